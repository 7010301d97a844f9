"""What every method promises (htc_vlm/testing has the checks): each of its examples."""

from __future__ import annotations

import pytest

from htc_vlm.compressors import COMPRESSORS
from htc_vlm.testing import Check, checks_of


@pytest.mark.parametrize("check", [check for name in COMPRESSORS.own_names() for check in checks_of(name)], ids=str)
def test_every_method_keeps_the_contract(check: Check) -> None:
    """A method that breaks a promise breaks every number that is reported of it."""
    check()
