"""Box voting (Gidaris and Komodakis 2015, https://arxiv.org/abs/1505.01749, section 3.2): boxes that NMS has kept move
to the average of those that they stand for.

    B'_i = sum_j w_j B_j / sum_j w_j     over the boxes j of the class with IoU(B_j, B_i) > iou_thresh

The weight w_j is the score of a box, and 0 where that is negative. A box stays where it is if no weight is left, and
votes for itself if it has an area. PyTorch writes the IoU of all pairs of a kept box and another; here each pair stays
in registers.
"""

import torch
from torch import Tensor

from retina_fast.kernels.arguments import at_least_float32, check_boxes, check_devices, check_integers, check_shape
from retina_fast.kernels.dispatch import is_differentiated, runs_triton, tl, triton
from retina_fast.kernels.nms_overlap import count_of


def box_voting_reference(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor | None,
    counts: Tensor,
    positions: Tensor,
    kept_counts: Tensor,
    iou_thresh: float = 0.5,
) -> Tensor:
    """The definition; see :func:`box_voting`."""
    width, kept = boxes.shape[1], positions.shape[1]
    if width == 0:  # positions in the padding are 0, where there is no box
        return boxes.new_zeros(*positions.shape, 4)
    inside = torch.arange(width, device=boxes.device) < counts[:, None]  # (B, M)
    valid = torch.arange(kept, device=boxes.device) < kept_counts[:, None]  # (B, D)
    own = boxes.gather(1, positions[..., None].expand(-1, -1, 4))  # (B, D, 4)
    a, b = own[:, :, None], boxes[:, None]  # (B, D, 1, 4), (B, 1, M, 4)
    side = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0)
    intersection = side[..., 0] * side[..., 1]
    areas, others = ((box[..., 2] - box[..., 0]) * (box[..., 3] - box[..., 1]) for box in (a, b))
    votes = (intersection / (areas + others - intersection) > iou_thresh) & inside[:, None]  # (B, D, M)
    if labels is not None:
        votes &= labels.gather(1, positions)[..., None] == labels[:, None]
    weights = torch.where(votes & (scores > 0)[:, None], scores[:, None], 0)
    total = weights.sum(2, keepdim=True)  # (B, D, 1)
    mean = weights @ torch.where(inside[..., None], boxes, 0).nan_to_num(0) / torch.where(total > 0, total, 1)
    return torch.where(valid[..., None], torch.where(total > 0, mean, own), 0)


_KEPT, _CHUNK = 16, 128  # kept boxes of a program, and boxes that it compares them with in one go


@triton.jit(do_not_specialize=["width", "kept"])
def _box_voting_kernel(
    boxes_ptr, scores_ptr, labels_ptr, counts_ptr, positions_ptr, kept_counts_ptr, out_ptr, width, kept, iou_thresh,
    KEPT: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Program (t, b) moves KEPT kept boxes of image b."""
    image = tl.program_id(1).to(tl.int64)
    count = count_of(counts_ptr, image, width)
    d = tl.program_id(0) * KEPT + tl.arange(0, KEPT)
    valid = (d < kept) & (d < tl.load(kept_counts_ptr + image))
    own = tl.load(positions_ptr + image * kept + d, mask=valid, other=0)
    boxes_ptr += image * width * 4
    ptr = boxes_ptr + own * 4
    x1, y1 = tl.load(ptr, mask=valid, other=0.0), tl.load(ptr + 1, mask=valid, other=0.0)
    x2, y2 = tl.load(ptr + 2, mask=valid, other=0.0), tl.load(ptr + 3, mask=valid, other=0.0)
    area = (x2 - x1) * (y2 - y1)
    total = tl.zeros([KEPT], tl.float32)
    sum_x1, sum_y1, sum_x2, sum_y2 = total, total, total, total
    if tl.max(valid.to(tl.int32), axis=0) > 0:
        for start in range(0, count, CHUNK):
            i = start + tl.arange(0, CHUNK)
            mask = i < count
            voter = boxes_ptr + i * 4
            u1, v1 = tl.load(voter, mask=mask, other=0.0), tl.load(voter + 1, mask=mask, other=0.0)
            u2, v2 = tl.load(voter + 2, mask=mask, other=0.0), tl.load(voter + 3, mask=mask, other=0.0)
            side = tl.maximum(tl.minimum(x2[:, None], u2[None, :]) - tl.maximum(x1[:, None], u1[None, :]), 0.0)
            other = tl.maximum(tl.minimum(y2[:, None], v2[None, :]) - tl.maximum(y1[:, None], v1[None, :]), 0.0)
            intersection = side * other
            iou = tl.div_rn(intersection, area[:, None] + ((u2 - u1) * (v2 - v1))[None, :] - intersection)
            votes = (iou > iou_thresh) & mask[None, :] & valid[:, None]
            if labels_ptr is not None:
                label = tl.load(labels_ptr + image * width + i, mask=mask, other=0)
                votes &= label[None, :] == tl.load(labels_ptr + image * width + own, mask=valid, other=0)[:, None]
            score = tl.load(scores_ptr + image * width + i, mask=mask, other=0.0)
            weight = tl.where(votes & (score > 0)[None, :], score[None, :], 0.0)
            total += tl.sum(weight, axis=1)
            sum_x1 += tl.sum(tl.where(weight > 0, weight * u1[None, :], 0.0), axis=1)
            sum_y1 += tl.sum(tl.where(weight > 0, weight * v1[None, :], 0.0), axis=1)
            sum_x2 += tl.sum(tl.where(weight > 0, weight * u2[None, :], 0.0), axis=1)
            sum_y2 += tl.sum(tl.where(weight > 0, weight * v2[None, :], 0.0), axis=1)
    voted = total > 0
    total = tl.where(voted, total, 1.0)
    out_ptr += (image * kept + d) * 4
    tl.store(out_ptr, tl.where(voted, tl.div_rn(sum_x1, total), x1), mask=d < kept)
    tl.store(out_ptr + 1, tl.where(voted, tl.div_rn(sum_y1, total), y1), mask=d < kept)
    tl.store(out_ptr + 2, tl.where(voted, tl.div_rn(sum_x2, total), x2), mask=d < kept)
    tl.store(out_ptr + 3, tl.where(voted, tl.div_rn(sum_y2, total), y2), mask=d < kept)


@torch.library.custom_op("retina_fast::box_voting", mutates_args=())
def _op(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor | None,
    counts: Tensor,
    positions: Tensor,
    kept_counts: Tensor,
    iou_thresh: float,
) -> Tensor:
    """See :func:`box_voting`; all arguments contiguous, boxes and scores float32."""
    batch, kept = positions.shape
    out = boxes.new_empty(batch, kept, 4)
    with torch.cuda.device_of(boxes):
        _box_voting_kernel[(triton.cdiv(kept, _KEPT), batch)](
            boxes, scores, labels, counts, positions, kept_counts, out, boxes.shape[1], kept, iou_thresh, KEPT=_KEPT,
            CHUNK=_CHUNK, enable_fp_fusion=False,
        )  # fmt: skip
    return out


@_op.register_fake
def _(boxes, scores, labels, counts, positions, kept_counts, iou_thresh):
    return boxes.new_empty(*positions.shape, 4)


def box_voting(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor | None,
    counts: Tensor,
    positions: Tensor,
    kept_counts: Tensor,
    iou_thresh: float = 0.5,
) -> Tensor:
    """Move the boxes that a suppression has kept to the average of those they overlap: ``(B, D, 4)``, padded with 0.

    Args:
        boxes: ``(B, M, 4)`` xyxy, all boxes that the suppression was given; differentiable, as the scores are, by the
            reference.
        scores: ``(B, M)``: the weights.
        labels: ``(B, M)`` integer classes; with None every class votes for every other.
        counts: ``(B,)`` integers: only the first counts[b] boxes of image b vote.
        positions: ``(B, D)`` integers: the kept boxes, as batched_nms and soft_nms return them.
        kept_counts: ``(B,)``: only the first kept_counts[b] of them count.
        iou_thresh: boxes whose IoU with a kept one is strictly above vote for it.

    Raises:
        ValueError: if the shapes do not fit, M is 2^29 or more, labels, counts or positions are not integers, or the
            tensors lie on different devices.

    Example::

        >>> boxes = torch.tensor([[[0.0, 0, 8, 8], [2, 0, 8, 8], [20, 20, 28, 28]]])
        >>> scores, kept = torch.tensor([[0.75, 0.25, 0.5]]), torch.tensor([[0, 2]])
        >>> box_voting(boxes, scores, None, torch.tensor([3]), kept, torch.tensor([2]))
        tensor([[[ 0.5000,  0.0000,  8.0000,  8.0000],
                 [20.0000, 20.0000, 28.0000, 28.0000]]])
    """
    batch, _ = check_boxes(boxes, scores, labels, counts)
    check_shape("positions", positions, "(B, D)", (batch, *positions.shape[-1:]))
    check_shape("kept_counts", kept_counts, "(B,)", (batch,))
    check_integers(positions=positions, kept_counts=kept_counts)
    check_devices(boxes.device, positions=positions, kept_counts=kept_counts)
    boxes, scores, positions = at_least_float32(boxes), at_least_float32(scores), positions.long()
    if runs_triton(boxes, scores) and not is_differentiated(boxes, scores):
        labels = None if labels is None else labels.contiguous()
        rest = counts.contiguous(), positions.contiguous(), kept_counts.contiguous(), iou_thresh
        return _op(boxes.contiguous(), scores.contiguous(), labels, *rest)
    return box_voting_reference(boxes, scores, labels, counts, positions, kept_counts, iou_thresh)
