"""Suppression within many small classes on a CPU: all pairs of boxes of one class at once.

A call of torchvision's suppression costs as much as comparing a few hundred pairs here, so that one call a class is
slow where classes are small. Here a list of all pairs is made for all classes, and one pass over those that overlap
decides. Each IoU is computed step by step as torchvision computes it, in the dtype of the boxes.
"""

import torch
from torch import Tensor


def kept_of_pairs(boxes: Tensor, lengths: Tensor, thresh: float) -> Tensor:
    """Which boxes (N, 4) stay, as bool (N,).

    Args:
        boxes: class after class, best first within each.
        lengths: ``(C,)`` int64, how many boxes each class has.
        thresh: a box goes when its IoU with a better kept one of its class is strictly above.
    """
    n = torch.arange(len(boxes), device="cpu")
    better = n - (lengths.cumsum(0) - lengths).repeat_interleave(lengths)  # boxes of the class that are better
    # Box b has the pairs with its better boxes. Those of all boxes follow each other.
    below = n.repeat_interleave(better)
    above = torch.arange(len(below), device="cpu") + (n - better.cumsum(0)).repeat_interleave(better)
    x1, y1, x2, y2 = boxes.unbind(1)
    areas = (x2 - x1) * (y2 - y1)
    lower, upper = boxes.index_select(0, below), boxes.index_select(0, above)
    side = torch.minimum(lower[:, 2:], upper[:, 2:]).sub_(torch.maximum(lower[:, :2], upper[:, :2])).clamp_(min=0)
    intersection = side[:, 0] * side[:, 1]
    iou = intersection / (areas[above] + areas[below] - intersection)
    overlapping = (iou > thresh).nonzero().squeeze(1)
    stays = bytearray(b"\1" * len(boxes))
    # Pairs lie in the order of their lower box, so that it is known by then whether the better one stays.
    for a, b in zip(above[overlapping].tolist(), below[overlapping].tolist(), strict=True):
        if stays[a]:
            stays[b] = 0
    return torch.frombuffer(stays, dtype=torch.bool) if stays else torch.empty(0, dtype=torch.bool, device="cpu")
