"""Box loss over the foreground anchors, for the five losses of torchvision's RetinaNet.

    l1, smooth_l1 (beta 1)   on the deltas that would turn the anchor into its ground truth
                             (Girshick et al. 2014, https://arxiv.org/abs/1311.2524, appendix C)
    giou, diou, ciou         on the decoded box, see iou_losses.py

Only the deltas of foreground anchors are read, a few hundred rows an image, which torchvision gathers image by image.
The finished gradient, 0 for all others, is written in the same pass: 8 bytes an anchor in bfloat16.
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
from retina_fast.kernels.box_decode import MAX_LOG_SCALE, decode
from retina_fast.kernels.dispatch import HAS_TRITON, needs_reference, runs_triton, tl, triton
from retina_fast.kernels.iou_losses import IOU_LOSSES, iou_loss_and_slopes
from retina_fast.kernels.levels import (
    flatten_all,
    level_of,
    load_matched,
    load_rows,
    pick,
    pick_size,
    store_rows,
    tile_levels,
    truths_of,
)
from retina_fast.kernels.one_pass import grads_by_reference, run_one_pass, sum_of

LOSS_TYPES = ("l1", "smooth_l1", *IOU_LOSSES)


def encode(boxes: Tensor, anchors: Tensor) -> Tensor:
    """Deltas (..., 4) that turn anchors (..., 4) into boxes (..., 4), both xyxy."""
    size, anchor_size = boxes[..., 2:] - boxes[..., :2], anchors[..., 2:] - anchors[..., :2]
    centre, anchor_centre = boxes[..., :2] + 0.5 * size, anchors[..., :2] + 0.5 * anchor_size
    return torch.cat(((centre - anchor_centre) / anchor_size, torch.log(size / anchor_size)), dim=-1)


def box_loss_reference(
    deltas: Sequence[Tensor],
    anchors: Tensor,
    indices: Tensor,
    boxes: Tensor,
    offsets: Tensor,
    normalizers: Tensor,
    loss_type: str = "l1",
    weights: Tensor | None = None,
) -> Tensor:
    """The definition, differentiable by autograd; see :func:`box_loss`."""
    image, anchor = (indices >= 0).nonzero(as_tuple=True)  # (F,) each, F the foreground anchors
    flat = torch.cat(flatten_all(deltas, 4), dim=1)[image, anchor]  # (F, 4)
    flat = at_least_float32(flat)
    anchors = anchors[anchor] if anchors.dim() == 2 else anchors[image, anchor]  # (F, 4)
    matched = boxes[indices[image, anchor] + offsets[image]]  # (F, 4)
    if loss_type in IOU_LOSSES:
        loss = IOU_LOSSES[loss_type](decode(flat, anchors), matched, reduction="none", eps=1e-7)
    else:
        difference = F.l1_loss if loss_type == "l1" else F.smooth_l1_loss
        loss = difference(flat, encode(matched, anchors), reduction="none").sum(dim=1)
    if weights is not None:
        loss = loss * weights[image, anchor].to(loss.dtype)
    return (loss / normalizers[image]).sum()


# Triton. A program handles a tile of anchors of one image and level; nearly all tiles hold no foreground.

_TILE = 512
_MAX_LOG_SCALE = tl.constexpr(MAX_LOG_SCALE)
_NAN = tl.constexpr(tl.PropagateNan.ALL if HAS_TRITON else None)  # otherwise a minimum would hide a NaN


@triton.jit
def _l1(delta, target, SMOOTH: tl.constexpr):
    """The loss of one delta and its slope."""
    d = delta - target
    slope = tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, 0.0))
    if SMOOTH:
        near = tl.abs(d) < 1
        return tl.where(near, 0.5 * d * d, tl.abs(d) - 0.5), tl.where(near, d, slope)
    else:
        return tl.abs(d), slope


@triton.jit(do_not_specialize=["num_anchors", "anchors_stride", "num_boxes"])
def _box_loss_kernel(
    levels, grads, anchors_ptr, anchors_stride, indices_ptr, boxes_ptr, offsets_ptr, normalizers_ptr, partials_ptr,
    factor_ptr, weights_ptr, starts, first_tiles, num_anchors, num_boxes, LOSS: tl.constexpr,
    TILE: tl.constexpr, WITH_GRADS: tl.constexpr,
):  # fmt: skip
    """Program (t, b) handles tile t, counted through the levels, of image b. It writes the tile's share of the loss to
    partials (B, T), and its gradients, times factor if there is one. Either output may be left out."""
    tile = tl.program_id(0)
    image = tl.program_id(1).to(tl.int64)
    level = level_of(first_tiles, tile)
    delta_ptr, grad_ptr = pick(levels, level), pick(grads, level)
    start = pick_size(starts, level)
    num_rows = pick_size(starts[1:], level) - start
    begin = (tile - pick_size(first_tiles, level)) * TILE
    row = begin + tl.arange(0, TILE)
    delta_ptr += image * num_rows * 4
    grad_ptr += image * num_rows * 4
    index = tl.load(indices_ptr + image * num_anchors + start + row, mask=row < num_rows, other=-1)
    foreground = index >= 0

    loss = tl.zeros([TILE], tl.float32)
    if tl.max(index, axis=0) < 0:
        if WITH_GRADS:
            i = begin * 4 + tl.arange(0, 4 * TILE)
            tl.store(grad_ptr + i, tl.zeros([4 * TILE], grad_ptr.dtype.element_ty), mask=i < num_rows * 4)
    else:
        dx, dy, dw, dh = load_rows(delta_ptr, row, foreground)
        first, count = truths_of(offsets_ptr, num_boxes, image)
        x1, y1, x2, y2 = load_rows(anchors_ptr + image * anchors_stride, start + row, foreground)
        bx1, by1, bx2, by2 = load_matched(boxes_ptr, first, count, index, foreground)
        w, h = x2 - x1, y2 - y1
        cx, cy = x1 + 0.5 * w, y1 + 0.5 * h
        bx1, by1, bx2, by2 = bx1 - cx, by1 - cy, bx2 - cx, by2 - cy
        if LOSS == "l1" or LOSS == "smooth_l1":
            loss_x, grad_x = _l1(dx, 0.5 * (bx1 + bx2) / w, LOSS == "smooth_l1")
            loss_y, grad_y = _l1(dy, 0.5 * (by1 + by2) / h, LOSS == "smooth_l1")
            loss_w, grad_w = _l1(dw, tl.log((bx2 - bx1) / w), LOSS == "smooth_l1")
            loss_h, grad_h = _l1(dh, tl.log((by2 - by1) / h), LOSS == "smooth_l1")
            loss = loss_x + loss_y + loss_w + loss_h
        else:
            half_w = 0.5 * w * tl.exp(tl.minimum(dw, _MAX_LOG_SCALE, _NAN))
            half_h = 0.5 * h * tl.exp(tl.minimum(dh, _MAX_LOG_SCALE, _NAN))
            loss, grad_x, grad_y, grad_w, grad_h = iou_loss_and_slopes(
                dx * w, dy * h, half_w, half_h, bx1, by1, bx2, by2, LOSS
            )
            grad_x, grad_y = grad_x * w, grad_y * h
            grad_w = tl.where(dw <= _MAX_LOG_SCALE, grad_w * half_w, 0.0)
            grad_h = tl.where(dh <= _MAX_LOG_SCALE, grad_h * half_h, 0.0)
        scale = 1 / tl.load(normalizers_ptr + image)
        if weights_ptr is not None:
            scale *= tl.load(weights_ptr + image * num_anchors + start + row, mask=foreground, other=0.0)
        loss = tl.where(foreground, loss * scale, 0.0)
        if WITH_GRADS:
            if factor_ptr is not None:
                scale *= tl.load(factor_ptr)
            grad_x, grad_y = tl.where(foreground, grad_x * scale, 0.0), tl.where(foreground, grad_y * scale, 0.0)
            grad_w, grad_h = tl.where(foreground, grad_w * scale, 0.0), tl.where(foreground, grad_h * scale, 0.0)
            store_rows(grad_ptr, row, grad_x, grad_y, grad_w, grad_h, row < num_rows)
    if partials_ptr is not None:
        tl.store(partials_ptr + image * tl.num_programs(0) + tile, tl.sum(loss, axis=0))


@torch.library.custom_op("retina_fast::box_loss", mutates_args=())
def _box_loss_op(
    levels: list[Tensor],
    anchors: Tensor,
    indices: Tensor,
    boxes: Tensor,
    offsets: Tensor,
    normalizers: Tensor,
    factor: Tensor | None,
    loss_type: str,
    with_loss: bool,
    with_grads: bool,
    weights: Tensor | None,
) -> list[Tensor]:
    """The loss (), if wanted, and the gradients of all contiguous levels (B, N_l, 4), times factor (), if wanted."""
    starts, first_tiles, tiles = tile_levels(levels, _TILE)
    partials = indices.new_empty(len(indices), tiles, dtype=torch.float32) if with_loss else None
    grads = [torch.empty_like(level) for level in levels] if with_grads else []
    with torch.cuda.device_of(indices):
        _box_loss_kernel[(tiles, len(indices))](
            tuple(levels), tuple(grads or levels), anchors, anchors.stride(0) if anchors.dim() == 3 else 0, indices,
            boxes, offsets, normalizers, partials, factor, weights, starts, first_tiles, indices.shape[1], len(boxes),
            LOSS=loss_type, TILE=_TILE, WITH_GRADS=with_grads, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return ([] if partials is None else [sum_of(partials)]) + grads


@_box_loss_op.register_fake
def _(levels, anchors, indices, boxes, offsets, normalizers, factor, loss_type, with_loss, with_grads, weights):
    loss = [indices.new_empty((), dtype=torch.float32)] if with_loss else []
    return loss + ([torch.empty_like(level) for level in levels] if with_grads else [])


def _reference_of_levels(arguments, *levels):
    return box_loss_reference(levels, *arguments)


def _setup_context(ctx, inputs, output):
    levels, *tensors, _, ctx.loss_type, with_loss, _, weights = inputs
    ctx.mark_non_differentiable(*output[int(with_loss) :])
    ctx.save_for_backward(*tensors, weights, *levels)


def _backward(ctx, grad_outputs):
    *tensors, weights = ctx.saved_tensors[:6]
    levels, nothing = list(ctx.saved_tensors[6:]), [None] * 10
    if needs_reference(grad_outputs[0]):
        reference = functools.partial(_reference_of_levels, (*tensors, ctx.loss_type, weights))
        return grads_by_reference("box_loss", reference, levels, grad_outputs[0]), *nothing
    return _box_loss_op(levels, *tensors, grad_outputs[0], ctx.loss_type, False, True, weights), *nothing


_box_loss_op.register_autograd(_backward, setup_context=_setup_context)


def _box_loss_triton(
    levels: Sequence[Tensor],
    anchors: Tensor,
    indices: Tensor,
    boxes: Tensor,
    offsets: Tensor,
    normalizers: Tensor,
    loss_type: str,
    weights: Tensor | None = None,
) -> Tensor:
    tensors = [x.contiguous() for x in (anchors, indices, boxes, offsets, normalizers)]
    weights = None if weights is None else weights.contiguous()
    return run_one_pass(
        "box_loss",
        lambda levels, with_grads: _box_loss_op(levels, *tensors, None, loss_type, True, with_grads, weights),
        functools.partial(_reference_of_levels, (*tensors, loss_type, weights)),
        [level.contiguous() for level in levels],
    )


def box_loss(
    deltas: Sequence[Tensor],
    anchors: Tensor,
    indices: Tensor,
    boxes: Tensor,
    offsets: Tensor,
    normalizers: Tensor,
    loss_type: str = "l1",
    weights: Tensor | None = None,
) -> Tensor:
    """Box loss of a batch: the sum over images b of (the summed loss of b's foreground) / normalizers[b], a scalar.

    Args:
        deltas: the levels as the heads wrote them, each ``(B, A*4, H, W)`` or ``(B, N_l, 4)``; any float dtype.
        anchors: ``(N, 4)`` xyxy pixels, shared by the images, or ``(B, N, 4)``. Anchors and boxes are converted to
            float32, unless the deltas are float64.
        indices: ``(B, N)`` integers: row of the matched ground truth within its image; negative is not foreground. On a
            GPU one that is none of the image's reads nothing, and the loss is NaN.
        boxes: ``(G, 4)`` ground truths of all images, concatenated.
        offsets: ``(B + 1,)`` integers: image b owns rows offsets[b] to offsets[b + 1] of boxes.
        normalizers: ``(B,)`` of any dtype: the foreground counts (at least 1) times B for torchvision's mean over
            images.
        loss_type: one of l1, smooth_l1, giou, diou, ciou.
        weights: ``(B, N)``, the weight of each foreground anchor's loss, such as its quality; others are not read. No
            gradient flows into it. None weighs all alike.

    Raises:
        AssertionError: for an unknown ``loss_type``, as torchvision's.
        ValueError: if the shapes do not fit, indices or offsets are not integers or, on a CPU, go beyond the ground
            truths, the levels differ in dtype, or the tensors lie on different devices.

    Example::

        >>> anchors = torch.tensor([[0.0, 0.0, 10.0, 10.0], [5.0, 5.0, 15.0, 15.0]])
        >>> indices, offsets = torch.tensor([[-1, 0]]), torch.tensor([0, 1])
        >>> box_loss([torch.zeros(1, 2, 4)], anchors, indices, anchors[:1], offsets, torch.tensor([1.0]))
        tensor(1.)
    """
    if loss_type not in LOSS_TYPES:
        raise AssertionError(f"Unsupported loss: {loss_type!r}; choose one of {', '.join(LOSS_TYPES)}")
    shape, first = check_matched_levels(deltas, 4, anchors, indices, boxes, offsets), deltas[0]
    normalizers = loss_normalizers(normalizers, shape[0], first)
    if first.dtype != torch.float64:
        anchors, boxes = anchors.float(), boxes.float()
    weights = loss_weights(weights, normalizers, shape)
    if runs_triton(*deltas):
        return _box_loss_triton(
            flatten_all(deltas, 4), anchors, indices, boxes, offsets, normalizers, loss_type, weights
        )
    check_matches(indices, offsets, len(boxes))
    return box_loss_reference(deltas, anchors, indices, boxes, offsets, normalizers, loss_type, weights)
