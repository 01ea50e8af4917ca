"""Rows of distinct 63-bit keys in falling order: a batch of images is sorted without waiting for the GPU.

A key holds a number in its high bits, and in its low bits an index that is counted down. So keys order by falling
number and then by rising index, no two keys of a row are equal, and a key carries all that is known of its entry: no
other array has to be moved with it. -1 pads a row.

Rows of up to 8192 keys take two launches, where torch.sort makes about ten. In the first, each program sorts a run of
256 keys. In the second, every key finds its place in the other runs by binary search. Longer rows go to torch.sort.
"""

import torch
from torch import Tensor

from retina_fast.kernels.compiler import tl, triton

PADDING = -1

_RUN = 256
_MAX_RUNS = 32
_MERGE = 64  # keys whose places one program finds


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


@triton.jit(do_not_specialize=["width"])
def _merge_runs_kernel(
    runs_ptr, out_ptr, counts_ptr, width, RUN: tl.constexpr, MAX_RUNS: tl.constexpr, KEYS: tl.constexpr
):
    """Program (t, b) places KEYS keys of row b: the place of a key is the number of greater keys in all runs."""
    image = tl.program_id(1).to(tl.int64)
    runs_ptr += image * width
    out_ptr += image * width
    count = tl.load(counts_ptr + image).to(tl.int32)
    start = tl.program_id(0) * KEYS
    i = start + tl.arange(0, KEYS)
    if start < count:
        keys = tl.load(runs_ptr + i, mask=i < count, other=-1)
        run = tl.arange(0, MAX_RUNS)[None, :] * RUN
        greater = tl.zeros([KEYS, MAX_RUNS], tl.int32)
        step = RUN
        while step > 0:
            probe = run + tl.minimum(greater + step, RUN) - 1
            other = tl.load(runs_ptr + probe, mask=probe < count, other=-1)
            greater = tl.where((greater + step <= RUN) & (other > keys[:, None]), greater + step, greater)
            step //= 2
        place = tl.sum(greater, axis=1)
        tl.store(out_ptr + place, keys, mask=i < count)
    tl.store(out_ptr + i, tl.full([KEYS], -1, tl.int64), mask=(i >= count) & (i < width))


def sort_keys(keys: Tensor, counts: Tensor) -> Tensor:
    """Each row in falling order, its padding last.

    Args:
        keys: ``(B, M)`` int64. The keys of a row are distinct, not negative, and come first; the rest is PADDING.
        counts: ``(B,)`` integers: the number of keys in each row.
    """
    batch, width = keys.shape
    if width > _RUN * _MAX_RUNS:
        return keys.sort(dim=1, descending=True).values
    runs, out = torch.empty_like(keys), torch.empty_like(keys)
    with torch.cuda.device_of(keys):
        _sort_runs_kernel[(triton.cdiv(width, _RUN), batch)](
            keys, runs, counts, width, RUN=_RUN, CHUNK=32, enable_fp_fusion=False
        )
        _merge_runs_kernel[(triton.cdiv(width, _MERGE), batch)](
            runs, out, counts, width, RUN=_RUN, MAX_RUNS=_MAX_RUNS, KEYS=_MERGE, enable_fp_fusion=False
        )
    return out
