"""How many detections are kept where a detector computes in another precision."""

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor
from torchvision.ops import box_iou

COMPARED = 16
"""On so many of the calibration images the detections are compared."""
SEARCHED = 4
"""On so many of them each layer is tried alone, where some may stay in float32."""
LEVEL = 0.3
"""Detections of at least this score count."""
IOU = 0.5
"""A detection is kept if the other side has one of the same label with at least this IoU ..."""
SCORE = 0.1
"""... and a score that differs by at most this."""
LEAST_KEPT = 0.95
"""If a smaller share of the detections is kept, or if more than the rest is new, it is warned of."""
FEW_FOUND = 10
"""Fewer detections than that are warned of: they say little."""

_ADVICE = "give more images for calibration, or leave layers in float32 by float32_share"

Found = Mapping[str, Tensor]


@dataclass
class Kept:
    """What became of the detections of some images, and how far those that were kept have moved.

    Attributes:
        images: how many.
        found: detections in float32 of a score of at least 0.3.
        kept: how many of them the other precision gives too.
        new: how many it gives that float32 does not.
        scores: the largest difference of a score among those that are kept.
        boxes: the largest difference of a coordinate among them, in pixels.
    """

    images: int = 0
    found: int = 0
    kept: int = 0
    new: int = 0
    scores: float = 0.0
    boxes: float = 0.0

    def add(self, theirs: Found, ours: Found) -> None:
        """Count one image.

        Args:
            theirs: ``boxes`` (D, 4), ``scores`` (D,) and ``labels`` (D,) in float32.
            ours: the same in the other precision.
        """
        self.images += 1
        found, kept, scores, boxes = _partners(theirs, ours)
        self.found, self.kept = self.found + found, self.kept + kept
        self.scores, self.boxes = max(self.scores, scores), max(self.boxes, boxes)
        found, kept, _, _ = _partners(ours, theirs)
        self.new += found - kept

    def __str__(self) -> str:
        return (
            f"{self.kept} of {self.found} detections kept and {self.new} new in {self.images} images; scores differ by "
            f"at most {self.scores:.2g}, boxes by at most {self.boxes:.2g} px"
        )

    def warn(self, what: str, advice: str = _ADVICE, stacklevel: int = 2) -> None:
        """Warn if there was little to compare, or if more than one in twenty detections changed.

        Args:
            what: the subject of the sentence, such as ``the file``.
            advice: what may help.
            stacklevel: that of :func:`warnings.warn`.
        """
        if not self.found:
            warnings.warn(
                f"the model finds nothing in the images for calibration, so that nothing shows how good {what} is: "
                "give images of the kind that the detector is for",
                stacklevel=stacklevel + 1,
            )
            return
        if self.found < FEW_FOUND:
            warnings.warn(
                f"the model finds {self.found} objects in {self.images} images for calibration, which is too few to "
                f"show how good {what} is: give images of the kind that the detector is for",
                stacklevel=stacklevel + 1,
            )
        if self.kept < LEAST_KEPT * self.found or self.new > (1 - LEAST_KEPT) * self.found:
            warnings.warn(f"{what} detects differently in eight bits: {self}; {advice}", stacklevel=stacklevel + 1)


def compare(pairs: Iterable[tuple[Found, Found]]) -> Kept:
    """Count all images: of each, the detections in float32 and in the other precision.

    Example::

        >>> import torch
        >>> one = {"boxes": torch.tensor([[0.0, 0, 9, 9]]), "scores": torch.tensor([0.8]), "labels": torch.tensor([1])}
        >>> print(compare([(one, one | {"scores": torch.tensor([0.75])})]))
        1 of 1 detections kept and 0 new in 1 images; scores differ by at most 0.05, boxes by at most 0 px
    """
    kept = Kept()
    for theirs, ours in pairs:
        kept.add(theirs, ours)
    return kept


def _partners(these: Found, those: Found) -> tuple[int, int, float, float]:
    """How many of these detections count, how many have a partner, and how far partners differ at most."""
    counting = these["scores"] >= LEVEL
    boxes, scores, labels = (these[name][counting] for name in ("boxes", "scores", "labels"))
    if not len(boxes) or not len(those["boxes"]):
        return len(boxes), 0, 0.0, 0.0
    near = box_iou(boxes, those["boxes"])
    away = (scores[:, None] - those["scores"]).abs()
    near[(labels[:, None] != those["labels"]) | (away > SCORE)] = -1
    best = near.max(dim=1)
    partnered = best.values >= IOU
    index = best.indices[partnered]
    score = away[partnered].gather(1, index[:, None])
    moved = (boxes[partnered] - those["boxes"][index]).abs()
    largest = [float(x.max()) if x.numel() else 0.0 for x in (score, moved)]
    return len(boxes), int(partnered.sum()), largest[0], largest[1]
