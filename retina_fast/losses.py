"""The loss path: anchors are matched to ground truths, then focal loss and box loss read the heads' levels in place."""

from torch import Tensor
from torchvision.models.detection._utils import Matcher

from retina_fast.forward import DELTAS, LOGITS, HeadOutputs
from retina_fast.kernels.anchor_matching import anchor_matching
from retina_fast.kernels.box_loss import box_loss
from retina_fast.kernels.focal_loss import focal_loss
from retina_fast.targets import GroundTruths


def detection_losses(
    outputs: HeadOutputs, truths: GroundTruths, matcher: Matcher, loss_type: str, gamma: float = 2.0
) -> dict[str, Tensor]:
    """torchvision's two losses of a batch: per image, sum / max(1, foreground anchors); then the mean over images.

    Args:
        outputs: of the heads, for B images.
        truths: the ground truths of the B images, in the pixels of the anchors.
        matcher: its two thresholds and its low-quality rule are used.
        loss_type: of the box loss, one of l1, smooth_l1, giou, diou, ciou.
        gamma: focusing exponent of the focal loss.

    Returns:
        ``classification`` and ``bbox_regression``, scalars.
    """
    anchors = outputs.anchors.float()
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
        "classification": focal_loss(
            outputs.levels[LOGITS], matches.labels, normalizers, outputs.num_classes, gamma=gamma
        ),
        "bbox_regression": box_loss(
            outputs.levels[DELTAS], anchors, matches.indices, truths.boxes, truths.offsets, normalizers, loss_type
        ),
    }
