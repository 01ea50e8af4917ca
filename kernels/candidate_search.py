"""The keys of the candidates: of the survivors of each image and level at least the topk greatest, and a few more, up
to the room of a level, which are dropped when keys find their places. Within a level they lie by falling bin of values.

Mostly the bin of values (``candidate_list.py``) that holds the topk-th key tells which keys stay, and the first of
three launches writes them. Where the bin has too many keys, such as many equal scores, the launches count its keys in
512 finer bins, and those of a finer bin again. What is too many even then lies within a few thousand logits, which one
program searches to the end; only values of the outermost bins, or so close to 0 that a bin holds them all, may make it
look through a whole level. The launches read the lists, and the logits where a list is too short.
"""

import math
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from retina_fast.kernels.candidate_list import BINS, bin_of, list_survivors, lowest_key
from retina_fast.kernels.dispatch import tl, triton
from retina_fast.kernels.key_sort import PADDING, RUN, pack, sorts_by_kernels
from retina_fast.kernels.levels import encode_sizes, level_of, pick, pick_size

_SLACK = 128  # how many keys more than topk have room at least
_SEARCH_TILE = 1024
_SEARCH_PROGRAMS = 512  # of all images together
_ONE_PROGRAM = 15  # bits of a range of keys that one program may search alone


class FoundKeys(NamedTuple):
    """Keys of B images. A part of a row holds those of one level, by falling bin of values, in any order within one."""

    keys: Tensor
    """(B, M) int64; behind the keys of a part lies PADDING where the sort needs it, else anything."""
    counts: Tensor
    """(B, levels) int32: how many keys each part has."""
    above: Tensor
    """(B, levels, BINS) int32: how many survivors are above each bin, which is where its keys begin within a part."""
    part_starts: tuple[int, ...]
    """Where each part begins, and M."""
    most: int
    """How many keys of a part are candidates, the greatest."""
    index_bits: int
    """How many bits of a key the index takes."""
    first_bin: int
    """What is subtracted from the number of a bin."""
    drop: int
    """How many low bits of float32 the dtype of the logits lacks."""
    zeros: Tensor
    """int32 zeros for whoever comes next, as many as were asked for."""


@triton.jit
def _shift_of(size, BINS: tl.constexpr):
    """By how many bits keys are shifted so that a range of so many falls into the bins."""
    bits = ((tl.maximum(size, 2) - 1).to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 126
    return tl.maximum(bits - 9, 0)  # 2^9 bins


@triton.jit
def _pick_bin(counts, needed, BINS: tl.constexpr):
    """The bin that holds the needed-th greatest key, how many keys are above it, and how many it has. Bins are counted
    from the last, and so are the counts."""
    falling = tl.arange(0, BINS)
    bin = tl.sum((tl.cumsum(counts, axis=0) < needed).to(tl.int32), axis=0)
    above = tl.sum(tl.where(falling < bin, counts, 0), axis=0)
    return BINS - 1 - bin, above, tl.sum(tl.where(falling == bin, counts, 0), axis=0)


@triton.jit
def _interval(state_ptr, histogram_ptr, found, capacity, room, topk, first_bin, index_bits, digit, DROP: tl.constexpr,
              BINS: tl.constexpr):  # fmt: skip
    """The range of keys that holds the topk-th greatest, how many are above it and within it, and whether the launch
    before had to leave the keys to this one. Where the list is too short, the logits hold more keys than were found."""
    lowest = tl.full([], 0, tl.int64)
    end = tl.full([], 0x7FFFFFFFFFFFFFFF, tl.int64)
    above, within = tl.full([], 0, tl.int32), found
    if digit > 0:
        lowest, end = tl.load(state_ptr), tl.load(state_ptr + 1)
        above, within = tl.load(state_ptr + 2).to(tl.int32), tl.load(state_ptr + 3).to(tl.int32)
    is_open = (digit == 0) | (above + within > room)
    if above + within > tl.where(digit == 0, tl.minimum(room, capacity), room):
        counts = tl.load(histogram_ptr + BINS - 1 - tl.arange(0, BINS))
        bin, more, within = _pick_bin(counts, tl.maximum(topk - above, 1), BINS)
        above += more
        if digit == 0:
            lowest = lowest_key(bin, first_bin, index_bits, DROP, BINS)
            end = lowest_key(bin + 1, first_bin, index_bits, DROP, BINS)
        else:
            shift = _shift_of(end - lowest, BINS)
            lowest += bin.to(tl.int64) << shift
            end = tl.minimum(end, lowest + (tl.full([], 1, tl.int64) << shift))
    return lowest, end, above, within, is_open


@triton.jit
def _append(keys, chosen, above, first_bin, index_bits, row_ptr, filled_ptr, count_ptr, DROP: tl.constexpr,
            BINS: tl.constexpr):  # fmt: skip
    """Appends the chosen keys to their bins in a part of a row."""
    total = tl.sum(chosen.to(tl.int32), axis=0)
    if total > 0:
        bin = bin_of(keys, first_bin, index_bits, DROP, BINS)
        slots = tl.gather(above, BINS - 1 - bin, axis=0)
        slots += tl.atomic_add(filled_ptr + bin, 1, mask=chosen, sem="relaxed")
        tl.store(row_ptr + slots, keys, mask=chosen)
        tl.atomic_add(count_ptr, total, sem="relaxed")


@triton.jit
def _append_from(x_ptr, in_level, start, threshold, lowest, end, needed, room, above_bins, first_bin, index_bits,
                 row_ptr, filled_ptr, count_ptr, DROP: tl.constexpr, TILE: tl.constexpr,
                 BINS: tl.constexpr):  # fmt: skip
    """One program appends keys of a range in which all have one value, or which is rarely met: at least the needed
    greatest ones, and no more than have room."""
    first, stop = 0, in_level
    if (lowest >> index_bits) == ((end - 1) >> index_bits):  # equal values: a range of indices
        last = (tl.full([], 1, tl.int64) << index_bits) - 1
        first = tl.maximum((last - ((end - 1) & last)).to(tl.int32) - start, 0)
        stop = tl.minimum((last - (lowest & last)).to(tl.int32) - start + 1, in_level)
    bottom, top, above, within = lowest, end, 0, room + 1
    while above + within > room:
        shift = _shift_of(top - bottom, BINS)
        histogram = tl.zeros([BINS], tl.int32)
        for offset in range(first, stop, TILE):
            i = offset + tl.arange(0, TILE)
            x = tl.load(x_ptr + i, mask=i < stop, other=float("-inf")).to(tl.float32)
            keys = pack(x, start + i, index_bits, DROP)
            matching = (x > threshold) & (keys >= bottom) & (keys < top)
            bin = tl.where(matching, BINS - 1 - ((keys - bottom) >> shift), 0).to(tl.int32)
            histogram += tl.histogram(bin, BINS, mask=matching)
        bin, more, within = _pick_bin(histogram, needed - above, BINS)
        above += more
        bottom += bin.to(tl.int64) << shift
        top = tl.minimum(top, bottom + (tl.full([], 1, tl.int64) << shift))
    for offset in range(first, stop, TILE):
        i = offset + tl.arange(0, TILE)
        x = tl.load(x_ptr + i, mask=i < stop, other=float("-inf")).to(tl.float32)
        keys = pack(x, start + i, index_bits, DROP)
        chosen = (x > threshold) & (keys >= bottom) & (keys < end)
        _append(keys, chosen, above_bins, first_bin, index_bits, row_ptr, filled_ptr, count_ptr, DROP, BINS)


@triton.jit(do_not_specialize=["width", "list_width", "first_bin", "index_bits", "topk", "digit"])
def _search_kernel(
    levels, starts, list_starts, first_shares, part_starts, lists_ptr, found_ptr, states_ptr, histograms_ptr, above_ptr,
    filled_ptr, rows_ptr, counts_ptr, width, list_width, first_bin, index_bits, threshold, topk, digit,
    DROP: tl.constexpr, TILE: tl.constexpr, BINS: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Program (p, b) looks at its share of a level of image b. If it is known by now which keys stay, they are appended
    to the row, unless an earlier launch has done so. Otherwise those of the range that holds the lowest of them are
    counted in finer bins."""
    image = tl.program_id(1).to(tl.int64)
    level = level_of(first_shares, tl.program_id(0))
    share = tl.program_id(0) - pick_size(first_shares, level)
    shares = pick_size(first_shares[1:], level) - pick_size(first_shares, level)
    segment = image * len(levels) + level
    segments = tl.num_programs(1).to(tl.int64) * len(levels)
    start, list_start, part_start = (
        pick_size(starts, level),
        pick_size(list_starts, level),
        pick_size(part_starts, level),
    )
    room = pick_size(part_starts[1:], level) - part_start
    found, capacity = tl.load(found_ptr + segment), pick_size(list_starts[1:], level) - list_start
    lowest, end, above, within, is_open = _interval(
        states_ptr + ((digit - 1) * segments + segment) * 4, histograms_ptr + (digit * segments + segment) * BINS,
        found, capacity, room, topk, first_bin, index_bits, digit, DROP, BINS,
    )  # fmt: skip
    if not LAST and share == 0:
        state_ptr = states_ptr + (digit * segments + segment) * 4
        tl.store(state_ptr, lowest)
        tl.store(state_ptr + 1, end)
        tl.store(state_ptr + 2, above.to(tl.int64))
        tl.store(state_ptr + 3, within.to(tl.int64))
    if is_open:
        known = above + within <= room
        in_level = pick_size(starts[1:], level) - start
        listed = found <= capacity
        list_ptr = lists_ptr + image * list_width + list_start
        x_ptr = pick(levels, level) + image * in_level
        row_ptr, count_ptr = rows_ptr + image * width + part_start, counts_ptr + segment
        filled_ptr += segment * BINS
        in_bins = tl.load(histograms_ptr + segment * BINS + BINS - 1 - tl.arange(0, BINS))
        above_bins = tl.cumsum(in_bins, axis=0) - in_bins
        if (share == 0) & (digit == 0):
            tl.store(above_ptr + segment * BINS + BINS - 1 - tl.arange(0, BINS), above_bins)
        work = tl.where(listed, found, in_level)
        from_key = tl.where(known, lowest, end)  # those from the end on stay in any case
        shift = _shift_of(end - lowest, BINS)
        histogram = tl.zeros([BINS], tl.int32)
        offset = share * TILE
        while offset < work:
            i = offset + tl.arange(0, TILE)
            if listed:
                keys = tl.load(list_ptr + i, mask=i < work, other=-1)
            else:
                x = tl.load(x_ptr + i, mask=i < work, other=float("-inf")).to(tl.float32)
                keys = tl.where(x > threshold, pack(x, start + i, index_bits, DROP), -1)
            if known | LAST:
                _append(keys, keys >= from_key, above_bins, first_bin, index_bits, row_ptr, filled_ptr, count_ptr,
                        DROP, BINS)  # fmt: skip
            elif not LAST:
                matching = (keys >= lowest) & (keys < end)
                bin = tl.where(matching, (keys - lowest) >> shift, 0).to(tl.int32)
                histogram += tl.histogram(bin, BINS, mask=matching)
            offset += shares * TILE
        if LAST:
            if (share == 0) & ~known:
                _append_from(x_ptr, in_level, start, threshold, lowest, end, tl.maximum(topk - above, 1), room - above,
                             above_bins, first_bin, index_bits, row_ptr, filled_ptr, count_ptr, DROP, TILE,
                             BINS)  # fmt: skip
        elif ~known:
            bins = histograms_ptr + ((digit + 1) * segments + segment) * BINS + tl.arange(0, BINS)
            tl.atomic_add(bins, histogram, mask=histogram > 0, sem="relaxed")


def _launches(drop: int, index_bits: int) -> int:
    """How many launches search: as many as leave a usual bin's keys in so few bits that one program can search them."""
    bits = index_bits + 2 + 16 - drop
    return 1 + max(1, math.ceil((bits - _ONE_PROGRAM) / 9))


def search_keys(levels: list[Tensor], threshold: float, topk: int, zeros: int = 0) -> FoundKeys:
    """The keys of the candidates. The number of launches depends on the dtype and the number of logits alone.

    Args:
        levels: the logits, each ``(B, N_l, K)``.
        threshold: logits must exceed it.
        topk: the most candidates of an image and level.
        zeros: how many zeros the result is to have, so that they take no launch of their own.
    """
    first, *_ = levels = [level.contiguous() for level in levels]
    batch, logits = len(first), [level.shape[1] * level.shape[2] for level in levels]
    drop = {torch.bfloat16: 16, torch.float16: 13}.get(first.dtype, 0)
    index_bits = max(1, (sum(logits) - 1).bit_length())
    starts = [0, *accumulate(logits)]
    most = min(topk, 2**31 - 1)
    part_starts = [0, *accumulate(RUN * triton.cdiv(min(count, most + _SLACK), RUN) for count in logits)]
    programs = max(1, _SEARCH_PROGRAMS // max(1, batch))
    first_shares = [0, *accumulate(
        max(1, min(triton.cdiv(count, 8 * _SEARCH_TILE), programs * count // max(1, starts[-1]))) for count in logits
    )]  # fmt: skip
    launches, segments, bins = _launches(drop, index_bits), batch * len(levels), BINS.value
    parts = segments, segments * bins, segments * (2 + launches * bins), zeros
    counts, filled, rest, spare = first.new_zeros(sum(parts), dtype=torch.int32).split(parts)
    above = torch.empty_like(filled)
    survivors = list_survivors(levels, encode_sizes(starts), threshold, most, drop, index_bits, rest)
    states = first.new_empty(launches, segments, 4, dtype=torch.int64)
    shape = batch, part_starts[-1]
    rows = states.new_empty(shape) if sorts_by_kernels(shape[1]) else states.new_full(shape, PADDING)
    with torch.cuda.device_of(first):
        for digit in range(launches):
            _search_kernel[(first_shares[-1], batch)](
                tuple(levels), encode_sizes(starts), survivors.list_starts, encode_sizes(first_shares),
                encode_sizes(part_starts), survivors.lists, survivors.found, states, survivors.histograms, above,
                filled, rows, counts, shape[1], survivors.lists.shape[1], survivors.first_bin, index_bits, threshold,
                most, digit, DROP=drop, TILE=_SEARCH_TILE, BINS=bins, LAST=digit == launches - 1,
                enable_fp_fusion=False,
            )  # fmt: skip
    counts, above = counts.view(batch, len(levels)), above.view(batch, len(levels), bins)
    return FoundKeys(rows, counts, above, tuple(part_starts), most, index_bits, survivors.first_bin, drop, spare)
