"""The survivors of selection: a key for every logit above the threshold, and how many fall into each bin of values.

The logits are read once. The survivors of each image and level are listed, each as one integer key that orders it, and
counted in a histogram of 512 bins. A list has room for 3% of the logits; where more survive, the list is of no use.
"""

import struct
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from retina_fast.kernels.dispatch import tl, triton
from retina_fast.kernels.key_sort import pack
from retina_fast.kernels.levels import encode_sizes, level_of, pick, pick_size

# A segment is one level of one image. A tile is a run of logits of one segment that starts on a 16-byte
# boundary. A thread looks at 16 bytes of a tile at a time, and notes as bits which of these logits survive.

_TILE_BYTES = 32768  # by instruction counts: at half of that a tile's set-up costs 1 more an element
_LISTED = 32  # the list of a segment has room for one in 32 of its logits
_RUNS = 256  # with a survivor, up to which those of a tile are listed by as many lanes
_ONE_RUN = tl.constexpr(1 << 17)  # more than a tile has logits
_LANES = 128  # threads of a program
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
    """(B * levels,) int32: how many survivors each segment has; with more than its list has room for, the list is of no
    use."""
    histograms: Tensor
    """(B * levels * BINS,) int32: how many each bin has."""
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
def _bin_of(keys, first_bin, index_bits, DROP: tl.constexpr, BINS: tl.constexpr):
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
def _write_keys(x_ptr, start, bits, slots, begin, first_index, list_ptr, index_bits, DROP: tl.constexpr):
    """Writes the keys of the survivors that the bits of runs tell of, of each run one at a time."""
    while tl.max(bits, axis=0) > 0:
        lowest = (bits & -bits).to(tl.float32).to(tl.int32, bitcast=True)
        i = start + (lowest >> 23) - 127  # the exponent of a power of two
        x = tl.load(x_ptr + i, mask=bits > 0, other=0.0).to(tl.float32)
        tl.store(list_ptr + slots, pack(x, first_index + begin + i, index_bits, DROP), mask=bits > 0)
        slots += 1
        bits &= bits - 1


@triton.jit
def _list(x_ptr, begin, end, first_index, threshold, found, list_ptr, found_ptr, bins_ptr, capacity, first_bin,
          index_bits, DROP: tl.constexpr, TILE: tl.constexpr, RUN: tl.constexpr, RUNS: tl.constexpr,
          BINS: tl.constexpr, LANES: tl.constexpr):  # fmt: skip
    """Counts a tile's survivors, in all and in each bin, and appends their keys to the list if it has room for them."""
    counts = found >> 16
    bits = found & 65535
    own = counts + tl.where(bits > 0, _ONE_RUN, 0)  # survivors, and whether there are any
    # A thread has every LANES-th run, and adds up its own before the threads add up theirs.
    own = tl.reshape(own, [TILE // RUN // LANES, LANES])
    of_lane = tl.sum(own, axis=0)
    whole = tl.sum(of_lane, axis=0)
    total = whole & (_ONE_RUN - 1)
    if total > 0:
        before = (tl.cumsum(of_lane, axis=0) - of_lane)[None, :] + tl.cumsum(own, axis=0) - own
        before = tl.reshape(before, [TILE // RUN])
        slot = tl.atomic_add(found_ptr, total, sem="relaxed")
        histogram = tl.zeros([BINS], tl.int32)
        fits = slot + total <= capacity
        list_ptr += slot
        if fits & (whole // _ONE_RUN <= RUNS):
            # The runs that have survivors move together, to be seen to by fewer lanes.
            run = tl.arange(0, TILE // RUN)
            entry = ((before & (_ONE_RUN - 1)) << 19) | (run << 8) | bits  # 12, 11 and 8 bits
            tl.store(list_ptr + before // _ONE_RUN, entry.to(tl.int64), mask=bits > 0)
            tl.debug_barrier()
            lane = tl.arange(0, RUNS)
            entry = tl.load(list_ptr + lane, mask=lane < whole // _ONE_RUN, other=0).to(tl.int32)
            tl.debug_barrier()
            start = ((entry >> 8) & 2047) * RUN
            _write_keys(x_ptr, start, entry & 255, entry >> 19, begin, first_index, list_ptr, index_bits, DROP)
            tl.debug_barrier()
            for first in range(0, total, RUNS):
                keys = tl.load(list_ptr + first + lane, mask=first + lane < total, other=0)
                bin = _bin_of(keys, first_bin, index_bits, DROP, BINS)
                histogram += tl.histogram(bin, BINS, mask=first + lane < total)
        else:
            if fits:
                start = tl.arange(0, TILE // RUN) * RUN
                _write_keys(x_ptr, start, bits, before & (_ONE_RUN - 1), begin, first_index, list_ptr, index_bits, DROP)
            for first in range(0, TILE, TILE // RUN):
                i = first + tl.arange(0, TILE // RUN)
                x = tl.load(x_ptr + i, mask=(begin + i >= 0) & (begin + i < end), other=float("-inf")).to(tl.float32)
                bin = _bin_of(pack(x, i, index_bits, DROP), first_bin, index_bits, DROP, BINS)
                histogram += tl.histogram(bin, BINS, mask=x > threshold)
        tl.atomic_add(bins_ptr + tl.arange(0, BINS), histogram, mask=histogram > 0, sem="relaxed")


@triton.jit(do_not_specialize=["list_width", "first_bin", "index_bits"])
def _list_kernel(
    levels, starts, first_tiles, list_starts, lists_ptr, found_ptr, bins_ptr, list_width, first_bin, index_bits,
    threshold, DROP: tl.constexpr, TILE: tl.constexpr, RUN: tl.constexpr, RUNS: tl.constexpr, BINS: tl.constexpr,
    LANES: tl.constexpr,
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
    segment = image * len(levels) + level
    _list(x_ptr, begin, end, start, threshold, found, list_ptr, found_ptr + segment, bins_ptr + segment * BINS,
          capacity, first_bin, index_bits, DROP, TILE, RUN, RUNS, BINS, LANES)  # fmt: skip


def _first_bin(threshold: float) -> int:
    """Where the bins begin, so that the first holds the threshold or what is lower."""
    (bits,) = struct.unpack("i", struct.pack("f", max(threshold, _LOWEST) + 0.0))
    rising16 = (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> 16
    near_zero = getattr(_NEAR_ZERO, "value", _NEAR_ZERO)
    code = max(rising16 - near_zero + 3, 0) + 4 if rising16 > 0 else min(rising16 + 1 + near_zero, 0) - 4
    return 0 if rising16 == 0 else code >> 2


def list_survivors(
    levels: list[Tensor], starts: tuple[int, ...], threshold: float, drop: int, index_bits: int, zeros: Tensor
) -> Survivors:
    """One launch; the arguments are those of ``search_keys``, and

    Args:
        starts: encoded, where each level begins among the logits of an image.
        zeros: int32, (1 + BINS) for each segment.
    """
    first, segments = levels[0], len(levels[0]) * len(levels)
    tile, run = _TILE_BYTES // first.element_size(), 16 // first.element_size()
    logits = [level.shape[1] * level.shape[2] for level in levels]
    first_tiles = [0, *accumulate(triton.cdiv(count + 15, tile) for count in logits)]
    list_starts = [0, *accumulate(count // _LISTED + 1 for count in logits)]
    lists = first.new_empty(len(first), list_starts[-1], dtype=torch.int64)
    survivors = Survivors(lists, zeros[:segments], zeros[segments:], encode_sizes(list_starts), _first_bin(threshold))
    with torch.cuda.device_of(first):
        _list_kernel[(first_tiles[-1], len(first))](
            tuple(levels), starts, encode_sizes(first_tiles), survivors.list_starts, lists, survivors.found,
            survivors.histograms, list_starts[-1], survivors.first_bin, index_bits, threshold, DROP=drop, TILE=tile,
            RUN=run, RUNS=min(_RUNS, tile // run), BINS=BINS.value, LANES=min(_LANES, tile // run),
            enable_fp_fusion=False,
        )  # fmt: skip
    return survivors
