"""Random orders put other programs between the warps of one, and what a program's warps must do alike is checked."""

import contextlib
import re

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from tests.ptx.cases import CASES, run_case
from tests.ptx.code import Code
from tests.ptx.launch import emulated
from tests.ptx.machine import Machine, Options
from tests.ptx.memory import Fault, Memory
from tests.ptx.program import Unsupported
from tests.ptx.scalars import Scalars


@triton.jit
def _count_from_a_floor(x, floor_ptr, found_ptr, BLOCK: tl.constexpr, ATOMIC: tl.constexpr):
    """Counts the numbers from a floor on, which programs raise meanwhile: at first all at once, later one by one."""
    floor = tl.atomic_max(floor_ptr, 0, sem="relaxed") if ATOMIC else tl.load(floor_ptr, volatile=True)
    above = (tl.load(x + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)) >= floor).to(tl.int32)
    if floor < 2:
        tl.atomic_add(found_ptr, tl.sum(above, axis=0), sem="relaxed")
    else:
        tl.atomic_add(found_ptr + tl.zeros([BLOCK], tl.int32), above, sem="relaxed")
    tl.atomic_max(floor_ptr, floor + 1, sem="relaxed")


def count_from_a_floor(atomic: bool, **order) -> str:
    """The emulator's fault, or nothing."""
    x = torch.arange(8 * 64, dtype=torch.int32) + 8  # all are above any floor
    floor, found = torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    try:
        with emulated(**order):
            _count_from_a_floor[(8,)](x, floor, found, BLOCK=64, ATOMIC=atomic, num_warps=2)
    except Fault as fault:
        return str(fault)
    assert 0 < floor[0] <= 8
    assert found[0] == len(x)
    return ""


def test_a_scalar_that_each_warp_loads_while_other_programs_change_it():
    assert not count_from_a_floor(atomic=False)  # the usual order does not tell
    orders = [{"seed": seed, "shuffle": True} for seed in range(1, 13)]
    assert not any(count_from_a_floor(atomic=True, **order) for order in orders)
    faults = [fault for order in orders if (fault := count_from_a_floor(atomic=False, **order))]
    assert len(faults) >= 3
    for fault in faults:
        assert re.search(r"warps of one program load one number as \[\d, \d\], .*ld\.volatile", fault)


def test_warps_that_branch_by_different_values_of_it(monkeypatch):
    """Without that check, where it matters: one warp waits at a barrier of a branch that the other did not take."""
    monkeypatch.setattr(Scalars, "check", lambda *_: None)
    faults = [count_from_a_floor(atomic=False, seed=seed, shuffle=True) for seed in range(1, 13)]
    assert [fault for fault in faults if "wait for each other" in fault and "32 have ended" in fault]


@triton.jit
def _note_counters(counters, out):
    i = tl.arange(0, 64)
    tl.store(out + tl.program_id(0) * 64 + i, tl.load(counters + i, volatile=True))
    tl.atomic_add(counters + i, 1, sem="relaxed")


def test_programs_run_between_the_loads_of_two_warps():
    """Two programs have run as a whole after one warp of a third looked at its counters and before the other did."""
    between = []
    for seed in range(1, 11):
        out = torch.empty(4, 2, 32, dtype=torch.int32)
        with emulated(seed=seed, shuffle=True):
            _note_counters[(4,)](torch.zeros(64, dtype=torch.int32), out, num_warps=2)
        assert (out == out[:, :, :1]).all()  # but the lanes of a warp go together
        between.append(int((out[:, 0, 0] - out[:, 1, 0]).abs().max()))
    assert max(between) >= 2


@triton.jit
def _add_what_stands_there(a, out, LOAD_FIRST: tl.constexpr):
    program = tl.program_id(0)
    if LOAD_FIRST:
        tl.store(out + program, tl.load(a))
    if program == 0:
        tl.atomic_add(a, 1, sem="relaxed")
    if not LOAD_FIRST:
        tl.store(out + program, tl.load(a))


@pytest.mark.parametrize("order", [{}, {"seed": 1, "shuffle": True}, {"together": 1}], ids=str)
@pytest.mark.parametrize("load_first", [True, False])
def test_a_plain_load_of_what_another_program_adds_to(load_first, order):
    """It is refused in any order of the two, so that no order need be searched for."""
    a, out = torch.zeros(1, dtype=torch.int32), torch.empty(2, dtype=torch.int32)
    with emulated(**order), pytest.raises(Fault, match=r"race on int32\[1\]"):
        _add_what_stands_there[(2,)](a, out, LOAD_FIRST=load_first)


# Barriers: 128 threads, of which the first warp takes the first branch and the others the second.

_PTX = """
.visible .entry meet(
.param .u64 .ptr .global .align 4 out
)
.reqntid 128
{
	.reg .pred 	%p<3>;
	.reg .b32 	%r<4>;
	mov.u32 	%r1, %tid.x;
	setp.lt.u32 	%p1, %r1, 32;
	setp.lt.u32 	%p2, %r1, 64;
	@%p1 bra 	$first;
	SECOND
	bra.uni 	$end;
$first:
	FIRST
$end:
	ret;
}
"""
_ORDERS = [Options(), Options(seed=1, shuffle=True)]


def meet(first: str, second: str, options: Options) -> int:
    """How many barriers were passed."""
    memory, code = Memory(), Code(_PTX.replace("FIRST", first).replace("SECOND", second))
    out = memory.add("out", np.zeros(4, np.uint8), 4)
    return Machine(code, memory, [np.uint64(out.base)], (3, 1, 1), 0, options).run().barriers


@pytest.mark.parametrize("options", _ORDERS, ids=str)
@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ("bar.sync 0;", "bar.sync 0;", r"different places: \{.*\}$"),  # a GPU would let them pass
        ("bar.sync 0;", "bar.sync 1;", r"different places: \{.*\}$"),
        ("bar.sync 0;", "", "and 96 have ended"),  # as it would here
        ("", "bar.sync 0;", "and 32 have ended"),
        ("bar.sync 1, 64;", "bar.sync 1, 96;", "wait for each other"),
        ("bar.sync 1, 64;", "@%p2 bar.sync 1, 64;", None),
    ],
)
def test_warps_that_do_not_meet(first, second, message, options):
    with pytest.raises(Fault if message else Unsupported, match=message):
        meet(first, second, options)


@pytest.mark.parametrize("options", _ORDERS, ids=str)
def test_barriers_of_part_of_the_threads(options):
    """They are met at any place, and by so many threads as they name."""
    assert meet("bar.sync 1, 128;", "bar.sync 1, 128;", options) == 3 * 2
    assert meet("", "bar.sync 2, 96;", options) == 3
    assert meet("", "bar.sync 2, 96; bar.sync 2, 96;", options) == 6


@pytest.mark.parametrize("barrier", ["bar.arrive 1, 128;", "bar.red.or.pred %p2, 0, %p1;", "barrier.cluster.wait;"])
def test_other_barriers_are_not_known(barrier):
    with pytest.raises(Unsupported):
        meet(barrier, barrier, Options())


@triton.jit
def _hand_on(values, told, drawn, out, BLOCK: tl.constexpr, RELEASE: tl.constexpr, ACQUIRE: tl.constexpr,
             BARRIER: tl.constexpr, SCOPE: tl.constexpr):  # fmt: skip
    """The program that draws n waits for the one that drew n - 1, adds one to its values, and tells the next."""
    i = tl.arange(0, BLOCK)
    n = tl.atomic_add(drawn, 1, sem="relaxed")
    while tl.atomic_max(told, 0, sem=ACQUIRE, scope=SCOPE) < n:
        pass
    number = tl.load(values + n * BLOCK + BLOCK - 1 - i)  # of another thread's
    tl.store(values + (n + 1) * BLOCK + i, number + 1)
    if BARRIER:
        tl.debug_barrier()
    tl.atomic_xchg(told, n + 1, sem=RELEASE, scope=SCOPE)
    tl.store(out + n, n)


@pytest.mark.parametrize(
    "order",
    [
        {},
        {"together": 2},
        {"seed": 1, "shuffle": True, "together": 4},
        *(pytest.param({"seed": n, "shuffle": True, "together": 4}, marks=pytest.mark.slow) for n in range(2, 7)),
    ],
)
@pytest.mark.parametrize(
    ("release", "acquire", "scope", "barrier", "race"),
    [
        ("release", "acquire", "gpu", True, False),
        ("acq_rel", "acq_rel", "gpu", True, False),
        ("relaxed", "acquire", "gpu", True, True),
        ("release", "relaxed", "gpu", True, True),
        ("release", "acquire", "gpu", False, True),
        ("release", "acquire", "cta", True, True),
    ],
)
def test_programs_that_wait_for_each_other(release, acquire, scope, barrier, race, order):
    """Values are handed on if whoever wrote them releases them, behind a barrier, and whoever reads acquires them, both
    in the scope of the GPU."""
    values, told, drawn = torch.zeros(7, 64), *torch.zeros(2, 1, dtype=torch.int32)
    with emulated(**order), pytest.raises(Fault, match="race on float32") if race else contextlib.nullcontext():
        out = torch.empty(6, dtype=torch.int32)
        _hand_on[(6,)](
            values, told, drawn, out, BLOCK=64, RELEASE=release, ACQUIRE=acquire, BARRIER=barrier, SCOPE=scope,
            num_warps=2,
        )  # fmt: skip
    if not race:
        assert values[:, 0].tolist() == [0, 1, 2, 3, 4, 5, 6]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name for name in CASES if re.match("candidate_selection .*mixed|anchor_matching$|.* chain in tiles", name)]
)
def test_programs_that_communicate_do_it_in_any_order(name):
    for seed in range(1, 13):
        outcome = run_case(CASES[name], seed=seed, shuffle=True)
        assert not outcome.failures, f"seed {seed}: {outcome.failures}"
