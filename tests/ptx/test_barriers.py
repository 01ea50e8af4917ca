"""The study of barriers tells needed ones from redundant ones and from those that are never reached."""

import re

import torch
import triton
import triton.language as tl

from tests.ptx.barriers import Study, without_barrier
from tests.ptx.launch import emulated


@triton.jit
def _reverse_twice(a, n, NEVER: tl.constexpr):
    i = tl.arange(0, 128)
    x = tl.load(a + 127 - i)
    tl.debug_barrier()
    tl.store(a + i, x)
    tl.debug_barrier()
    tl.debug_barrier()
    x = tl.load(a + 127 - i)
    tl.debug_barrier()
    tl.store(a + i, x)
    if n > NEVER:
        tl.debug_barrier()
        tl.store(a + i, 0)


def test_each_barrier_is_judged():
    a, study = torch.arange(128), Study()
    with emulated(before=study):
        _reverse_twice[(1,)](a, 5, NEVER=7)
    assert torch.equal(a, torch.arange(128))  # the launch itself ran unchanged
    needed, redundant = "race", "redundant"
    assert [*study.seen_as.values()] == [needed, redundant, redundant, needed, "never reached"]


def test_the_barrier_that_is_named_is_removed():
    ptx = "first; bar.sync \t0;\nsecond; barrier.sync 0;\nthird;"
    assert without_barrier(ptx, 1) == "first; bar.sync \t0;\nsecond; \nthird;"
    assert len(re.findall("sync", without_barrier(ptx, 0))) == 1
