"""Rows of distinct 63-bit keys in falling order: a batch of images is sorted without waiting for the GPU.

A key holds a number in its high bits, and in its low bits an index, subtracted from the largest one. So falling keys
mean falling numbers and, among equal numbers, rising indices. No two keys of a row are equal. Number and index are both
within the key, so that no other array has to be sorted along. -1 pads a row.

Rows of up to 8192 keys take one or two launches, where torch.sort makes about ten. In a small batch every key is
compared with every other of its row, in one launch. In a larger one each program first sorts a run of 256 keys; then
every key finds its place in the other runs by binary search. Longer rows go to torch.sort.
"""

import torch
from torch import Tensor

from retina_fast.kernels.dispatch import tl, triton

PADDING = -1

RUN, LOG_RUN = 256, 8  # keys that are sorted together at first
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
def is_less(keys, others):
    """1 where a key is less than another, else 0. The sign of their difference is cheaper than to compare 64 bits."""
    return ((keys - others).to(tl.uint64, bitcast=True) >> 63).to(tl.int32)


@triton.jit(do_not_specialize=["width", "runs_width"])
def _sort_runs_kernel(keys_ptr, runs_ptr, counts_ptr, width, runs_width, RUN: tl.constexpr, CHUNK: tl.constexpr):
    """Program (r, b) sorts run r of row b, and pads it: the place of a key is the number of greater keys in the run."""
    image = tl.program_id(1).to(tl.int64)
    start = tl.program_id(0) * RUN
    count = tl.load(counts_ptr + image).to(tl.int32)
    runs_ptr += image * runs_width + start
    i = tl.arange(0, RUN)
    if start < count:
        keys_ptr += image * width + start
        keys = tl.load(keys_ptr + i, mask=start + i < count, other=-1)
        greater = tl.zeros([RUN, CHUNK], tl.int32)
        for chunk in range(0, RUN, CHUNK):
            j = chunk + tl.arange(0, CHUNK)
            others = tl.load(keys_ptr + j, mask=start + j < count, other=0)
            greater += is_less(keys[:, None], others[None, :])
        place = tl.sum(greater, axis=1)
        tl.store(runs_ptr + place, keys, mask=start + i < count)
    tl.store(runs_ptr + i, tl.full([RUN], -1, tl.int64), mask=start + i >= count)


@triton.jit
def _place_in_runs(row_ptr, count, keys, RUN: tl.constexpr, LOG_RUN: tl.constexpr, MAX_RUNS: tl.constexpr,
                   KEYS: tl.constexpr):  # fmt: skip
    """Places of keys of a row that consists of sorted, padded runs."""
    run = tl.arange(0, MAX_RUNS)[None, :] * RUN
    filled = run < count
    greater = tl.zeros([KEYS, MAX_RUNS], tl.int32)
    for n in tl.static_range(1, LOG_RUN + 1):
        other = tl.load(row_ptr + run + greater + ((RUN >> n) - 1), mask=filled, other=-1)
        greater += tl.where(other > keys[:, None], RUN >> n, 0)
    other = tl.load(row_ptr + run + greater, mask=filled, other=-1)
    greater += (other > keys[:, None]).to(tl.int32)
    return tl.sum(greater, axis=1)


@triton.jit
def _place_by_counting(row_ptr, count, keys, KEYS: tl.constexpr, CHUNK: tl.constexpr):
    """Places of keys of a row that lies in any order."""
    greater = tl.zeros([KEYS, CHUNK], tl.int32)
    for start in range(0, count, CHUNK):
        i = start + tl.arange(0, CHUNK)
        others = tl.load(row_ptr + i, mask=i < count, other=0)
        greater += is_less(keys[:, None], others[None, :])
    return tl.sum(greater, axis=1)


@triton.jit(do_not_specialize=["row_width", "width"])
def _sort_kernel(
    rows_ptr, counts_ptr, out_ptr, row_width, width, KEYS: tl.constexpr, COUNTED: tl.constexpr, CHUNK: tl.constexpr,
    RUN: tl.constexpr, LOG_RUN: tl.constexpr, MAX_RUNS: tl.constexpr,
):  # fmt: skip
    """Program (t, b) writes KEYS keys of row b to their places, and its share of the padding."""
    image = tl.program_id(1).to(tl.int64)
    start, count = tl.program_id(0) * KEYS, tl.load(counts_ptr + image).to(tl.int32)
    rows_ptr += image * row_width
    out_ptr += image * width
    i = start + tl.arange(0, KEYS)
    if start < count:
        keys = tl.load(rows_ptr + i, mask=i < count, other=-1)
        if COUNTED:
            place = _place_by_counting(rows_ptr, count, keys, KEYS, CHUNK)
        else:
            place = _place_in_runs(rows_ptr, count, keys, RUN, LOG_RUN, MAX_RUNS, KEYS)
        tl.store(out_ptr + place, keys, mask=i < count)
    tl.store(out_ptr + i, tl.full([KEYS], -1, tl.int64), mask=(i >= count) & (i < width))


def sorts_by_kernels(width: int) -> bool:
    """Whether rows of so many keys are sorted by the kernels. Longer ones go to torch.sort."""
    return width <= RUN * MAX_RUNS


def counts_pairs(batch: int, width: int) -> bool:
    """Whether rows of so many keys are sorted by comparing all, in one launch."""
    return batch * width * width <= _PAIRS


def sort_runs(keys: Tensor, counts: Tensor) -> Tensor:
    """Each run of 256 keys of a row (B, M), of which counts (B,) are keys, in falling order, and padded with -1; the
    rows grow to whole runs."""
    batch, width = keys.shape
    runs = keys.new_empty(batch, RUN * triton.cdiv(width, RUN))
    with torch.cuda.device_of(keys):
        _sort_runs_kernel[(triton.cdiv(width, RUN), batch)](
            keys, runs, counts, width, runs.shape[1], RUN=RUN, CHUNK=32, enable_fp_fusion=False
        )
    return runs


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
    counted = counts_pairs(batch, width)
    rows, each = (keys, COUNTED) if counted else (sort_runs(keys, counts), MERGED)
    out = torch.empty_like(keys)
    with torch.cuda.device_of(keys):
        _sort_kernel[(triton.cdiv(width, each), batch)](
            rows, counts, out, rows.shape[1], width, KEYS=each, COUNTED=counted, CHUNK=CHUNK, RUN=RUN,
            LOG_RUN=LOG_RUN, MAX_RUNS=MAX_RUNS, enable_fp_fusion=False,
        )  # fmt: skip
    return out
