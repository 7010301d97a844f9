"""What tests of this library and of methods elsewhere share."""

from __future__ import annotations

from htc_vlm.testing.families import tiny_inputs, tiny_model

__all__ = ["tiny_inputs", "tiny_model"]
