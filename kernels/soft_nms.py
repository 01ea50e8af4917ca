"""Soft-NMS (Bodla et al. 2017, https://arxiv.org/abs/1704.04503): overlapping boxes lose score, but are not dropped.

The best box is taken; every other box of its class has its score multiplied by f(IoU); again, until no score exceeds
the threshold or enough boxes are taken. Equations 3 and 4 of the paper:

    linear      f = 1 - IoU where IoU > iou_thresh, else 1
    gaussian    f = exp(-IoU^2 / sigma)

A score never rises, so the boxes come in the order of their last scores, the lower index first on a tie. Classes do not
affect each other: here each program takes boxes from its own classes until it has as many as the result holds, and a
sort joins what all have taken. IoU and scores are float32, or float64 for float64 boxes. A box with a NaN or of
infinite area overlaps nothing, and a score that is NaN is never taken.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from retina_fast.kernels.arguments import at_least_float32, check_boxes
from retina_fast.kernels.dispatch import runs_triton, tl, triton
from retina_fast.kernels.key_sort import pack, sort_keys, unpack_index
from retina_fast.kernels.nms_overlap import POSITION_BITS, count_of

METHODS = ("linear", "gaussian")


class SoftKept(NamedTuple):
    """The boxes taken from B images, padded to D; the first counts[b] of a row count, best first."""

    positions: Tensor
    """(B, D) int64: position of the box among the image's boxes; 0 in the padding."""
    scores: Tensor
    """(B, D): the score with which it was taken; 0 in the padding."""
    counts: Tensor
    """(B,) int64."""


def iou_with(box: Tensor, boxes: Tensor) -> Tensor:
    """IoU (B, M) of one box an image (B, 4) with boxes (B, M, 4); NaN where a box has a NaN or no area."""
    box = box[:, None]
    side = (torch.minimum(box[..., 2:], boxes[..., 2:]) - torch.maximum(box[..., :2], boxes[..., :2])).clamp(min=0)
    intersection = side[..., 0] * side[..., 1]
    area, areas = ((b[..., 2] - b[..., 0]) * (b[..., 3] - b[..., 1]) for b in (box, boxes))
    return intersection / (area + areas - intersection)


def soft_nms_reference(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor | None,
    counts: Tensor,
    method: str = "gaussian",
    iou_thresh: float = 0.3,
    sigma: float = 0.5,
    score_thresh: float = 0.001,
    max_detections: int = 300,
) -> SoftKept:
    """The definition; see :func:`soft_nms`. Each step takes the best box of every image at once."""
    batch, width = boxes.shape[:2]
    inside = torch.arange(width, device=boxes.device) < counts[:, None]
    left = torch.where(inside & (scores > score_thresh), scores, -torch.inf)  # (B, M)
    positions = torch.zeros((batch, max_detections), dtype=torch.int64, device=boxes.device)
    taken = scores.new_zeros(batch, max_detections)
    taken_counts = torch.zeros(batch, dtype=torch.int64, device=boxes.device)
    image = torch.arange(batch, device=boxes.device)
    for step in range(min(max_detections, width)):
        best = left.argmax(dim=1)  # the first on a tie
        score = left[image, best]
        valid = score > score_thresh
        if not bool(valid.any()):
            break
        positions[:, step] = torch.where(valid, best, 0)
        taken[:, step] = torch.where(valid, score, 0)
        taken_counts += valid
        iou = iou_with(boxes[image, best], boxes)
        factor = torch.exp(iou * iou * (-1 / sigma)) if method == "gaussian" else 1 - iou
        touched = (iou > (0.0 if method == "gaussian" else iou_thresh)) & (left > score_thresh)
        if labels is not None:
            touched &= labels == labels[image, best][:, None]
        lowered = left * factor  # NaN where an infinite score is lowered to 0
        left = torch.where(touched, torch.where(lowered > score_thresh, lowered, -torch.inf), left)
        left[image, best] = -torch.inf
    return SoftKept(positions, taken, taken_counts)


_GROUPS = 128  # of classes, each with a program, if there are labels
_SCAN = 512  # boxes that a program looks at in one go


@triton.jit
def _best_of(scores, members):
    """The highest score and, on a tie, the first of its members."""
    best = tl.max(scores, axis=0)
    return best, tl.min(tl.where(scores == best, members, 0x7FFFFFFF), axis=0)


@triton.jit(do_not_specialize=["width", "max_detections"])
def _soft_nms_kernel(
    boxes_ptr, scores_ptr, labels_ptr, counts_ptr, members_ptr, left_ptr, taken_ptr, width, max_detections, iou_thresh,
    exponent, score_thresh, GAUSSIAN: tl.constexpr, GROUPS: tl.constexpr, SCAN: tl.constexpr,
):  # fmt: skip
    """Program (g, b) handles the classes of image b whose low bits are g. It writes the last scores of the boxes that
    it takes, at most max_detections, and -inf for its others."""
    group = tl.program_id(0)
    image = tl.program_id(1).to(tl.int64)
    count = count_of(counts_ptr, image, width)
    boxes_ptr += image * width * 4
    scores_ptr += image * width
    taken_ptr += image * width
    if labels_ptr is not None:
        labels_ptr += image * width
    members_ptr += (image * GROUPS + group) * width
    left_ptr += (image * GROUPS + group) * width
    lane = tl.arange(0, SCAN)

    members = 0
    for start in range(0, count, SCAN):
        i = start + lane
        mine = i < count
        if labels_ptr is not None:
            mine &= (tl.load(labels_ptr + i, mask=mine, other=0) & (GROUPS - 1)) == group
        score = tl.load(scores_ptr + i, mask=mine, other=float("-inf")).to(tl.float32)
        tl.store(taken_ptr + i, tl.full([SCAN], float("-inf"), tl.float32), mask=mine)
        able = mine & (score > score_thresh)
        slots = members + tl.cumsum(able.to(tl.int32), axis=0) - 1
        tl.store(members_ptr + slots, i, mask=able)
        tl.store(left_ptr + slots, score, mask=able)
        members += tl.sum(able.to(tl.int32), axis=0)
    tl.debug_barrier()  # other threads read the members, and write what they have taken

    # In each turn the box taken in the turn before lowers the scores, of which the next best is found. At first none.
    number, best, chosen = 0, score_thresh, -1
    going = members > 0
    while going:
        x1 = tl.load(boxes_ptr + chosen * 4, mask=chosen >= 0, other=0.0)
        y1 = tl.load(boxes_ptr + chosen * 4 + 1, mask=chosen >= 0, other=0.0)
        x2 = tl.load(boxes_ptr + chosen * 4 + 2, mask=chosen >= 0, other=0.0)
        y2 = tl.load(boxes_ptr + chosen * 4 + 3, mask=chosen >= 0, other=0.0)
        highest = tl.full([SCAN], float("-inf"), tl.float32)
        highest_member = tl.full([SCAN], 0x7FFFFFFF, tl.int32)
        for start in range(0, members, SCAN):
            slots = start + lane
            i = tl.load(members_ptr + slots, mask=slots < members, other=0)
            score = tl.load(left_ptr + slots, mask=slots < members, other=float("-inf"))
            if chosen >= 0:
                u1, v1 = tl.load(boxes_ptr + i * 4), tl.load(boxes_ptr + i * 4 + 1)
                u2, v2 = tl.load(boxes_ptr + i * 4 + 2), tl.load(boxes_ptr + i * 4 + 3)
                side = tl.maximum(tl.minimum(x2, u2) - tl.maximum(x1, u1), 0.0)
                intersection = side * tl.maximum(tl.minimum(y2, v2) - tl.maximum(y1, v1), 0.0)
                iou = tl.div_rn(intersection, (x2 - x1) * (y2 - y1) + (u2 - u1) * (v2 - v1) - intersection)
                touched = (iou > iou_thresh) & (score > score_thresh)
                if labels_ptr is not None:
                    touched &= tl.load(labels_ptr + i) == tl.load(labels_ptr + chosen)
                factor = tl.exp(iou * iou * exponent) if GAUSSIAN else 1 - iou
                score = tl.where(touched, score * factor, score)
                score = tl.where(i == chosen, float("-inf"), score)
                tl.store(left_ptr + slots, score, mask=slots < members)
            higher = (score > score_thresh) & (score > highest)
            highest = tl.where(higher, score, highest)
            highest_member = tl.where(higher, i, highest_member)
        best, chosen = _best_of(highest, highest_member)
        going = (best > score_thresh) & (number < max_detections)
        if going:
            tl.store(taken_ptr + chosen, best)
            number += 1


@triton.jit(do_not_specialize=["width"])
def _taken_keys_kernel(taken_ptr, counts_ptr, keys_ptr, lengths_ptr, width, POSITION_BITS: tl.constexpr,
                       SCAN: tl.constexpr):  # fmt: skip
    """Program b moves the keys of the boxes taken of image b to the front of its row, in any order, and counts them."""
    image = tl.program_id(0).to(tl.int64)
    count = count_of(counts_ptr, image, width)
    length = 0
    for start in range(0, count, SCAN):
        i = start + tl.arange(0, SCAN)
        score = tl.load(taken_ptr + image * width + i, mask=i < count, other=float("-inf"))
        taken = score > float("-inf")
        slots = length + tl.cumsum(taken.to(tl.int32), axis=0) - 1
        tl.store(keys_ptr + image * width + slots, pack(score, i, POSITION_BITS, 0), mask=taken)
        length += tl.sum(taken.to(tl.int32), axis=0)
    tl.store(lengths_ptr + image, length + tl.zeros([], tl.int64))
    for start in range(length, width, SCAN):
        i = start + tl.arange(0, SCAN)
        tl.store(keys_ptr + image * width + i, tl.full([SCAN], -1, tl.int64), mask=i < width)


@triton.jit(do_not_specialize=["width", "max_detections"])
def _take_kernel(keys_ptr, taken_ptr, lengths_ptr, positions_ptr, scores_ptr, width, max_detections,
                 POSITION_BITS: tl.constexpr, SCAN: tl.constexpr):  # fmt: skip
    """Program (t, b) writes SCAN positions and scores of image b, from its sorted keys."""
    image = tl.program_id(1).to(tl.int64)
    d = tl.program_id(0) * SCAN + tl.arange(0, SCAN)
    valid = (d < max_detections) & (d < tl.load(lengths_ptr + image))
    position = unpack_index(tl.load(keys_ptr + image * width + d, mask=valid, other=0), POSITION_BITS)
    position = tl.where(valid, position, 0)
    score = tl.load(taken_ptr + image * width + position, mask=valid, other=0.0)
    out = image * max_detections + d
    tl.store(positions_ptr + out, position.to(tl.int64), mask=d < max_detections)
    tl.store(scores_ptr + out, score, mask=d < max_detections)


def _soft_nms_triton(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor | None,
    counts: Tensor,
    method: str,
    iou_thresh: float,
    sigma: float,
    score_thresh: float,
    max_detections: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The fields of SoftKept, of contiguous float32 boxes; three launches and a sort."""
    batch, width = boxes.shape[:2]
    groups, gaussian = 1 if labels is None else _GROUPS, method == "gaussian"
    members = boxes.new_empty(batch, groups, width, dtype=torch.int32)
    left, taken = boxes.new_empty(batch, groups, width), boxes.new_empty(batch, width)
    keys, lengths = (boxes.new_empty(shape, dtype=torch.int64) for shape in ((batch, width), (batch,)))
    positions = boxes.new_empty(batch, max_detections, dtype=torch.int64)
    out = boxes.new_empty(batch, max_detections)
    with torch.cuda.device_of(boxes):
        _soft_nms_kernel[(groups, batch)](
            boxes, scores, labels, counts, members, left, taken, width, max_detections,
            0.0 if gaussian else iou_thresh, -1 / sigma, score_thresh, GAUSSIAN=gaussian, GROUPS=groups, SCAN=_SCAN,
            enable_fp_fusion=False,
        )  # fmt: skip
        _taken_keys_kernel[(batch,)](
            taken, counts, keys, lengths, width, POSITION_BITS=POSITION_BITS.value, SCAN=_SCAN, enable_fp_fusion=False
        )
        _take_kernel[(triton.cdiv(max_detections, _SCAN), batch)](
            sort_keys(keys, lengths), taken, lengths, positions, out, width, max_detections,
            POSITION_BITS=POSITION_BITS.value, SCAN=_SCAN, enable_fp_fusion=False,
        )  # fmt: skip
    return positions, out, lengths.clamp(max=max_detections)


_SCHEMA = (
    "(Tensor boxes, Tensor scores, Tensor? labels, Tensor counts, str method, float iou_thresh, float sigma, "
    "float score_thresh, int max_detections) -> (Tensor, Tensor, Tensor)"
)
_op = torch.library.custom_op("retina_fast::soft_nms", _soft_nms_triton, mutates_args=(), schema=_SCHEMA)
# The reference reads scores on the host: as an operation it is one node of a compiled or exported graph.
_reference_op = torch.library.custom_op(
    "retina_fast::soft_nms_reference", soft_nms_reference, mutates_args=(), schema=_SCHEMA
)


@_op.register_fake
@_reference_op.register_fake
def _(boxes, scores, labels, counts, method, iou_thresh, sigma, score_thresh, max_detections):
    positions = boxes.new_empty((boxes.shape[0], max_detections), dtype=torch.int64)
    return positions, scores.new_empty(positions.shape), positions.new_empty(boxes.shape[0])


def soft_nms(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor | None,
    counts: Tensor,
    method: str = "gaussian",
    iou_thresh: float = 0.3,
    sigma: float = 0.5,
    score_thresh: float = 0.001,
    max_detections: int = 300,
) -> SoftKept:
    """Take boxes of a padded batch by falling score, each of which lowers the scores of those that it overlaps.

    Args:
        boxes: ``(B, M, 4)`` xyxy, with M below 2^29. With float64 boxes or scores the reference runs, on a GPU, too.
        scores: ``(B, M)``, at least 0.
        labels: ``(B, M)`` integer classes; None lowers scores across classes.
        counts: ``(B,)`` integers: only the first counts[b] boxes of image b count.
        method: "linear" or "gaussian".
        iou_thresh: above which "linear" lowers a score.
        sigma: of "gaussian"; the larger, the less a score is lowered.
        score_thresh: at least 0; a box is taken while its score, lowered so far, is above.
        max_detections: D, the most boxes taken of an image.

    Raises:
        ValueError: if the shapes do not fit, M is 2^29 or more, labels or counts are not integers, method is neither,
            sigma is not above 0, score_thresh or max_detections is negative, or the tensors lie on different devices.

    Example::

        >>> boxes = torch.tensor([[[0.0, 0, 8, 8], [0, 0, 8, 4], [20, 20, 28, 28]]])
        >>> soft_nms(boxes, torch.tensor([[0.8, 0.6, 0.5]]), None, torch.tensor([3]), "linear", max_detections=3)
        SoftKept(positions=tensor([[0, 2, 1]]), scores=tensor([[0.8000, 0.5000, 0.3000]]), counts=tensor([3]))
    """
    check_boxes(boxes, scores, labels, counts)
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if not sigma > 0:
        raise ValueError(f"sigma must be above 0, got {sigma}")
    if not score_thresh >= 0:
        raise ValueError(f"score_thresh must be at least 0, got {score_thresh}")
    if max_detections < 0:
        raise ValueError(f"max_detections must be at least 0, got {max_detections}")
    boxes, scores = at_least_float32(boxes.detach()).contiguous(), at_least_float32(scores.detach()).contiguous()
    labels, counts = None if labels is None else labels.contiguous(), counts.contiguous()
    op = _op if runs_triton(boxes, scores) else _reference_op
    return SoftKept(*op(boxes, scores, labels, counts, method, iou_thresh, sigma, score_thresh, max_detections))
