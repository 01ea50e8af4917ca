"""Adaptive training sample selection, ATSS (Zhang et al. 2020, https://arxiv.org/abs/1912.02424, algorithm 1): which
anchors have to predict a ground truth is decided by the statistics of its own IoUs, and not by fixed thresholds.

The candidates of a ground truth are, in each level, the k anchors whose centres are nearest to its own. With the mean m
and the standard deviation v of the IoUs of all its candidates with it,

    a candidate is foreground   if IoU >= m + v, and if its centre lies inside the ground truth

An anchor that is foreground for several ground truths is matched to the one of highest IoU, the first on a tie. All
other anchors are background (-1), none is ignored. A ground truth may be left without an anchor. Where distances tie,
the anchor of lower index is nearer.

v is that of a sample, with n - 1 in the denominator, as in the authors' program. With S the sum of the n IoUs, and Q
that of their squares, IoU >= m + v means n IoU - S >= 0 and (n IoU - S)^2 >= (n Q - S^2) n / (n - 1). IoUs enter it as
whole multiples of 2^-20. So the sums are exact integers, whatever their order, and equal IoUs equal their mean. An IoU
that is no number, as of areas beyond float32, counts as 0.

The authors' program makes matrices of anchors x ground truths, of distances, IoUs and marks, over 20 bytes a pair. Here
a rectangle is kept around the centres of every tile of anchors. A program takes the tiles in the order of their
distance from the ground truth, and stops at the first that cannot hold a nearer anchor than the k found, which is after
a few. Memory is 4 bytes a candidate, and 16 bytes an anchor of each image.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from retina_fast.kernels.anchor_matching import Matches, checked_geometry
from retina_fast.kernels.arguments import offsets_on_host
from retina_fast.kernels.dispatch import runs_triton, tl, triton
from retina_fast.kernels.labels import BACKGROUND
from retina_fast.kernels.levels import encode_sizes, level_of, load_rows, pick_size
from retina_fast.kernels.match_keys import (
    FIRST,
    NONE,
    TL_FIRST,
    centres_of,
    index_of,
    key_of,
    keys_of,
    matched_of,
    write_matches,
)
from retina_fast.kernels.pair_iou import box_iou, tile_iou

MAX_CANDIDATES = 2048
"""The most candidates of a ground truth. With more, the sums of squares might not fit into 64 bits."""

_UNIT = 1 << 20  # IoUs are counted in its inverse
_PAIRS = 1 << 19  # distances that the reference holds at a time: 4 MB of keys


def _nearest(centres: Tensor, targets: Tensor, k: int) -> Tensor:
    """(G, k) int64: rows of the k centres (N, 2) that are nearest to each of the targets (G, 2), in any order."""
    x, y = (centres[:, i] - targets[:, None, i] for i in (0, 1))  # (G, N)
    distance = x.mul_(x).add_(y.mul_(y))  # squared: not negative, so that its bits order as the numbers do
    keys = keys_of(distance, torch.arange(len(centres), device=centres.device))
    return keys.topk(k, largest=False, sorted=False).values & 0xFFFFFFFF


def _reaches(iou: Tensor) -> Tensor:
    """Whether each of the IoUs (G, n) of a row is at least the row's mean plus its standard deviation."""
    n = iou.shape[1]
    units = (iou * _UNIT).long()
    total = units.sum(dim=1, keepdim=True)
    spread = n * units.square().sum(dim=1, keepdim=True) - total.square()  # n (n - 1) times the variance
    least = spread + (spread + max(n - 2, 0)) // max(n - 1, 1)  # spread n / (n - 1), rounded up
    above = n * units - total
    return (above >= 0) & (above.square() >= least)


def _match_image(anchors: Tensor, boxes: Tensor, level_sizes: Sequence[int], top_k: int) -> Tensor:
    """(N,) int64 matched indices of one image."""
    centres = centres_of(anchors)
    best = torch.zeros(len(anchors), dtype=torch.int64, device=anchors.device)  # the IoU's bits, then the index's
    width = max(*level_sizes, sum(min(top_k, size) for size in level_sizes))
    first = 0
    for chunk in boxes.split(max(1, _PAIRS // width)):
        targets = centres_of(chunk)
        candidates = torch.cat(
            [
                _nearest(centres[start:stop], targets, min(top_k, stop - start)) + start
                for start, stop in pairwise(accumulate(level_sizes, initial=0))
            ],
            dim=1,
        )  # (g, n)
        iou = box_iou(chunk[:, None], anchors[candidates]).nan_to_num(0)  # (g, n)
        centre = centres[candidates]  # (g, n, 2)
        inside = ((centre > chunk[:, None, :2]) & (centre < chunk[:, None, 2:])).all(dim=2)
        row, column = (_reaches(iou) & inside).nonzero(as_tuple=True)
        keys = keys_of(iou[row, column], FIRST - first - row)
        best.scatter_reduce_(0, candidates[row, column], keys, "amax")
        first += len(chunk)
    return matched_of(best)


def atss_matching_reference(
    anchors: Tensor, boxes: Tensor, labels: Tensor, offsets: Tensor, level_sizes: Sequence[int], top_k: int = 9
) -> Matches:
    """The definition; see :func:`atss_matching`."""
    rows = offsets_on_host(offsets, len(boxes))
    indices = torch.full(
        (len(rows) - 1, anchors.shape[-2]), BACKGROUND, dtype=torch.int32, device=anchors.device
    )  # (B, N)
    classes = indices.clone()
    for b, (start, stop) in enumerate(pairwise(rows)):
        if start == stop or not indices.shape[1]:
            continue
        matched = _match_image(anchors if anchors.dim() == 2 else anchors[b], boxes[start:stop], level_sizes, top_k)
        indices[b] = matched
        classes[b] = torch.where(matched >= 0, labels[start:stop][matched.clamp(min=0)], matched)
    return Matches(indices, classes, (indices >= 0).sum(dim=1, dtype=torch.int32))


# Triton. Candidates and matches equal the reference's exactly: no product is contracted with a sum to an fma.

_TILE = 256  # anchors whose centres one rectangle surrounds
_TILES = 512  # rectangles that a program looks at together
_PROGRAMS = 4096  # that look for candidates at a time, about as many as an H200 holds
_TL_UNIT = tl.constexpr(_UNIT)


@triton.jit(do_not_specialize=["anchors_stride"])
def _surround_kernel(anchors_ptr, anchors_stride, bounds_ptr, starts, first_tiles, TILE: tl.constexpr):
    """Program (t, b) writes the rectangle around the centres of tile t, counted through the levels, of anchor set b."""
    tile = tl.program_id(0)
    anchors_set = tl.program_id(1).to(tl.int64)
    level = level_of(first_tiles, tile)
    anchor = pick_size(starts, level) + (tile - pick_size(first_tiles, level)) * TILE + tl.arange(0, TILE)
    valid = anchor < pick_size(starts[1:], level)
    x1, y1, x2, y2 = load_rows(anchors_ptr + anchors_set * anchors_stride, anchor, valid)
    x, y = 0.5 * (x1 + x2), 0.5 * (y1 + y2)
    bounds_ptr += (anchors_set * tl.num_programs(0) + tile) * 4
    tl.store(bounds_ptr, tl.min(tl.where(valid, x, float("inf")), axis=0))
    tl.store(bounds_ptr + 1, tl.min(tl.where(valid, y, float("inf")), axis=0))
    tl.store(bounds_ptr + 2, tl.max(tl.where(valid, x, float("-inf")), axis=0))
    tl.store(bounds_ptr + 3, tl.max(tl.where(valid, y, float("-inf")), axis=0))


@triton.jit(do_not_specialize=["anchors_stride", "bounds_stride"])
def _nearest_kernel(
    anchors_ptr, anchors_stride, bounds_ptr, bounds_stride, boxes_ptr, offsets_ptr, candidates_ptr, starts, first_tiles,
    first_slots, TILE: tl.constexpr, TILES: tl.constexpr, ROOM: tl.constexpr,
):  # fmt: skip
    """Program (p, l, b) finds the candidates in level l of ground truths p, p + P, ... of image b, P the number of
    programs. They are kept unsorted, and the farthest is replaced by what is nearer."""
    level, image = tl.program_id(1), tl.program_id(2).to(tl.int64)
    start, stop = pick_size(starts, level), pick_size(starts[1:], level)
    first_tile = pick_size(first_tiles, level)
    tiles = pick_size(first_tiles[1:], level) - first_tile
    slot = pick_size(first_slots, level)
    count = pick_size(first_slots[1:], level) - slot
    width = pick_size(first_slots, len(first_slots) - 1)
    anchors_ptr += image * anchors_stride
    bounds_ptr += image * bounds_stride + first_tile * 4
    i = tl.arange(0, ROOM)
    end = tl.load(offsets_ptr + image + 1).to(tl.int32)
    box = tl.load(offsets_ptr + image).to(tl.int32) + tl.program_id(0)
    while box < end:
        ptr = boxes_ptr + box.to(tl.int64) * 4
        x = 0.5 * (tl.load(ptr) + tl.load(ptr + 2))
        y = 0.5 * (tl.load(ptr + 1) + tl.load(ptr + 3))
        kept = tl.where(i < count, -i.to(tl.int64) + NONE, -1)  # different keys that are farther than any distance
        farthest = tl.max(kept, axis=0)
        for chunk in range(0, tiles, TILES):
            tile = chunk + tl.arange(0, TILES)
            left, top, right, bottom = load_rows(bounds_ptr, tile, tile < tiles)
            dx = tl.maximum(tl.maximum(left - x, x - right), 0.0)
            dy = tl.maximum(tl.maximum(top - y, y - bottom), 0.0)
            waiting = tl.where(tile < tiles, key_of(dx * dx + dy * dy, tile), NONE)
            nearest = tl.min(waiting, axis=0)
            while (nearest < NONE) & ((nearest >> 32) <= (farthest >> 32)):
                anchor = start + index_of(nearest) * TILE + tl.arange(0, TILE)
                x1, y1, x2, y2 = load_rows(anchors_ptr, anchor, anchor < stop)
                right_of, below = 0.5 * (x1 + x2) - x, 0.5 * (y1 + y2) - y
                keys = tl.where(anchor < stop, key_of(right_of * right_of + below * below, anchor), NONE)
                least = tl.min(keys, axis=0)
                while least < farthest:
                    kept = tl.where(kept == farthest, least, kept)
                    keys = tl.where(keys == least, NONE, keys)
                    farthest = tl.max(kept, axis=0)
                    least = tl.min(keys, axis=0)
                waiting = tl.where(waiting == nearest, NONE, waiting)
                nearest = tl.min(waiting, axis=0)
        tl.store(candidates_ptr + box.to(tl.int64) * width + slot + i, index_of(kept), mask=i < count)
        box += tl.num_programs(0)


@triton.jit(do_not_specialize=["num_anchors", "anchors_stride", "n"])
def _choose_kernel(
    anchors_ptr, anchors_stride, boxes_ptr, offsets_ptr, candidates_ptr, best_ptr, num_anchors, n, WIDTH: tl.constexpr
):
    """Program (p, b) offers ground truths p, p + P, ... of image b to those of their n candidates that are foreground.
    An anchor keeps the greatest key that it is offered: the highest IoU, then the first ground truth."""
    image = tl.program_id(1).to(tl.int64)
    i = tl.arange(0, WIDTH)
    valid = i < n
    first = tl.load(offsets_ptr + image).to(tl.int32)
    end = tl.load(offsets_ptr + image + 1).to(tl.int32)
    box = first + tl.program_id(0)
    while box < end:
        ptr = boxes_ptr + box.to(tl.int64) * 4
        left, top, right, bottom = tl.load(ptr), tl.load(ptr + 1), tl.load(ptr + 2), tl.load(ptr + 3)
        anchor = tl.load(candidates_ptr + box.to(tl.int64) * n + i, mask=valid, other=0)
        x1, y1, x2, y2 = load_rows(anchors_ptr + image * anchors_stride, anchor, valid)
        iou = tl.maximum(tile_iou(x1, y1, x2, y2, (x2 - x1) * (y2 - y1), left, top, right, bottom), 0.0)
        units = tl.where(valid, iou * _TL_UNIT, 0.0).to(tl.int32).to(tl.int64)
        total = tl.sum(units, axis=0)
        spread = n * tl.sum(units * units, axis=0) - total * total
        least = spread + (spread + tl.maximum(n - 2, 0)) // tl.maximum(n - 1, 1)
        above = n * units - total
        x, y = 0.5 * (x1 + x2), 0.5 * (y1 + y2)
        inside = (x > left) & (x < right) & (y > top) & (y < bottom)
        foreground = valid & inside & (above >= 0) & (above * above >= least)
        key = key_of(iou, first - box + TL_FIRST)
        tl.atomic_max(best_ptr + image * num_anchors + anchor, key, mask=foreground, sem="relaxed")
        box += tl.num_programs(0)


def _atss_matching_triton(
    anchors: Tensor, boxes: Tensor, labels: Tensor, offsets: Tensor, level_sizes: Sequence[int], top_k: int
) -> tuple[Tensor, Tensor, Tensor]:
    batch, num_anchors, levels = len(offsets) - 1, anchors.shape[-2], len(level_sizes)
    anchors, boxes, labels, offsets = (x.contiguous() for x in (anchors, boxes, labels, offsets))
    best = anchors.new_zeros((batch, num_anchors), dtype=torch.int64)
    if len(boxes) and best.numel():
        with torch.cuda.device_of(anchors):
            starts = encode_sizes([*accumulate(level_sizes, initial=0)])
            tiles = [*accumulate((triton.cdiv(size, _TILE) for size in level_sizes), initial=0)]
            slots = [*accumulate((min(top_k, size) for size in level_sizes), initial=0)]
            own = batch if anchors.dim() == 3 else 1  # sets of anchors
            stride, bounds_stride = (4 * num_anchors, 4 * tiles[-1]) if anchors.dim() == 3 else (0, 0)
            bounds = anchors.new_empty((own, tiles[-1], 4))
            candidates = anchors.new_empty((len(boxes), slots[-1]), dtype=torch.int32)
            _surround_kernel[(tiles[-1], own)](
                anchors, stride, bounds, starts, encode_sizes(tiles), TILE=_TILE, num_warps=1, enable_fp_fusion=False
            )
            programs = min(len(boxes), triton.cdiv(_PROGRAMS, batch * levels))
            _nearest_kernel[(programs, levels, batch)](
                anchors, stride, bounds, bounds_stride, boxes, offsets, candidates, starts, encode_sizes(tiles),
                encode_sizes(slots), TILE=_TILE, TILES=_TILES,
                ROOM=triton.next_power_of_2(min(top_k, max(level_sizes))), num_warps=1, enable_fp_fusion=False,
            )  # fmt: skip
            _choose_kernel[(programs, batch)](
                anchors, stride, boxes, offsets, candidates, best, num_anchors, slots[-1],
                WIDTH=triton.next_power_of_2(slots[-1]), num_warps=4, enable_fp_fusion=False,
            )  # fmt: skip
    return write_matches(best, labels, offsets)


@torch.library.custom_op("retina_fast::atss_matching", mutates_args=())
def _op(
    anchors: Tensor, boxes: Tensor, labels: Tensor, offsets: Tensor, level_sizes: list[int], top_k: int
) -> tuple[Tensor, Tensor, Tensor]:
    return _atss_matching_triton(anchors, boxes, labels, offsets, level_sizes, top_k)


@torch.library.custom_op("retina_fast::atss_matching_reference", mutates_args=())
def _reference_op(
    anchors: Tensor, boxes: Tensor, labels: Tensor, offsets: Tensor, level_sizes: list[int], top_k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The reference reads offsets on the host: as an operation it is one node of a compiled or exported graph."""
    return atss_matching_reference(anchors, boxes, labels, offsets, level_sizes, top_k)


@_op.register_fake
@_reference_op.register_fake
def _(anchors, boxes, labels, offsets, level_sizes, top_k):
    indices = anchors.new_empty((len(offsets) - 1, anchors.shape[-2]), dtype=torch.int32)
    return indices, torch.empty_like(indices), indices.new_empty(len(indices))


def atss_matching(
    anchors: Tensor, boxes: Tensor, labels: Tensor, offsets: Tensor, level_sizes: Sequence[int], top_k: int = 9
) -> Matches:
    """Match the anchors of a batch of images to their ground truths by adaptive training sample selection.

    Args:
        anchors: ``(N, 4)`` xyxy pixels, shared by the images, or ``(B, N, 4)``; read as float32.
        boxes: ``(G, 4)`` ground truths of all images, concatenated; read as float32.
        labels: ``(G,)`` integer classes.
        offsets: ``(B + 1,)`` integers: image b owns rows offsets[b] to offsets[b + 1].
        level_sizes: how many of the N anchors, which lie level by level, each level has.
        top_k: k, how many anchors of each level are candidates of a ground truth; all where a level has fewer.

    Raises:
        ValueError: for shapes that do not fit each other, labels or offsets that are not integers, tensors on different
            devices, level sizes that do not add up to N, a k below 1 or such that a ground truth would have more than
            2048 candidates, or, on a CPU, offsets that fall or end above G.

    Example::

        >>> centre = torch.arange(0.0, 50.0, 10.0)
        >>> anchors = torch.stack((centre - 8, centre - 8, centre + 8, centre + 8), dim=1)  # along the diagonal
        >>> truth = torch.tensor([[11.0, 11.0, 27.0, 27.0]])
        >>> atss_matching(anchors, truth, torch.tensor([7]), torch.tensor([0, 1]), [5], top_k=4).labels
        tensor([[-1, -1,  7, -1, -1]], dtype=torch.int32)
    """
    anchors, boxes = checked_geometry(anchors, boxes, labels, offsets)
    sizes = list(level_sizes)
    if sum(sizes) != anchors.shape[-2] or any(size < 0 for size in sizes):
        raise ValueError(f"level_sizes must add up to the {anchors.shape[-2]} anchors, got {sizes}")
    if top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    candidates = sum(min(top_k, size) for size in sizes)
    if candidates > MAX_CANDIDATES:
        raise ValueError(
            f"top_k {top_k} gives a ground truth {candidates} candidates in {len(sizes)} levels, more than the "
            f"{MAX_CANDIDATES} that there may be"
        )
    op = _op if runs_triton(anchors) else _reference_op
    return Matches(*op(anchors, boxes, labels, offsets, sizes, top_k))
