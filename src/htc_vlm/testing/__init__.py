"""What tests of this library and of methods elsewhere share."""

from __future__ import annotations

from htc_vlm.testing.contract import Check, check_compressor, checks_of
from htc_vlm.testing.families import tiny_inputs, tiny_model

__all__ = ["Check", "check_compressor", "checks_of", "tiny_inputs", "tiny_model"]
