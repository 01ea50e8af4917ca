"""Rows of distinct 63-bit keys in falling order: a batch of images is sorted without waiting for the GPU.

A key holds a number in its high bits, and in its low bits an index, subtracted from the largest one. So falling keys
mean falling numbers and, among equal numbers, rising indices. No two keys of a row are equal. Number and index are both
within the key, so that no other array has to be sorted along. -1 pads a row.

Rows of up to 8192 keys take two launches, where torch.sort makes about ten. In the first, each program sorts a run of
256 keys. In the second, every key finds its place in the other runs by binary search. Longer rows go to torch.sort.
"""

import torch
from torch import Tensor

from retina_fast.kernels.compiler import tl, triton

PADDING = -1

RUN = 256  # keys that are sorted together at first
MAX_RUNS = 32
MERGED = 64  # keys whose places one program finds


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


@triton.jit(do_not_specialize=["width"])
def _sort_runs_kernel(keys_ptr, runs_ptr, counts_ptr, width, RUN: tl.constexpr, CHUNK: tl.constexpr):
    """Program (r, b) sorts run r of row b: the place of a key is the number of greater keys in the run."""
    image = tl.program_id(1).to(tl.int64)
    count = tl.load(counts_ptr + image).to(tl.int32)
    start = tl.program_id(0) * RUN
    if start < count:
        keys_ptr += image * width + start
        i = tl.arange(0, RUN)
        keys = tl.load(keys_ptr + i, mask=start + i < count, other=-1)
        place = tl.zeros([RUN], tl.int32)
        for chunk in range(0, RUN, CHUNK):
            j = chunk + tl.arange(0, CHUNK)
            others = tl.load(keys_ptr + j, mask=start + j < count, other=-1)
            place += tl.sum((others[None, :] > keys[:, None]).to(tl.int32), axis=1)
        tl.store(runs_ptr + image * width + start + place, keys, mask=start + i < count)


@triton.jit
def place_in_runs(runs_ptr, i, count, RUN: tl.constexpr, MAX_RUNS: tl.constexpr, KEYS: tl.constexpr):
    """Keys i of a row of sorted runs, and their places: the number of greater keys in all runs. Where i is not below
    the count, the key is -1 and its place is i."""
    keys = tl.load(runs_ptr + i, mask=i < count, other=-1)
    place = i
    if tl.max(keys, axis=0) >= 0:
        run = tl.arange(0, MAX_RUNS)[None, :] * RUN
        greater = tl.zeros([KEYS, MAX_RUNS], tl.int32)
        step = RUN
        while step > 0:
            probe = run + tl.minimum(greater + step, RUN) - 1
            other = tl.load(runs_ptr + probe, mask=probe < count, other=-1)
            greater = tl.where((greater + step <= RUN) & (other > keys[:, None]), greater + step, greater)
            step //= 2
        place = tl.where(i < count, tl.sum(greater, axis=1), i)
    return keys, place


@triton.jit(do_not_specialize=["width"])
def _merge_runs_kernel(
    runs_ptr, out_ptr, counts_ptr, width, RUN: tl.constexpr, MAX_RUNS: tl.constexpr, KEYS: tl.constexpr
):
    """Program (t, b) writes KEYS keys of row b to their places."""
    image = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    count = tl.load(counts_ptr + image).to(tl.int32)
    keys, place = place_in_runs(runs_ptr + image * width, i, count, RUN, MAX_RUNS, KEYS)
    tl.store(out_ptr + image * width + place, keys, mask=i < width)


def sorts_by_kernels(width: int) -> bool:
    """Whether rows of so many keys are sorted by the kernels. Longer ones go to torch.sort."""
    return width <= RUN * MAX_RUNS


def sort_runs(keys: Tensor, counts: Tensor) -> Tensor:
    """Each run of 256 keys of a row in falling order; the arguments are those of :func:`sort_keys`."""
    batch, width = keys.shape
    runs = torch.empty_like(keys)
    with torch.cuda.device_of(keys):
        _sort_runs_kernel[(triton.cdiv(width, RUN), batch)](
            keys, runs, counts, width, RUN=RUN, CHUNK=32, enable_fp_fusion=False
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
    runs, out = sort_runs(keys, counts), torch.empty_like(keys)
    with torch.cuda.device_of(keys):
        _merge_runs_kernel[(triton.cdiv(width, MERGED), batch)](
            runs, out, counts, width, RUN=RUN, MAX_RUNS=MAX_RUNS, KEYS=MERGED, enable_fp_fusion=False
        )
    return out
