"""Greedy non-maximum suppression, exact per class, for a batch of images at once (Neubeck and Van Gool 2006).

Boxes are visited by falling score. On a tie the lower index goes first, and NaN goes before all numbers. A box is kept
unless its IoU with a kept box of its class exceeds the threshold. IoU = I / (A + B - I) is computed in float32, or in
float64 for float64 boxes. A box with a NaN or of infinite area overlaps nothing.

torchvision's ``batched_nms`` keeps classes apart by adding label * (largest coordinate + 1) to the boxes of small
inputs. The sum is rounded: its two paths disagree on borderline boxes, and 16-bit coordinates overflow. Here nothing is
added. torchvision also writes the overlaps of all pairs as bits, which one block then reads to the end. Here each
image's classes are shared out to 16 programs. A program walks down the boxes of its classes in tiles of 32: it compares
a tile with the boxes it has kept so far, then within itself. It ends when it has kept as many as the result can hold.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.ops.boxes import nms as torchvision_nms  # bound now: ours may come to stand in its place

from retina_fast.kernels.arguments import at_least_float32, check_devices, check_integers, check_shape
from retina_fast.kernels.compiler import runs_triton, tl, triton
from retina_fast.kernels.key_sort import pack, sort_keys, unpack_index


class Kept(NamedTuple):
    """The boxes kept of B images, padded to D; the first counts[b] of a row count, best first."""

    positions: Tensor
    """(B, D) int64: position of the box among the image's boxes; 0 in the padding."""
    counts: Tensor
    """(B,) int64."""


def nms_image(boxes: Tensor, scores: Tensor | None, labels: Tensor | None, iou_thresh: float) -> Tensor:
    """Positions of the kept boxes of one image, best first; without scores the boxes lie best first."""
    order = None if scores is None else scores.sort(descending=True, stable=True).indices
    boxes = at_least_float32(boxes)
    boxes = boxes if order is None else boxes[order]
    falling = torch.arange(len(boxes), 0, -1, device=boxes.device).to(boxes.dtype)  # for the scores: no ties left
    if labels is None or bool((labels == labels[:1]).all()):
        kept = torchvision_nms(boxes, falling, iou_thresh)
    else:
        by_class = (labels if order is None else labels[order]).sort(stable=True)
        is_kept = torch.zeros(len(boxes), dtype=torch.bool, device=boxes.device)
        for members in by_class.indices.split(by_class.values.unique_consecutive(return_counts=True)[1].tolist()):
            if len(members) > 1:
                members = members[torchvision_nms(boxes[members], falling[members], iou_thresh)]
            is_kept[members] = True
        kept = is_kept.nonzero().squeeze(1)
    return kept if order is None else order[kept]


def batched_nms_reference(
    boxes: Tensor,
    scores: Tensor | None,
    labels: Tensor | None,
    counts: Tensor,
    iou_thresh: float = 0.5,
    max_detections: int = 300,
) -> Kept:
    """The definition; see :func:`batched_nms`."""
    positions = torch.zeros((len(boxes), max_detections), dtype=torch.int64, device=boxes.device)
    kept_counts = torch.zeros(len(boxes), dtype=torch.int64, device=boxes.device)
    for b, count in enumerate(counts.tolist()):
        image_scores, image_labels = (None if rows is None else rows[b, :count] for rows in (scores, labels))
        kept = nms_image(boxes[b, :count], image_scores, image_labels, iou_thresh)[:max_detections]
        positions[b, : len(kept)] = kept
        kept_counts[b] = len(kept)
    return Kept(positions, kept_counts)


_GROUPS = 16  # programs an image; a power of two
_SCAN = 512  # boxes whose class a program looks at in one go
_POSITION_BITS = tl.constexpr(31)  # of a key
_WORD = tl.constexpr(32)  # boxes of a tile, one bit each; with 64 the pairs no longer fit the registers


@triton.jit(do_not_specialize=["width"])
def _score_keys_kernel(scores_ptr, keys_ptr, counts_ptr, width, TILE: tl.constexpr):
    """Program (t, b) makes the keys of TILE boxes of image b, which order by falling score, then by position."""
    image = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)
    scores = tl.load(scores_ptr + image * width + i, mask=i < width, other=0.0).to(tl.float32)
    keys = tl.where(i < tl.load(counts_ptr + image), pack(scores, i, _POSITION_BITS, 0), -1)
    tl.store(keys_ptr + image * width + i, keys, mask=i < width)


@triton.jit
def _position(keys_ptr, i, mask):
    """Position of the i-th best box of an image; 0 where masked."""
    if keys_ptr is None:
        position = tl.where(mask, i, 0)
    else:
        key = tl.load(keys_ptr + i, mask=mask, other=-1)
        position = unpack_index(key, _POSITION_BITS)
    return position


@triton.jit
def _overlap(boxes_ptr, labels_ptr, above, below, comparable, iou_thresh, below_thresh):
    """Which of the boxes ``above`` [R, 1] suppress which of the boxes ``below`` [1, C], where comparable [R, C]."""
    if labels_ptr is not None:
        comparable &= tl.load(labels_ptr + above) == tl.load(labels_ptr + below)
    x1, y1 = tl.load(boxes_ptr + above * 4), tl.load(boxes_ptr + above * 4 + 1)
    x2, y2 = tl.load(boxes_ptr + above * 4 + 2), tl.load(boxes_ptr + above * 4 + 3)
    u1, v1 = tl.load(boxes_ptr + below * 4), tl.load(boxes_ptr + below * 4 + 1)
    u2, v2 = tl.load(boxes_ptr + below * 4 + 2), tl.load(boxes_ptr + below * 4 + 3)
    width = tl.maximum(tl.minimum(x2, u2) - tl.maximum(x1, u1), 0.0)
    height = tl.maximum(tl.minimum(y2, v2) - tl.maximum(y1, v1), 0.0)
    intersection = width * height
    union = (x2 - x1) * (y2 - y1) + (u2 - u1) * (v2 - v1) - intersection
    # A division costs as much as all of this, and nearly no pair comes near the threshold. The quotient of the other
    # pairs is not looked at: 1 instead of mostly 0, which would take the slow path of the division.
    near = comparable & ~(intersection < below_thresh * union)
    suppressed = near.to(tl.int32)
    if tl.max(tl.max(suppressed, axis=1), axis=0) > 0:
        iou = tl.div_rn(tl.where(near, intersection, union), union)
        suppressed &= (iou > iou_thresh).to(tl.int32)
    return suppressed


@triton.jit
def _deal(
    labels_ptr, keys_ptr, members_ptr, scanned, tail, count, group, GROUPS: tl.constexpr, SCAN: tl.constexpr,
    RING: tl.constexpr,
):  # fmt: skip
    """Appends to the members those of the next SCAN boxes that belong to the program's classes; returns how many."""
    i = scanned + tl.arange(0, SCAN)
    mine = i < count
    if labels_ptr is not None:
        label = tl.load(labels_ptr + _position(keys_ptr, i, mine), mask=mine, other=0)
        mine &= (label & (GROUPS - 1)) == group
    slots = tail + tl.cumsum(mine.to(tl.int32), axis=0) - 1
    tl.store(members_ptr + slots % RING, i, mask=mine)
    return tl.sum(mine.to(tl.int32), axis=0)


@triton.jit
def _keep(
    boxes_ptr, labels_ptr, keys_ptr, members_ptr, kept_ptr, flags_ptr, head, tail, kept, max_kept, iou_thresh,
    below_thresh, RING: tl.constexpr, WORD: tl.constexpr,
):  # fmt: skip
    """Decides which of the next WORD members are kept; returns how many."""
    t = tl.arange(0, WORD)
    waiting = head + t < tail
    i = tl.load(members_ptr + (head + t) % RING, mask=waiting, other=0)
    position = _position(keys_ptr, i, waiting)
    suppressed = tl.zeros([WORD, WORD], tl.int32)
    first = 0
    while first < kept:
        above = tl.load(kept_ptr + first + t, mask=first + t < kept, other=0)
        comparable = (first + t < kept)[:, None] & waiting[None, :]
        suppressed |= _overlap(
            boxes_ptr, labels_ptr, above[:, None], position[None, :], comparable, iou_thresh, below_thresh
        )
        first += WORD
    alive = waiting & (tl.max(suppressed, axis=0) == 0)
    comparable = (t[:, None] < t[None, :]) & waiting[None, :]
    suppressed = _overlap(
        boxes_ptr, labels_ptr, position[:, None], position[None, :], comparable, iou_thresh, below_thresh
    )
    by = tl.sum(suppressed.to(tl.int64) << t[:, None], axis=0)  # [WORD]: the bits of those that suppress each
    bit = tl.full([WORD], 1, tl.int64) << t
    staying = tl.sum(tl.where(alive, bit, 0), axis=0)
    before = ~staying
    while staying != before:  # after n rounds the first n boxes are decided; two or three rounds mostly decide all
        before = staying
        staying = tl.sum(tl.where(alive & ((by & before) == 0), bit, 0), axis=0)
    chosen = ((staying >> t) & 1) == 1
    slots = kept + tl.cumsum(chosen.to(tl.int32), axis=0) - 1
    chosen &= slots < max_kept
    tl.store(kept_ptr + slots, position, mask=chosen)
    tl.store(flags_ptr + i, tl.full([WORD], 1, tl.int8), mask=chosen)
    return tl.sum(chosen.to(tl.int32), axis=0)


@triton.jit(do_not_specialize=["width", "max_kept"])
def _suppress_kernel(
    boxes_ptr, labels_ptr, keys_ptr, counts_ptr, members_ptr, kept_ptr, flags_ptr, width, max_kept, iou_thresh,
    below_thresh, GROUPS: tl.constexpr, SCAN: tl.constexpr, WORD: tl.constexpr,
):  # fmt: skip
    """Program (g, b) handles the classes of image b whose low bits are g. It raises the flags of the boxes it keeps, at
    most max_kept; the flags are in the order of the scores. Boxes not yet decided wait in a ring of members."""
    group = tl.program_id(0)
    image = tl.program_id(1).to(tl.int64)
    count = tl.load(counts_ptr + image).to(tl.int32)
    boxes_ptr += image * width * 4
    flags_ptr += image * width
    if labels_ptr is not None:
        labels_ptr += image * width
    if keys_ptr is not None:
        keys_ptr += image * width
    RING: tl.constexpr = SCAN + WORD
    members_ptr += (image * GROUPS + group) * RING
    kept_ptr += (image * GROUPS + group) * max_kept
    scanned, head, tail, kept = 0, 0, 0, 0
    while (kept < max_kept) & ((head < tail) | (scanned < count)):
        if (tail - head < WORD) & (scanned < count):
            tail += _deal(labels_ptr, keys_ptr, members_ptr, scanned, tail, count, group, GROUPS, SCAN, RING)
            scanned += SCAN
        else:
            kept += _keep(
                boxes_ptr, labels_ptr, keys_ptr, members_ptr, kept_ptr, flags_ptr, head, tail, kept, max_kept,
                iou_thresh, below_thresh, RING, WORD,
            )  # fmt: skip
            head = tl.minimum(head + WORD, tail)
        tl.debug_barrier()  # members and kept are read by other threads than wrote them


@triton.jit(do_not_specialize=["width", "max_detections"])
def _first_kernel(
    flags_ptr, keys_ptr, counts_ptr, positions_ptr, kept_counts_ptr, width, max_detections, SCAN: tl.constexpr
):
    """Program b writes the positions of the first flagged boxes of image b, and their number."""
    image = tl.program_id(0).to(tl.int64)
    count = tl.load(counts_ptr + image).to(tl.int32)
    flags_ptr += image * width
    positions_ptr += image * max_detections
    if keys_ptr is not None:
        keys_ptr += image * width
    start, kept = 0, 0
    while (kept < max_detections) & (start < count):
        i = start + tl.arange(0, SCAN)
        flag = tl.load(flags_ptr + i, mask=i < count, other=0).to(tl.int32)
        slots = kept + tl.cumsum(flag, axis=0) - 1
        position = _position(keys_ptr, i, i < count).to(tl.int64)
        tl.store(positions_ptr + slots, position, mask=(flag > 0) & (slots < max_detections))
        kept += tl.sum(flag, axis=0)
        start += SCAN
    tl.store(kept_counts_ptr + image, tl.minimum(kept, max_detections).to(tl.int64))


def rounded_down(value: float) -> float:
    """The greatest float32 that is not above a float64: a float32 number exceeds either both or neither."""
    near = np.float32(value)
    return float(near if float(near) <= value else np.nextafter(near, np.float32(-np.inf)))


def _batched_nms_triton(
    boxes: Tensor, scores: Tensor | None, labels: Tensor | None, counts: Tensor, iou_thresh: float, max_detections: int
) -> tuple[Tensor, Tensor]:
    """The fields of Kept. The number of launches depends on nothing but whether M is above 8192."""
    batch, width = boxes.shape[:2]
    boxes, counts = boxes.contiguous(), counts.contiguous()
    labels = None if labels is None else labels.contiguous()
    positions = boxes.new_zeros(batch, max_detections, dtype=torch.int64)
    kept_counts = torch.empty_like(counts, dtype=torch.int64)
    flags = boxes.new_zeros(batch, width, dtype=torch.int8)
    groups = 1 if labels is None else _GROUPS
    max_kept = min(max_detections, width)
    members = boxes.new_empty(batch, groups, _SCAN + _WORD.value, dtype=torch.int32)
    lists = boxes.new_empty(batch, groups, max_kept, dtype=torch.int32)
    thresh = rounded_down(iou_thresh)
    with torch.cuda.device_of(boxes):
        keys = None
        if scores is not None:
            keys = boxes.new_empty(batch, width, dtype=torch.int64)
            _score_keys_kernel[(triton.cdiv(width, _SCAN), batch)](
                scores.contiguous(), keys, counts, width, TILE=_SCAN, enable_fp_fusion=False
            )
            keys = sort_keys(keys, counts)
        _suppress_kernel[(groups, batch)](
            boxes, labels, keys, counts, members, lists, flags, width, max_kept, thresh,
            thresh * (1 - 2**-20) if thresh > 0 else float("-inf"), GROUPS=groups, SCAN=_SCAN, WORD=_WORD.value,
            enable_fp_fusion=False,
        )  # fmt: skip
        _first_kernel[(batch,)](
            flags, keys, counts, positions, kept_counts, width, max_detections, SCAN=_SCAN, enable_fp_fusion=False
        )
    return positions, kept_counts


_op = torch.library.custom_op("retina_fast::batched_nms", _batched_nms_triton, mutates_args=())


@torch.library.custom_op("retina_fast::batched_nms_reference", mutates_args=())
def _reference_op(
    boxes: Tensor, scores: Tensor | None, labels: Tensor | None, counts: Tensor, iou_thresh: float, max_detections: int
) -> tuple[Tensor, Tensor]:
    """The reference reads counts on the host: as an operation it is one node of a compiled or exported graph."""
    return batched_nms_reference(boxes, scores, labels, counts, iou_thresh, max_detections)


@_op.register_fake
@_reference_op.register_fake
def _(boxes, scores, labels, counts, iou_thresh, max_detections):
    positions = boxes.new_empty((boxes.shape[0], max_detections), dtype=torch.int64)
    return positions, boxes.new_empty(boxes.shape[0], dtype=torch.int64)


def batched_nms(
    boxes: Tensor,
    scores: Tensor | None,
    labels: Tensor | None,
    counts: Tensor,
    iou_thresh: float = 0.5,
    max_detections: int = 300,
) -> Kept:
    """Suppress overlapping boxes of one class in every image of a padded batch.

    Args:
        boxes: ``(B, M, 4)`` xyxy, M below 2^29: offsets of coordinates, up to 4 M, are 32 bits wide. Float64 boxes or
            scores take the reference's path on a GPU, too.
        scores: ``(B, M)``; a NaN ranks above all. None: the boxes lie best first already.
        labels: ``(B, M)`` integer classes; None suppresses across classes.
        counts: ``(B,)`` integers up to M: only the first counts[b] boxes of image b count.
        iou_thresh: a box goes when its IoU with a better kept one is strictly above.
        max_detections: D, the most boxes kept of an image.

    Raises:
        ValueError: if the shapes do not fit, M is 2^29 or more, labels or counts are not integers, max_detections is
            negative, or the tensors lie on different devices.

    Example::

        >>> boxes = torch.tensor([[[0.0, 0, 9, 9], [0, 0, 9, 8], [0, 0, 9, 9]]])
        >>> batched_nms(boxes, torch.tensor([[0.9, 0.8, 0.7]]), torch.tensor([[1, 1, 0]]), torch.tensor([3]), 0.5, 4)
        Kept(positions=tensor([[0, 2, 0, 0]]), counts=tensor([2]))
    """
    if boxes.dim() != 3 or boxes.shape[2] != 4:
        raise ValueError(f"boxes must be (B, M, 4), got {tuple(boxes.shape)}")
    batch, width = boxes.shape[:2]
    if width >= 2**29:
        raise ValueError(f"boxes must be fewer than 2^29 an image, got {width}")
    for name, rows in (("scores", scores), ("labels", labels)):
        if rows is not None:
            check_shape(name, rows, "(B, M)", (batch, width))
    check_shape("counts", counts, "(B,)", (batch,))
    check_integers(labels=labels, counts=counts)
    check_devices(boxes.device, scores=scores, labels=labels, counts=counts)
    if max_detections < 0:
        raise ValueError(f"max_detections must be at least 0, got {max_detections}")
    scores = None if scores is None else scores.detach()
    boxes = at_least_float32(boxes.detach())
    op = _op if runs_triton(boxes, scores) else _reference_op
    return Kept(*op(boxes, scores, labels, counts, iou_thresh, max_detections))
