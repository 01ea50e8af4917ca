"""The detection path: select candidates, decode their boxes, suppress overlaps; padded from end to end."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.models.detection import retinanet as tv

from retina_fast.forward import DELTAS, LOGITS, HeadOutputs
from retina_fast.kernels.batched_nms import batched_nms
from retina_fast.kernels.box_decode import decode_and_clip
from retina_fast.kernels.candidate_selection import Candidates
from retina_fast.kernels.dispatch import is_transformed
from retina_fast.kernels.postprocess import Nms, detections_of, postprocess, postprocess_by_steps

_NO_LIMIT = 2**31 - 1


class Detections(NamedTuple):
    """The detections of B images, padded to D; the first counts[b] of row b count, highest score first."""

    boxes: Tensor
    """(B, D, 4) float32 xyxy pixels of the image as it was given; 0 in the padding."""
    scores: Tensor
    """(B, D) float32; 0 in the padding."""
    labels: Tensor
    """(B, D) int64; -1 in the padding."""
    counts: Tensor
    """(B,) int64."""

    def to_list(self) -> list[dict[str, Tensor]]:
        """torchvision's form, a dict an image; the only place that reads the counts on the host."""
        named = {"boxes": self.boxes, "scores": self.scores, "labels": self.labels}
        # Indexed, since autograd lets nobody change in place what unbind returns, and a loop over a tensor is that.
        counts = map(int, self.counts) if is_transformed(self.counts) else self.counts.tolist()
        return [{name: values[b, :count] for name, values in named.items()} for b, count in enumerate(counts)]

    @classmethod
    def from_list(cls, detections: Sequence[dict[str, Tensor]], width: int) -> "Detections":
        """Pad torchvision's list of dicts to ``width`` detections an image, or to the most that one of them has."""
        device = detections[0]["boxes"].device
        width = max(width, *(len(image["boxes"]) for image in detections))
        padded = cls(
            torch.zeros((len(detections), width, 4), dtype=torch.float32, device=device),
            torch.zeros((len(detections), width), dtype=torch.float32, device=device),
            torch.full((len(detections), width), -1, device=device),
            torch.tensor([len(image["boxes"]) for image in detections], device=device),
        )
        for b, image in enumerate(detections):
            row = slice(len(image["boxes"]))
            padded.boxes[b, row], padded.scores[b, row] = image["boxes"], image["scores"]
            padded.labels[b, row] = image["labels"]
        return padded


class Thresholds(NamedTuple):
    """What decides which candidates become detections."""

    score_thresh: float
    """Scores must exceed it."""
    topk_candidates: int
    """The most candidates of one image and level that reach the suppression."""
    nms_thresh: float
    """IoU above which the lower-scored of two boxes of one class is dropped."""
    detections_per_img: int
    """D, the most detections of an image."""

    @classmethod
    def of(cls, model: tv.RetinaNet) -> "Thresholds":
        """The model's present thresholds. A ``detections_per_img`` of None is no limit, as in torchvision.

        Raises:
            TypeError: for a score or IoU that is no number, or numbers of candidates or detections that are not whole.
            ValueError: for numbers of candidates or detections below 0.
        """
        limit = _NO_LIMIT if model.detections_per_img is None else model.detections_per_img
        found = cls(model.score_thresh, model.topk_candidates, model.nms_thresh, limit)
        for name, value in zip(cls._fields, found, strict=True):
            if value is None or isinstance(value, str) or (isinstance(value, float) and not name.endswith("thresh")):
                kind = "a number" if name.endswith("thresh") else "a whole number"
                raise TypeError(f"model.{name} must be {kind}, got {value!r}")
        for name in ("topk_candidates", "detections_per_img"):
            if getattr(found, name) < 0:
                raise ValueError(f"model.{name} must be at least 0, got {getattr(found, name)}")
        return found


def detect(
    outputs: HeadOutputs,
    image_sizes: Tensor,
    original_sizes: Tensor,
    thresholds: Thresholds,
    nms: Nms | None = None,
) -> Detections:
    """From the heads' outputs to padded detections; nothing waits for the GPU.

    Args:
        outputs: of the heads, for B images, level by level.
        image_sizes: ``(B, 2)`` height and width of each image inside the batch, to which boxes are clipped.
        original_sizes: ``(B, 2)`` height and width as the image was given, to which boxes are scaled back.
        thresholds: D is lowered to the width of the candidates if that is less.
        nms: what suppresses, after the other steps one by one; None is all in one operation.
    """
    logits, deltas, anchors = outputs.levels[LOGITS], outputs.levels[DELTAS], outputs.anchors.float()
    constants = outputs.num_classes, *thresholds, outputs.reg_max
    given = logits, deltas, anchors, image_sizes, original_sizes, *constants
    return Detections(*(postprocess_by_steps(*given, nms) if nms else postprocess(*given)))


def detect_candidates(
    candidates: Candidates,
    deltas: Tensor,
    anchors: Tensor,
    image_sizes: Tensor,
    original_sizes: Tensor,
    thresholds: Thresholds,
    nms: Nms = batched_nms,
) -> Detections:
    """The same from candidates that are chosen already.

    Args:
        candidates: M an image.
        deltas: ``(B, M, C)`` of their anchors alone.
        anchors: ``(N, 4)``, all that there are.
        image_sizes: as :func:`detect` takes them.
        original_sizes: likewise.
        thresholds: of which those of the suppression count.
        nms: what suppresses.
    """
    own = anchors.float().index_select(0, candidates.anchors.flatten()).view(*candidates.anchors.shape, 4)
    boxes = decode_and_clip(deltas, own, image_sizes)
    limits = thresholds.nms_thresh, thresholds.detections_per_img
    return Detections(*detections_of(candidates, boxes, image_sizes, original_sizes, *limits, nms))
