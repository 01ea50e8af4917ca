"""The loss path: match anchors to ground truths, then focal loss and box loss over the levels as they lie."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.models.detection._utils import Matcher

from retina_fast.kernels.anchor_matching import anchor_matching
from retina_fast.kernels.box_loss import box_loss
from retina_fast.kernels.focal_loss import focal_loss
from retina_fast.targets import GroundTruths


def shared_or_stacked(anchors: Sequence[Tensor]) -> Tensor:
    """The anchors of a batch: ``(N, 4)`` where all images share one tensor, else ``(B, N, 4)``."""
    first = anchors[0]
    if all(image_anchors is first for image_anchors in anchors):
        return first.float()
    return torch.stack(list(anchors)).float()


def detection_losses(
    logits: Sequence[Tensor],
    deltas: Sequence[Tensor],
    anchors: Tensor,
    truths: GroundTruths,
    num_classes: int,
    matcher: Matcher,
    loss_type: str,
    gamma: float = 2.0,
) -> dict[str, Tensor]:
    """torchvision's two losses of a batch: per image, sum / max(1, foreground anchors); then the mean over images.

    Args:
        logits: the levels, each ``(B, A*K, H, W)`` or ``(B, N_l, K)``.
        deltas: the levels, each ``(B, A*4, H, W)`` or ``(B, N_l, 4)``.
        anchors: ``(N, 4)`` or ``(B, N, 4)`` float32 xyxy pixels.
        truths: the ground truths, in the same pixels.
        num_classes: K.
        matcher: its two thresholds and the low-quality rule are used.
        loss_type: one of l1, smooth_l1, giou, diou, ciou.
        gamma: of the focal loss.
    """
    matches = anchor_matching(
        anchors,
        truths.boxes,
        truths.labels,
        truths.offsets,
        matcher.high_threshold,
        matcher.low_threshold,
        matcher.allow_low_quality_matches,
    )
    normalizers = matches.num_foreground.clamp(min=1) * float(len(truths.counts))  # (B,) float32
    return {
        "classification": focal_loss(logits, matches.labels, normalizers, num_classes, gamma=gamma),
        "bbox_regression": box_loss(
            deltas, anchors, matches.indices, truths.boxes, truths.offsets, normalizers, loss_type
        ),
    }
