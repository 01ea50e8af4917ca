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
truths and 201,600 anchors. Here a tile of anchors stays in registers, and the ground truths are read one by one, but
for those outside the rectangle around its anchors: their IoU with them is 0. This gives the best ground truth of each
anchor, and the highest IoU of each ground truth, in the tile and anywhere. A second launch applies the thresholds, and
looks for ties only where these two are equal. Beside the results, memory is 8 bytes an anchor, or 32 where ground
truths are many, and 4 bytes for each tile of 128 anchors and ground truth.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from retina_fast.kernels.anchor_matching_cpu import Thresholds, match_indices
from retina_fast.kernels.arguments import check_devices, check_integers, offsets_on_host
from retina_fast.kernels.dispatch import runs_triton, tl, triton
from retina_fast.kernels.labels import BACKGROUND, TL_BACKGROUND, TL_IGNORED
from retina_fast.kernels.levels import load_rows
from retina_fast.kernels.pair_iou import iou_with


class Matches(NamedTuple):
    """The matches of N anchors in each of B images."""

    indices: Tensor
    """(B, N) int32: row of the matched ground truth within its image, -1 background, -2 ignored."""
    labels: Tensor
    """(B, N) int32: class of the matched ground truth, -1 background, -2 ignored."""
    num_foreground: Tensor
    """(B,) int32: the number of anchors of each image that matched a ground truth."""


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
    batch, num_anchors = len(rows) - 1, anchors.shape[-2]
    indices = torch.full((batch, num_anchors), BACKGROUND, dtype=torch.int32, device=anchors.device)
    classes, counts = indices.clone(), indices.new_zeros(batch)
    if num_anchors and rows[-1] > rows[0]:
        thresholds = Thresholds(fg_iou_thresh, bg_iou_thresh, allow_low_quality_matches)
        places, matched = match_indices(anchors, boxes, rows, thresholds)
        image, is_foreground = places // num_anchors, matched >= 0
        own = labels[offsets[image] + matched.clamp(min=0)]
        indices.view(-1)[places] = matched.int()
        classes.view(-1)[places] = torch.where(is_foreground, own, matched).int()
        counts += image[is_foreground].bincount(minlength=batch)
    return Matches(indices, classes, counts)


# Triton. The results equal the reference's exactly, so divisions round to nearest, and no product is contracted with a
# sum to an fma.

_TILE = 128  # anchors of a program, which is one warp, so that no reduction over its anchors needs a barrier
_CHUNK = 32  # ground truths looked at together: one a lane, and a bit of an int32
_SHARE = 128  # ground truths of an image that one program sees: a tile of large anchors meets all of them
_LAST = tl.constexpr(2**31 - 1)


@triton.jit
def _lowest(bits):
    """The number of the lowest bit set in an int32 other than 0: the exponent of that bit as a float32."""
    return ((bits & -bits).to(tl.uint32, bitcast=True).to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127


@triton.jit(do_not_specialize=["num_anchors", "anchors_stride", "num_boxes", "batch", "shares"])
def _anchor_matching_kernel(
    anchors_ptr, anchors_stride, boxes_ptr, offsets_ptr, found_ptr, peaks_ptr, tops_ptr, num_anchors, num_boxes, batch,
    shares, LOW_QUALITY: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """A program takes a tile of the anchors, and one of the shares of the ground truths of an image. Those of the last
    tile come first, since its large anchors meet most ground truths.

    It writes the best ground truth of each anchor to found (S, B, N), as an int64 that orders as IoU and then index do:
    the bits of the IoU, then 2^31 - 1 minus the index. With LOW_QUALITY it also writes the highest IoU of each ground
    truth in the tile to tops (T, G), and anywhere to peaks (G,): bits again, which order as the numbers do.
    """
    tile = tl.cdiv(num_anchors, TILE) - 1 - tl.program_id(0) // (batch * shares)
    image = (tl.program_id(0) % batch).to(tl.int64)
    share = tl.program_id(0) // batch % shares
    start = tl.load(offsets_ptr + image).to(tl.int32)
    stop = tl.load(offsets_ptr + image + 1).to(tl.int32)
    size = tl.cdiv(tl.cdiv(stop - start, CHUNK), shares) * CHUNK
    first = start + share * size
    end = tl.minimum(first + size, stop)
    anchor = tile * TILE + tl.arange(0, TILE)
    valid = anchor < num_anchors
    x1, y1, x2, y2 = load_rows(anchors_ptr + image * anchors_stride, anchor, valid)
    left = tl.min(tl.where(valid, x1, float("inf")), axis=0)
    top = tl.min(tl.where(valid, y1, float("inf")), axis=0)
    right = tl.max(tl.where(valid, x2, float("-inf")), axis=0)
    bottom = tl.max(tl.where(valid, y2, float("-inf")), axis=0)

    best = tl.zeros([TILE], tl.float32)
    best_box = tl.zeros([TILE], tl.int32) + start
    lane = tl.arange(0, CHUNK)
    while first < end:
        g = first + lane
        g_x1, g_y1, g_x2, g_y2 = load_rows(boxes_ptr, g, g < end)
        near = (g < end) & (g_x1 < right) & (g_x2 > left) & (g_y1 < bottom) & (g_y2 > top)
        bits = tl.sum(near.to(tl.int32) << lane, axis=0)
        tops = tl.zeros([CHUNK], tl.int32)
        while bits != 0:
            this = _lowest(bits)
            bits &= bits - 1
            iou = iou_with(x1, y1, x2, y2, boxes_ptr, first + this)
            best_box = tl.where(iou > best, first + this, best_box)
            best = tl.maximum(iou, best)
            if LOW_QUALITY:
                tops = tl.where(lane == this, tl.max(tl.maximum(iou, 0.0).to(tl.int32, bitcast=True), axis=0), tops)
        if LOW_QUALITY:
            tl.store(tops_ptr + tile.to(tl.int64) * num_boxes + g, tops, mask=g < end)
            tl.atomic_max(peaks_ptr + g, tops, mask=tops > 0, sem="relaxed")
        first += CHUNK
    found = (best.to(tl.int32, bitcast=True).to(tl.int64) << 32) | (_LAST - (best_box - start))
    row = (share * batch + image) * num_anchors + anchor
    tl.store(found_ptr + row, found, mask=valid)


@triton.jit(do_not_specialize=["num_anchors", "anchors_stride", "num_boxes", "shares"])
def _match_kernel(
    anchors_ptr, anchors_stride, boxes_ptr, labels_ptr, offsets_ptr, found_ptr, peaks_ptr, tops_ptr, indices_ptr,
    classes_ptr, counts_ptr, num_anchors, num_boxes, shares, fg_iou_thresh, bg_iou_thresh, LOW_QUALITY: tl.constexpr,
    TILE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Program (t, b): what tile t of the anchors of image b matches."""
    tile = tl.program_id(0)
    image = tl.program_id(1).to(tl.int64)
    start = tl.load(offsets_ptr + image).to(tl.int32)
    stop = tl.load(offsets_ptr + image + 1).to(tl.int32)
    anchor = tile * TILE + tl.arange(0, TILE)
    valid = anchor < num_anchors
    row = image * num_anchors + anchor
    found = tl.load(found_ptr + row, mask=valid, other=0)
    size = tl.num_programs(1).to(tl.int64) * num_anchors
    for s in range(1, shares):
        found = tl.maximum(found, tl.load(found_ptr + s * size + row, mask=valid, other=0))
    best = (found >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    index = _LAST - found.to(tl.int32)
    matched = tl.where(best < fg_iou_thresh, TL_IGNORED, index)
    matched = tl.where(best < bg_iou_thresh, TL_BACKGROUND, matched)
    if LOW_QUALITY:
        above = tl.maximum(fg_iou_thresh, bg_iou_thresh)  # anchors of such an IoU are foreground already
        first = start
        lane = tl.arange(0, CHUNK)
        while first < stop:
            g = first + lane
            peak = tl.load(peaks_ptr + g, mask=g < stop, other=1)
            top = tl.load(tops_ptr + tile.to(tl.int64) * num_boxes + g, mask=g < stop, other=0)
            if tl.min(peak, axis=0) == 0:  # a ground truth that touches no anchor of the image: all anchors tie
                matched = index
            reached = (top == peak) & (top > 0) & (peak.to(tl.float32, bitcast=True) < above)
            bits = tl.sum(reached.to(tl.int32) << lane, axis=0)
            while bits != 0:
                box = first + _lowest(bits)
                bits &= bits - 1
                x1, y1, x2, y2 = load_rows(anchors_ptr + image * anchors_stride, anchor, valid)
                peak_of_box = tl.load(peaks_ptr + box).to(tl.float32, bitcast=True)
                matched = tl.where(iou_with(x1, y1, x2, y2, boxes_ptr, box) == peak_of_box, index, matched)
            first += CHUNK
    matched = tl.where(start < stop, matched, TL_BACKGROUND)
    foreground = valid & (matched >= 0)
    label = tl.load(labels_ptr + start + index, mask=foreground, other=0).to(tl.int32)
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
    num_boxes = len(boxes) if allow_low_quality_matches else 0
    counts, peaks = anchors.new_zeros(batch + num_boxes, dtype=torch.int32).split((batch, num_boxes))
    if not indices.numel():
        return indices, classes, counts
    anchors, boxes, labels, offsets = (x.contiguous() for x in (anchors, boxes, labels, offsets))
    stride = anchors.stride(0) if anchors.dim() == 3 else 0
    tiles, shares = triton.cdiv(num_anchors, _TILE), max(1, min(4, triton.cdiv(len(boxes), batch * _SHARE)))
    found = anchors.new_empty((shares, batch, num_anchors), dtype=torch.int64)
    tops = anchors.new_empty((tiles, num_boxes), dtype=torch.int32)
    constants = {"LOW_QUALITY": allow_low_quality_matches, "TILE": _TILE, "CHUNK": _CHUNK}
    with torch.cuda.device_of(anchors):
        _anchor_matching_kernel[(tiles * batch * shares,)](
            anchors, stride, boxes, offsets, found, peaks, tops, num_anchors, num_boxes, batch, shares, **constants,
            num_warps=1, enable_fp_fusion=False,
        )  # fmt: skip
        _match_kernel[(tiles, batch)](
            anchors, stride, boxes, labels, offsets, found, peaks, tops, indices, classes, counts, num_anchors,
            num_boxes, shares, fg_iou_thresh, bg_iou_thresh, **constants, num_warps=1, enable_fp_fusion=False,
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
