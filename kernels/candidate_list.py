"""The survivors of selection: a key for every logit above the threshold, and how many fall into each bin of values.

The logits are read once. The survivors of each image and level are listed, each as one integer key that orders it, and
counted in a histogram of 512 bins. A list has room for 3% of the logits; where more survive, the list is of no use.

Once the bins from some bin on hold topk survivors, none of a lower bin can become a candidate. This bin is the floor of
its level and image: later programs leave out what lies below it. So of 80,000 survivors a few thousand are listed.
"""

import math
import struct
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from retina_fast.kernels.dispatch import INTERPRETED, tl, triton
from retina_fast.kernels.key_sort import pack
from retina_fast.kernels.levels import encode_sizes, level_of, pick, pick_size
from retina_fast.kernels.nms_overlap import count_bits

# A segment is one level of one image. A tile is a run of logits of one segment that starts on a 16-byte
# boundary. A thread looks at 16 bytes of a tile at a time, and notes as bits which of these logits survive.

_TILE_BYTES = 16384
_LISTED = 32  # the list of a segment has room for one in 32 of its logits
_LANES = 64  # threads of a program
_CHUNK, _WIDE = 128, 1024  # keys, or logits, that go into a histogram in one go
_AT_ONCE = 2048  # programs, about as many as an H200 holds: floors help those that come after them
_FEW, _FEW_WITH_FLOORS = 16, 64  # survivors of a tile that are counted one by one
_COMPILED = tl.constexpr(not INTERPRETED)
BINS = tl.constexpr(512)

# A value's code is the upper half of its float32 number, as bfloat16 has it, but one code for all below 2^-4. A bin has
# four codes. From the bin of the threshold on, or that of -16, the bins reach up to a logit of 16 at least.
_NEAR_ZERO = tl.constexpr(0x3D80)
_LOWEST = -16.0


class Survivors(NamedTuple):
    """The survivors of B images."""

    lists: Tensor
    """(B, sum of the rooms) int64 keys."""
    found: Tensor
    """(B * levels,) int32: how many survivors of each segment were found, at least topk if it has so many. With more
    than its list has room for, the list is of no use."""
    histograms: Tensor
    """(B * levels * BINS,) int32: how many survivors each bin has; below the floor's bin some may be missing."""
    list_starts: tuple[int, ...]
    """Encoded: where each level's list begins in a row, and the length of the row."""
    first_bin: int
    """What is subtracted from the number of a bin."""


@triton.jit
def _code_of(rising16):
    """The code of a value, which rises with it, from the upper half of its integer ``rising``."""
    above = tl.maximum(rising16 - _NEAR_ZERO + 3, 0) + 4
    below = tl.minimum(rising16 + 1 + _NEAR_ZERO, 0) - 4
    return tl.where(rising16 > 0, above, tl.where(rising16 < 0, below, 0))


@triton.jit
def bin_of(keys, first_bin, index_bits, DROP: tl.constexpr, BINS: tl.constexpr):
    """The bins of keys, which rise with them."""
    rising16 = ((keys >> index_bits) - (1 << (31 - DROP))).to(tl.int32) >> (16 - DROP)
    return tl.minimum(tl.maximum((_code_of(rising16) >> 2) - first_bin, 0), BINS - 1)


@triton.jit
def lowest_key(bin, first_bin, index_bits, DROP: tl.constexpr, BINS: tl.constexpr):
    """The lowest key that a bin may have; for the bin after the last, more than any key."""
    code = (bin + first_bin) * 4
    rising16 = tl.where(code >= 8, code + _NEAR_ZERO - 7, tl.where(code > 0, 1, code + 3 - _NEAR_ZERO))
    rising16 = tl.where(code == 0, 0, rising16).to(tl.int64)
    lowest = ((rising16 << (16 - DROP)) + (1 << (31 - DROP))) << index_bits
    lowest = tl.where(bin <= 0, 0, lowest)
    return tl.where(bin >= BINS, 0x7FFFFFFFFFFFFFFF, lowest)


@triton.jit
def _lowest_value(bin, first_bin):
    """The lowest float32 number of a bin above the first."""
    code = (bin + first_bin) * 4
    rising16 = tl.where(code >= 8, code + _NEAR_ZERO - 7, tl.where(code > 0, 1, code + 3 - _NEAR_ZERO))
    rising = tl.where(code == 0, 0, rising16) << 16
    return (rising ^ ((rising >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _survivors(x_ptr, begin, end, at_least, floor_ptr, first_bin, FLOORS: tl.constexpr, TILE: tl.constexpr,
               RUN: tl.constexpr, LANES: tl.constexpr, DROP: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """(LANES, WORDS) int32: bits of the logits that survive, 32 // RUN runs of a lane to a word; and the lowest value
    that does, by the floor if there is one."""
    lane = tl.arange(0, LANES)[:, None, None, None]  # first, so that the compiler deals the threads along it
    word = tl.arange(0, TILE // (32 * LANES))[None, :, None, None]
    run = tl.arange(0, 32 // RUN)[None, None, :, None]
    place = tl.arange(0, RUN)[None, None, None, :]
    i = ((word * (32 // RUN) + run) * LANES + lane) * RUN + place
    if MASKED:
        x = tl.load(x_ptr + i, mask=(begin + i >= 0) & (begin + i < end), other=float("-inf"))
    else:
        x = tl.load(x_ptr + i)
    if FLOORS:  # read while the logits are on their way, and by one thread, so that all warps have the same
        floor = tl.atomic_max(floor_ptr, 0, sem="relaxed")
        at_least = tl.where(floor > 0, _lowest_value(floor, first_bin), at_least)
    if DROP != 16 or not _COMPILED:  # an instruction compares two bfloat16; the interpreter would compare their bits
        x = x.to(tl.float32)
    bits = tl.where(x >= at_least.to(x.dtype), 1 << (run * RUN + place), 0)
    return tl.sum(tl.sum(bits, axis=3), axis=2), at_least


@triton.jit
def _lowest_place(words, word, lane, RUN: tl.constexpr, LANES: tl.constexpr):
    """The place within a tile of the logit that the lowest bit of a word stands for."""
    lowest = (words & -words).to(tl.float32).to(tl.int32, bitcast=True)
    bit = ((lowest >> 23) & 255) - 127  # the exponent of a power of two
    return word * (32 * LANES) + lane * RUN + (bit & (RUN - 1)) + (bit & (32 - RUN)) * LANES


@triton.jit
def _list(x_ptr, begin, end, first_index, at_least, words, list_ptr, found_ptr, bins_ptr, capacity, first_bin,
          index_bits, DROP: tl.constexpr, TILE: tl.constexpr, RUN: tl.constexpr, FEW: tl.constexpr,
          CHUNK: tl.constexpr, WIDE: tl.constexpr, BINS: tl.constexpr, LANES: tl.constexpr):  # fmt: skip
    """Counts a tile's survivors, in all and in each bin, and appends their keys to the list if it has room for them.
    Returns how many the segment had before, and has now."""
    counts = tl.reshape(count_bits(words), [TILE // 32])
    total, slot = tl.sum(counts, axis=0), 0
    if total > 0:
        slot = tl.atomic_add(found_ptr, total, sem="relaxed")
        most = tl.max(counts, axis=0)
        slots = tl.reshape(slot + tl.cumsum(counts, axis=0) - counts, [LANES, TILE // (32 * LANES)])
        histogram = tl.zeros([BINS], tl.int32)
        if slot + total <= capacity:
            word = tl.arange(0, TILE // (32 * LANES))[None, :]
            lane = tl.arange(0, LANES)[:, None]
            if total <= FEW:
                for _ in range(0, most):
                    i = _lowest_place(words, word, lane, RUN, LANES)
                    x = tl.load(x_ptr + i, mask=words != 0, other=0.0).to(tl.float32)
                    keys = pack(x, first_index + begin + i, index_bits, DROP)
                    tl.store(list_ptr + slots, keys, mask=words != 0)
                    bin = bin_of(keys, first_bin, index_bits, DROP, BINS)
                    tl.atomic_add(bins_ptr + bin, 1, mask=words != 0, sem="relaxed")
                    slots += 1
                    words &= words - 1
            else:
                for _ in range(0, most):
                    i = _lowest_place(words, word, lane, RUN, LANES)
                    tl.store(list_ptr + slots, i.to(tl.int64), mask=words != 0)
                    slots += 1
                    words &= words - 1
                list_ptr += slot
                tl.debug_barrier()
                for first in range(0, total, CHUNK):
                    place = first + tl.arange(0, CHUNK)
                    i = tl.load(list_ptr + place, mask=place < total, other=0).to(tl.int32)
                    x = tl.load(x_ptr + i, mask=place < total, other=0.0).to(tl.float32)
                    keys = pack(x, first_index + begin + i, index_bits, DROP)
                    tl.store(list_ptr + place, keys, mask=place < total)
                    bin = bin_of(keys, first_bin, index_bits, DROP, BINS)
                    histogram += tl.histogram(bin, BINS, mask=place < total)
        else:
            for first in range(0, TILE, WIDE):
                i = first + tl.arange(0, WIDE)
                x = tl.load(x_ptr + i, mask=(begin + i >= 0) & (begin + i < end), other=float("-inf")).to(tl.float32)
                bin = bin_of(pack(x, i, index_bits, DROP), first_bin, index_bits, DROP, BINS)
                histogram += tl.histogram(bin, BINS, mask=x >= at_least)
        if (total > FEW) | (slot + total > capacity):
            tl.atomic_add(bins_ptr + tl.arange(0, BINS), histogram, mask=histogram > 0, sem="relaxed")
    return slot, slot + total


@triton.jit
def _raise_floor(bins_ptr, floor_ptr, topk, BINS: tl.constexpr):
    """Raises the floor to the last bin from which on there are topk survivors, of those counted by now."""
    counts = tl.load(bins_ptr + BINS - 1 - tl.arange(0, BINS), volatile=True)
    bin = BINS - 1 - tl.sum((tl.cumsum(counts, axis=0) < topk).to(tl.int32), axis=0)
    tl.atomic_max(floor_ptr, bin, sem="relaxed")


@triton.jit(do_not_specialize=["images", "list_width", "first_bin", "index_bits", "topk", "renewed"])
def _list_kernel(
    levels, starts, first_tiles, list_starts, lists_ptr, found_ptr, bins_ptr, floors_ptr, images, list_width,
    first_bin, index_bits, at_least, topk, renewed, DROP: tl.constexpr, TILE: tl.constexpr, RUN: tl.constexpr,
    FLOORS: tl.constexpr, FEW: tl.constexpr, CHUNK: tl.constexpr, WIDE: tl.constexpr, BINS: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """Program t * images + b lists the survivors of tile t, counted through the levels, of image b. The floor is raised
    whenever another 2^renewed survivors were found. Other programs raise it meanwhile, so no branch may hang on what a
    warp has read by itself: with a barrier in a branch that only some warps take, survivors are counted wrongly."""
    tile = tl.program_id(0) // images
    image = (tl.program_id(0) % images).to(tl.int64)
    level = level_of(first_tiles, tile)
    start, list_start = pick_size(starts, level), pick_size(list_starts, level)
    end = pick_size(starts[1:], level) - start  # logits of an image in this level
    shift = ((image * end) & 15).to(tl.int32)  # the image's first logit may lie off the 16-byte boundaries
    tile -= pick_size(first_tiles, level)
    begin = tile * TILE - shift
    x_ptr = pick(levels, level) + tl.multiple_of(image * end - shift, 16) + tile * TILE
    segment = image * len(levels) + level
    found_ptr, bins_ptr, floor_ptr = found_ptr + segment, bins_ptr + segment * BINS, floors_ptr + segment
    at_least = tl.full([], at_least, tl.float32)
    if (begin >= 0) & (begin + TILE <= end):
        words, at_least = _survivors(x_ptr, begin, end, at_least, floor_ptr, first_bin, FLOORS, TILE, RUN, LANES, DROP,
                                     False)  # fmt: skip
    else:
        words, at_least = _survivors(x_ptr, begin, end, at_least, floor_ptr, first_bin, FLOORS, TILE, RUN, LANES, DROP,
                                     True)  # fmt: skip
    capacity = pick_size(list_starts[1:], level) - list_start
    list_ptr = lists_ptr + image * list_width + list_start
    before, now = _list(x_ptr, begin, end, start, at_least, words, list_ptr, found_ptr, bins_ptr, capacity, first_bin,
                        index_bits, DROP, TILE, RUN, FEW, CHUNK, WIDE, BINS, LANES)  # fmt: skip
    if FLOORS and (before ^ now) >> renewed != 0:
        _raise_floor(bins_ptr, floor_ptr, topk, BINS)


def _first_bin(threshold: float) -> int:
    """Where the bins begin, so that the first holds the threshold or what is lower."""
    (bits,) = struct.unpack("i", struct.pack("f", max(threshold, _LOWEST) + 0.0))
    rising16 = (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> 16
    near_zero = getattr(_NEAR_ZERO, "value", _NEAR_ZERO)
    code = max(rising16 - near_zero + 3, 0) + 4 if rising16 > 0 else min(rising16 + 1 + near_zero, 0) - 4
    return 0 if rising16 == 0 else code >> 2


def _at_least(threshold: float, drop: int) -> float:
    """The lowest number above the threshold: in float32, or in bfloat16 if so many bits are dropped."""
    near = np.nextafter(np.float32(threshold), np.float32(np.inf))
    if drop == 16:
        bits = int(near.view(np.int32)) + (0xFFFF if near > 0 else 0)
        near = np.int32(bits & ~0xFFFF).view(np.float32)
    return math.nan if threshold == math.inf else float(near)


def list_survivors(
    levels: list[Tensor],
    starts: tuple[int, ...],
    threshold: float,
    topk: int,
    drop: int,
    index_bits: int,
    zeros: Tensor,
) -> Survivors:
    """One launch; the arguments are those of ``search_keys``, and

    Args:
        starts: encoded, where each level begins among the logits of an image.
        zeros: int32, (2 + BINS) for each segment.
    """
    first, segments = levels[0], len(levels[0]) * len(levels)
    tile, run = _TILE_BYTES // first.element_size(), 16 // first.element_size()
    logits = [level.shape[1] * level.shape[2] for level in levels]
    first_tiles = [0, *accumulate(triton.cdiv(count + 15, tile) for count in logits)]
    list_starts = [0, *accumulate(count // _LISTED + 1 for count in logits)]
    lists = first.new_empty(len(first), list_starts[-1], dtype=torch.int64)
    floor_of, found, histograms = zeros[:segments], zeros[segments : 2 * segments], zeros[2 * segments :]
    programs, topk = first_tiles[-1] * len(first), max(1, topk)
    floors = programs > _AT_ONCE
    renewed = (topk // 2).bit_length() if floors else 31
    survivors = Survivors(lists, found, histograms, encode_sizes(list_starts), _first_bin(threshold))
    lanes = min(_LANES, tile // 32)
    with torch.cuda.device_of(first):
        _list_kernel[(programs,)](
            tuple(levels), starts, encode_sizes(first_tiles), survivors.list_starts, lists, found, histograms, floor_of,
            len(first), list_starts[-1], survivors.first_bin, index_bits, _at_least(threshold, drop), topk, renewed,
            DROP=drop, TILE=tile, RUN=run, FLOORS=floors, FEW=_FEW_WITH_FLOORS if floors else _FEW,
            CHUNK=min(_CHUNK, tile), WIDE=min(_WIDE, tile), BINS=BINS.value, LANES=lanes,
            num_warps=triton.cdiv(lanes, 32), enable_fp_fusion=False,
        )  # fmt: skip
    return survivors
