"""Boxes whose sides are distributions, as the head of generalized focal loss predicts them (Li et al. 2020,
https://arxiv.org/abs/2006.04388, section 3.2).

An anchor has n + 1 logits for each of the left, top, right and bottom side, n being ``reg_max``: their softmax is the
distribution of the side's distance from the anchor's centre, over 0, 1, ..., n units. The predicted distance is its
expectation. A unit is an eighth of the anchor's width or height, so that anchors of eight strides, which the paper has,
get its boxes: there a unit is the stride. With n = 16 a box reaches up to two anchors' sides from the centre.

Here a box is 4 (n + 1) numbers, side by side; with n = 0, they are the 4 deltas of box_decode.py instead.
"""

import torch
from torch import Tensor

from retina_fast.kernels.dispatch import tl, triton

UNITS = 8
"""How many units an anchor's width and height have."""
_TL_UNITS = tl.constexpr(UNITS)


def box_channels(reg_max: int) -> int:
    """How many numbers of a level an anchor has: 4 deltas for 0, else 4 sides of ``reg_max`` + 1 logits.

    Raises:
        ValueError: unless ``reg_max`` is a whole number of at least 0.

    Example::

        >>> box_channels(0), box_channels(16)
        (4, 68)
    """
    if type(reg_max) is not int or reg_max < 0:
        raise ValueError(f"reg_max must be a whole number of at least 0, got {reg_max!r}")
    return 4 * (reg_max + 1)


def units_of(anchors: Tensor) -> Tensor:
    """The unit of each side (..., 4), left, top, right, bottom, of anchors (..., 4)."""
    return ((anchors[..., 2:] - anchors[..., :2]) / UNITS).repeat(*[1] * (anchors.dim() - 1), 2)


def expected_distances(logits: Tensor) -> Tensor:
    """Distances (..., 4) in units, left, top, right, bottom, of logits (..., 4 (n + 1)); differentiable."""
    probabilities = logits.unflatten(-1, (4, -1)).softmax(dim=-1)  # (..., 4, n + 1)
    places = torch.arange(probabilities.shape[-1], dtype=logits.dtype, device=logits.device)
    return (probabilities * places).sum(dim=-1)


@triton.jit
def softmax_rows(x, COUNT: tl.constexpr, BINS: tl.constexpr):
    """Of logits [N, BINS], of which COUNT count: what they exceed the row's greatest by (0 in the padding), their
    softmax (0 in the padding), the logarithm of its denominator [N], and its expectation [N]."""
    bins = tl.arange(0, BINS)[None, :]
    counts = bins < COUNT
    x = tl.where(counts, x - tl.max(tl.where(counts, x, float("-inf")), axis=1)[:, None], 0.0)
    e = tl.where(counts, tl.exp(x), 0.0)
    total = tl.sum(e, axis=1)
    p = e / total[:, None]
    return x, p, tl.log(total), tl.sum(p * bins.to(tl.float32), axis=1)


@triton.jit
def load_side(ptr, side: tl.constexpr, mask, COUNT: tl.constexpr, BINS: tl.constexpr):
    """The logits [N, BINS] of a side, float32, of boxes that begin at ptr [N]; 0 where masked and in the padding."""
    bins = tl.arange(0, BINS)[None, :]
    return tl.load(ptr[:, None] + (side * COUNT + bins), mask=mask[:, None] & (bins < COUNT), other=0.0).to(tl.float32)


@triton.jit
def expected_side(x, COUNT: tl.constexpr, BINS: tl.constexpr):
    """The expectation [N] of the softmax of logits [N, BINS], of which COUNT count."""
    return softmax_rows(x, COUNT, BINS)[3]


@triton.jit
def box_of_sides(left, top, right, bottom):
    """The same box as deltas describe it: the offset of its centre, and its width and height, in those of the anchor.
    To divide by a power of two is exact."""
    x, y = (right - left) * (0.5 / _TL_UNITS), (bottom - top) * (0.5 / _TL_UNITS)
    return x, y, (left + right) * (1 / _TL_UNITS), (top + bottom) * (1 / _TL_UNITS)
