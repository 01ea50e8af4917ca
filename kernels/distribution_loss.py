"""Distribution focal loss together with an IoU loss of the decoded box, over the foreground anchors (Li et al. 2020,
https://arxiv.org/abs/2006.04388, equation 6): the box loss of a head whose sides are distributions.

side_distributions.py says what the 4 (n + 1) logits x of an anchor are. With the softmax S of a side, the target y, the
distance of the ground truth's side in units, held within [0, n], and i the whole number below it:

    DFL      = -((i + 1 - y) log S_i + (y - i) log S_(i+1))
    loss     = IoU loss of the decoded box + 1/8 of the mean of the four DFL

    dDFL/dx_j = S_j - t_j, where t is i + 1 - y at i, y - i at i + 1, and 0 elsewhere
    de/dx_j   = S_j (j - e) for the expectation e of S, by which the slope of the IoU loss (iou_losses.py) goes on

1/8 is the ratio of the two in the authors' configurations, 0.25 times the mean to 2 times GIoU.

Only the logits of foreground anchors are read, a few hundred rows an image. The finished gradient, 0 for all others, is
written in the same pass: 136 bytes an anchor in bfloat16 with n = 16. Eager PyTorch gathers the rows, keeps their
softmaxes for backward, and scatters their gradients into zeros that autograd fills for every level.
"""

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from retina_fast.kernels.arguments import (
    at_least_float32,
    check_matched_levels,
    check_matches,
    loss_normalizers,
    loss_weights,
)
from retina_fast.kernels.box_decode import decode
from retina_fast.kernels.dispatch import needs_reference, runs_triton, tl, triton
from retina_fast.kernels.iou_losses import IOU_LOSSES, iou_loss_and_slopes
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
from retina_fast.kernels.one_pass import grads_by_reference, run_one_pass, sum_of
from retina_fast.kernels.side_distributions import UNITS, box_channels, box_of_sides, load_side, softmax_rows, units_of

DFL_WEIGHT = 1 / 8
"""Of the mean of the four sides' distribution focal loss beside the IoU loss."""


def distribution_loss_reference(
    distributions: Sequence[Tensor],
    anchors: Tensor,
    indices: Tensor,
    boxes: Tensor,
    offsets: Tensor,
    normalizers: Tensor,
    reg_max: int = 16,
    loss_type: str = "giou",
    weights: Tensor | None = None,
) -> Tensor:
    """The definition, differentiable by autograd; see :func:`distribution_loss`."""
    image, anchor = (indices >= 0).nonzero(as_tuple=True)  # (F,) each, F the foreground anchors
    flat = torch.cat(flatten_all(distributions, box_channels(reg_max)), dim=1)[image, anchor]  # (F, 4 (n + 1))
    flat = at_least_float32(flat)
    anchors = anchors[anchor] if anchors.dim() == 2 else anchors[image, anchor]  # (F, 4)
    matched = boxes[indices[image, anchor] + offsets[image]]  # (F, 4)
    centre = 0.5 * (anchors[:, :2] + anchors[:, 2:])
    distances = torch.cat((centre - matched[:, :2], matched[:, 2:] - centre), dim=1)  # (F, 4)
    target = (distances / units_of(anchors)).clamp(0, reg_max)
    below = target.floor().clamp(max=reg_max - 1)
    logits = flat.unflatten(1, (4, reg_max + 1)).transpose(1, 2)  # (F, n + 1, 4)
    entropy, upper = functools.partial(F.cross_entropy, logits, reduction="none"), target - below
    dfl = (1 - upper) * entropy(below.long()) + upper * entropy(below.long() + 1)  # (F, 4)
    loss = IOU_LOSSES[loss_type](decode(flat, anchors), matched, reduction="none", eps=1e-7)
    loss = loss + DFL_WEIGHT * dfl.mean(dim=1)
    if weights is not None:
        loss = loss * weights[image, anchor].to(loss.dtype)
    return (loss / normalizers[image]).sum()


# Triton. A program handles a tile of anchors of one image and level; nearly all tiles hold no foreground.

_TILE = 128
_ROWS = 16  # of a tile with foreground, that are looked at together
_ZEROS = 1024  # that are written at a time
_TL_UNITS = tl.constexpr(UNITS)
_TL_WEIGHT = tl.constexpr(DFL_WEIGHT / 4)


@triton.jit
def _side(ptr, side: tl.constexpr, y, mask, COUNT: tl.constexpr, BINS: tl.constexpr):
    """Of a side's logits, in rows that begin at ptr [N]: the softmax [N, BINS] and its expectation [N]; of the distance
    y [N] in units, the two weights in a row of zeros [N, BINS]; and the distribution focal loss [N]."""
    x, p, log, e = softmax_rows(load_side(ptr, side, mask, COUNT, BINS), COUNT, BINS)
    y = tl.minimum(tl.maximum(y, 0.0), COUNT - 1)
    below = tl.minimum(y.to(tl.int32), COUNT - 2)
    upper = (y - below)[:, None]
    past = tl.arange(0, BINS)[None, :] - below[:, None]
    target = tl.where(past == 0, 1 - upper, tl.where(past == 1, upper, 0.0))
    return p, e, target, log - tl.sum(target * x, axis=1)


@triton.jit
def _store_side(ptr, side: tl.constexpr, p, e, target, slope, scale, foreground, mask, COUNT: tl.constexpr,
                BINS: tl.constexpr):  # fmt: skip
    """Writes the gradient of a side, whose softmax is p and whose expectation e; slope is that of the loss in e."""
    bins = tl.arange(0, BINS)[None, :]
    grad = slope[:, None] * p * (bins - e[:, None]) + (p - target) * _TL_WEIGHT
    grad = tl.where(foreground[:, None], grad * scale[:, None], 0.0).to(ptr.dtype.element_ty)
    tl.store(ptr[:, None] + (side * COUNT + bins), grad, mask=mask[:, None] & (bins < COUNT))


@triton.jit
def _rows(
    level_ptr, grad_ptr, anchors_ptr, index, boxes_ptr, first, count, row, anchor, valid, weight, factor,
    LOSS: tl.constexpr, COUNT: tl.constexpr, BINS: tl.constexpr, WITH_GRADS: tl.constexpr,
):  # fmt: skip
    """The losses of some rows of a level, times weight [N], 0 for background; it writes their gradients."""
    foreground = index >= 0
    x1, y1, x2, y2 = load_rows(anchors_ptr, anchor, foreground)
    bx1, by1, bx2, by2 = load_matched(boxes_ptr, first, count, index, foreground)
    w, h = tl.where(foreground, x2 - x1, 1.0), tl.where(foreground, y2 - y1, 1.0)
    cx, cy = x1 + 0.5 * w, y1 + 0.5 * h
    bx1, by1, bx2, by2 = bx1 - cx, by1 - cy, bx2 - cx, by2 - cy
    unit_x, unit_y = w * (1 / _TL_UNITS), h * (1 / _TL_UNITS)
    ptr = level_ptr + row * (4 * COUNT)
    left, left_e, left_y, dfl = _side(ptr, 0, -bx1 / unit_x, foreground, COUNT, BINS)
    top, top_e, top_y, of_top = _side(ptr, 1, -by1 / unit_y, foreground, COUNT, BINS)
    right, right_e, right_y, of_right = _side(ptr, 2, bx2 / unit_x, foreground, COUNT, BINS)
    bottom, bottom_e, bottom_y, of_bottom = _side(ptr, 3, by2 / unit_y, foreground, COUNT, BINS)
    dx, dy, scale_w, scale_h = box_of_sides(left_e, top_e, right_e, bottom_e)
    loss, by_x, by_y, by_w, by_h = iou_loss_and_slopes(
        dx * w, dy * h, 0.5 * w * scale_w, 0.5 * h * scale_h, bx1, by1, bx2, by2, LOSS
    )
    loss += (dfl + of_top + of_right + of_bottom) * _TL_WEIGHT
    if WITH_GRADS:
        # Centre and half size move by half of what a side moves.
        scale, half_x, half_y, ptr = factor * weight, 0.5 * unit_x, 0.5 * unit_y, grad_ptr + row * (4 * COUNT)
        _store_side(ptr, 0, left, left_e, left_y, half_x * (by_w - by_x), scale, foreground, valid, COUNT, BINS)
        _store_side(ptr, 1, top, top_e, top_y, half_y * (by_h - by_y), scale, foreground, valid, COUNT, BINS)
        _store_side(ptr, 2, right, right_e, right_y, half_x * (by_w + by_x), scale, foreground, valid, COUNT, BINS)
        _store_side(ptr, 3, bottom, bottom_e, bottom_y, half_y * (by_h + by_y), scale, foreground, valid, COUNT, BINS)
    return tl.where(foreground, loss * weight, 0.0)


@triton.jit(do_not_specialize=["num_anchors", "anchors_stride", "num_boxes"])
def _distribution_loss_kernel(
    levels, grads, anchors_ptr, anchors_stride, indices_ptr, boxes_ptr, offsets_ptr, normalizers_ptr, partials_ptr,
    factor_ptr, weights_ptr, starts, first_tiles, num_anchors, num_boxes, LOSS: tl.constexpr,
    COUNT: tl.constexpr, BINS: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr, ZEROS: tl.constexpr,
    WITH_GRADS: tl.constexpr,
):  # fmt: skip
    """Program (t, b) handles tile t, counted through the levels, of image b. It writes the tile's share of the loss to
    partials (B, T), and its gradients, times factor if there is one. Either output may be left out."""
    tile = tl.program_id(0)
    image = tl.program_id(1).to(tl.int64)
    level = level_of(first_tiles, tile)
    start = pick_size(starts, level)
    num_rows = pick_size(starts[1:], level) - start
    begin = (tile - pick_size(first_tiles, level)) * TILE
    level_ptr = pick(levels, level) + image * num_rows * (4 * COUNT)
    grad_ptr = pick(grads, level) + image * num_rows * (4 * COUNT)
    indices_ptr += image * num_anchors + start
    row = begin + tl.arange(0, TILE)
    loss = tl.zeros([ROWS], tl.float32)
    if tl.max(tl.load(indices_ptr + row, mask=row < num_rows, other=-1), axis=0) < 0:
        if WITH_GRADS:
            for turn in tl.static_range(0, TILE * 4 * COUNT, ZEROS):
                i = turn + tl.arange(0, ZEROS)
                inside = (i < TILE * 4 * COUNT) & (i < (num_rows - begin) * (4 * COUNT))
                zeros = tl.zeros([ZEROS], grad_ptr.dtype.element_ty)
                tl.store(grad_ptr + begin * (4 * COUNT) + i, zeros, mask=inside)
    else:
        first, count = truths_of(offsets_ptr, num_boxes, image)
        scale, factor = 1 / tl.load(normalizers_ptr + image), 1.0
        if factor_ptr is not None:
            factor = tl.load(factor_ptr)
        for turn in range(begin, min(begin + TILE, num_rows), ROWS):
            some = turn + tl.arange(0, ROWS)
            valid = some < num_rows
            index = tl.load(indices_ptr + some, mask=valid, other=-1)
            weight = tl.zeros([ROWS], tl.float32) + scale
            if weights_ptr is not None:
                weight *= tl.load(weights_ptr + image * num_anchors + start + some, mask=index >= 0, other=0.0)
            loss += _rows(
                level_ptr, grad_ptr, anchors_ptr + image * anchors_stride, index, boxes_ptr, first, count, some,
                start + some, valid, weight, factor, LOSS, COUNT, BINS, WITH_GRADS,
            )  # fmt: skip
    if partials_ptr is not None:
        tl.store(partials_ptr + image * tl.num_programs(0) + tile, tl.sum(loss, axis=0))


@torch.library.custom_op("retina_fast::distribution_loss", mutates_args=())
def _distribution_loss_op(
    levels: list[Tensor],
    anchors: Tensor,
    indices: Tensor,
    boxes: Tensor,
    offsets: Tensor,
    normalizers: Tensor,
    factor: Tensor | None,
    reg_max: int,
    loss_type: str,
    with_loss: bool,
    with_grads: bool,
    weights: Tensor | None,
) -> list[Tensor]:
    """The loss (), if wanted, and the gradients of all contiguous levels (B, N_l, C), times factor (), if wanted."""
    starts, first_tiles, tiles = tile_levels(levels, _TILE)
    partials = indices.new_empty(len(indices), tiles, dtype=torch.float32) if with_loss else None
    grads = [torch.empty_like(level) for level in levels] if with_grads else []
    with torch.cuda.device_of(indices):
        _distribution_loss_kernel[(tiles, len(indices))](
            tuple(levels), tuple(grads or levels), anchors, anchors.stride(0) if anchors.dim() == 3 else 0, indices,
            boxes, offsets, normalizers, partials, factor, weights, starts, first_tiles, indices.shape[1], len(boxes),
            LOSS=loss_type, COUNT=reg_max + 1, BINS=triton.next_power_of_2(reg_max + 1), TILE=_TILE, ROWS=_ROWS,
            ZEROS=_ZEROS, WITH_GRADS=with_grads, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return ([] if partials is None else [sum_of(partials)]) + grads


@_distribution_loss_op.register_fake
def _(levels, anchors, indices, boxes, offsets, normalizers, factor, reg_max, loss, with_loss, with_grads, weights):
    loss = [indices.new_empty((), dtype=torch.float32)] if with_loss else []
    return loss + ([torch.empty_like(level) for level in levels] if with_grads else [])


def _reference_of_levels(arguments, *levels):
    return distribution_loss_reference(levels, *arguments)


def _setup_context(ctx, inputs, output):
    levels, *tensors, _, reg_max, loss_type, with_loss, _, weights = inputs
    ctx.constants = reg_max, loss_type
    ctx.mark_non_differentiable(*output[int(with_loss) :])
    ctx.save_for_backward(*tensors, weights, *levels)


def _backward(ctx, grad_outputs):
    *tensors, weights = ctx.saved_tensors[:6]
    levels, nothing = list(ctx.saved_tensors[6:]), [None] * 11
    if needs_reference(grad_outputs[0]):
        reference = functools.partial(_reference_of_levels, (*tensors, *ctx.constants, weights))
        return grads_by_reference("distribution_loss", reference, levels, grad_outputs[0]), *nothing
    return _distribution_loss_op(levels, *tensors, grad_outputs[0], *ctx.constants, False, True, weights), *nothing


_distribution_loss_op.register_autograd(_backward, setup_context=_setup_context)


def _distribution_loss_triton(
    levels: Sequence[Tensor], tensors: Sequence[Tensor], reg_max: int, loss: str, weights: Tensor | None
) -> Tensor:
    tensors = [x.contiguous() for x in tensors]
    weights = None if weights is None else weights.contiguous()
    return run_one_pass(
        "distribution_loss",
        lambda levels, grads: _distribution_loss_op(levels, *tensors, None, reg_max, loss, True, grads, weights),
        functools.partial(_reference_of_levels, (*tensors, reg_max, loss, weights)),
        [level.contiguous() for level in levels],
    )


def distribution_loss(
    distributions: Sequence[Tensor],
    anchors: Tensor,
    indices: Tensor,
    boxes: Tensor,
    offsets: Tensor,
    normalizers: Tensor,
    reg_max: int = 16,
    loss_type: str = "giou",
    weights: Tensor | None = None,
) -> Tensor:
    """Box loss of a batch whose boxes are distributions: the sum over images b of (the summed IoU loss and distribution
    focal loss of b's foreground) / normalizers[b], a scalar.

    Args:
        distributions: the levels as the heads wrote them, each ``(B, A*C, H, W)`` or ``(B, N_l, C)`` with
            C = 4 (reg_max + 1) logits an anchor, those of left, top, right and bottom; any float dtype.
        anchors: ``(N, 4)`` xyxy pixels, shared by the images, or ``(B, N, 4)``. Anchors and boxes are converted to
            float32, unless the logits are float64.
        indices: ``(B, N)`` integers: row of the matched ground truth within its image; negative is not foreground. On a
            GPU one that is none of the image's reads nothing, and the loss is NaN.
        boxes: ``(G, 4)`` ground truths of all images, concatenated.
        offsets: ``(B + 1,)`` integers: image b owns rows offsets[b] to offsets[b + 1] of boxes.
        normalizers: ``(B,)`` of any dtype: the foreground counts (at least 1) times B for the mean over images.
        reg_max: n, at least 1: the farthest distance of a side from the anchor's centre, in eighths of the anchor's
            size. A ground truth that reaches farther, or does not reach the centre, has the nearest distance as target.
        loss_type: of the decoded box: giou, diou or ciou.
        weights: ``(B, N)``, the weight of each foreground anchor's loss, such as its quality; others are not read. No
            gradient flows into it. None weighs all alike.

    Raises:
        ValueError: if the shapes do not fit, indices or offsets are not integers or, on a CPU, go beyond the ground
            truths, the levels differ in dtype, the tensors lie on different devices, or for an unknown ``loss_type`` or
            a ``reg_max`` below 1.

    Example::

        >>> anchors = torch.tensor([[0.0, 0.0, 8.0, 8.0], [4.0, 4.0, 12.0, 12.0]])  # with units of a pixel
        >>> truth, indices, offsets = anchors[1:] - 1.5, torch.tensor([[-1, 0]]), torch.tensor([0, 1])
        >>> sides = torch.full((4, 9), -50.0)
        >>> sides[:2, 5:7], sides[2:, 2:4] = 0.0, 0.0  # left and top are at 5.5, right and bottom at 2.5
        >>> logits = [torch.stack((torch.zeros(36), sides.flatten()))[None]]
        >>> distribution_loss(logits, anchors, indices, truth, offsets, torch.ones(1), reg_max=8)  # log(2) / 8
        tensor(0.0866)
    """
    if loss_type not in IOU_LOSSES:
        raise ValueError(f"loss_type must be one of {', '.join(IOU_LOSSES)}, got {loss_type!r}")
    channels = box_channels(reg_max)
    if reg_max < 1:
        raise ValueError(f"reg_max must be at least 1, got {reg_max}")
    shape = check_matched_levels(distributions, channels, anchors, indices, boxes, offsets)
    first = distributions[0]
    normalizers = loss_normalizers(normalizers, shape[0], first)
    if first.dtype != torch.float64:
        anchors, boxes = anchors.float(), boxes.float()
    tensors = anchors, indices, boxes, offsets, normalizers
    weights = loss_weights(weights, normalizers, shape)
    if runs_triton(*distributions):
        levels = flatten_all(distributions, channels)
        return _distribution_loss_triton(levels, tensors, reg_max, loss_type, weights)
    check_matches(indices, offsets, len(boxes))
    return distribution_loss_reference(distributions, *tensors, reg_max, loss_type, weights)
