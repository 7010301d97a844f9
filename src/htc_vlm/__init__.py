"""htc-vlm: vision-language models that keep an image in one cached token.

Importing this package registers the model with the Auto classes of transformers. Only the command `htc-vlm` puts that off
until a name is asked for, so that it answers --help without torch.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from htc_vlm import compressors
    from htc_vlm.applied.apply import apply
    from htc_vlm.model import CompressedImages, HtcVlmConfig, HtcVlmForConditionalGeneration, HtcVlmProcessor
    from htc_vlm.model.loading import load
    from htc_vlm.model.prefix_cache import compress, generate
    from htc_vlm.store import ImageStore

__version__ = "0.1.0"

__all__ = [
    "CompressedImages", "HtcVlmConfig", "HtcVlmForConditionalGeneration", "HtcVlmProcessor", "ImageStore", "apply",
    "compress", "compressors", "generate", "load",
]  # fmt: skip


def _public_names() -> dict[str, Any]:
    """Import what __all__ names."""
    from htc_vlm import compressors, model
    from htc_vlm.applied.apply import apply
    from htc_vlm.model.loading import load
    from htc_vlm.model.prefix_cache import compress, generate
    from htc_vlm.store import ImageStore

    vars(compressors)["apply"] = apply  # an alias; compressors itself imports nothing above it
    own = {"apply": apply, "compress": compress, "compressors": compressors, "generate": generate, "load": load}
    return own | {"ImageStore": ImageStore} | {n: vars(model)[n] for n in __all__ if n in vars(model)}


if getattr(sys.modules.get("htc_vlm_cli"), "is_running", False):

    def __getattr__(name: str) -> Any:
        if name not in __all__ or name == "compressors":  # that one is found as a submodule
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals().update(_public_names())
        return globals()[name]

else:
    globals().update(_public_names())
