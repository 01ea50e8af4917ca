"""Rows of distinct 63-bit keys in falling order: a batch of images is sorted without waiting for the GPU.

A key holds a number in its high bits, and in its low bits an index, subtracted from the largest one. So falling keys
mean falling numbers and, among equal numbers, rising indices. No two keys of a row are equal. Number and index are both
within the key, so that no other array has to be sorted along. -1 pads a row.

A row may have parts, such as the levels of an image, of which each gives its ``most`` greatest keys to the sorted row.
The place of a key is the number of greater keys, where a part counts as no more than ``most``; a key with ``most`` or
more greater keys in its own part is dropped.

Rows of up to 8192 keys take one or two launches, where torch.sort makes about ten. In a small batch every key is
compared with every other of its row, in one launch. In a larger one each program first sorts a run of 256 keys; then
every key finds its place in the other runs by binary search. Longer rows go to torch.sort.
"""

import torch
from torch import Tensor

from retina_fast.kernels.dispatch import tl, triton
from retina_fast.kernels.levels import decode_size, encode_sizes, level_of, pick_size

PADDING = -1

RUN = 256  # keys that are sorted together at first
LOG_RUN = tl.constexpr(8)
MAX_RUNS = 32
MERGED = 32  # keys whose places one program finds in runs
COUNTED = 16  # keys whose places one program finds by comparing them with all
CHUNK = 512  # keys that they are compared with in one go
_PAIRS = 10**8  # of keys in a batch, up to which all are compared: by prediction as fast as runs


@triton.jit
def rising(x):
    """Integers in the order of float32 numbers. -0 equals 0, and every NaN is the same integer, above infinity."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    bits = tl.where(x == x, bits, 0x7FFFFFFF)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def pack(x, index, index_bits, DROP: tl.constexpr):
    """Keys that order by falling x, then by rising index below 2^index_bits. They are not negative. DROP is the number
    of low bits of float32 that the dtype of x lacks: 0 for float32, 16 for bfloat16, 13 for float16."""
    high = (rising(x) >> DROP).to(tl.int64) + (1 << (31 - DROP))
    last = (tl.full([], 1, tl.int64) << index_bits) - 1
    return (high << index_bits) + (last - index)


@triton.jit
def unpack_index(key, index_bits):
    """The index within a key."""
    last = (tl.full([], 1, tl.int64) << index_bits) - 1
    return (last - (key & last)).to(tl.int32)


@triton.jit
def unpack_number(key, index_bits, DROP: tl.constexpr):
    """The number within a key, float32."""
    high = ((key >> index_bits) - (1 << (31 - DROP))).to(tl.int32)
    return ((high ^ ((high >> 31) & (0x7FFFFFFF >> DROP))) << DROP).to(tl.float32, bitcast=True)


@triton.jit
def _is_less(keys, others):
    """1 where a key is less than another, else 0. The sign of their difference is cheaper than to compare 64 bits."""
    return ((keys - others).to(tl.uint64, bitcast=True) >> 63).to(tl.int32)


@triton.jit(do_not_specialize=["width", "runs_width"])
def _sort_runs_kernel(
    keys_ptr, runs_ptr, counts_ptr, part_starts, width, runs_width, RUN: tl.constexpr, CHUNK: tl.constexpr
):
    """Program (r, b) sorts run r of row b, and pads it: the place of a key is the number of greater keys in the run."""
    image = tl.program_id(1).to(tl.int64)
    start = tl.program_id(0) * RUN
    part = level_of(part_starts, start)
    count = tl.load(counts_ptr + image * (len(part_starts) - 1) + part).to(tl.int32) + pick_size(part_starts, part)
    runs_ptr += image * runs_width + start
    i = tl.arange(0, RUN)
    if start < count:
        keys_ptr += image * width + start
        keys = tl.load(keys_ptr + i, mask=start + i < count, other=-1)
        greater = tl.zeros([RUN, CHUNK], tl.int32)
        for chunk in range(0, RUN, CHUNK):
            j = chunk + tl.arange(0, CHUNK)
            others = tl.load(keys_ptr + j, mask=start + j < count, other=0)
            greater += _is_less(keys[:, None], others[None, :])
        place = tl.sum(greater, axis=1)
        tl.store(runs_ptr + place, keys, mask=start + i < count)
    tl.store(runs_ptr + i, tl.full([RUN], -1, tl.int64), mask=start + i >= count)


@triton.jit
def _place_in_runs(row_ptr, counts_ptr, part_starts, keys, part, most, RUN: tl.constexpr, LOG_RUN: tl.constexpr,
                   MAX_RUNS: tl.constexpr, KEYS: tl.constexpr):  # fmt: skip
    """Places of keys of one part, and how many greater keys their part has; the row consists of sorted, padded runs."""
    PARTS: tl.constexpr = len(part_starts) - 1
    run = tl.arange(0, MAX_RUNS) * RUN
    filled = tl.zeros([MAX_RUNS], tl.int32)  # whether a run has keys
    for p in tl.static_range(PARTS):
        first = decode_size(part_starts[p])
        stop = first + tl.load(counts_ptr + p).to(tl.int32)
        filled = tl.where(run >= first, (run < stop).to(tl.int32), filled)
    filled = (filled > 0)[None, :]
    greater = tl.zeros([KEYS, MAX_RUNS], tl.int32)
    for n in tl.static_range(1, LOG_RUN + 1):
        other = tl.load(row_ptr + run[None, :] + greater + ((RUN >> n) - 1), mask=filled, other=-1)
        greater += tl.where(other > keys[:, None], RUN >> n, 0)
    other = tl.load(row_ptr + run[None, :] + greater, mask=filled, other=-1)
    greater += (other > keys[:, None]).to(tl.int32)
    place, before = tl.zeros([KEYS], tl.int32), tl.zeros([KEYS], tl.int32)
    for p in tl.static_range(PARTS):
        here = (run >= decode_size(part_starts[p])) & (run < decode_size(part_starts[p + 1]))
        in_part = tl.sum(tl.where(here[None, :], greater, 0), axis=1)
        place += tl.minimum(in_part, most)
        before = tl.where(part == p, in_part, before)
    return place, before


@triton.jit
def _place_by_counting(row_ptr, counts_ptr, part_starts, keys, part, most, KEYS: tl.constexpr, CHUNK: tl.constexpr):
    """Places of keys of one part, and how many greater keys their part has; the row lies in any order."""
    place, before = tl.zeros([KEYS], tl.int32), tl.zeros([KEYS], tl.int32)
    for p in range(len(part_starts) - 1):
        first = pick_size(part_starts, p)
        count = tl.load(counts_ptr + p).to(tl.int32)
        greater = tl.zeros([KEYS, CHUNK], tl.int32)
        for start in range(0, count, CHUNK):
            i = start + tl.arange(0, CHUNK)
            others = tl.load(row_ptr + first + i, mask=i < count, other=0)
            greater += _is_less(keys[:, None], others[None, :])
        in_part = tl.sum(greater, axis=1)
        place += tl.minimum(in_part, most)
        before = tl.where(part == p, in_part, before)
    return place, before


@triton.jit
def places(row_ptr, counts_ptr, part_starts, tile, most, KEYS: tl.constexpr, COUNTED: tl.constexpr,
           CHUNK: tl.constexpr, RUN: tl.constexpr, MAX_RUNS: tl.constexpr):  # fmt: skip
    """A tile of KEYS keys of a row, their places in the sorted row, and which of them belong there."""
    start = tile * KEYS
    part = level_of(part_starts, start)
    i = start + tl.arange(0, KEYS)
    count = tl.load(counts_ptr + part).to(tl.int32) + pick_size(part_starts, part)
    keys = tl.load(row_ptr + i, mask=i < count, other=-1)
    place, before = tl.zeros([KEYS], tl.int32), tl.zeros([KEYS], tl.int32)
    if start < count:
        if COUNTED:
            place, before = _place_by_counting(row_ptr, counts_ptr, part_starts, keys, part, most, KEYS, CHUNK)
        else:
            place, before = _place_in_runs(
                row_ptr, counts_ptr, part_starts, keys, part, most, RUN, LOG_RUN, MAX_RUNS, KEYS
            )
    return keys, place, (i < count) & (before < most)


@triton.jit
def count_of_row(counts_ptr, part_starts, most):
    """The length of the sorted row."""
    count = 0
    for p in tl.static_range(len(part_starts) - 1):
        count += tl.minimum(tl.load(counts_ptr + p).to(tl.int32), most)
    return count


@triton.jit(do_not_specialize=["row_width", "width", "most"])
def _sort_kernel(
    rows_ptr, counts_ptr, part_starts, out_ptr, row_width, width, most, KEYS: tl.constexpr, COUNTED: tl.constexpr,
    CHUNK: tl.constexpr, RUN: tl.constexpr, MAX_RUNS: tl.constexpr,
):  # fmt: skip
    """Program (t, b) writes KEYS keys of row b to their places, and its share of the padding."""
    image = tl.program_id(1).to(tl.int64)
    counts_ptr += image * (len(part_starts) - 1)
    keys, place, belongs = places(
        rows_ptr + image * row_width,
        counts_ptr,
        part_starts,
        tl.program_id(0),
        most,
        KEYS,
        COUNTED,
        CHUNK,
        RUN,
        MAX_RUNS,
    )
    out_ptr += image * width
    tl.store(out_ptr + place, keys, mask=belongs)
    i = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    tl.store(out_ptr + i, tl.full([KEYS], -1, tl.int64),
             mask=(i >= count_of_row(counts_ptr, part_starts, most)) & (i < width))  # fmt: skip


def sorts_by_kernels(width: int) -> bool:
    """Whether rows of so many keys are sorted by the kernels. Longer ones go to torch.sort."""
    return width <= RUN * MAX_RUNS


def counts_pairs(batch: int, width: int) -> bool:
    """Whether rows of so many keys are sorted by comparing all, in one launch."""
    return batch * width * width <= _PAIRS


def sort_runs(keys: Tensor, counts: Tensor, part_starts: tuple[int, ...]) -> Tensor:
    """Each run of 256 keys of a row (B, M) in falling order, and padded with -1; the rows grow to whole runs.

    ``counts`` (B, parts) says how many keys each part has, and ``part_starts``, encoded, where each begins: at
    multiples of 256.
    """
    batch, width = keys.shape
    runs = keys.new_empty(batch, RUN * triton.cdiv(width, RUN))
    with torch.cuda.device_of(keys):
        _sort_runs_kernel[(triton.cdiv(width, RUN), batch)](
            keys, runs, counts, part_starts, width, runs.shape[1], RUN=RUN, CHUNK=32, enable_fp_fusion=False
        )
    return runs


def placing(keys: Tensor, counts: Tensor, part_starts: tuple[int, ...]) -> tuple[Tensor, dict[str, int | bool]]:
    """The rows as :func:`places` needs them, and its constants."""
    counted = counts_pairs(*keys.shape)
    rows = keys if counted else sort_runs(keys, counts, part_starts)
    constants = {"KEYS": COUNTED if counted else MERGED, "COUNTED": counted, "CHUNK": CHUNK}
    return rows, constants | {"RUN": RUN, "MAX_RUNS": MAX_RUNS}


def sort_keys(keys: Tensor, counts: Tensor) -> Tensor:
    """Each row in falling order, its padding last.

    Args:
        keys: ``(B, M)`` int64. The keys of a row are distinct, not negative, and come first. Behind them, rows of more
            than 8192 keys must hold PADDING.
        counts: ``(B,)`` integers: the number of keys in each row.
    """
    batch, width = keys.shape
    if not sorts_by_kernels(width):
        return keys.sort(dim=1, descending=True).values
    part_starts = encode_sizes((0, width))
    rows, constants = placing(keys, counts, part_starts)
    out = torch.empty_like(keys)
    with torch.cuda.device_of(keys):
        _sort_kernel[(triton.cdiv(width, constants["KEYS"]), batch)](
            rows, counts, part_starts, out, rows.shape[1], width, width, **constants, enable_fp_fusion=False
        )
    return out
