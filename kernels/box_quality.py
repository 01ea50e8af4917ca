"""How well predicted boxes fit: the IoU of each foreground anchor's decoded box with its ground truth. It is the target
of the classification in quality focal loss (Li et al. 2020, https://arxiv.org/abs/2006.04388, section 3.2) and in
varifocal loss (Zhang et al. 2021, https://arxiv.org/abs/2008.13367, section 3.1). No gradient flows through it.

Only the deltas, or distributions, of foreground anchors are read, a few hundred rows an image, which eager PyTorch
gathers image by image. One launch serves the batch and writes 4 bytes an anchor. As in box_loss.py, the kernel works
relative to the anchor's centre, where float32 keeps more digits of a small box.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from retina_fast.kernels.arguments import at_least_float32, check_matched_levels, check_matches
from retina_fast.kernels.box_decode import MAX_LOG_SCALE, decode
from retina_fast.kernels.dispatch import HAS_TRITON, runs_triton, tl, triton
from retina_fast.kernels.levels import (
    flatten_all,
    level_of,
    load_matched,
    load_rows,
    pick,
    pick_size,
    tile_levels,
    truths_of,
)
from retina_fast.kernels.pair_iou import box_iou
from retina_fast.kernels.side_distributions import box_channels, box_of_sides, expected_side, load_side


def box_quality_reference(
    deltas: Sequence[Tensor], anchors: Tensor, indices: Tensor, boxes: Tensor, offsets: Tensor, reg_max: int = 0
) -> Tensor:
    """The definition; see :func:`box_quality`."""
    image, anchor = (indices >= 0).nonzero(as_tuple=True)  # (F,) each, F the foreground anchors
    levels = flatten_all(deltas, box_channels(reg_max))
    flat = at_least_float32(torch.cat(levels, dim=1).detach()[image, anchor])  # (F, C)
    own = anchors[anchor] if anchors.dim() == 2 else anchors[image, anchor]  # (F, 4)
    matched = boxes[indices[image, anchor] + offsets[image]]  # (F, 4)
    quality = flat.new_zeros(indices.shape)
    quality[image, anchor] = box_iou(decode(flat, own), matched.to(flat.dtype)).clamp(max=1)
    return quality


_TILE = 512
_DISTRIBUTIONS_TILE = 64
_MAX_LOG_SCALE = tl.constexpr(MAX_LOG_SCALE)
_NAN = tl.constexpr(tl.PropagateNan.ALL if HAS_TRITON else None)  # otherwise a minimum would hide a NaN


@triton.jit(do_not_specialize=["num_anchors", "anchors_stride", "num_boxes"])
def _box_quality_kernel(
    levels, anchors_ptr, anchors_stride, indices_ptr, boxes_ptr, offsets_ptr, quality_ptr, starts, first_tiles,
    num_anchors, num_boxes, COUNT: tl.constexpr, BINS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Program (t, b) handles tile t, counted through the levels, of image b. Nearly all tiles hold no foreground."""
    tile = tl.program_id(0)
    image = tl.program_id(1).to(tl.int64)
    level = level_of(first_tiles, tile)
    start = pick_size(starts, level)
    num_rows = pick_size(starts[1:], level) - start
    row = (tile - pick_size(first_tiles, level)) * TILE + tl.arange(0, TILE)
    place = image * num_anchors + start + row
    index = tl.load(indices_ptr + place, mask=row < num_rows, other=-1)
    foreground = index >= 0
    quality = tl.zeros([TILE], tl.float32)
    if tl.max(index, axis=0) >= 0:
        level_ptr = pick(levels, level) + image * num_rows * (4 * COUNT)
        if COUNT == 1:
            dx, dy, dw, dh = load_rows(level_ptr, row, foreground)
            scale_w = tl.exp(tl.minimum(dw, _MAX_LOG_SCALE, _NAN))
            scale_h = tl.exp(tl.minimum(dh, _MAX_LOG_SCALE, _NAN))
        else:
            ptr = level_ptr + row * (4 * COUNT)
            left = expected_side(load_side(ptr, 0, foreground, COUNT, BINS), COUNT, BINS)
            top = expected_side(load_side(ptr, 1, foreground, COUNT, BINS), COUNT, BINS)
            right = expected_side(load_side(ptr, 2, foreground, COUNT, BINS), COUNT, BINS)
            bottom = expected_side(load_side(ptr, 3, foreground, COUNT, BINS), COUNT, BINS)
            dx, dy, scale_w, scale_h = box_of_sides(left, top, right, bottom)
        first, count = truths_of(offsets_ptr, num_boxes, image)
        x1, y1, x2, y2 = load_rows(anchors_ptr + image * anchors_stride, start + row, foreground)
        bx1, by1, bx2, by2 = load_matched(boxes_ptr, first, count, index, foreground)
        w, h = x2 - x1, y2 - y1
        cx, cy = x1 + 0.5 * w, y1 + 0.5 * h
        area = (bx2 - bx1) * (by2 - by1)
        half_w, half_h = 0.5 * w * scale_w, 0.5 * h * scale_h
        width = tl.minimum(dx * w + half_w, bx2 - cx, _NAN) - tl.maximum(dx * w - half_w, bx1 - cx, _NAN)
        height = tl.minimum(dy * h + half_h, by2 - cy, _NAN) - tl.maximum(dy * h - half_h, by1 - cy, _NAN)
        intersection = tl.maximum(width, 0.0, _NAN) * tl.maximum(height, 0.0, _NAN)
        iou = intersection / (4 * half_w * half_h + area - intersection)
        quality = tl.where(foreground, tl.minimum(iou, 1.0, _NAN), 0.0)
    tl.store(quality_ptr + place, quality, mask=row < num_rows)


@torch.library.custom_op("retina_fast::box_quality", mutates_args=())
def _op(levels: list[Tensor], anchors: Tensor, indices: Tensor, boxes: Tensor, offsets: Tensor, reg_max: int) -> Tensor:
    """Qualities (B, N) for contiguous levels (B, N_l, C); all arguments contiguous."""
    tile = _DISTRIBUTIONS_TILE if reg_max else _TILE
    starts, first_tiles, tiles = tile_levels(levels, tile)
    quality = torch.empty_like(indices, dtype=torch.float32)
    with torch.cuda.device_of(indices):
        _box_quality_kernel[(tiles, len(indices))](
            tuple(levels), anchors, anchors.stride(0) if anchors.dim() == 3 else 0, indices, boxes, offsets, quality,
            starts, first_tiles, indices.shape[1], len(boxes), COUNT=reg_max + 1,
            BINS=triton.next_power_of_2(reg_max + 1), TILE=tile, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return quality


@_op.register_fake
def _(levels, anchors, indices, boxes, offsets, reg_max):
    return torch.empty_like(indices, dtype=torch.float32)


def box_quality(
    deltas: Sequence[Tensor], anchors: Tensor, indices: Tensor, boxes: Tensor, offsets: Tensor, reg_max: int = 0
) -> Tensor:
    """IoU of the predicted box of each foreground anchor with its ground truth, ``(B, N)``; 0 for all other anchors.

    Args:
        deltas: the levels as the heads wrote them, each ``(B, A*4, H, W)`` or ``(B, N_l, 4)``; any float dtype. With
            ``reg_max``, they have 4 (reg_max + 1) numbers an anchor in place of 4.
        anchors: ``(N, 4)`` xyxy pixels, shared by the images, or ``(B, N, 4)``.
        indices: ``(B, N)`` integers: row of the matched ground truth within its image; negative is not foreground. On a
            GPU one that is none of the image's reads nothing, and its anchor's quality is NaN.
        boxes: ``(G, 4)`` ground truths of all images, concatenated.
        offsets: ``(B + 1,)`` integers: image b owns rows offsets[b] to offsets[b + 1] of boxes.
        reg_max: n where each side is a distribution over 0, 1, ..., n units, and 0 for deltas.

    Returns:
        float32, or float64 for float64 deltas.

    Raises:
        ValueError: if the shapes do not fit, indices or offsets are not integers or, on a CPU, go beyond the ground
            truths, the levels differ in dtype, or the tensors lie on different devices.

    Example::

        >>> anchors = torch.tensor([[0.0, 0.0, 10.0, 10.0], [5.0, 5.0, 15.0, 15.0]])
        >>> truth = torch.tensor([[0.0, 0.0, 10.0, 5.0]])
        >>> box_quality([torch.zeros(1, 2, 4)], anchors, torch.tensor([[0, -1]]), truth, torch.tensor([0, 1]))
        tensor([[0.5000, 0.0000]])
    """
    check_matched_levels(deltas, box_channels(reg_max), anchors, indices, boxes, offsets)
    deltas = [level.detach() for level in deltas]
    dtype = torch.float64 if deltas[0].dtype == torch.float64 else torch.float32
    anchors, boxes = anchors.to(dtype), boxes.to(dtype)
    if runs_triton(*deltas):
        levels = [level.contiguous() for level in flatten_all(deltas, box_channels(reg_max))]
        return _op(levels, *(x.contiguous() for x in (anchors, indices, boxes, offsets)), reg_max)
    check_matches(indices, offsets, len(boxes))
    return box_quality_reference(deltas, anchors, indices, boxes, offsets, reg_max)
