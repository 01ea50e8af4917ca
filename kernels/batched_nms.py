"""Greedy non-maximum suppression, exact per class, for a batch of images at once (Neubeck and Van Gool 2006).

Boxes are visited by falling score. On a tie the lower index goes first, and NaN goes before all numbers. A box is kept
unless its IoU with a kept box of its class exceeds the threshold. IoU = I / (A + B - I) is computed in float32, or in
float64 for float64 boxes. A box with a NaN or of infinite area overlaps nothing.

torchvision's ``batched_nms`` keeps classes apart by adding label * (largest coordinate + 1) to the boxes of small
inputs. The sum is rounded: its two paths disagree on borderline boxes, and 16-bit coordinates overflow. Here nothing is
added. torchvision also writes the overlaps of all pairs as bits, which one block then reads to the end. Here a few
thousand boxes are shared out by class to programs that each walk down their own (``nms_walk.py``). Many boxes, or those
of one class, are compared by the whole GPU, tile by tile (``nms_tiles.py``). The sizes alone decide which, so that
nothing waits for the GPU. On a CPU each image goes through ``nms_cpu.py``.
"""

import functools
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.ops.boxes import nms as torchvision_nms  # bound now: ours may come to stand in its place

from retina_fast.kernels.arguments import at_least_float32, check_boxes, counts_on_host
from retina_fast.kernels.dispatch import runs_triton, tl, triton
from retina_fast.kernels.key_sort import pack, rising, sort_keys, sorts_by_kernels
from retina_fast.kernels.nms_cpu import best_first, kept_class_by_class, kept_of_image
from retina_fast.kernels.nms_overlap import POSITION_BITS, count_of
from retina_fast.kernels.nms_tiles import suppress_by_tiles, tile_progress
from retina_fast.kernels.nms_walk import progress_blocks, suppress_by_walks


class Kept(NamedTuple):
    """The boxes kept of B images, padded to D; the first counts[b] of a row count, best first."""

    positions: Tensor
    """(B, D) int64: position of the box among the image's boxes; 0 in the padding."""
    counts: Tensor
    """(B,) int64."""


FEW = 256  # boxes of one class, up to which torchvision's own function is the fastest on a CPU


def _on_host(x: Tensor) -> NDArray[Any]:
    """A tensor's numbers, without a copy where they lie on the host."""
    x = x.detach().resolve_neg()  # a view may stand for the numbers' negatives
    return (x.cpu() if x.is_cuda else x).numpy()


def nms_image(
    boxes: Tensor, scores: Tensor | None, labels: Tensor | None, iou_thresh: float, most: int | None = None
) -> Tensor:
    """Positions of the kept boxes of one image, best first, at most ``most``; without scores the boxes lie best first.
    It runs on the CPU, wherever the tensors are."""
    boxes = at_least_float32(boxes).detach()
    rows = _on_host(boxes)
    classes = None if labels is None else _on_host(labels)
    fits = scores is not None and scores.element_size() <= boxes.element_size()
    if scores is not None and fits and 1 < len(rows) <= FEW and (classes is None or not (classes != classes[0]).any()):
        return torchvision_nms(boxes, scores.to(boxes.dtype), iou_thresh)[:most]
    order = None if scores is None else best_first(_on_host(at_least_float32(scores)))
    if order is not None:
        rows, classes = rows.take(order, axis=0), None if classes is None else classes.take(order)
    thresh = iou_thresh if rows.dtype == np.float64 else rounded_down(iou_thresh)
    if thresh < 0:  # boxes that are apart suppress each other
        kept = kept_class_by_class(rows, classes, thresh)[:most]
    else:
        kept = kept_of_image(rows, classes, thresh, most)
    positions = torch.from_numpy(kept if order is None else order.take(kept))
    return positions.to(boxes.device) if boxes.is_cuda else positions


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
    for b, count in enumerate(counts_on_host(counts)):
        image_scores, image_labels = (None if rows is None else rows[b, :count] for rows in (scores, labels))
        kept = nms_image(boxes[b, :count], image_scores, image_labels, iou_thresh, max_detections)
        positions[b, : len(kept)] = kept
        kept_counts[b] = len(kept)
    return Kept(positions, kept_counts)


_TILE = 512
# Pairs of a box and a kept one, up to which programs walk: by prediction, where one program's walk at its longest
# takes as long as the tiles.
_WALKED, _WALKED_OF_ONE_CLASS = 2**21, 2**13


@triton.jit(do_not_specialize=["width", "zeros"])
def _score_keys_kernel(
    scores_ptr, keys_ptr, counts_ptr, lengths_ptr, progress_ptr, width, zeros, TILE: tl.constexpr
):  # fmt: skip
    """Program (t, b) makes the keys of TILE boxes of image b, which order by falling score, then by position; as int32
    by falling score alone. Program (0, b) writes how many there are, and the zeros from which suppression counts its
    progress."""
    image = tl.program_id(1).to(tl.int64)
    count = count_of(counts_ptr, image, width)
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)
    scores = tl.load(scores_ptr + image * width + i, mask=i < width, other=0.0).to(tl.float32)
    if keys_ptr.dtype.element_ty == tl.int32:
        keys = tl.where(i < count, rising(scores), -(2**31))
    else:
        keys = tl.where(i < count, pack(scores, i, POSITION_BITS, 0), -1)
    tl.store(keys_ptr + image * width + i, keys, mask=i < width)
    if tl.program_id(0) == 0:
        tl.store(lengths_ptr + image, count)
        for first in range(0, zeros, TILE):
            i = first + tl.arange(0, TILE)
            tl.store(progress_ptr + image * zeros + i, tl.zeros([TILE], tl.int32), mask=i < zeros)


@functools.cache
def rounded_down(value: float) -> float:
    """The greatest float32 that is not above a float64: a float32 number exceeds either both or neither."""
    with np.errstate(over="ignore"):
        near = np.float32(value)
    return float(near if float(near) <= value else np.nextafter(near, np.float32(-np.inf)))


def thresholds_of(iou_thresh: float) -> tuple[float, float]:
    """The threshold as the kernels take it, and the next number above it, or infinity if it is not above 0."""
    thresh = rounded_down(iou_thresh)
    return thresh, float(np.nextafter(np.float32(thresh), np.float32(np.inf))) if thresh > 0 else float("inf")


def is_walked(width: int, max_detections: int, by_class: bool) -> bool:
    """Whether programs walk down the boxes of their classes; otherwise all of the GPU goes tile by tile."""
    return width * min(max_detections, width) <= (_WALKED if by_class else _WALKED_OF_ONE_CLASS)


def _batched_nms_triton(
    boxes: Tensor, scores: Tensor | None, labels: Tensor | None, counts: Tensor, iou_thresh: float, max_detections: int
) -> tuple[Tensor, Tensor]:
    """The fields of Kept. The number of launches depends on B, M, D and whether there are labels."""
    batch, width = boxes.shape[:2]
    boxes, counts = boxes.contiguous(), counts.contiguous()
    labels = None if labels is None else labels.contiguous()
    walked = is_walked(width, max_detections, labels is not None)
    zeros = progress_blocks(width) if walked else tile_progress(width, labels is not None)
    progress = boxes.new_empty(batch, zeros, dtype=torch.int32)
    with torch.cuda.device_of(boxes):
        keys = None
        if scores is None:
            progress.zero_()
        else:
            short = sorts_by_kernels(width)
            keys = boxes.new_empty(batch, width, dtype=torch.int64 if short else torch.int32)
            lengths = boxes.new_empty(batch, dtype=torch.int32)
            _score_keys_kernel[(max(1, triton.cdiv(width, _TILE)), batch)](
                scores.contiguous(), keys, counts, lengths, progress, width, zeros, TILE=_TILE, enable_fp_fusion=False
            )
            # torch.sort goes half as often over a long row if no position is in the keys.
            keys = sort_keys(keys, lengths) if short else keys.sort(dim=1, descending=True, stable=True).indices.int()
            counts = lengths
        suppress = suppress_by_walks if walked else suppress_by_tiles
        return suppress(boxes, labels, keys, counts, thresholds_of(iou_thresh), max_detections, progress)


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
        boxes: ``(B, M, 4)`` xyxy, with M below 2^29. With float64 boxes or scores the reference runs, on a GPU, too.
        scores: ``(B, M)``; a NaN ranks above all. None: the boxes lie best first already.
        labels: ``(B, M)`` integer classes; None suppresses across classes.
        counts: ``(B,)`` integers: only the first counts[b] boxes of image b count.
        iou_thresh: a box goes when its IoU with a better kept one is strictly above.
        max_detections: D, the most boxes kept of an image.

    Raises:
        ValueError: if the shapes do not fit, M is 2^29 or more, labels or counts are not integers, max_detections or,
            on a CPU, a count is negative, or the tensors lie on different devices.

    Example::

        >>> boxes = torch.tensor([[[0.0, 0, 9, 9], [0, 0, 9, 8], [0, 0, 9, 9]]])
        >>> batched_nms(boxes, torch.tensor([[0.9, 0.8, 0.7]]), torch.tensor([[1, 1, 0]]), torch.tensor([3]), 0.5, 4)
        Kept(positions=tensor([[0, 2, 0, 0]]), counts=tensor([2]))
    """
    check_boxes(boxes, scores, labels, counts)
    if max_detections < 0:
        raise ValueError(f"max_detections must be at least 0, got {max_detections}")
    scores = None if scores is None else scores.detach()
    boxes = at_least_float32(boxes.detach())
    op = _op if runs_triton(boxes, scores) else _reference_op
    return Kept(*op(boxes, scores, labels, counts, iou_thresh, max_detections))
