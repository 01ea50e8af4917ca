"""The loss path: anchors are matched to ground truths, then both losses read the heads' levels in place.

Which anchors are matched is the matcher's to say: torchvision's ``Matcher``, by two thresholds, or one of this package.
The classification loss is torchvision's focal loss, or one whose targets say how well the predicted boxes fit: by their
IoUs, or as the matcher sets them.
"""

import math
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor
from torchvision.models.detection._utils import Matcher
from torchvision.models.detection.retinanet import (
    RetinaNetClassificationHead,
    RetinaNetHead,
    RetinaNetRegressionHead,
)

from retina_fast.forward import DELTAS, LOGITS, HeadOutputs
from retina_fast.heads import DistributionRegressionHead, is_known_coder
from retina_fast.kernels.anchor_matching import Matches, anchor_matching
from retina_fast.kernels.atss_matching import atss_matching
from retina_fast.kernels.box_loss import LOSS_TYPES, box_loss
from retina_fast.kernels.box_quality import box_quality
from retina_fast.kernels.distribution_loss import distribution_loss
from retina_fast.kernels.focal_loss import focal_loss
from retina_fast.kernels.iou_losses import IOU_LOSSES
from retina_fast.kernels.labels import BACKGROUND, IGNORED
from retina_fast.kernels.levels import count_anchors
from retina_fast.kernels.soft_focal_loss import WEIGHTS, soft_focal_loss
from retina_fast.kernels.task_aligned_matching import MAX_TOP_K, AlignedMatches, task_aligned_matching
from retina_fast.stock import has_stock_loss_functions, is_stock, overrides
from retina_fast.targets import GroundTruths


@dataclass
class AtssMatcher:
    """Matches anchors by adaptive training sample selection, ATSS (Zhang et al. 2020,
    https://arxiv.org/abs/1912.02424): an anchor near an object is foreground if its IoU is at least the mean plus the
    standard deviation of the IoUs of all anchors that are near. See :mod:`retina_fast.kernels.atss_matching`.

    Args:
        top_k: how many cells of each level, the nearest to the object, have their anchors considered. This is the
            paper's k, which counts anchors, where a cell has one.

    Raises:
        ValueError: for a ``top_k`` below 1.

    Example::

        >>> from retina_fast import retinanet_resnet18_fpn
        >>> model = retinanet_resnet18_fpn(num_classes=3, weights_backbone=None, matcher=AtssMatcher(top_k=12))
        >>> model.proposal_matcher
        AtssMatcher(top_k=12)
    """

    top_k: int = 9

    def __post_init__(self) -> None:
        if type(self.top_k) is not int or self.top_k < 1:
            raise ValueError(f"top_k must be a whole number of at least 1, got {self.top_k}")

    def __call__(self, match_quality_matrix: Tensor) -> NoReturn:
        """Refuses to match by a matrix of IoUs alone, as torchvision's own loss path asks of its matcher."""
        _refuse_to_match("ATSS needs the anchors' centres")


@dataclass
class TaskAlignedMatcher:
    """Matches anchors by task-aligned assignment, TOOD (Feng et al. 2021, https://arxiv.org/abs/2108.07755): an anchor
    within an object is foreground if its score and its predicted box fit best, and how well they fit is the target of
    quality focal loss and varifocal loss. See :mod:`retina_fast.kernels.task_aligned_matching`.

    Args:
        top_k: how many anchors an object may have, at most 128.
        alpha: exponent of the score of the object's class, at least 0.
        beta: exponent of the IoU of the predicted box, at least 0.

    Raises:
        ValueError: for a value out of its range.

    Example::

        >>> from retina_fast import retinanet_resnet18_fpn
        >>> model = retinanet_resnet18_fpn(num_classes=3, weights_backbone=None, matcher="task_aligned")
        >>> model.proposal_matcher
        TaskAlignedMatcher(top_k=13, alpha=1.0, beta=6.0)
    """

    top_k: int = 13
    alpha: float = 1.0
    beta: float = 6.0

    def __post_init__(self) -> None:
        if type(self.top_k) is not int or not 1 <= self.top_k <= MAX_TOP_K:
            raise ValueError(f"top_k must be a whole number from 1 to {MAX_TOP_K}, got {self.top_k}")
        for name in ("alpha", "beta"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a number of at least 0, got {getattr(self, name)}")

    def __call__(self, match_quality_matrix: Tensor) -> NoReturn:
        """Refuses to match by a matrix of IoUs alone, as torchvision's own loss path asks of its matcher."""
        _refuse_to_match("task-aligned assignment needs scores and predicted boxes")


def _refuse_to_match(needs: str) -> NoReturn:
    raise NotImplementedError(
        f"{needs}, which torchvision's loss path does not give to its matcher: the model is torchvision's, or a part "
        "of it that computes losses is the user's own"
    )


MATCHERS = {"atss": AtssMatcher, "task_aligned": TaskAlignedMatcher}
"""The matchers of this package by the names that a model's argument ``matcher`` takes."""


CLASSIFICATION_LOSSES = ("focal", *WEIGHTS)
"""What a model's argument ``classification_loss`` may be."""

BOX_WEIGHTS = ("quality",)
"""What a model's argument ``box_weights`` may be."""


_SET_BY = {
    "matcher": "proposal_matcher, such as to AtssMatcher()",
    "box_loss": f"head.regression_head._loss_type, to one of {', '.join(LOSS_TYPES)}",
}
"""Arguments of a model, and what holds them."""


def matcher_of(chosen: Any) -> Any:
    """The matcher that a name of :data:`MATCHERS` stands for; any matcher is returned as it is.

    Raises:
        ValueError: for an unknown name.

    Example::

        >>> matcher_of("atss")
        AtssMatcher(top_k=9)
    """
    if not isinstance(chosen, str):
        return chosen
    if chosen not in MATCHERS:
        raise ValueError(f"matcher must be one of {', '.join(MATCHERS)}, or a matcher itself, got {chosen!r}")
    return MATCHERS[chosen]()


_MARKS = BACKGROUND, IGNORED


def _marks(matcher: Any) -> tuple[int, int]:
    """How a matcher of torchvision's marks anchors that are background, and those that do not count."""
    return matcher.BELOW_LOW_THRESHOLD, matcher.BETWEEN_THRESHOLDS


def has_stock_losses(head: Any, matcher: Any) -> bool:
    """Whether the heads' losses, their box coder, the matcher and what they call are torchvision's own, or the matcher
    is one of this package."""
    if (
        not has_stock_loss_functions()
        or not isinstance(head, RetinaNetHead)
        or overrides(head, RetinaNetHead, "compute_loss")
    ):
        return False
    classification, regression = head.classification_head, head.regression_head
    distributed = isinstance(regression, DistributionRegressionHead)
    of_boxes = DistributionRegressionHead if distributed else RetinaNetRegressionHead
    return (
        isinstance(classification, RetinaNetClassificationHead)
        and not overrides(classification, RetinaNetClassificationHead, "compute_loss")
        and isinstance(regression, RetinaNetRegressionHead)
        and not overrides(regression, of_boxes, "compute_loss")
        and is_known_coder(regression.box_coder)
        and classification.BETWEEN_THRESHOLDS == IGNORED
        and (
            (is_stock(matcher, Matcher, "__call__", "set_low_quality_matches_") and _marks(matcher) == _MARKS)
            or any(is_stock(matcher, cls, "__call__") for cls in MATCHERS.values())
        )
    )


def _match(outputs: HeadOutputs, anchors: Tensor, truths: GroundTruths, matcher: Any) -> Matches | AlignedMatches:
    """The matches of float32 anchors with the ground truths."""
    arguments = anchors, truths.boxes, truths.labels, truths.offsets
    if isinstance(matcher, TaskAlignedMatcher):
        given = outputs.levels[LOGITS], outputs.levels[DELTAS], *arguments, outputs.num_classes
        return task_aligned_matching(*given, matcher.top_k, matcher.alpha, matcher.beta, outputs.reg_max)
    if not isinstance(matcher, AtssMatcher):
        thresholds = matcher.high_threshold, matcher.low_threshold, matcher.allow_low_quality_matches
        return anchor_matching(*arguments, *thresholds)
    levels, k = outputs.levels[LOGITS], outputs.num_classes
    sizes = [count_anchors(level, k) for level in levels]
    cells = list(outputs.cells) or [level.shape[-2:].numel() for level in levels if level.dim() == 4]
    if len(cells) != len(sizes):
        raise ValueError(
            f"ATSS needs the heads' outputs level by level, (B, A*C, H, W), got {[tuple(x.shape) for x in levels]}"
        )
    per_cell = max([1, *(size // max(count, 1) for size, count in zip(sizes, cells, strict=True))])
    return atss_matching(*arguments, sizes, matcher.top_k * per_cell)


def check_losses(
    classification_loss: str | None, box_loss: str | None, reg_max: int | None = None, box_weights: str | None = None
) -> None:
    """Raises ValueError for a name that is no loss or no weight, or a box loss that the distributions of a ``reg_max``
    cannot have. None passes."""
    if reg_max is not None and (type(reg_max) is not int or reg_max < 1):
        raise ValueError(f"reg_max must be a whole number of at least 1, got {reg_max!r}")
    for name, chosen, known in (
        ("classification_loss", classification_loss, CLASSIFICATION_LOSSES),
        ("box_loss", box_loss, LOSS_TYPES),
        ("box_weights", box_weights, BOX_WEIGHTS),
    ):
        if chosen is not None and chosen not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {chosen!r}")
    if reg_max is not None and box_loss is not None and box_loss not in IOU_LOSSES:
        raise ValueError(f"box_loss must be one of {', '.join(IOU_LOSSES)} with reg_max, got {box_loss!r}")


def refuse_arguments(name: str) -> None:
    """Raises AttributeError for an attribute of a model of which only the argument of its name has an effect.

    Example::

        >>> refuse_arguments("classification_loss")
    """
    if name in _SET_BY:
        raise AttributeError(f"setting model.{name} would change nothing: set model.{_SET_BY[name]}")


def detection_losses(
    outputs: HeadOutputs,
    truths: GroundTruths,
    matcher: Any,
    loss_type: str,
    gamma: float = 2.0,
    classification_loss: str = "focal",
    box_weights: str | None = None,
) -> dict[str, Tensor]:
    """The two losses of a batch, averaged as torchvision's: per image, sum / max(1, foreground anchors); then the mean.

    Args:
        outputs: of the heads, for B images.
        truths: the ground truths of the B images, in the pixels of the anchors.
        matcher: torchvision's, whose two thresholds and low-quality rule are used, or one of :data:`MATCHERS`.
        loss_type: of the box loss, one of l1, smooth_l1, giou, diou, ciou; where sides are distributions, one of the
            last three, to which distribution focal loss is added.
        gamma: focusing exponent of the classification loss.
        classification_loss: one of :data:`CLASSIFICATION_LOSSES`.
        box_weights: quality, where a foreground anchor's box loss is weighed by the IoU of its predicted box with the
            ground truth, and an image's is divided by the sum of these, at least 1, in place of their number. With a
            :class:`TaskAlignedMatcher` the targets of its scores stand in place of IoUs, here and in the loss above.

    Returns:
        ``classification`` and ``bbox_regression``, scalars.

    Raises:
        ValueError: if the matcher has to know the levels, and the outputs were joined; or for l1 or smooth_l1 where
            sides are distributions.
    """
    anchors, truths = outputs.anchors.float(), truths._replace(boxes=truths.boxes.detach())
    matches = _match(outputs, anchors, truths, matcher)
    batch = torch.tensor(
        len(truths.counts), dtype=torch.float32, device="cpu"
    )  # a number, but not of the default dtype
    normalizers = matches.num_foreground.clamp(min=1) * batch  # (B,) float32
    logits, deltas, labels, k = outputs.levels[LOGITS], outputs.levels[DELTAS], matches.labels, outputs.num_classes
    geometry = anchors, matches.indices, truths.boxes, truths.offsets
    quality = matches.targets if isinstance(matches, AlignedMatches) else None
    if quality is None and (classification_loss != "focal" or box_weights):
        quality = box_quality(deltas, *geometry, outputs.reg_max)
    if classification_loss == "focal":
        classification = focal_loss(logits, labels, normalizers, k, gamma=gamma)
    else:
        assert quality is not None
        classification = soft_focal_loss(logits, labels, quality, normalizers, k, classification_loss, gamma)
    weights = quality if box_weights else None
    if weights is not None:
        normalizers = weights.sum(dim=1).clamp(min=1) * batch
    if outputs.reg_max:
        box = distribution_loss(deltas, *geometry, normalizers, outputs.reg_max, loss_type, weights)
    else:
        box = box_loss(deltas, *geometry, normalizers, loss_type, weights)
    return {"classification": classification, "bbox_regression": box}
