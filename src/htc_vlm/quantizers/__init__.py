"""Picture quantizers; ONE FILE = ONE QUANTIZER. A new file of this folder registers itself."""

from __future__ import annotations

import importlib
import pkgutil

from htc_vlm.quantizers.base import QUANTIZERS, Encoding, Quantizer, resolve, signed_pixels

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["QUANTIZERS", "Encoding", "Quantizer", "resolve", "signed_pixels"]
