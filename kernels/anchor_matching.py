"""Anchor matching: which ground truth each anchor answers for (Ren et al. 2015, section 3.1.2; torchvision's Matcher).

For anchor n let best(n) be the ground truth of highest IoU, the first one on a tie. Then

    matched[n] = best(n)   if IoU >= fg_iou_thresh, or if n ties the highest IoU that some ground truth reaches anywhere
                           (the low-quality rule: n keeps its own best ground truth, not the one it ties for)
                 -2        if bg_iou_thresh <= IoU < fg_iou_thresh: ignored
                 -1        otherwise: background, and every anchor of an image without ground truth

A ground truth that touches no anchor has a highest IoU of 0, which every anchor that misses it ties: all of those
become foreground for their own best. That is torchvision's rule, and it is kept.

torchvision builds ground truths x anchors matrices: 36 bytes a pair at its peak, 3.6 GB an image at 500 ground truths
and 201,600 anchors. Here anchors pass by in tiles, so memory is O(anchors + ground truths).
"""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

BACKGROUND = -1
IGNORED = -2

_TILE_PAIRS = 1 << 18  # IoUs held at a time: 1 MB of float32, inside the L2 cache


class Matches(NamedTuple):
    """What every anchor answers for; N anchors, B images."""

    indices: Tensor
    """(B, N) int32: row of the matched ground truth within its image, -1 background, -2 ignored."""
    labels: Tensor
    """(B, N) int32: class of the matched ground truth, -1 background, -2 ignored."""
    num_foreground: Tensor
    """(B,) int32: how many anchors of each image matched a ground truth."""


def pairwise_iou(boxes: Tensor, anchors: Tensor) -> Tensor:
    """IoU (G, n) of boxes (G, 4) and anchors (n, 4), xyxy; rounds exactly as torchvision's ``box_iou`` does."""
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])  # (G,)
    anchor_area = (anchors[:, 2] - anchors[:, 0]) * (anchors[:, 3] - anchors[:, 1])  # (n,)
    width = torch.minimum(boxes[:, None, 2], anchors[:, 2]).sub_(torch.maximum(boxes[:, None, 0], anchors[:, 0]))
    height = torch.minimum(boxes[:, None, 3], anchors[:, 3]).sub_(torch.maximum(boxes[:, None, 1], anchors[:, 1]))
    intersection = width.clamp_(min=0).mul_(height.clamp_(min=0))
    return intersection.div_((area[:, None] + anchor_area).sub_(intersection))


def _match_image(anchors: Tensor, boxes: Tensor, fg: float, bg: float, low_quality: bool) -> Tensor:
    """(N,) int64 matched indices of one image with at least one ground truth."""
    tiles = anchors.split(max(1, _TILE_PAIRS // len(boxes)))
    matched, best, peaks = [], [], []
    for tile in tiles:
        iou = pairwise_iou(boxes, tile)  # (G, n)
        value, index = iou.max(dim=0)
        matched.append(torch.where(value < bg, BACKGROUND, torch.where(value < fg, IGNORED, index)))
        best.append(index)
        peaks.append(iou.amax(dim=1))
    if low_quality:
        highest = torch.stack(peaks).amax(dim=0)  # (G,)
        for t, tile in enumerate(tiles):
            here = (peaks[t] == highest).nonzero().squeeze(1)  # ground truths whose highest IoU lies in this tile
            if len(here):
                ties = (pairwise_iou(boxes[here], tile) == highest[here, None]).any(dim=0)
                matched[t] = torch.where(ties, best[t], matched[t])
    return torch.cat(matched)


def anchor_matching_reference(
    anchors: Tensor,
    boxes: Tensor,
    labels: Tensor,
    offsets: Tensor,
    fg_iou_thresh: float = 0.5,
    bg_iou_thresh: float = 0.4,
    allow_low_quality_matches: bool = True,
) -> Matches:
    """The definition; see :func:`anchor_matching`."""
    rows = offsets.tolist()
    batch = len(rows) - 1
    shape = (batch, anchors.shape[-2])
    indices = torch.full(shape, BACKGROUND, dtype=torch.int32, device=anchors.device)
    classes = indices.clone()
    for b, (start, stop) in enumerate(pairwise(rows)):
        if start == stop:
            continue
        image_anchors = anchors if anchors.dim() == 2 else anchors[b]
        matched = _match_image(
            image_anchors, boxes[start:stop], fg_iou_thresh, bg_iou_thresh, allow_low_quality_matches
        )
        indices[b] = matched
        classes[b] = torch.where(matched >= 0, labels[start:stop][matched.clamp(min=0)], matched)
    return Matches(indices, classes, (indices >= 0).sum(dim=1, dtype=torch.int32))


def anchor_matching(
    anchors: Tensor,
    boxes: Tensor,
    labels: Tensor,
    offsets: Tensor,
    fg_iou_thresh: float = 0.5,
    bg_iou_thresh: float = 0.4,
    allow_low_quality_matches: bool = True,
) -> Matches:
    """Match the anchors of a batch of images to their ground truths.

    Args:
        anchors: ``(N, 4)`` float32 xyxy pixels, shared by the images, or ``(B, N, 4)``.
        boxes: ``(G, 4)`` float32 ground truths of all images, concatenated.
        labels: ``(G,)`` integer classes.
        offsets: ``(B + 1,)`` integers: image b owns rows offsets[b] to offsets[b + 1].
        fg_iou_thresh: IoU from which an anchor is foreground.
        bg_iou_thresh: IoU below which it is background.
        allow_low_quality_matches: whether the low-quality rule applies.

    Example::

        >>> anchors = torch.tensor([[0.0, 0, 10, 10], [5, 5, 15, 15], [40, 40, 50, 50]])
        >>> anchor_matching(anchors, anchors[:1], torch.tensor([7]), torch.tensor([0, 1])).labels
        tensor([[ 7, -1, -1]], dtype=torch.int32)
    """
    return anchor_matching_reference(
        anchors, boxes, labels, offsets, fg_iou_thresh, bg_iou_thresh, allow_low_quality_matches
    )
