"""Keys by which matching orders anchors and ground truths, and the last step of matching: writing what was found.

A key is an int64. Its upper half holds the bits of a float32 that is not negative, which order as the numbers do, and
its lower half an index, which decides where the numbers are equal.
"""

import torch
from torch import Tensor

from retina_fast.kernels.dispatch import tl, triton
from retina_fast.kernels.labels import BACKGROUND, TL_BACKGROUND

FIRST = (1 << 31) - 1
"""This less the index of a ground truth is a key's lower half: of equal numbers the first then has the greatest key."""
TL_FIRST = tl.constexpr(FIRST)

NONE = tl.constexpr(0x7FFFFFFFFFFFFFFF)
"""Above every key."""

_TILE = 1024


def centres_of(boxes: Tensor) -> Tensor:
    """The centres (..., 2) of boxes (..., 4)."""
    return 0.5 * (boxes[..., :2] + boxes[..., 2:])


def keys_of(values: Tensor, indices: Tensor) -> Tensor:
    """Keys, int64, of float32 values that are not negative, and indices; the two are broadcast."""
    return (values.view(torch.int32).long() << 32) + indices


def value_of(keys: Tensor) -> Tensor:
    """The float32 values of keys."""
    return (keys >> 32).int().view(torch.float32)


def matched_of(best: Tensor) -> Tensor:
    """The matched indices, int64, of anchors whose greatest keys, of an IoU and of FIRST less an index, are given; a
    key of 0 means background."""
    return torch.where(best > 0, FIRST - (best & 0xFFFFFFFF), BACKGROUND)


@triton.jit
def key_of(value, index):
    """The key of a float32 that is not negative, and of an index."""
    return (value.to(tl.int32, bitcast=True).to(tl.int64) << 32) + index.to(tl.int64)


@triton.jit
def index_of(key):
    """The index of a key."""
    return (key & 0xFFFFFFFF).to(tl.int32)


@triton.jit
def float_of(key):
    """The float32 of a key."""
    return (key >> 32).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["num_anchors"])
def _write_matches_kernel(
    best_ptr, labels_ptr, offsets_ptr, indices_ptr, classes_ptr, counts_ptr, num_anchors, TILE: tl.constexpr
):
    """Program (t, b) writes the matches of tile t of the anchors of image b, and adds to the image's count."""
    image = tl.program_id(1).to(tl.int64)
    anchor = tl.program_id(0) * TILE + tl.arange(0, TILE)
    valid = anchor < num_anchors
    row = image * num_anchors + anchor
    best = tl.load(best_ptr + row, mask=valid, other=0)
    foreground = best > 0
    index = tl.where(foreground, -index_of(best) + TL_FIRST, TL_BACKGROUND)
    labels_ptr += tl.load(offsets_ptr + image)
    label = tl.load(labels_ptr + index, mask=foreground, other=TL_BACKGROUND).to(tl.int32)
    tl.store(indices_ptr + row, index, mask=valid)
    tl.store(classes_ptr + row, label, mask=valid)
    count = tl.sum(foreground.to(tl.int32), axis=0)
    tl.atomic_add(counts_ptr + image, count, mask=count > 0, sem="relaxed")


def write_matches(best: Tensor, labels: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The matches that the greatest keys (B, N) stand for, in one launch: indices and classes (B, N), counts (B,)."""
    batch, num_anchors = best.shape
    indices = best.new_empty((batch, num_anchors), dtype=torch.int32)
    classes, counts = torch.empty_like(indices), best.new_zeros(batch, dtype=torch.int32)
    if best.numel():
        with torch.cuda.device_of(best):
            _write_matches_kernel[(triton.cdiv(num_anchors, _TILE), batch)](
                best, labels, offsets, indices, classes, counts, num_anchors, TILE=_TILE, num_warps=4
            )
    return indices, classes, counts
