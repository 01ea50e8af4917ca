"""The study of barriers tells needed ones from redundant ones and from those that are never reached."""

import re
from collections import Counter

import torch
import triton
import triton.language as tl

from tests.ptx.barriers import Study, places_of_barriers, without_barrier
from tests.ptx.launch import emulated


@triton.jit
def _reverse_twice(a, zeros, n, NEVER: tl.constexpr):
    i = tl.arange(0, 128)
    x = tl.load(a + 127 - i)
    tl.debug_barrier()
    tl.store(a + i, x)
    tl.debug_barrier()
    nothing = tl.load(zeros + i)  # or Triton 3.6 would merge the two barriers
    tl.debug_barrier()
    x = tl.load(a + 127 - i) + nothing
    tl.debug_barrier()
    tl.store(a + i, x)
    if n > NEVER:
        tl.debug_barrier()
        tl.store(a + i, 0)


def test_each_barrier_is_judged():
    a, study = torch.arange(128), Study()
    with emulated(before=study):
        _reverse_twice[(1,)](a, torch.zeros_like(a), 5, NEVER=7)
    assert torch.equal(a, torch.arange(128))  # the launch itself ran unchanged
    needed, redundant = "race", "redundant"
    assert [*study.seen_as.values()] == [needed, redundant, redundant, needed, "never reached"]
    assert sum(study.table().values(), Counter()) == Counter({needed: 2, redundant: 2, "never reached": 1})
    assert {kernel for kernel, _ in study.table()} == {"_reverse_twice"}


def test_the_barrier_that_is_named_is_removed():
    ptx = "first; bar.sync \t0;\nsecond; barrier.sync 0;\nthird;"
    assert without_barrier(ptx, 1) == "first; bar.sync \t0;\nsecond; \nthird;"
    assert len(re.findall("sync", without_barrier(ptx, 0))) == 1


def test_a_barrier_is_named_by_the_line_of_the_project():
    ptx = """
	.loc	1 108 0                         // a.py:108:0
	bar.sync 	0;
	.loc	1 9 12, function_name $L__info_string0, inlined_at 1 112 5 // a.py:9:12
	.loc	2 343 12, function_name $L__info_string0, inlined_at 1 9 12 // standard.py:343:12
	bar.sync 	0;
	.loc	2 263 12, function_name $L__info_string0, inlined_at 2 343 12 // standard.py:263:12
	bar.sync 	0;
	.loc	1 0 0                           // a.py:0:0
	bar.sync 	0;
	.file	1 "/project/kernels/a.py"
	.file	2 "/site-packages/triton/language/standard.py"
"""
    assert places_of_barriers(ptx) == ["a.py:108", "a.py:9", "a.py:9", "a.py:9"]
