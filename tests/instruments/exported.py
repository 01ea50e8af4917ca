"""Exported files beside the model that they were written from: whether both find the same detections.

Boxes must agree to BOX_PX pixels and scores to SCORE, with the same label.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from retina_fast import Detections
from tests.instruments.agreement import differing, margin

GREY = torch.tensor([124, 116, 104], dtype=torch.uint8)[:, None, None]  # ImageNet's mean
BOX_PX, SCORE = 1e-3, 1e-5


def crops(pictures: list[Tensor], count: int, height: int, width: int) -> Tensor:
    """Returns random windows of the pictures, (count + 1, 3, height, width) uint8, with a grey image in third place."""
    generator = torch.Generator().manual_seed(0)
    images = []
    for i in range(count):
        picture = pictures[i % len(pictures)]
        y, x = (
            int(torch.randint(side - own + 1, (), generator=generator))
            for side, own in zip(picture.shape[1:], (height, width), strict=True)
        )
        images.append(picture[:, y : y + height, x : x + width])
    return torch.stack([*images[:2], GREY.expand(-1, height, width), *images[2:]])


def apart(ours: Detections, theirs: Detections) -> tuple[float, float, int]:
    """Compares each detection with the nearest one of its label on the other side.

    Returns the largest differences of boxes, in pixels, and of scores, and how many have no partner within the bounds.
    """
    boxes = scores = 0.0
    lost = 0
    for mine, other in zip(ours.to_list(), theirs.to_list(), strict=True):
        lost += abs(len(mine["boxes"]) - len(other["boxes"]))
        if not len(mine["boxes"]) or not len(other["boxes"]):
            continue
        box = (mine["boxes"][:, None] - other["boxes"]).abs().amax(dim=2)
        score = (mine["scores"][:, None] - other["scores"]).abs()
        distance = torch.maximum(box / BOX_PX, score / SCORE)
        distance[mine["labels"][:, None] != other["labels"]] = torch.inf
        for axis in (0, 1):
            nearest = distance.min(dim=axis)
            near = nearest.values <= 1
            lost += int((~near).sum())
            place = nearest.indices.unsqueeze(axis)
            boxes = max([boxes, *box.gather(axis, place).squeeze(axis)[near].tolist()])
            scores = max([scores, *score.gather(axis, place).squeeze(axis)[near].tolist()])
    return boxes, scores, lost


def eager(model: Any) -> Callable[[Tensor], Detections]:
    """Returns what runs the model on uint8 images (B, 3, H, W)."""

    @torch.no_grad()
    def run(images: Tensor) -> Detections:
        return model.detect(images.float() / 255)

    return run


Expected = list[tuple[Tensor, Detections]]


def expectations(model: Any, images: Tensor) -> Expected:
    """Returns the model's detections on batches of one image, then of four. The third image must give none."""
    expected = [(batch, eager(model)(batch)) for size in (1, 4) for batch in images.split(size)]
    assert not expected[2][1].counts.any(), "the grey image has detections"
    return expected


def compare(expected: Expected, run: Callable[[Tensor], Detections]) -> dict[str, Any]:
    """Compares what `run` finds with what is expected.

    Returns the largest differences (`boxes_px`, `scores`), how many detections only one side has (`lost`), and how
    far from the NMS threshold the IoU of such a detection is at most (`margin`). Within rounding, either way is right.
    """
    result: dict[str, Any] = {"boxes_px": 0.0, "scores": 0.0, "lost": 0, "margin": 0.0, "detections": 0}
    for batch, theirs in expected:
        ours = run(batch)
        boxes, scores, lost = apart(ours, theirs)
        result["boxes_px"], result["scores"] = max(result["boxes_px"], boxes), max(result["scores"], scores)
        result["lost"] += lost
        result["detections"] += int(theirs.counts.sum())
        for mine, other in zip(ours.to_list(), theirs.to_list(), strict=True):
            if differing(mine, other) or differing(other, mine):
                result["margin"] = max(result["margin"], margin(mine, other))
    return result


def quiet(model: Any, grey: Tensor) -> Any:
    """Raises the model's score threshold above what it finds in a grey image (3, H, W), and returns the model."""
    best = float(eager(model)(grey[None]).scores.max())
    model.score_thresh = max(model.score_thresh, round(best + 0.01, 2))
    return model
