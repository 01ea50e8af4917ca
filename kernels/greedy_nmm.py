"""Greedy non-maximum merging (SAHI, Akyon et al. 2022, https://arxiv.org/abs/2202.06934): overlapping boxes become one.

Where a picture is searched in overlapping tiles, an object on a seam is found in parts. The best box takes in every
other box of its class whose overlap with it is at least t; then the best of what is left, and so on. The box of each
such group grows, member by member, best first:

    B <- the smallest box around B and the member,  if the overlap of the member with B as grown so far is at least t

A member that fails this second test does not enlarge the box, but is removed all the same. All this is
``GreedyNMMPostprocess`` of SAHI 0.12.8 (in 0.12.6 the second test was strict). The overlap is one of

    IOU     I / (A + B - I)
    IOS     I / min(A, B),  intersection over the smaller area

in float32, or in float64 for float64 boxes. Ties are SAHI's: of equal scores the box with the smaller x1 goes first,
then y1, x2, y2; then the lower index. So the order in which boxes are given matters only between equal ones. A box with
a NaN or of infinite area overlaps nothing.

The groups are those of a suppression. So the kernels are NMS tile by tile (``nms_tiles.py``), one launch in which
each box looks for the first kept box that takes it in, and one in which every kept box walks through its members.
Without a GPU, ``greedy_nmm_cpu.py`` compares only boxes that share a cell of a grid. SAHI itself merges pair by pair in
Python.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from retina_fast.kernels.arguments import at_least_float32, check_boxes, counts_on_host
from retina_fast.kernels.batched_nms import thresholds_of
from retina_fast.kernels.dispatch import runs_triton, tl, triton
from retina_fast.kernels.greedy_nmm_cpu import merge_image
from retina_fast.kernels.nms_overlap import POSITION_BITS, WORD, count_of, load_box, overlap
from retina_fast.kernels.nms_tiles import suppress_by_tiles, tile_progress

METRICS = ("IOU", "IOS")


class Merged(NamedTuple):
    """The boxes that are left of B images, padded to D; the first counts[b] of a row count, best first."""

    boxes: Tensor
    """(B, D, 4) xyxy, grown; 0 in the padding."""
    positions: Tensor
    """(B, D) int64: position of the group's best box among the image's boxes; 0 in the padding."""
    counts: Tensor
    """(B,) int64."""
    groups: Tensor
    """(B, M) int64: the place among the D of the box that took the given box in; -1 if D were full, or padding."""


def best_first(boxes: Tensor, scores: Tensor) -> Tensor:
    """Positions (..., M) by falling score, NaN first; on a tie by rising x1, y1, x2, y2 and position."""
    order = boxes[..., 3].sort(stable=True).indices
    for side in (2, 1, 0):
        order = order.gather(-1, boxes[..., side].gather(-1, order).sort(stable=True).indices)
    return order.gather(-1, scores.gather(-1, order).sort(descending=True, stable=True).indices)


def overlaps(a: Tensor, b: Tensor, match_metric: str) -> Tensor:
    """The metric of boxes (..., 4) that broadcast; NaN where one has a NaN, no area or an infinite one."""
    side = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0)
    intersection = side[..., 0] * side[..., 1]
    area, other = ((box[..., 2] - box[..., 0]) * (box[..., 3] - box[..., 1]) for box in (a, b))
    if match_metric == "IOU":
        return intersection / (area + other - intersection)
    return intersection / (torch.minimum(area, other) + 0 * (area + other))


def greedy_nmm_reference(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor | None,
    counts: Tensor,
    match_metric: str = "IOS",
    match_threshold: float = 0.5,
    max_detections: int = 300,
) -> Merged:
    """The definition; see :func:`greedy_nmm`."""
    threshold = _rounded(match_threshold, boxes.dtype)
    out = _empty(boxes, max_detections)
    for b, count in enumerate(counts_on_host(counts)):
        left = best_first(boxes[b, :count], scores[b, :count])
        d = 0
        while len(left) and d < max_detections:
            best, rest = left[0], left[1:]
            taken = overlaps(boxes[b, best], boxes[b, rest], match_metric) >= threshold
            if labels is not None:
                taken &= labels[b, rest] == labels[b, best]
            box = boxes[b, best]
            for member in boxes[b, rest[taken]]:
                if overlaps(box, member, match_metric) >= threshold:
                    box = torch.cat((torch.minimum(box[:2], member[:2]), torch.maximum(box[2:], member[2:])))
            out.boxes[b, d], out.positions[b, d] = box, best
            out.groups[b, best] = out.groups[b, rest[taken]] = d
            left, d = rest[~taken], d + 1
        out.counts[b] = d
    return out


def _rounded(threshold: float, dtype: torch.dtype) -> float:
    """The threshold in the boxes' precision, in which the metric is compared with it."""
    return threshold if dtype == torch.float64 else float(np.float32(threshold))


def _empty(boxes: Tensor, max_detections: int) -> Merged:
    """No box left."""
    batch, width = boxes.shape[:2]
    return Merged(
        boxes.new_zeros(batch, max_detections, 4),
        boxes.new_zeros(batch, max_detections, dtype=torch.int64),
        boxes.new_zeros(batch, dtype=torch.int64),
        boxes.new_full((batch, width), -1, dtype=torch.int64),
    )


_COLUMNS, _LANES = 64, 32  # boxes that a program assigns, and groups that one unites


@triton.jit(do_not_specialize=["width", "most"])
def _group_kernel(
    boxes_ptr, labels_ptr, counts_ptr, positions_ptr, kept_counts_ptr, groups_ptr, width, most, threshold,
    above_threshold, SMALLER: tl.constexpr, COLUMNS: tl.constexpr, WORD: tl.constexpr,
):  # fmt: skip
    """Program (t, b) finds, for COLUMNS boxes of image b, the first kept box that takes each in; ``most`` is none."""
    image = tl.program_id(1).to(tl.int64)
    count = count_of(counts_ptr, image, width)
    kept = tl.load(kept_counts_ptr + image).to(tl.int32)
    i = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = i < count
    boxes_ptr += image * width * 4
    positions_ptr += image * most
    if labels_ptr is not None:
        labels_ptr += image * width
    below = tl.where(inside, i, 0)
    box = load_box(boxes_ptr, labels_ptr, below[None, :])
    group = tl.full([COLUMNS], 0, tl.int32) + most
    waiting = inside
    first = 0
    while (first < kept) & (tl.max(waiting.to(tl.int32), axis=0) > 0):
        slots = first + tl.arange(0, WORD)
        above = tl.load(positions_ptr + slots, mask=slots < kept, other=0).to(tl.int32)
        better = load_box(boxes_ptr, labels_ptr, above[:, None])
        taken = overlap(better, box, threshold, above_threshold, SMALLER) > 0
        taken |= above[:, None] == below[None, :]  # a kept box without an area, too
        taken &= (slots < kept)[:, None] & waiting[None, :]
        found = tl.min(tl.where(taken, slots[:, None], most), axis=0)
        group = tl.where(waiting, found, group)
        waiting &= found == most
        first += WORD
    tl.store(groups_ptr + image * width + i, group, mask=i < width)


@triton.jit(do_not_specialize=["width", "most"])
def _unite_kernel(
    boxes_ptr, positions_ptr, kept_counts_ptr, members_ptr, starts_ptr, out_ptr, width, most, threshold,
    SMALLER: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Program (t, b) lets LANES kept boxes of image b grow, each by its own members, which lie best first."""
    image = tl.program_id(1).to(tl.int64)
    d = tl.program_id(0) * LANES + tl.arange(0, LANES)
    valid = (d < most) & (d < tl.load(kept_counts_ptr + image))
    boxes_ptr += image * width * 4
    members_ptr += image * width
    starts_ptr += image * (most + 1)
    ptr = boxes_ptr + tl.load(positions_ptr + image * most + d, mask=valid, other=0) * 4
    x1, y1 = tl.load(ptr, mask=valid, other=0.0), tl.load(ptr + 1, mask=valid, other=0.0)
    x2, y2 = tl.load(ptr + 2, mask=valid, other=0.0), tl.load(ptr + 3, mask=valid, other=0.0)
    at = tl.load(starts_ptr + d, mask=valid, other=0)
    end = tl.load(starts_ptr + d + 1, mask=valid, other=0)
    while tl.max((at < end).to(tl.int32), axis=0) > 0:
        going = at < end
        member = boxes_ptr + tl.load(members_ptr + at, mask=going, other=0) * 4
        u1, v1 = tl.load(member, mask=going, other=0.0), tl.load(member + 1, mask=going, other=0.0)
        u2, v2 = tl.load(member + 2, mask=going, other=0.0), tl.load(member + 3, mask=going, other=0.0)
        side = tl.maximum(tl.minimum(x2, u2) - tl.maximum(x1, u1), 0.0)
        intersection = side * tl.maximum(tl.minimum(y2, v2) - tl.maximum(y1, v1), 0.0)
        area, other = (x2 - x1) * (y2 - y1), (u2 - u1) * (v2 - v1)
        whole = tl.minimum(area, other) if SMALLER else area + other - intersection
        grows = going & (tl.div_rn(intersection, whole) > threshold)
        x1, y1 = tl.where(grows, tl.minimum(x1, u1), x1), tl.where(grows, tl.minimum(y1, v1), y1)
        x2, y2 = tl.where(grows, tl.maximum(x2, u2), x2), tl.where(grows, tl.maximum(y2, v2), y2)
        at += 1
    out_ptr += (image * most + d) * 4
    tl.store(out_ptr, x1, mask=d < most)
    tl.store(out_ptr + 1, y1, mask=d < most)
    tl.store(out_ptr + 2, x2, mask=d < most)
    tl.store(out_ptr + 3, y2, mask=d < most)


@torch.library.custom_op("retina_fast::greedy_nmm", mutates_args=())
def _op(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor | None,
    counts: Tensor,
    match_metric: str,
    match_threshold: float,
    max_detections: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The fields of Merged, of float32 boxes. The number of launches depends on M, and on whether there are labels."""
    batch, width = boxes.shape[:2]
    empty = _empty(boxes, max_detections)
    if not batch or not width or not max_detections:
        return empty[:]
    smaller, threshold = match_metric == "IOS", _rounded(match_threshold, boxes.dtype)
    inside = torch.arange(width, device=boxes.device) < counts[:, None]
    order = best_first(boxes, scores)
    order = order.gather(1, inside.gather(1, order).to(torch.int8).sort(descending=True, stable=True, dim=1).indices)
    keys = (1 << POSITION_BITS.value) - 1 - order  # from which the kernels read the position
    boxes, labels, counts = boxes.contiguous(), None if labels is None else labels.contiguous(), counts.contiguous()
    below = float(np.nextafter(np.float32(threshold), np.float32(0)))  # what is above it is at least the threshold
    strict = thresholds_of(below)
    with torch.cuda.device_of(boxes):
        progress = boxes.new_zeros(batch, tile_progress(width, labels is not None), dtype=torch.int32)
        kept, kept_counts = suppress_by_tiles(boxes, labels, keys, counts, strict, max_detections, progress, smaller)
        groups = boxes.new_empty(batch, width, dtype=torch.int32)
        _group_kernel[(triton.cdiv(width, _COLUMNS), batch)](
            boxes, labels, counts, kept, kept_counts, groups, width, max_detections, *strict, SMALLER=smaller,
            COLUMNS=_COLUMNS, WORD=WORD.value, enable_fp_fusion=False,
        )  # fmt: skip
        by_group, ranks = groups.gather(1, order).sort(dim=1, stable=True)
        members = order.gather(1, ranks)
        ends = torch.arange(max_detections + 1, dtype=torch.int32, device=boxes.device).expand(batch, -1)
        starts = torch.searchsorted(by_group, ends.contiguous())
        out = boxes.new_empty(batch, max_detections, 4)
        _unite_kernel[(triton.cdiv(max_detections, _LANES), batch)](
            boxes, kept, kept_counts, members, starts, out, width, max_detections, strict[0], SMALLER=smaller,
            LANES=_LANES, num_warps=1, enable_fp_fusion=False,
        )  # fmt: skip
    return out, kept, kept_counts, torch.where(groups < max_detections, groups.long(), -1)


@torch.library.custom_op("retina_fast::greedy_nmm_cpu", mutates_args=())
def _cpu_op(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor | None,
    counts: Tensor,
    match_metric: str,
    match_threshold: float,
    max_detections: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The fields of Merged, image by image on the CPU, wherever the tensors are."""
    out = _empty(boxes, max_detections)
    threshold = _rounded(match_threshold, boxes.dtype)
    for b, count in enumerate(counts_on_host(counts)):
        order = best_first(boxes[b, :count], scores[b, :count])
        own = None if labels is None else labels[b, order].cpu().numpy()
        grown, kept, groups = merge_image(boxes[b, order].cpu().numpy(), own, match_metric, threshold, max_detections)
        out.boxes[b, : len(kept)] = torch.from_numpy(grown).to(boxes.device)
        out.positions[b, : len(kept)] = order[torch.from_numpy(kept).to(boxes.device)]
        out.groups[b, order] = torch.from_numpy(groups).to(boxes.device)
        out.counts[b] = len(kept)
    return out[:]


@_op.register_fake
@_cpu_op.register_fake
def _(boxes, scores, labels, counts, match_metric, match_threshold, max_detections):
    batch, width = boxes.shape[:2]
    positions = boxes.new_empty((batch, max_detections), dtype=torch.int64)
    groups = boxes.new_empty((batch, width), dtype=torch.int64)
    return boxes.new_empty(batch, max_detections, 4), positions, boxes.new_empty(batch, dtype=torch.int64), groups


def greedy_nmm(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor | None,
    counts: Tensor,
    match_metric: str = "IOS",
    match_threshold: float = 0.5,
    max_detections: int = 300,
) -> Merged:
    """Merge overlapping boxes of one class into the best of them, in every image of a padded batch.

    Args:
        boxes: ``(B, M, 4)`` xyxy, with M below 2^29.
        scores: ``(B, M)``; a merged box has the score of its best one. NaN ranks above all.
        labels: ``(B, M)`` integer classes; None merges across classes.
        counts: ``(B,)`` integers: only the first counts[b] boxes of image b count.
        match_metric: "IOU", or "IOS": intersection over the smaller area.
        match_threshold: above 0, at most 1: a box is taken in when its overlap with a better one is at least that.
        max_detections: D, the most boxes left of an image.

    Raises:
        ValueError: if the shapes do not fit, M is 2^29 or more, labels or counts are not integers, a count is
            negative (on a CPU alone), match_metric or match_threshold is none of these, max_detections is negative, or
            the tensors lie on different devices.

    Example::

        >>> boxes = torch.tensor([[[0.0, 0, 8, 8], [4, 0, 12, 8], [20, 20, 28, 28]]])
        >>> merged = greedy_nmm(boxes, torch.tensor([[0.9, 0.8, 0.7]]), None, torch.tensor([3]), "IOS", 0.4, 2)
        >>> merged.boxes, merged.groups
        (tensor([[[ 0.,  0., 12.,  8.],
                 [20., 20., 28., 28.]]]), tensor([[0, 0, 1]]))
    """
    check_boxes(boxes, scores, labels, counts)
    if match_metric not in METRICS:
        raise ValueError(f"match_metric must be one of {', '.join(METRICS)}, got {match_metric!r}")
    if not 0 < match_threshold <= 1:
        raise ValueError(f"match_threshold must be above 0 and at most 1, got {match_threshold}")
    if max_detections < 0:
        raise ValueError(f"max_detections must be at least 0, got {max_detections}")
    boxes, scores = at_least_float32(boxes.detach()), at_least_float32(scores.detach())
    op = _op if runs_triton(boxes, scores) else _cpu_op
    return Merged(*op(boxes, scores, labels, counts, match_metric, match_threshold, max_detections))
