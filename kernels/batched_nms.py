"""Greedy non-maximum suppression, exact per class, for a batch of images at once (Neubeck and Van Gool 2006).

By falling score, the lower index first on a tie, a box is kept unless its IoU with a kept box of its class exceeds the
threshold; IoU = I / (A + B - I) in float32. torchvision's ``batched_nms`` moves classes apart by adding
label * (largest coordinate + 1) to small inputs, which rounds: its two paths disagree on borderline boxes, and 16-bit
offsets overflow. Nothing is added here.
"""

from typing import NamedTuple

import torch
import torchvision
from torch import Tensor


class Kept(NamedTuple):
    """The boxes kept of B images, padded to D; the first counts[b] of a row count, best first."""

    positions: Tensor
    """(B, D) int64: position of the box among the image's boxes; 0 in the padding."""
    counts: Tensor
    """(B,) int64."""


def nms_image(boxes: Tensor, scores: Tensor, labels: Tensor | None, iou_thresh: float) -> Tensor:
    """Positions of the kept boxes of one image, best first."""
    order = scores.sort(descending=True, stable=True).indices
    boxes = boxes[order].float()
    falling = torch.arange(len(order), 0, -1, device=boxes.device).float()  # stands in for the scores: no ties left
    if labels is None:
        return order[torchvision.ops.nms(boxes, falling, iou_thresh)]
    by_class = labels[order].sort(stable=True)
    kept = torch.zeros(len(order), dtype=torch.bool, device=boxes.device)
    for members in by_class.indices.split(by_class.values.unique_consecutive(return_counts=True)[1].tolist()):
        if len(members) > 1:
            members = members[torchvision.ops.nms(boxes[members], falling[members], iou_thresh)]
        kept[members] = True
    return order[kept]


def batched_nms_reference(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor | None,
    counts: Tensor,
    iou_thresh: float = 0.5,
    max_detections: int = 300,
) -> Kept:
    """The definition; see :func:`batched_nms`."""
    positions = torch.zeros((len(boxes), max_detections), dtype=torch.int64, device=boxes.device)
    kept_counts = torch.zeros(len(boxes), dtype=torch.int64, device=boxes.device)
    for b, count in enumerate(counts.tolist()):
        image_labels = None if labels is None else labels[b, :count]
        kept = nms_image(boxes[b, :count], scores[b, :count], image_labels, iou_thresh)[:max_detections]
        positions[b, : len(kept)] = kept
        kept_counts[b] = len(kept)
    return Kept(positions, kept_counts)


def batched_nms(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor | None,
    counts: Tensor,
    iou_thresh: float = 0.5,
    max_detections: int = 300,
) -> Kept:
    """Suppress overlapping boxes of one class in every image of a padded batch.

    Args:
        boxes: ``(B, M, 4)`` xyxy.
        scores: ``(B, M)``.
        labels: ``(B, M)`` integer classes; None suppresses across classes.
        counts: ``(B,)``: only the first counts[b] boxes of image b count.
        iou_thresh: a box goes when its IoU with a better kept one is strictly above.
        max_detections: D, the most boxes kept of an image.

    Example::

        >>> boxes = torch.tensor([[[0.0, 0, 9, 9], [0, 0, 9, 8], [0, 0, 9, 9]]])
        >>> batched_nms(boxes, torch.tensor([[0.9, 0.8, 0.7]]), torch.tensor([[1, 1, 0]]), torch.tensor([3]), 0.5, 4)
        Kept(positions=tensor([[0, 2, 0, 0]]), counts=tensor([2]))
    """
    return batched_nms_reference(boxes, scores, labels, counts, iou_thresh, max_detections)
