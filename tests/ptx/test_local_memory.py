"""A thread's own memory, where a compiler puts small arrays: Triton 3.9 did so with bits that it packs into a word."""

import numpy as np
import pytest

from tests.ptx.code import Code
from tests.ptx.machine import Machine, Options
from tests.ptx.memory import Fault, Memory
from tests.ptx.traffic import Result

# Each thread writes two bytes, half of them by a generic address, and reads them back as one number.
_PTX = """
.visible .entry packed(
.param .u64 .ptr .global .align 4 out
)
.reqntid 64
{
	.local .align 2 .b8 	__local_depot0[4];
	.reg .b64 	%SP;
	.reg .b32 	%SPL;
	.reg .b32 	%r<9>;
	.reg .b64 	%rd<9>;
	mov.b32 	%SPL, __local_depot0;
	cvt.u64.u32 	%SP, %SPL;
	cvta.local.u64 	%SP, %SP;
	mov.u32 	%r1, %tid.x;
	mov.u32 	%r2, %ctaid.x;
	mad.lo.s32 	%r3, %r2, 64, %r1;
	shr.u32 	%r4, %r3, 1;
	st.b8 	[%SP+2], %r3;
	st.local.b8 	[__local_depot0+3], %r4;
	ld.local.b16 	%r5, [%SPL+PLACE];
	ld.param.u64 	%rd1, [out];
	mul.wide.u32 	%rd2, %r3, 4;
	add.s64 	%rd3, %rd1, %rd2;
	st.global.b32 	[%rd3], %r5;
	ret;
}
"""


def run(place: int, options: Options) -> tuple[np.ndarray, Result]:
    memory, out = Memory(), np.zeros(128, np.uint32)
    base = memory.add("out", out.view(np.uint8), 4).base
    result = Machine(Code(_PTX.replace("PLACE", str(place))), memory, [np.uint64(base)], (2, 1, 1), 0, options).run()
    return out, result


@pytest.mark.parametrize("options", [Options(), Options(seed=1, shuffle=True), Options(together=1)], ids=str)
def test_each_thread_reads_what_it_wrote(options):
    n = np.arange(128, dtype=np.uint32)
    assert np.array_equal(run(2, options)[0], n | n >> 1 << 8)


def test_bounds_and_alignment():
    with pytest.raises(Fault, match=r"out of bounds: 2 bytes at offset 4 of local memory, which has 4"):
        run(4, Options())
    with pytest.raises(Fault, match="misaligned: 2 bytes at offset 1 of local memory"):
        run(1, Options())


def test_lanes_lie_next_to_each_other():
    _, result = run(2, Options(count=True))
    stores, loads = result.total("local st"), result.total("local ld")
    assert (stores.requests, loads.requests) == (8, 4)  # of four warps
    assert (stores.moved, loads.moved) == (stores.ideal, loads.ideal) == (8, 8)
