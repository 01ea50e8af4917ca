"""The anchors whose predictions are aligned best with a ground truth: the search of task_aligned_matching.py, where
costs are explained. Here they are those of the reference up to rounding, since exponentials round differently.

The first launch keeps a rectangle around the centres of every tile of anchors, and decodes the boxes of the tiles that
meet a ground truth. In the second, a program reads only those tiles of its share that meet the ground truth, and keeps
the top_k of least cost. The shares are dealt out in turns, so that the anchors of a large ground truth are spread over
many programs.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from retina_fast.kernels.box_decode import MAX_LOG_SCALE
from retina_fast.kernels.dispatch import HAS_TRITON, PTX, tl, triton
from retina_fast.kernels.fast_math import sigmoid
from retina_fast.kernels.levels import level_of, load_rows, pick, pick_size, store_rows, tile_levels
from retina_fast.kernels.match_keys import NONE, key_of
from retina_fast.kernels.pair_iou import tile_iou
from retina_fast.kernels.side_distributions import UNITS, expected_side, load_side

EMPTY = tl.constexpr(0x7F800000 << 32)
"""Keys from here on have no finite cost, so they stand for no anchor."""

_TILE = 128  # anchors whose centres one rectangle surrounds
_TILES = 32  # rectangles, or ground truths, that a program looks at together
_SHARES = 32
_DISTRIBUTIONS = 64  # that are decoded together
_PROGRAMS = 4096  # about as many as an H200 holds
_MAX_LOG_SCALE = tl.constexpr(MAX_LOG_SCALE)
_NAN = tl.constexpr(tl.PropagateNan.ALL if HAS_TRITON else None)  # otherwise a minimum would hide a NaN
_UNIT = tl.constexpr(1 / UNITS)


@triton.jit(do_not_specialize=["num_anchors", "anchors_stride"])
def _predict_kernel(
    levels, anchors_ptr, anchors_stride, boxes_ptr, offsets_ptr, predicted_ptr, bounds_ptr, starts, first_tiles,
    num_anchors, COUNT: tl.constexpr, BINS: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Program (t, b) writes the rectangle around the centres of tile t, counted through the levels, of the anchors of
    image b, and the boxes that they predict if a ground truth meets it."""
    tile = tl.program_id(0)
    image = tl.program_id(1).to(tl.int64)
    level = level_of(first_tiles, tile)
    start = pick_size(starts, level)
    num_rows = pick_size(starts[1:], level) - start
    begin = (tile - pick_size(first_tiles, level)) * TILE
    level_ptr = pick(levels, level) + image * num_rows * (4 * COUNT)
    anchors_ptr += image * anchors_stride + start * 4
    predicted_ptr += (image * num_anchors + start) * 4
    all_rows = begin + tl.arange(0, TILE)
    x1, y1, x2, y2 = load_rows(anchors_ptr, all_rows, all_rows < num_rows)
    x, y = 0.5 * (x1 + x2), 0.5 * (y1 + y2)
    from_x = tl.min(tl.where(all_rows < num_rows, x, float("inf")), axis=0)
    from_y = tl.min(tl.where(all_rows < num_rows, y, float("inf")), axis=0)
    to_x = tl.max(tl.where(all_rows < num_rows, x, float("-inf")), axis=0)
    to_y = tl.max(tl.where(all_rows < num_rows, y, float("-inf")), axis=0)
    bounds_ptr += (image * tl.num_programs(0) + tile) * 4
    tl.store(bounds_ptr, from_x)
    tl.store(bounds_ptr + 1, from_y)
    tl.store(bounds_ptr + 2, to_x)
    tl.store(bounds_ptr + 3, to_y)

    end = tl.load(offsets_ptr + image + 1).to(tl.int32)
    meeting = tl.zeros([TILES], tl.int32)
    for first in range(tl.load(offsets_ptr + image).to(tl.int32), end, TILES):
        box = first + tl.arange(0, TILES)
        left, top, right, bottom = load_rows(boxes_ptr, box, box < end)
        meets = (box < end) & (from_x < right) & (to_x > left) & (from_y < bottom) & (to_y > top)
        meeting |= meets.to(tl.int32)
    if tl.max(meeting, axis=0) > 0:
        for first in range(0, TILE, ROWS):
            row = begin + first + tl.arange(0, ROWS)
            valid = row < num_rows
            a_x1, a_y1, a_x2, a_y2 = load_rows(anchors_ptr, row, valid)
            w, h = a_x2 - a_x1, a_y2 - a_y1
            cx, cy = a_x1 + 0.5 * w, a_y1 + 0.5 * h
            if COUNT == 1:
                dx, dy, dw, dh = load_rows(level_ptr, row, valid)
                cx, cy = dx * w + cx, dy * h + cy
                to_right = 0.5 * (tl.exp(tl.minimum(dw, _MAX_LOG_SCALE, _NAN)) * w)
                to_bottom = 0.5 * (tl.exp(tl.minimum(dh, _MAX_LOG_SCALE, _NAN)) * h)
                to_left, to_top = to_right, to_bottom
            else:
                ptr = level_ptr + row * (4 * COUNT)
                to_left = expected_side(load_side(ptr, 0, valid, COUNT, BINS), COUNT, BINS) * (w * _UNIT)
                to_top = expected_side(load_side(ptr, 1, valid, COUNT, BINS), COUNT, BINS) * (h * _UNIT)
                to_right = expected_side(load_side(ptr, 2, valid, COUNT, BINS), COUNT, BINS) * (w * _UNIT)
                to_bottom = expected_side(load_side(ptr, 3, valid, COUNT, BINS), COUNT, BINS) * (h * _UNIT)
            store_rows(predicted_ptr, row, cx - to_left, cy - to_top, cx + to_right, cy + to_bottom, valid)


@triton.jit(do_not_specialize=["num_anchors", "anchors_stride", "k", "alpha", "beta"])
def _align_kernel(
    levels, anchors_ptr, anchors_stride, predicted_ptr, bounds_ptr, boxes_ptr, labels_ptr, offsets_ptr, keys_ptr,
    starts, first_tiles, num_anchors, k, alpha, beta, K: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr,
    ROOM: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Program (p, s, b) writes to keys (G, S, k) the least keys, of cost and anchor, in tiles s, s + S, ... of ground
    truths p, p + P, ... of image b. They are kept unsorted, and the greatest is replaced by what is less."""
    share, shares, image = tl.program_id(1), tl.num_programs(1), tl.program_id(2).to(tl.int64)
    tiles = pick_size(first_tiles, len(first_tiles) - 1)
    anchors_ptr += image * anchors_stride
    predicted_ptr += image * num_anchors * 4
    bounds_ptr += image * tiles * 4
    i = tl.arange(0, ROOM)
    end = tl.load(offsets_ptr + image + 1).to(tl.int32)
    box = tl.load(offsets_ptr + image).to(tl.int32) + tl.program_id(0)
    while box < end:
        ptr = boxes_ptr + box.to(tl.int64) * 4
        left, top, right, bottom = tl.load(ptr), tl.load(ptr + 1), tl.load(ptr + 2), tl.load(ptr + 3)
        label = tl.load(labels_ptr + box).to(tl.int32)
        known = (label >= 0) & (label < K)
        kept = tl.where(i < k, -i.to(tl.int64) + NONE, -1)  # different keys that stand for no anchor
        greatest = tl.max(kept, axis=0)
        for first in range(share, tiles, TILES * shares):
            tile = first + shares * tl.arange(0, TILES)
            from_x, from_y, to_x, to_y = load_rows(bounds_ptr, tile, tile < tiles)
            meets = (from_x < right) & (to_x > left) & (from_y < bottom) & (to_y > top) & (tile < tiles) & known
            waiting = tl.where(meets, tile, tiles)
            this = tl.min(waiting, axis=0)
            while this < tiles:
                level = level_of(first_tiles, this)
                start = pick_size(starts, level)
                num_rows = pick_size(starts[1:], level) - start
                row = (this - pick_size(first_tiles, level)) * TILE + tl.arange(0, TILE)
                x1, y1, x2, y2 = load_rows(anchors_ptr, start + row, row < num_rows)
                x, y = 0.5 * (x1 + x2), 0.5 * (y1 + y2)
                inside = (row < num_rows) & (x > left) & (x < right) & (y > top) & (y < bottom)
                logits_ptr = pick(levels, level) + image * num_rows * K + label
                logit = tl.load(logits_ptr + row * K, mask=inside, other=0.0).to(tl.float32)
                x1, y1, x2, y2 = load_rows(predicted_ptr, start + row, inside)
                iou = tile_iou(x1, y1, x2, y2, (x2 - x1) * (y2 - y1), left, top, right, bottom)
                iou = tl.where(iou > 1, 1.0, tl.where(iou < 0, 0.0, iou))
                _, log = sigmoid(logit, PTX)
                cost = alpha * (tl.maximum(-logit, 0.0) + log) - beta * tl.log(iou)
                keys = tl.where(inside & (cost < float("inf")), key_of(tl.maximum(cost, 0.0), start + row), NONE)
                least = tl.min(keys, axis=0)
                while least < greatest:
                    kept = tl.where(kept == greatest, least, kept)
                    keys = tl.where(keys == least, NONE, keys)
                    greatest = tl.max(kept, axis=0)
                    least = tl.min(keys, axis=0)
                waiting = tl.where(waiting == this, tiles, waiting)
                this = tl.min(waiting, axis=0)
        tl.store(keys_ptr + (box.to(tl.int64) * shares + share) * k + i, kept, mask=i < k)
        box += tl.num_programs(0)


def aligned_candidates(
    logits: Sequence[Tensor], deltas: Sequence[Tensor], anchors: Tensor, boxes: Tensor, labels: Tensor, offsets: Tensor,
    num_classes: int, top_k: int, alpha: float, beta: float, reg_max: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Keys (G, S, top_k) of cost and anchor, of which the top_k least of each ground truth are its candidates, and the
    boxes (B, N, 4) that they predict. Two launches; all tensors are contiguous, and none is empty."""
    batch, num_anchors = len(offsets) - 1, anchors.shape[-2]
    starts, first_tiles, tiles = tile_levels(logits, _TILE)
    stride = 4 * num_anchors if anchors.dim() == 3 else 0
    shares = min(_SHARES, tiles)
    programs = min(len(boxes), triton.cdiv(_PROGRAMS, batch * shares))
    predicted, bounds = anchors.new_empty((batch, num_anchors, 4)), anchors.new_empty((batch, tiles, 4))
    keys = anchors.new_empty((len(boxes), shares, top_k), dtype=torch.int64)
    with torch.cuda.device_of(anchors):
        _predict_kernel[(tiles, batch)](
            tuple(deltas), anchors, stride, boxes, offsets, predicted, bounds, starts, first_tiles, num_anchors,
            COUNT=reg_max + 1, BINS=triton.next_power_of_2(reg_max + 1), TILE=_TILE, TILES=_TILES,
            ROWS=min(_TILE, _DISTRIBUTIONS) if reg_max else _TILE, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
        _align_kernel[(programs, shares, batch)](
            tuple(logits), anchors, stride, predicted, bounds, boxes, labels, offsets, keys, starts,
            first_tiles, num_anchors, top_k, alpha, beta, K=num_classes, TILE=_TILE, TILES=_TILES,
            ROOM=triton.next_power_of_2(top_k), PTX=PTX, num_warps=1, enable_fp_fusion=False,
        )  # fmt: skip
    return keys, predicted
