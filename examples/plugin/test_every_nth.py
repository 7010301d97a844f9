"""All that a method needs as its test: `pytest examples/plugin`, once it is installed. Or `check_compressor("every_nth")`."""

from __future__ import annotations

import pytest

from htc_vlm.testing import Check, checks_of


@pytest.mark.parametrize("check", checks_of("every_nth"), ids=str)
def test_contract(check: Check) -> None:
    check()
