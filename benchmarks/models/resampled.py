"""How sure a difference of AP50 is between two detectors on the same few photographs: a paired bootstrap over squares.

A photograph of a forest holds hundreds of trees, and a split may hold one photograph, so that whole images cannot be
resampled. Squares of 100 pixels can: each true box and each detection belongs to the square of its centre. Detections
are matched with true boxes once, as COCO does. Then squares are drawn with replacement, as often as there are any, and
AP50 of both detectors is computed from what the drawn squares hold (Efron and Tibshirani, "An Introduction to the
Bootstrap", 1993, chapters 8 and 13; squares in place of single boxes, since neighbours are not independent).
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchvision.ops import box_convert, box_iou

SIDE = 100
"""Of a square, in pixels: a few trees across."""
DRAWS = 2000
IOU = 0.5


class Matched(NamedTuple):
    """Detections of one class in some photographs, matched with the true boxes."""

    scores: Tensor
    """(D,)."""
    right: Tensor
    """(D,) bool: whether a detection has a true box."""
    squares: Tensor
    """(D, 3) int64, the square of each detection: its photograph, column and row."""
    of_truths: Tensor
    """(T, 3), the squares of the true boxes."""


def matched(results: Sequence[Mapping[str, Any]], coco: Mapping[str, Any]) -> Matched:
    """Match detections, best first, each with the free true box of the largest IoU that is at least 0.5.

    Args:
        results: detections in COCO's form, of one class.
        coco: ``images`` and ``annotations`` in COCO's form, without crowds.
    """
    scores: list[Tensor] = []
    right: list[Tensor] = []
    squares: list[Tensor] = []
    of_truths: list[Tensor] = []
    for number, image in enumerate(coco["images"]):
        found = [result for result in results if result["image_id"] == image["id"]]
        true = [entry["bbox"] for entry in coco["annotations"] if entry["image_id"] == image["id"]]
        found.sort(key=lambda result: -result["score"])
        boxes, truths = (
            box_convert(torch.tensor(list(rows), dtype=torch.float64).view(-1, 4), "xywh", "xyxy")
            for rows in ([result["bbox"] for result in found], true)
        )
        near, hits = box_iou(boxes, truths), torch.zeros(len(boxes), dtype=torch.bool)
        for i in range(len(boxes)):
            if len(truths) and near[i].max() >= IOU:
                hits[i] = True
                near[:, near[i].argmax()] = -1.0
        scores.append(torch.tensor([result["score"] for result in found], dtype=torch.float64))
        right.append(hits)
        for lists, corners in ((squares, boxes), (of_truths, truths)):
            x, y = ((corners[:, :2] + corners[:, 2:]) / 2 // SIDE).long().unbind(1)
            lists.append(torch.stack((torch.full_like(x, number), x, y), dim=1))
    return Matched(torch.cat(scores), torch.cat(right), torch.cat(squares), torch.cat(of_truths))


def together(parts: Sequence[Matched]) -> Matched:
    """The detections and true boxes of several sets of photographs as of one."""
    first, moved = 0, []
    for part in parts:
        squares, of_truths = (rows + torch.tensor([first, 0, 0]) for rows in (part.squares, part.of_truths))
        moved.append(Matched(part.scores, part.right, squares, of_truths))
        first = 1 + int(max(rows[:, 0].max() if len(rows) else first for rows in (squares, of_truths)))
    return Matched(*map(torch.cat, zip(*moved, strict=True)))


def ap50(found: Matched) -> float:
    """AP at an IoU of 0.5, in points."""
    ones = torch.ones(1, len(found.scores)), torch.ones(1, len(found.of_truths))
    return 100 * float(average_precision(found, *ones))


def average_precision(found: Matched, weights: Tensor, of_truths: Tensor) -> Tensor:
    """COCO's AP at an IoU of 0.5, over 101 recalls, (R,).

    Args:
        found: D detections and T true boxes.
        weights: (R, D) how often each detection counts.
        of_truths: (R, T) how often each true box does.
    """
    order = found.scores.argsort(descending=True, stable=True)
    counts = weights[:, order].double()
    hits = (counts * found.right[order]).cumsum(1)
    recall = hits / of_truths.sum(1, keepdim=True).clamp(min=1)
    precision = hits / counts.cumsum(1).clamp(min=1)
    precision = precision.flip(1).cummax(1).values.flip(1)  # the best at this recall or a greater one
    precision = torch.cat((precision, precision.new_zeros(len(precision), 1)), dim=1)
    at = torch.searchsorted(recall, torch.linspace(0, 1, 101, dtype=torch.float64).expand(len(recall), -1).contiguous())
    return precision.gather(1, at).mean(1)


def interval(ours: Matched, theirs: Matched) -> tuple[float, float]:
    """The bounds between which 95% of the resampled differences of AP50 lie, ours less theirs, in points."""
    rows = [ours.squares, ours.of_truths, theirs.squares, theirs.of_truths]
    every, index = torch.cat(rows).unique(dim=0, return_inverse=True)
    of_ours, of_our_truths, of_theirs, of_their_truths = index.split([len(part) for part in rows])
    drawn = torch.randint(len(every), (DRAWS, len(every)), generator=torch.Generator().manual_seed(0))
    times = torch.zeros(DRAWS, len(every)).scatter_add_(1, drawn, torch.ones(drawn.shape))  # each square was drawn
    difference = average_precision(ours, times[:, of_ours], times[:, of_our_truths]) - average_precision(
        theirs, times[:, of_theirs], times[:, of_their_truths]
    )
    bounds = (100 * difference).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    return float(bounds[0]), float(bounds[1])


def print_ap50(split: str, found: Mapping[str, Matched]) -> None:
    """Print AP50 of each detector, and between which bounds its difference from the first, in float32, lies."""
    exact = next(iter(found.values()))
    for name, of_one in found.items():
        line = f"{name}: AP50 of {split} {ap50(of_one):.2f}"
        if of_one is not exact:
            line += ", less float32's {:.2f} to {:.2f} in 95% of the draws".format(*interval(of_one, exact))
        print(line, flush=True)
