"""The keys of the candidates: one for every logit above the threshold, and of these the topk of each image and level.

The logits are read once, and the survivors of each image and level are listed, each as one integer key that orders it.
Where more than topk survive, a radix search over the keys, 8 bits a pass, finds the lowest key that stays. A list has
room for 3% of the logits; where more survive, the passes read the logits instead.
"""

from itertools import accumulate

import torch
from torch import Tensor

from retina_fast.kernels.compiler import tl, triton
from retina_fast.kernels.key_sort import PADDING, pack, sorts_by_kernels
from retina_fast.kernels.levels import encode_sizes, level_of, pick, pick_size

# A segment is one level of one image. A tile is a run of logits of one segment that starts on a 16-byte
# boundary. A thread looks at 16 bytes of a tile at a time, and notes as bits which of these logits survive.

_TILE_BYTES = 32768  # by instruction counts: at half of that a tile's set-up costs 1 more an element
_LISTED = 32  # the list of a segment has room for one in 32 of its logits
_SEARCH_TILE = 2048
_SEARCH_PROGRAMS = 2048  # over all segments: about what an H200 holds at once
_BINS = tl.constexpr(256)


@triton.jit
def _survivors(x_ptr, begin, end, threshold, TILE: tl.constexpr, RUN: tl.constexpr, MASKED: tl.constexpr):
    """For each run of RUN logits, (TILE // RUN,): bits of those that exceed the threshold, plus 2^16 times their
    number."""
    place = tl.arange(0, RUN)[None, :]
    i = tl.arange(0, TILE // RUN)[:, None] * RUN + place
    if MASKED:
        x = tl.load(x_ptr + i, mask=(begin + i >= 0) & (begin + i < end), other=float("-inf"))
    else:
        x = tl.load(x_ptr + i)
    return tl.sum(tl.where(x.to(tl.float32) > threshold, (1 << place) + 65536, 0), axis=1)


@triton.jit
def _list(x_ptr, begin, first_index, found, list_ptr, found_ptr, capacity, index_bits, DROP: tl.constexpr,
          TILE: tl.constexpr, RUN: tl.constexpr):  # fmt: skip
    """Counts a tile's survivors, and appends their keys to the list as far as it has room."""
    counts = found >> 16
    total = tl.sum(counts, axis=0)
    if total > 0:
        slot = tl.atomic_add(found_ptr, total, sem="relaxed")
        if slot < capacity:
            slots = slot + tl.cumsum(counts, axis=0) - counts
            bits = found & 65535
            start = tl.arange(0, TILE // RUN) * RUN
            while tl.max(bits, axis=0) > 0:  # one survivor of each run at a time
                lowest = (bits & -bits).to(tl.float32).to(tl.int32, bitcast=True)
                i = start + (lowest >> 23) - 127  # the exponent of a power of two
                x = tl.load(x_ptr + i, mask=bits > 0, other=0.0).to(tl.float32)
                key = pack(x, first_index + begin + i, index_bits, DROP)
                tl.store(list_ptr + slots, key, mask=(bits > 0) & (slots < capacity))
                slots += 1
                bits &= bits - 1


@triton.jit(do_not_specialize=["list_width", "index_bits"])
def _list_kernel(
    levels, starts, first_tiles, list_starts, lists_ptr, found_ptr, list_width, index_bits, threshold,
    DROP: tl.constexpr, TILE: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """Program (t, b) lists the survivors of tile t, counted through the levels, of image b."""
    tile = tl.program_id(0)
    image = tl.program_id(1).to(tl.int64)
    level = level_of(first_tiles, tile)
    start, list_start = pick_size(starts, level), pick_size(list_starts, level)
    end = pick_size(starts[1:], level) - start  # logits of an image in this level
    shift = ((image * end) & 15).to(tl.int32)  # the image's first logit may lie off the 16-byte boundaries
    tile -= pick_size(first_tiles, level)
    begin = tile * TILE - shift
    x_ptr = pick(levels, level) + tl.multiple_of(image * end - shift, 16) + tile * TILE
    if (begin >= 0) & (begin + TILE <= end):
        found = _survivors(x_ptr, begin, end, threshold, TILE, RUN, False)
    else:
        found = _survivors(x_ptr, begin, end, threshold, TILE, RUN, True)
    capacity = pick_size(list_starts[1:], level) - list_start
    list_ptr = lists_ptr + image * list_width + list_start
    _list(x_ptr, begin, start, found, list_ptr, found_ptr + image * len(levels) + level, capacity, index_bits, DROP,
          TILE, RUN)  # fmt: skip


@triton.jit
def _lowest_key(states_ptr, histograms_ptr, found, digit, shift, topk, PASSES: tl.constexpr, BINS: tl.constexpr):
    """What ``digit`` passes tell of the lowest key that stays: the lowest key with the same high digits, and how many
    of the keys with these digits stay, or 0 where all of them do."""
    if digit == 0:
        lowest = tl.full([], 0, tl.int64)
        staying = tl.where(found > topk, topk, 0)
        if topk == 0:
            lowest = tl.full([], 0x7FFFFFFFFFFFFFFF, tl.int64)
    else:
        lowest = tl.load(states_ptr + 2 * digit - 2)
        staying = tl.load(states_ptr + 2 * digit - 1).to(tl.int32)
        if staying > 0:
            falling = tl.arange(0, BINS)
            counts = tl.load(histograms_ptr + (digit - 1) * BINS + BINS - 1 - falling)
            bin = tl.sum((tl.cumsum(counts, axis=0) < staying).to(tl.int32), axis=0)
            staying -= tl.sum(tl.where(falling < bin, counts, 0), axis=0)
            if staying == tl.sum(tl.where(falling == bin, counts, 0), axis=0):
                staying = 0
            lowest += (BINS - 1 - bin).to(tl.int64) << (shift + 8)
    return lowest, staying


@triton.jit(do_not_specialize=["width", "list_width", "index_bits", "digit", "shift", "topk"])
def _search_kernel(
    levels, starts, list_starts, lists_ptr, found_ptr, states_ptr, histograms_ptr, rows_ptr, counts_ptr, width,
    list_width, index_bits, threshold, topk, digit, shift, DROP: tl.constexpr, PASSES: tl.constexpr,
    TILE: tl.constexpr, BINS: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Program (p, s) looks at its share of segment s. It counts by their next digit the keys whose higher digits are
    those of the lowest key that stays. In the LAST pass this key is known, and all keys from it up go to the rows."""
    segment = tl.program_id(1).to(tl.int64)
    image = segment // len(levels)
    level = segment - image * len(levels)
    start, list_start = pick_size(starts, level), pick_size(list_starts, level)
    found = tl.load(found_ptr + segment)
    states_ptr += segment * (2 * PASSES)
    histograms_ptr += segment * (PASSES * BINS)
    lowest, staying = _lowest_key(states_ptr, histograms_ptr, found, digit, shift, topk, PASSES, BINS)
    if not LAST and tl.program_id(0) == 0:
        tl.store(states_ptr + 2 * digit, lowest)
        tl.store(states_ptr + 2 * digit + 1, staying.to(tl.int64))

    in_level = pick_size(starts[1:], level) - start
    listed = found <= pick_size(list_starts[1:], level) - list_start
    list_ptr = lists_ptr + image * list_width + list_start
    x_ptr = pick(levels, level) + image * in_level
    work = tl.where(listed, found, in_level)
    if not LAST:
        work = tl.where(staying > 0, work, 0)
    histogram = tl.zeros([BINS], tl.int32)
    offset = tl.program_id(0) * TILE
    while offset < work:
        i = offset + tl.arange(0, TILE)
        if listed:
            keys = tl.load(list_ptr + i, mask=i < work, other=-1)
        else:
            x = tl.load(x_ptr + i, mask=i < work, other=float("-inf")).to(tl.float32)
            keys = tl.where(x > threshold, pack(x, start + i, index_bits, DROP), -1)
        if LAST:
            chosen = keys >= lowest
            total = tl.sum(chosen.to(tl.int64), axis=0)
            if total > 0:
                slot = tl.atomic_add(counts_ptr + image, total, sem="relaxed")
                slots = slot + tl.cumsum(chosen.to(tl.int32), axis=0) - 1
                tl.store(rows_ptr + image * width + slots, keys, mask=chosen)
        else:
            digits = (keys - lowest) >> shift
            matching = (keys >= lowest) & (digits < BINS)
            histogram += tl.histogram(tl.where(matching, digits, 0).to(tl.int32), BINS, mask=matching)
        offset += tl.num_programs(0) * TILE
    if not LAST and offset > tl.program_id(0) * TILE:
        bins = histograms_ptr + digit * BINS + tl.arange(0, BINS)
        tl.atomic_add(bins, histogram, mask=histogram > 0, sem="relaxed")


def search_keys(
    levels: list[Tensor], width: int, threshold: float, topk: int, drop: int, index_bits: int
) -> tuple[Tensor, Tensor]:
    """The keys of the candidates (B, width), in any order, and their numbers (B,) int32. Behind them lie PADDING where
    the sort needs it, else anything. The number of launches depends on the dtype and the number of logits alone.

    Args:
        levels: the logits, each contiguous ``(B, N_l, K)``.
        width: the most candidates that an image can have.
        threshold: logits must exceed it.
        topk: the most candidates of an image and level.
        drop: how many low bits of float32 the dtype of the logits lacks.
        index_bits: how many bits an index of a logit in an image takes.
    """
    first = levels[0]
    batch, tile, run = len(first), _TILE_BYTES // first.element_size(), 16 // first.element_size()
    logits = [level.shape[1] * level.shape[2] for level in levels]
    starts = [0, *accumulate(logits)]
    first_tiles = [0, *accumulate(triton.cdiv(count + 15, tile) for count in logits)]
    list_starts = [0, *accumulate(count // _LISTED + 1 for count in logits)]
    passes = triton.cdiv(32 - drop + index_bits, 8)
    segments = batch * len(levels)
    zeros = first.new_zeros(batch + segments * (1 + passes * _BINS.value), dtype=torch.int32)
    counts, found, histograms = zeros[:batch], zeros[batch : batch + segments], zeros[batch + segments :]
    states = first.new_empty(segments, passes, 2, dtype=torch.int64)
    lists = states.new_empty(batch, list_starts[-1])
    rows = states.new_empty(batch, width) if sorts_by_kernels(width) else states.new_full((batch, width), PADDING)
    programs = max(1, min(_SEARCH_PROGRAMS // max(1, segments), triton.cdiv(starts[-1], 8 * _SEARCH_TILE)))
    _list_kernel[(first_tiles[-1], batch)](
        tuple(levels), encode_sizes(starts), encode_sizes(first_tiles), encode_sizes(list_starts), lists, found,
        list_starts[-1], index_bits, threshold, DROP=drop, TILE=tile, RUN=run, enable_fp_fusion=False,
    )  # fmt: skip
    for digit in range(passes + 1):
        _search_kernel[(programs, segments)](
            tuple(levels), encode_sizes(starts), encode_sizes(list_starts), lists, found, states, histograms, rows,
            counts, width, list_starts[-1], index_bits, threshold, min(topk, 2**31 - 1), digit,
            8 * (passes - 1 - digit), DROP=drop, PASSES=passes, TILE=_SEARCH_TILE, BINS=_BINS.value,
            LAST=digit == passes, enable_fp_fusion=False,
        )  # fmt: skip
    return rows, counts
