"""Anchor matching: the ground truth that each anchor has to predict (Ren et al. 2015, section 3.1.2; torchvision's
Matcher).

For anchor n let best(n) be the ground truth of highest IoU, the first one on a tie. Then

    matched[n] = best(n)   if IoU >= fg_iou_thresh, or if n ties the highest IoU that some ground truth reaches anywhere
                           (the low-quality rule: n keeps its own best ground truth, not the one it ties for)
                 -2        if bg_iou_thresh <= IoU < fg_iou_thresh: ignored
                 -1        otherwise: background, and every anchor of an image without ground truth

A ground truth that touches no anchor has a highest IoU of 0. Every anchor ties this, and becomes foreground for its own
best ground truth. That is torchvision's rule, and it is kept.

torchvision builds matrices of ground truths x anchors: 36 bytes a pair at its peak, 3.6 GB an image at 500 ground
truths and 201,600 anchors. Here a tile of anchors stays in registers, and the ground truths are read one by one. This
is done twice, to find the highest IoU of each ground truth, and then to match. Memory is O(anchors + ground truths), 8
bytes an anchor. A tile skips the ground truths outside the rectangle around its anchors: their IoU with them is 0.
"""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from retina_fast.kernels.arguments import check_devices, check_integers, offsets_on_host
from retina_fast.kernels.dispatch import runs_triton, tl, triton
from retina_fast.kernels.labels import BACKGROUND, IGNORED, TL_BACKGROUND, TL_IGNORED
from retina_fast.kernels.levels import load_rows

_TILE_ANCHORS = 1 << 14  # of a tile of the reference, at most
_TILE_PAIRS = 1 << 17  # anchors times ground truths of a tile, at most: the IoUs of those that meet stay in the cache


class Matches(NamedTuple):
    """The matches of N anchors in each of B images."""

    indices: Tensor
    """(B, N) int32: row of the matched ground truth within its image, -1 background, -2 ignored."""
    labels: Tensor
    """(B, N) int32: class of the matched ground truth, -1 background, -2 ignored."""
    num_foreground: Tensor
    """(B,) int32: the number of anchors of each image that matched a ground truth."""


def box_iou(boxes: Tensor, anchors: Tensor) -> Tensor:
    """IoU (...) of boxes (..., 4) and anchors (..., 4), xyxy, which are broadcast; rounds exactly as torchvision's
    ``box_iou`` does."""
    area = (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])
    anchor_area = (anchors[..., 2] - anchors[..., 0]) * (anchors[..., 3] - anchors[..., 1])
    width = torch.minimum(boxes[..., 2], anchors[..., 2]).sub_(torch.maximum(boxes[..., 0], anchors[..., 0]))
    height = torch.minimum(boxes[..., 3], anchors[..., 3]).sub_(torch.maximum(boxes[..., 1], anchors[..., 1]))
    intersection = width.clamp_(min=0).mul_(height.clamp_(min=0))
    return intersection.div_((area + anchor_area).sub_(intersection))


def pairwise_iou(boxes: Tensor, anchors: Tensor) -> Tensor:
    """IoU (G, n) of boxes (G, 4) and anchors (n, 4), xyxy."""
    return box_iou(boxes[:, None], anchors)


class _Tile(NamedTuple):
    """IoUs of some anchors; those with ground truths that are not near are 0."""

    columns: Tensor  # (4, n), which vector instructions read one side of all boxes after the other
    near: Tensor  # (g,) ground truths that meet the rectangle around the anchors
    best: Tensor  # (n,) highest IoU of each anchor
    peaks: Tensor  # (g,) highest IoU of each ground truth that is near


def _tile(columns: Tensor, boxes: Tensor) -> _Tile:
    corner, opposite = columns[:2].amin(dim=1), columns[2:].amax(dim=1)
    near = ((boxes[:, :2] < opposite) & (boxes[:, 2:] > corner)).all(dim=1).nonzero().squeeze(1)
    if not len(near):
        return _Tile(columns, near, columns.new_zeros(columns.shape[1]), columns.new_zeros(0))
    iou = pairwise_iou(boxes[near], columns.T)
    return _Tile(columns, near, iou.amax(dim=0), iou.amax(dim=1))


def _match_image(columns: Tensor, boxes: Tensor, fg: float, bg: float, low_quality: bool) -> Tensor:
    """(N,) int64 matched indices of one image with at least one ground truth; the anchors are columns (4, N)."""
    step = max(1, min(_TILE_ANCHORS, _TILE_PAIRS // len(boxes)))
    tiles = [_tile(part, boxes) for part in columns.split(step, dim=1)]
    highest = boxes.new_zeros(len(boxes))
    for tile in tiles:
        highest[tile.near] = torch.maximum(highest[tile.near], tile.peaks)
    least = 0.0 if low_quality and not highest.all() else min(fg, bg)  # every anchor ties a highest IoU of 0
    contends = []  # (n,) of each tile: whether an anchor can be other than background
    for tile in tiles:
        contends.append(tile.best >= least)
        here = tile.near[(tile.peaks == highest[tile.near]) & (tile.peaks < least)]  # ties of others contend already
        if low_quality and len(here):
            ties = pairwise_iou(boxes[here], tile.columns.T) == highest[here, None]
            contends[-1][ties.nonzero()[:, 1]] = True

    matched = torch.full(columns.shape[1:], BACKGROUND, device=columns.device)
    for part in torch.cat(contends).nonzero().squeeze(1).split(step):
        iou = pairwise_iou(boxes, columns[:, part].T).nan_to_num_(0)  # (G, n)
        value, index = iou.max(dim=0)
        found = torch.where(value < bg, BACKGROUND, torch.where(value < fg, IGNORED, index))
        if low_quality:
            found = torch.where((iou == highest[:, None]).any(dim=0), index, found)
        matched[part] = found
    return matched


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
    rows = offsets_on_host(offsets, len(boxes))
    batch = len(rows) - 1
    shape = (batch, anchors.shape[-2])
    indices = torch.full(shape, BACKGROUND, dtype=torch.int32, device=anchors.device)
    classes, columns = indices.clone(), anchors.mT.contiguous()  # (4, N) or (B, 4, N)
    for b, (start, stop) in enumerate(pairwise(rows)):
        if start == stop:
            continue
        of_image = columns if columns.dim() == 2 else columns[b]
        matched = _match_image(of_image, boxes[start:stop], fg_iou_thresh, bg_iou_thresh, allow_low_quality_matches)
        indices[b] = matched
        classes[b] = torch.where(matched >= 0, labels[start:stop][matched.clamp(min=0)], matched)
    return Matches(indices, classes, (indices >= 0).sum(dim=1, dtype=torch.int32))


# Triton. The results equal the reference's exactly, so divisions round to nearest, and no product is contracted with a
# sum to an fma.

_TILE = 512  # anchors of a program: by instruction counts, 128 costs twice as much at 16 ground truths
_CHUNK = 32  # ground truths looked at together: one a lane


@triton.jit
def tile_iou(x1, y1, x2, y2, area, box_x1, box_y1, box_x2, box_y2):
    """The IoU of a tile of anchors and one ground truth, rounded as box_iou rounds, or -1 where they do not
    intersect. Most pairs do not, and to divide 0 would take the slow path of div.rn, some 30 instructions."""
    width = tl.maximum(tl.minimum(box_x2, x2) - tl.maximum(box_x1, x1), 0.0)
    height = tl.maximum(tl.minimum(box_y2, y2) - tl.maximum(box_y1, y1), 0.0)
    intersection = width * height
    union = (box_x2 - box_x1) * (box_y2 - box_y1) + area - intersection
    return tl.div_rn(tl.where(intersection > 0, intersection, -union), union)


@triton.jit(do_not_specialize=["num_anchors", "anchors_stride"])
def _anchor_matching_kernel(
    anchors_ptr, anchors_stride, boxes_ptr, labels_ptr, offsets_ptr, peaks_ptr, indices_ptr, classes_ptr, counts_ptr,
    num_anchors, fg_iou_thresh, bg_iou_thresh, FIND_PEAKS: tl.constexpr, LOW_QUALITY: tl.constexpr, TILE: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """Program (t, b): tile t of the anchors of image b.

    With FIND_PEAKS it finds the highest IoU of every ground truth, and stores the bits of the float32 number as an
    int32, since the integers order as the numbers do. Without, the peaks are given and the anchors are matched.
    """
    image = tl.program_id(1).to(tl.int64)
    start = tl.load(offsets_ptr + image).to(tl.int32)
    stop = tl.load(offsets_ptr + image + 1).to(tl.int32)
    anchor = tl.program_id(0) * TILE + tl.arange(0, TILE)
    valid = anchor < num_anchors
    x1, y1, x2, y2 = load_rows(anchors_ptr + image * anchors_stride, anchor, valid)
    area = (x2 - x1) * (y2 - y1)
    left = tl.min(tl.where(valid, x1, float("inf")), axis=0)
    top = tl.min(tl.where(valid, y1, float("inf")), axis=0)
    right = tl.max(tl.where(valid, x2, float("-inf")), axis=0)
    bottom = tl.max(tl.where(valid, y2, float("-inf")), axis=0)

    best = tl.zeros([TILE], tl.float32)
    best_box = tl.zeros([TILE], tl.int32) + start
    ties = tl.zeros([TILE], tl.int1)
    first = start
    while first < stop:
        g = first + tl.arange(0, CHUNK)
        g_x1, g_y1, g_x2, g_y2 = load_rows(boxes_ptr, g, g < stop)
        near = tl.where((g < stop) & (g_x1 < right) & (g_x2 > left) & (g_y1 < bottom) & (g_y2 > top), g, stop)
        if LOW_QUALITY and not FIND_PEAKS:
            peak = tl.load(peaks_ptr + g, mask=g < stop, other=1)
            ties |= tl.min(peak, axis=0) == 0  # a ground truth that touches no anchor of the image: all anchors tie
        box = tl.min(near, axis=0)
        while box < stop:
            ptr = boxes_ptr + box * 4
            iou = tile_iou(x1, y1, x2, y2, area, tl.load(ptr), tl.load(ptr + 1), tl.load(ptr + 2), tl.load(ptr + 3))
            if FIND_PEAKS:
                peak = tl.max(iou, axis=0)
                tl.atomic_max(peaks_ptr + box, peak.to(tl.int32, bitcast=True), mask=peak > 0, sem="relaxed")
            else:
                best_box = tl.where(iou > best, box, best_box)
                best = tl.maximum(iou, best)
                if LOW_QUALITY:
                    ties |= iou == tl.load(peaks_ptr + box).to(tl.float32, bitcast=True)
            box = tl.min(tl.where(near > box, near, stop), axis=0)
        first += CHUNK

    if not FIND_PEAKS:
        index = best_box - start
        matched = tl.where(best < fg_iou_thresh, TL_IGNORED, index)
        matched = tl.where(best < bg_iou_thresh, TL_BACKGROUND, matched)
        matched = tl.where(ties, index, matched)
        matched = tl.where(start < stop, matched, TL_BACKGROUND)
        foreground = valid & (matched >= 0)
        label = tl.load(labels_ptr + best_box, mask=foreground, other=0).to(tl.int32)
        row = image * num_anchors + anchor
        tl.store(indices_ptr + row, matched, mask=valid)
        tl.store(classes_ptr + row, tl.where(foreground, label, matched), mask=valid)
        count = tl.sum(foreground.to(tl.int32), axis=0)
        tl.atomic_add(counts_ptr + image, count, mask=count > 0, sem="relaxed")


def _anchor_matching_triton(
    anchors: Tensor,
    boxes: Tensor,
    labels: Tensor,
    offsets: Tensor,
    fg_iou_thresh: float,
    bg_iou_thresh: float,
    allow_low_quality_matches: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, num_anchors = len(offsets) - 1, anchors.shape[-2]
    indices = anchors.new_empty((batch, num_anchors), dtype=torch.int32)
    classes = torch.empty_like(indices)
    peaks = anchors.new_zeros(len(boxes) if allow_low_quality_matches else 0, dtype=torch.int32)
    counts = anchors.new_zeros(batch, dtype=torch.int32)
    if not indices.numel():
        return indices, classes, counts
    anchors, boxes, labels, offsets = (x.contiguous() for x in (anchors, boxes, labels, offsets))
    stride = anchors.stride(0) if anchors.dim() == 3 else 0
    with torch.cuda.device_of(anchors):
        for find_peaks in (True, False) if allow_low_quality_matches else (False,):
            _anchor_matching_kernel[(triton.cdiv(num_anchors, _TILE), batch)](
                anchors, stride, boxes, labels, offsets, peaks, indices, classes, counts, num_anchors, fg_iou_thresh,
                bg_iou_thresh, FIND_PEAKS=find_peaks, LOW_QUALITY=allow_low_quality_matches, TILE=_TILE, CHUNK=_CHUNK,
                num_warps=4, enable_fp_fusion=False,
            )  # fmt: skip
    return indices, classes, counts


_op = torch.library.custom_op("retina_fast::anchor_matching", _anchor_matching_triton, mutates_args=())


@torch.library.custom_op("retina_fast::anchor_matching_reference", mutates_args=())
def _reference_op(
    anchors: Tensor,
    boxes: Tensor,
    labels: Tensor,
    offsets: Tensor,
    fg_iou_thresh: float,
    bg_iou_thresh: float,
    allow_low_quality_matches: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The reference reads offsets on the host: as an operation it is one node of a compiled or exported graph."""
    return anchor_matching_reference(
        anchors, boxes, labels, offsets, fg_iou_thresh, bg_iou_thresh, allow_low_quality_matches
    )


@_op.register_fake
@_reference_op.register_fake
def _(anchors, boxes, labels, offsets, *thresholds):
    indices = anchors.new_empty((len(offsets) - 1, anchors.shape[-2]), dtype=torch.int32)
    return indices, torch.empty_like(indices), indices.new_empty(len(indices))


def checked_geometry(anchors: Tensor, boxes: Tensor, labels: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Anchors and ground truths in float32, after a check that the arguments of a matching fit each other.

    Raises:
        ValueError: for shapes that do not, labels or offsets that are not integers, or tensors on different devices.
    """
    if offsets.dim() != 1 or not len(offsets):
        raise ValueError(f"offsets must be (B + 1,), got {tuple(offsets.shape)}")
    batch = len(offsets) - 1
    if anchors.dim() not in (2, 3) or anchors.shape[-1] != 4 or (anchors.dim() == 3 and len(anchors) != batch):
        raise ValueError(f"anchors must be (N, 4) or ({batch}, N, 4), got {tuple(anchors.shape)}")
    if boxes.dim() != 2 or boxes.shape[1] != 4 or labels.shape != boxes.shape[:1]:
        raise ValueError(f"boxes {tuple(boxes.shape)} and labels {tuple(labels.shape)} must be (G, 4) and (G,)")
    check_integers(labels=labels, offsets=offsets)
    check_devices(anchors.device, boxes=boxes, labels=labels, offsets=offsets)
    return anchors.float(), boxes.float()


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
        anchors: ``(N, 4)`` xyxy pixels, shared by the images, or ``(B, N, 4)``; read as float32.
        boxes: ``(G, 4)`` ground truths of all images, concatenated; read as float32.
        labels: ``(G,)`` integer classes.
        offsets: ``(B + 1,)`` integers: image b owns rows offsets[b] to offsets[b + 1].
        fg_iou_thresh: IoU from which an anchor is foreground.
        bg_iou_thresh: IoU below which it is background.
        allow_low_quality_matches: whether the low-quality rule applies.

    Raises:
        ValueError: for shapes that do not fit each other, labels or offsets that are not integers, tensors on different
            devices, or, on a CPU, offsets that fall or end above G.

    Example::

        >>> anchors = torch.tensor([[0.0, 0, 10, 10], [5, 5, 15, 15], [40, 40, 50, 50]])
        >>> anchor_matching(anchors, anchors[:1], torch.tensor([7]), torch.tensor([0, 1])).labels
        tensor([[ 7, -1, -1]], dtype=torch.int32)
    """
    anchors, boxes = checked_geometry(anchors, boxes, labels, offsets)
    op = _op if runs_triton(anchors) else _reference_op
    return Matches(*op(anchors, boxes, labels, offsets, fg_iou_thresh, bg_iou_thresh, allow_low_quality_matches))
