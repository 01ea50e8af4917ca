"""The operations for people with a detector of their own.

``sigmoid_focal_loss``, ``nms`` and ``batched_nms`` have torchvision.ops' signatures. The native ones beside them take
integer labels, levels as the heads wrote them, and padded batches.
"""

import torch
from torch import Tensor

from retina_fast.kernels.anchor_matching import Matches, anchor_matching
from retina_fast.kernels.batched_nms import Kept, nms_image
from retina_fast.kernels.batched_nms import batched_nms as padded_batched_nms
from retina_fast.kernels.box_decode import box_decode
from retina_fast.kernels.box_loss import box_loss
from retina_fast.kernels.candidate_selection import Candidates, candidate_selection
from retina_fast.kernels.focal_loss import focal_loss
from retina_fast.kernels.image_batch import image_batch
from retina_fast.kernels.sigmoid_focal_loss import sigmoid_focal_loss

__all__ = [
    "Candidates",
    "Kept",
    "Matches",
    "anchor_matching",
    "batched_nms",
    "box_decode",
    "box_loss",
    "candidate_selection",
    "focal_loss",
    "image_batch",
    "nms",
    "padded_batched_nms",
    "sigmoid_focal_loss",
]


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """torchvision.ops.nms: ``(D,)`` int64 positions of the kept boxes by falling score, lower index first on a tie.

    Args:
        boxes: ``(N, 4)`` xyxy.
        scores: ``(N,)``.
        iou_threshold: a box goes when its IoU with a better kept one is strictly above.

    Raises:
        ValueError: if the shapes do not fit.

    Example::

        >>> import torch
        >>> nms(torch.tensor([[0.0, 0, 9, 9], [0, 0, 9, 8], [20, 20, 29, 29]]), torch.tensor([0.5, 0.9, 0.1]), 0.5)
        tensor([1, 2])
    """
    _check_boxes(boxes, scores)
    return _suppress(boxes, scores, None, iou_threshold)


def batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    """torchvision.ops.batched_nms, exact per class whatever the boxes' dtype and size.

    Args:
        boxes: ``(N, 4)`` xyxy.
        scores: ``(N,)``.
        idxs: ``(N,)`` integer classes: boxes of different ones do not suppress each other.
        iou_threshold: a box goes when its IoU with a better kept one of its class is strictly above.

    Raises:
        ValueError: if the shapes do not fit.

    Example::

        >>> import torch
        >>> boxes = torch.tensor([[0.0, 0, 9, 9], [0, 0, 9, 8], [0, 0, 9, 9]])
        >>> batched_nms(boxes, torch.tensor([0.5, 0.9, 0.1]), torch.tensor([0, 0, 1]), 0.5)
        tensor([1, 2])
    """
    _check_boxes(boxes, scores)
    if idxs.shape != scores.shape:
        raise ValueError(f"idxs must be (N,) = {tuple(scores.shape)}, got {tuple(idxs.shape)}")
    return _suppress(boxes, scores, idxs, iou_threshold)


def _suppress(boxes: Tensor, scores: Tensor, labels: Tensor | None, iou_threshold: float) -> Tensor:
    if not boxes.is_cuda:
        return nms_image(boxes, scores, labels, iou_threshold)
    counts = torch.full((1,), len(boxes), device=boxes.device)
    labels = None if labels is None else labels[None]
    kept = padded_batched_nms(boxes[None], scores[None], labels, counts, iou_threshold, len(boxes))
    return kept.positions[0, : int(kept.counts)]  # how many there are is the shape: the host must know


def _check_boxes(boxes: Tensor, scores: Tensor) -> None:
    if boxes.dim() != 2 or boxes.shape[1] != 4:
        raise ValueError(f"boxes must be (N, 4), got {tuple(boxes.shape)}")
    if scores.shape != boxes.shape[:1]:
        raise ValueError(f"scores must be (N,) = ({len(boxes)},), got {tuple(scores.shape)}")
