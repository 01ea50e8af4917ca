"""Box decoding (Girshick et al. 2014, https://arxiv.org/abs/1311.2524, appendix C): deltas on anchors become boxes.

With an anchor's centre (cx, cy) and size (w, h), and deltas (dx, dy, dw, dh):

    centre = (dx w + cx, dy h + cy)     size = (exp(min(dw, c)) w, exp(min(dh, c)) h),  c = log(1000 / 16)

Where sides are distributions instead, side_distributions.py says what the box is. The boxes are then clipped to the
image. All is computed in float32, whatever the deltas' dtype. One launch serves the batch, and reads only the
candidates, 4 anchor coordinates and 4 deltas or distributions each, from the levels as they lie in memory. The boxes
stay in the pixels of the batch, in which torchvision compares them. :mod:`retina_fast.kernels.take_kept` scales the few
that are kept.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from retina_fast.kernels.arguments import check_anchors, check_devices, check_integers, check_shape
from retina_fast.kernels.dispatch import is_differentiated, runs_triton, tl, triton
from retina_fast.kernels.levels import check_levels, decode_size, encode_sizes, flatten_all
from retina_fast.kernels.side_distributions import (
    box_channels,
    box_of_sides,
    expected_distances,
    expected_side,
    load_side,
    units_of,
)

MAX_LOG_SCALE = math.log(1000 / 16)


def decode(deltas: Tensor, anchors: Tensor) -> Tensor:
    """Boxes (..., 4) xyxy of deltas (..., 4), or distributions (..., 4 (n + 1)), on anchors (..., 4), not clipped;
    differentiable."""
    size = anchors[..., 2:] - anchors[..., :2]
    centre = anchors[..., :2] + 0.5 * size
    if deltas.shape[-1] > 4:
        distances = expected_distances(deltas) * units_of(anchors)
        return torch.cat((centre - distances[..., :2], centre + distances[..., 2:]), dim=-1)
    centre = deltas[..., :2] * size + centre
    half = 0.5 * (torch.exp(deltas[..., 2:].clamp(max=MAX_LOG_SCALE)) * size)
    return torch.cat((centre - half, centre + half), dim=-1)


def box_decode_reference(
    deltas: Sequence[Tensor], anchors: Tensor, index: Tensor, image_sizes: Tensor, reg_max: int = 0
) -> Tensor:
    """The definition; see :func:`box_decode`."""
    flat = torch.cat(flatten_all(deltas, box_channels(reg_max)), dim=1)  # (B, N, C)
    rows = index.long()[..., None]  # (B, M, 1)
    anchors = anchors.expand(index.shape[0], -1, 4) if anchors.dim() == 2 else anchors
    own = anchors.gather(1, rows.expand(-1, -1, 4))  # (B, M, 4)
    return decode_and_clip(flat.gather(1, rows.expand(-1, -1, flat.shape[2])), own, image_sizes)


def decode_and_clip(deltas: Tensor, anchors: Tensor, image_sizes: Tensor) -> Tensor:
    """The boxes (B, M, 4) of deltas (B, M, C) of any float dtype on anchors (B, M, 4), inside their images (B, 2)."""
    deltas = deltas.float()
    if deltas.shape[-1] == 4:  # one column after another in memory, so that an operation takes long rows
        deltas, anchors = (x.mT.contiguous().mT for x in (deltas, anchors))
    boxes = decode(deltas, anchors)
    limits = image_sizes.to(boxes.dtype).flip(1).repeat(1, 2)[:, None]  # (B, 1, 4): w, h, w, h
    return torch.minimum(boxes.clamp_(min=0), limits)


_TILE = 128
_DISTRIBUTIONS_TILE = 16


@triton.jit
def _clip(x, limit):
    x = tl.where(x < 0, 0.0, x)  # unlike tl.minimum, keeps NaN
    return tl.where(x > limit, limit, x)


@triton.jit
def _load_deltas(levels, starts, image, anchor, mask):
    dx = tl.zeros(anchor.shape, tl.float32)
    dy, dw, dh = dx, dx, dx
    for level in tl.static_range(len(levels)):
        start, stop = decode_size(starts[level]), decode_size(starts[level + 1])
        here = mask & (anchor >= start) & (anchor < stop)
        ptr = levels[level] + (image * (stop - start) + anchor - start) * 4
        dx += tl.load(ptr, mask=here, other=0.0).to(tl.float32)
        dy += tl.load(ptr + 1, mask=here, other=0.0).to(tl.float32)
        dw += tl.load(ptr + 2, mask=here, other=0.0).to(tl.float32)
        dh += tl.load(ptr + 3, mask=here, other=0.0).to(tl.float32)
    return dx, dy, dw, dh


@triton.jit
def _load_distance(levels, starts, image, anchor, mask, side: tl.constexpr, COUNT: tl.constexpr, BINS: tl.constexpr):
    x = tl.zeros([anchor.shape[0], BINS], tl.float32)
    for level in tl.static_range(len(levels)):
        start, stop = decode_size(starts[level]), decode_size(starts[level + 1])
        here = mask & (anchor >= start) & (anchor < stop)
        ptr = levels[level] + (image * (stop - start) + anchor - start) * (4 * COUNT)
        x += load_side(ptr, side, here, COUNT, BINS)
    return expected_side(x, COUNT, BINS)


@triton.jit
def decode_boxes(levels, starts, anchors_ptr, sizes_ptr, image, anchor, mask, max_log_scale, COUNT: tl.constexpr,
                 BINS: tl.constexpr):  # fmt: skip
    """The clipped boxes of chosen anchors [N] of an image, as four vectors; 0 where masked. A side is a distribution
    over COUNT places, of which BINS is the next power of two; 1 stands for deltas."""
    if COUNT == 1:
        dx, dy, dw, dh = _load_deltas(levels, starts, image, anchor, mask)
        scale_w = tl.exp(tl.where(dw > max_log_scale, max_log_scale, dw))
        scale_h = tl.exp(tl.where(dh > max_log_scale, max_log_scale, dh))
    else:
        left = _load_distance(levels, starts, image, anchor, mask, 0, COUNT, BINS)
        top = _load_distance(levels, starts, image, anchor, mask, 1, COUNT, BINS)
        right = _load_distance(levels, starts, image, anchor, mask, 2, COUNT, BINS)
        bottom = _load_distance(levels, starts, image, anchor, mask, 3, COUNT, BINS)
        dx, dy, scale_w, scale_h = box_of_sides(left, top, right, bottom)
    ptr = anchors_ptr + anchor * 4
    x1, y1 = tl.load(ptr, mask=mask, other=0.0), tl.load(ptr + 1, mask=mask, other=0.0)
    w, h = tl.load(ptr + 2, mask=mask, other=0.0) - x1, tl.load(ptr + 3, mask=mask, other=0.0) - y1
    x, y = dx * w + (x1 + 0.5 * w), dy * h + (y1 + 0.5 * h)
    half_w, half_h = 0.5 * (scale_w * w), 0.5 * (scale_h * h)
    bottom = tl.load(sizes_ptr + image * 2).to(tl.float32)
    right = tl.load(sizes_ptr + image * 2 + 1).to(tl.float32)
    return _clip(x - half_w, right), _clip(y - half_h, bottom), _clip(x + half_w, right), _clip(y + half_h, bottom)


@triton.jit
def store_boxes(boxes_ptr, x1, y1, x2, y2, mask):
    """Writes boxes, of which boxes_ptr [N] points to the first numbers."""
    tl.store(boxes_ptr, x1, mask=mask)
    tl.store(boxes_ptr + 1, y1, mask=mask)
    tl.store(boxes_ptr + 2, x2, mask=mask)
    tl.store(boxes_ptr + 3, y2, mask=mask)


@triton.jit(do_not_specialize=["width", "anchors_stride"])
def _box_decode_kernel(
    levels, starts, anchors_ptr, index_ptr, sizes_ptr, boxes_ptr, width, anchors_stride, max_log_scale,
    COUNT: tl.constexpr, BINS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Program (t, b) writes the boxes of TILE chosen anchors of image b."""
    image = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)
    mask = i < width
    anchor = tl.load(index_ptr + image * width + i, mask=mask, other=0)
    x1, y1, x2, y2 = decode_boxes(
        levels, starts, anchors_ptr + image * anchors_stride, sizes_ptr, image, anchor, mask, max_log_scale, COUNT, BINS
    )
    store_boxes(boxes_ptr + (image * width + i) * 4, x1, y1, x2, y2, mask)


@torch.library.custom_op("retina_fast::box_decode", mutates_args=())
def _op(levels: list[Tensor], anchors: Tensor, index: Tensor, image_sizes: Tensor, reg_max: int) -> Tensor:
    """Boxes ``(B, M, 4)`` of contiguous levels ``(B, N_l, C)``; all arguments contiguous."""
    batch, width = index.shape
    starts = [0]
    for level in levels:
        starts.append(starts[-1] + level.shape[1])
    boxes = anchors.new_empty(batch, width, 4)
    stride = 0 if anchors.dim() == 2 else 4 * starts[-1]
    tile = _DISTRIBUTIONS_TILE if reg_max else _TILE
    with torch.cuda.device_of(anchors):
        _box_decode_kernel[(triton.cdiv(width, tile), batch)](
            tuple(levels), encode_sizes(starts), anchors, index, image_sizes, boxes, width, stride, MAX_LOG_SCALE,
            COUNT=reg_max + 1, BINS=triton.next_power_of_2(reg_max + 1), TILE=tile, enable_fp_fusion=False,
        )  # fmt: skip
    return boxes


@_op.register_fake
def _(levels, anchors, index, image_sizes, reg_max):
    return anchors.new_empty(*index.shape, 4)


def _box_decode_triton(
    deltas: Sequence[Tensor], anchors: Tensor, index: Tensor, image_sizes: Tensor, reg_max: int = 0
) -> Tensor:
    levels = [level.contiguous() for level in flatten_all(deltas, box_channels(reg_max))]
    return _op(levels, anchors.contiguous(), index.contiguous(), image_sizes.contiguous(), reg_max)


def box_decode(
    deltas: Sequence[Tensor], anchors: Tensor, index: Tensor, image_sizes: Tensor, reg_max: int = 0
) -> Tensor:
    """Decode and clip the boxes of chosen anchors: ``(B, M, 4)`` float32 xyxy pixels.

    Args:
        deltas: the levels as the heads wrote them, each ``(B, A*4, H, W)`` or ``(B, N_l, 4)``; any float dtype.
            Differentiable. With ``reg_max``, they have 4 (reg_max + 1) numbers an anchor in place of 4.
        anchors: ``(N, 4)`` xyxy pixels, shared by the images, or ``(B, N, 4)``; read as float32.
        index: ``(B, M)`` integers: which anchors to decode.
        image_sizes: ``(B, 2)`` height and width that boxes are clipped to.
        reg_max: n where each side is a distribution over 0, 1, ..., n units, and 0 for deltas.

    Raises:
        ValueError: if the shapes do not fit, index is not integers, the levels differ in dtype, the tensors lie on
            different devices, or ``reg_max`` is negative.

    Example::

        >>> anchors = torch.tensor([[0.0, 0.0, 10.0, 10.0], [5.0, 5.0, 15.0, 15.0]])
        >>> box_decode([torch.zeros(1, 2, 4)], anchors, torch.tensor([[1]]), torch.tensor([[12, 20]]))
        tensor([[[ 5.,  5., 15., 12.]]])
    """
    count, batch = check_levels(deltas, box_channels(reg_max)), deltas[0].shape[0]
    check_anchors(anchors, batch, count)
    check_shape("index", index, "(B, M)", (batch, index.shape[-1]))
    check_shape("image_sizes", image_sizes, "(B, 2)", (batch, 2))
    check_integers(index=index)
    check_devices(deltas[0].device, anchors=anchors, index=index, image_sizes=image_sizes)
    anchors = anchors.float()
    if runs_triton(*deltas) and not is_differentiated(*deltas):
        return _box_decode_triton(deltas, anchors, index, image_sizes, reg_max)
    return box_decode_reference(deltas, anchors, index, image_sizes, reg_max)
