"""The last step of selection: each key finds its place among the candidates of its image, and what it stands for is
written there: anchor, score and label, and, where deltas are given, the decoded box.

The place of a key is the number of greater keys, of which a level counts as no more than topk; a key with topk or more
greater ones in its own level is dropped. The keys of a level lie by falling bin of values, so that a key is compared
with those of its own bin in each level, and those above are known to be greater. So neither the sorted keys nor the
anchors have to be read again to learn which box belongs to which place.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from retina_fast.kernels.box_decode import MAX_LOG_SCALE, decode_boxes, store_boxes
from retina_fast.kernels.candidate_list import BINS, bin_of
from retina_fast.kernels.candidate_search import FoundKeys
from retina_fast.kernels.dispatch import tl, triton
from retina_fast.kernels.key_sort import is_less, sorts_by_kernels, unpack_index, unpack_number
from retina_fast.kernels.levels import encode_sizes, level_of, pick_size


class Decoding(NamedTuple):
    """What the boxes of candidates are decoded from."""

    deltas: list[Tensor]
    """The levels, each contiguous ``(B, N_l, C)``."""
    anchors: Tensor
    """``(N, 4)`` or ``(B, N, 4)`` float32, contiguous."""
    image_sizes: Tensor
    """``(B, 2)`` contiguous."""
    reg_max: int = 0
    """n where each side is a distribution over 0, 1, ..., n units, and 0 for deltas."""


# Up to so many keys in a batch: how many a program has, with how many more it compares them in one go, and its warps.
_TILES = ((2**14, 8, 128, 4), (math.inf, 16, 64, 1))


@triton.jit
def _count_of_row(counts_ptr, part_starts, most):
    """The length of the sorted row."""
    count = 0
    for p in tl.static_range(len(part_starts) - 1):
        count += tl.minimum(tl.load(counts_ptr + p), most)
    return count


@triton.jit
def _range_of(counts_ptr, above_ptr, part, exists, highest, lowest, BINS: tl.constexpr):
    """Where the keys of bins begin and end in a part."""
    above_ptr += part * BINS
    begin = tl.load(above_ptr + highest, mask=exists, other=0)
    end = tl.load(above_ptr + lowest - 1, mask=exists & (lowest > 0), other=0x7FFFFFFF)
    return begin, tl.maximum(begin, tl.minimum(end, tl.load(counts_ptr + part, mask=exists, other=0)))


@triton.jit
def _places(row_ptr, counts_ptr, above_ptr, part_starts, tile, most, first_bin, index_bits, KEYS: tl.constexpr,
            CHUNK: tl.constexpr, DROP: tl.constexpr, BINS: tl.constexpr):  # fmt: skip
    """A tile of KEYS keys of a row, their places in the sorted row, and which of them belong there."""
    PARTS: tl.constexpr = len(part_starts) - 1
    start = tile * KEYS
    own = level_of(part_starts, start)
    i = start + tl.arange(0, KEYS)
    count = tl.load(counts_ptr + own) + pick_size(part_starts, own)
    keys = tl.load(row_ptr + i, mask=i < count, other=-1)
    place, before = tl.zeros([KEYS], tl.int32), tl.zeros([KEYS], tl.int32)
    if start < count:
        bin = bin_of(keys, first_bin, index_bits, DROP, BINS)
        highest = tl.max(tl.where(i < count, bin, 0), axis=0)
        lowest = tl.min(tl.where(i < count, bin, BINS - 1), axis=0)
        greater = tl.zeros([KEYS, CHUNK], tl.int32)  # of parts of which all keys count
        begin, end = _range_of(counts_ptr, above_ptr, 0, True, highest, lowest, BINS)
        for part in range(PARTS):
            next_begin, next_end = _range_of(counts_ptr, above_ptr, part + 1, part + 1 < PARTS, highest, lowest, BINS)
            first = pick_size(part_starts, part)
            if end <= most:
                place += begin
                for chunk in range(begin, end, CHUNK):
                    j = chunk + tl.arange(0, CHUNK)
                    others = tl.load(row_ptr + first + j, mask=j < end, other=0)
                    greater += is_less(keys[:, None], others[None, :])
            else:  # the part may have more greater keys than count
                in_part = tl.zeros([KEYS], tl.int32) + begin
                for chunk in range(begin, tl.where(begin < most, end, begin), CHUNK):
                    j = chunk + tl.arange(0, CHUNK)
                    others = tl.load(row_ptr + first + j, mask=j < end, other=0)
                    in_part += tl.sum(is_less(keys[:, None], others[None, :]), axis=1)
                place += tl.minimum(in_part, most)
                before = tl.where(part == own, in_part, before)
            begin, end = next_begin, next_end
        place += tl.sum(greater, axis=1)
    return keys, place, (i < count) & (before < most)


@triton.jit(do_not_specialize=["row_width", "width", "most", "first_bin", "index_bits", "anchors_stride"])
def _place_kernel(
    rows_ptr, found_ptr, above_ptr, part_starts, anchors_ptr, scores_ptr, labels_ptr, boxes_ptr, counts_ptr, deltas,
    delta_starts, anchor_boxes_ptr, sizes_ptr, row_width, width, most, first_bin, index_bits, anchors_stride,
    max_log_scale,
    K: tl.constexpr, DROP: tl.constexpr, SORTED: tl.constexpr, KEYS: tl.constexpr, CHUNK: tl.constexpr,
    BINS: tl.constexpr, COUNT: tl.constexpr, DISTRIBUTION: tl.constexpr,
):  # fmt: skip
    """Program (t, b) writes what KEYS keys of image b stand for to their places, and its share of the padding."""
    tile = tl.program_id(0)
    image = tl.program_id(1).to(tl.int64)
    found_ptr += image * (len(part_starts) - 1)
    count = _count_of_row(found_ptr, part_starts, most)
    i = tile * KEYS + tl.arange(0, KEYS)
    if SORTED:
        keys, place, belongs = tl.load(rows_ptr + image * row_width + i, mask=i < count, other=-1), i, i < count
    else:
        above_ptr += image * (len(part_starts) - 1) * BINS
        keys, place, belongs = _places(rows_ptr + image * row_width, found_ptr, above_ptr, part_starts, tile, most,
                                       first_bin, index_bits, KEYS, CHUNK, DROP, BINS)  # fmt: skip
    out = image * width + place
    index = unpack_index(keys, index_bits)
    score = tl.div_rn(1.0, 1.0 + tl.exp(-unpack_number(keys, index_bits, DROP)))
    anchor = index // K
    tl.store(scores_ptr + out, score, mask=belongs)
    tl.store(labels_ptr + out, (index % K).to(tl.int64), mask=belongs)
    if anchors_ptr is not None:
        tl.store(anchors_ptr + out, anchor.to(tl.int64), mask=belongs)
    if boxes_ptr is not None:
        x1, y1, x2, y2 = decode_boxes(
            deltas, delta_starts, anchor_boxes_ptr + image * anchors_stride, sizes_ptr, image, anchor, belongs,
            max_log_scale, COUNT, DISTRIBUTION,
        )  # fmt: skip
        store_boxes(boxes_ptr + out * 4, x1, y1, x2, y2, belongs)

    out = image * width + i
    padding = (i >= count) & (i < width)
    tl.store(scores_ptr + out, tl.zeros([KEYS], tl.float32), mask=padding)
    tl.store(labels_ptr + out, tl.full([KEYS], -1, tl.int64), mask=padding)
    if anchors_ptr is not None:
        tl.store(anchors_ptr + out, tl.zeros([KEYS], tl.int64), mask=padding)
    if boxes_ptr is not None:
        zero = tl.zeros([KEYS], tl.float32)
        store_boxes(boxes_ptr + out * 4, zero, zero, zero, zero, padding)
    if tile == 0:
        tl.store(counts_ptr + image, count.to(tl.int64))


def write_candidates(
    found: FoundKeys, width: int, num_classes: int, decoding: Decoding | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Anchors, or boxes if they are to be decoded, scores and labels ``(B, width)``, best first, and counts ``(B,)``.

    One launch; where an image may have more than 8192 keys, torch.sort comes before.
    """
    keys, part_starts, most = found.keys, encode_sizes(found.part_starts), found.most
    batch, row_width = keys.shape
    scores, labels = keys.new_empty(batch, width, dtype=torch.float32), keys.new_empty(batch, width)
    counts = keys.new_empty(batch)
    anchors = boxes = deltas = delta_starts = anchor_boxes = sizes = None
    stride, places = 0, 1
    if decoding is None:
        anchors = keys.new_empty(batch, width)
    else:
        boxes, anchor_boxes, sizes = scores.new_empty(batch, width, 4), decoding.anchors, decoding.image_sizes
        deltas, starts, places = tuple(decoding.deltas), [0], decoding.reg_max + 1
        for level in deltas:
            starts.append(starts[-1] + level.shape[1])
        delta_starts, stride = encode_sizes(starts), 0 if anchor_boxes.dim() == 2 else 4 * starts[-1]
    by_kernels = sorts_by_kernels(row_width)
    with torch.cuda.device_of(keys):
        tile, chunk, warps = next(sizes for limit, *sizes in _TILES if keys.numel() <= limit)
        if not by_kernels:
            keys, tile, warps = _sorted_by_torch(found), 256, 4
        _place_kernel[(triton.cdiv(max(keys.shape[1], width), tile), batch)](
            keys, found.counts, found.above, part_starts, anchors, scores, labels, boxes, counts, deltas, delta_starts,
            anchor_boxes, sizes, keys.shape[1], width, most, found.first_bin, found.index_bits, stride, MAX_LOG_SCALE,
            K=num_classes, DROP=found.drop, SORTED=not by_kernels, KEYS=tile, CHUNK=chunk, BINS=BINS.value,
            COUNT=places, DISTRIBUTION=triton.next_power_of_2(places), num_warps=warps, enable_fp_fusion=False,
        )  # fmt: skip
    written = anchors if boxes is None else boxes
    assert written is not None
    return written, scores, labels, counts


def _sorted_by_torch(found: FoundKeys) -> Tensor:
    """Rows of keys in falling order, of each part the greatest ones; behind them padding."""
    ends = found.part_starts[1:]
    parts = [found.keys[:, start:end] for start, end in zip(found.part_starts, ends, strict=False)]
    if any(part.shape[1] > found.most for part in parts):
        parts = [part.sort(dim=1, descending=True).values[:, : found.most] for part in parts]
    return torch.cat(parts, dim=1).sort(dim=1, descending=True).values
