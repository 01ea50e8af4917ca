"""Limits of what a kernel executes, where its speed depends on them."""

import pytest

from tests.ptx.counts import count


@pytest.mark.parametrize(
    ("tiles", "instructions", "sectors_of_ideal"), [("background", 28.0, 1.25), ("mixed", 58.0, 8.0)]
)
def test_focal_loss(tiles, instructions, sectors_of_ideal):
    """Background tiles are nearly all: each of their elements is read and written once, 16 bytes a thread."""
    ((result, of_an_element),) = count(f"focal_loss bf16 K=91 {tiles} tiles")
    assert of_an_element <= instructions
    for kind in ("global ld", "global st"):
        traffic = result.total(kind)
        assert traffic.moved <= sectors_of_ideal * traffic.ideal
    assert result.barriers <= 3 * result.ctas
