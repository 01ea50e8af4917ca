"""Right kernels run right on the emulator, and each kind of fault that is planted in one is caught."""

import doctest
import os
import re
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

from tests.ptx import instruction, launch, machine
from tests.ptx.barriers import without_barrier
from tests.ptx.cases import CASES, run_case
from tests.ptx.faults import FAULTS, plant
from tests.ptx.launch import emulated
from tests.ptx.memory import Fault

ROOT = Path(__file__).parents[2]


@triton.jit
def _add(a, b, c, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(c + i, tl.load(a + i, mask=i < n) + tl.load(b + i, mask=i < n), mask=i < n)


@triton.jit
def _add_unmasked(a, b, c, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(c + i, tl.load(a + i) + tl.load(b + i))


@triton.jit
def _sum(a, c, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(c + tl.program_id(0), tl.sum(tl.load(a + i, mask=i < n, other=0.0), axis=0))


@triton.jit
def _append(counter, out):
    tl.store(out + tl.atomic_add(counter, 1, sem="relaxed"), tl.program_id(0))


@triton.jit
def _accumulate(a, total, BLOCK: tl.constexpr):
    tl.atomic_add(total + tl.zeros([BLOCK], tl.int32), tl.load(a + tl.arange(0, BLOCK)), sem="relaxed")


@triton.jit
def _next(a):
    tl.store(a + tl.program_id(0), tl.load(a + tl.program_id(0) + 1) + 1)


@triton.jit
def _all_to_one(c):
    tl.store(c, tl.program_id(0))


@triton.jit
def _wrongly_aligned(a, c, shift, BLOCK: tl.constexpr):
    i = tl.max_contiguous(tl.multiple_of(shift + tl.arange(0, BLOCK), BLOCK), BLOCK)
    tl.store(c + tl.arange(0, BLOCK), tl.load(a + i))


@triton.jit
def _reverse(a, c, BARRIER: tl.constexpr):
    i = tl.arange(0, 128)
    tl.store(a + i, i)
    if BARRIER:
        tl.debug_barrier()
    tl.store(c + i, tl.load(a + 127 - i))


@triton.jit
def _copy_strided(a, c, stride, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK) * stride
    tl.store(c + i, tl.load(a + i))


@triton.jit
def _narrow(a, c, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(c + i, tl.load(a + i).to(tl.bfloat16))


@triton.jit
def _square(x):
    return x * x


@triton.jit
def _methods(a, c, BLOCK: tl.constexpr):
    tl.store(c, _square(tl.load(a + tl.arange(0, BLOCK))).sum(axis=0))


ORDERS = [{}, {"seed": 1}, {"seed": 2, "shuffle": True}, {"capability": 80}, {"together": 1}]


@pytest.mark.parametrize("order", ORDERS, ids=str)
@pytest.mark.parametrize("n", [5003, 5120, 1])
def test_right_kernels(n, order):
    a, b = torch.randn(n), torch.randn(n)
    c, d = torch.empty(n), torch.empty(5)
    with emulated(**order):
        _add[(5,)](a, b, c, n, BLOCK=1024)
        _sum[(5,)](a, d, n, BLOCK=1024)
    assert torch.equal(c, a + b)
    torch.testing.assert_close(d.sum(), a.sum(), rtol=1e-4, atol=1e-4)


def test_kernels_are_compiled_within_and_interpreted_outside():
    a, c = torch.arange(64.0), torch.zeros(1)
    for _ in range(2):
        _methods[(1,)](a, c, BLOCK=64)
        assert c == (a * a).sum()
        with emulated() as log:
            _methods[(1,)](a, c.zero_(), BLOCK=64)
        assert c == (a * a).sum()
        assert [result.name for result in log.results] == ["_methods"]


@pytest.mark.parametrize("module", [launch, instruction])
def test_examples(module):
    failed, attempted = doctest.testmod(module)
    assert attempted
    assert not failed


def test_counts_of_coalesced_accesses():
    a = torch.randn(4096)
    with emulated(count=True) as log:
        _add_unmasked[(4,)](a, a, torch.zeros(4096), BLOCK=1024)
    (result,) = log.results
    for kind, tensors in (("global ld", 2), ("global st", 1)):
        traffic = result.total(kind)
        assert traffic.requests == tensors * 4096 / 4 / 32  # 16 bytes a thread
        assert traffic.moved == traffic.ideal == 16 * traffic.requests
    assert result.barriers == 0
    assert 32 * result.warp_instructions == result.thread_instructions


def test_counts_of_strided_accesses():
    with emulated(count=True) as log:
        _copy_strided[(1,)](torch.randn(1024), torch.zeros(1024), 8, BLOCK=128)
    for kind in ("global ld", "global st"):
        traffic = log.results[0].total(kind)
        assert traffic.moved == 32 * traffic.requests  # a sector of 32 bytes a thread, for 4 bytes
        assert traffic.ideal == 4 * traffic.requests


def test_counts_of_barriers():
    with emulated(count=True) as log:
        _sum[(6,)](torch.randn(6 * 1024), torch.zeros(6), 6 * 1024, BLOCK=1024)
    (result,) = log.results
    assert result.ctas == 6
    assert result.barriers == result.opcodes["bar.sync"] / 4 > 0  # of 4 warps


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_missing_barrier_of_shared_memory(shuffle):
    with (
        emulated(edit=lambda ptx: without_barrier(ptx, 0), shuffle=shuffle, seed=1),
        pytest.raises(Fault, match="race on shared memory"),
    ):
        _sum[(1,)](torch.randn(1024), torch.zeros(1), 1024, BLOCK=1024)


def test_a_missing_barrier_of_global_memory():
    a, c = torch.zeros(128, dtype=torch.int32), torch.zeros(128, dtype=torch.int32)
    with emulated():
        _reverse[(1,)](a, c, BARRIER=True)
        assert c.tolist() == list(range(127, -1, -1))
        with pytest.raises(Fault, match=r"race on int32\[128\]"):
            _reverse[(1,)](a, c, BARRIER=False)


def skipped_by_a_thread(ptx: str, instruction: str) -> str:
    """The kernel in which thread 0 jumps over the first such instruction."""
    jump = ".reg .pred %skip<1>;\nsetp.eq.u32 %skip0, %tid.x, 0;\n@%skip0 bra $skipped;\n"
    return re.sub(rf"({instruction}[^;]*;)", rf"{jump}\1\n$skipped:", ptx, count=1)


@pytest.mark.parametrize(
    ("instruction", "warps", "message"),
    [
        (r"bar\.sync", 4, "wait for each other"),
        (r"shfl\.sync", 4, "wait for each other"),  # thread 0 at the barrier after it
        (r"shfl\.sync", 1, "part of a warp never reaches"),
    ],
)
def test_an_instruction_that_part_of_the_threads_never_reaches(instruction, warps, message):
    with emulated(edit=lambda ptx: skipped_by_a_thread(ptx, instruction)), pytest.raises(Fault, match=message):
        _sum[(1,)](torch.randn(1024), torch.zeros(1), 1024, BLOCK=1024, num_warps=warps)


def test_a_shuffle_of_part_of_a_warp():
    with (
        emulated(edit=lambda ptx: re.sub(r"(shfl\.sync[^;]*), -1;", r"\1, 255;", ptx)),
        pytest.raises(Fault, match="not the whole warp"),
    ):
        _sum[(1,)](torch.randn(1024), torch.zeros(1), 1024, BLOCK=1024)


def test_a_kernel_that_does_not_end(monkeypatch):
    monkeypatch.setattr(machine, "MAX_STEPS", 1000)
    with emulated(edit=lambda ptx: ptx.replace("ret;", "$again:\nbra $again;")), pytest.raises(Fault, match="not end"):
        _all_to_one[(1,)](torch.zeros(1, dtype=torch.int32))


def test_inexact_functions_are_moved():
    """The compiled focal loss uses the approximate instructions, whose error shows in its own."""
    exact, moved = (run_case(CASES["sigmoid_focal_loss fp32"], perturb=perturb).comparisons for perturb in (0, 1))
    assert exact[0].what == "losses"
    assert exact[0].error < moved[0].error < moved[0].limit


def test_out_of_bounds():
    a = torch.randn(1024)
    with emulated(), pytest.raises(Fault, match=r"out of bounds: 16 bytes at offset 4000 of .* which has 4000"):
        _add_unmasked[(1,)](a, a, torch.zeros(1000), BLOCK=1024)


def test_misaligned():
    a = torch.randn(1040)
    with emulated(), pytest.raises(Fault, match="misaligned: 16 bytes at offset"):
        _wrongly_aligned[(1,)](a, torch.zeros(1024), 3, BLOCK=1024)


def test_a_read_of_what_nobody_wrote():
    a = torch.zeros(1024)
    with emulated():
        new = torch.empty(1024)
        with pytest.raises(Fault, match="read, but never written"):
            _add_unmasked[(1,)](new, a, a.clone(), BLOCK=1024)
        new[:512], new[512:] = 1.0, 2.0  # by torch, which counts as well
        _add_unmasked[(1,)](new, a, a, BLOCK=1024)
    assert a.sum() == 512 * 3


def test_programs_that_read_each_others_results():
    with emulated(), pytest.raises(Fault, match="race on float32"):
        _next[(8,)](torch.zeros(9))


def test_programs_that_write_different_values_at_one_place():
    with emulated(), pytest.raises(Fault, match="race on int32"):
        _all_to_one[(2,)](torch.zeros(1, dtype=torch.int32))


def results_by_seed(run) -> set[tuple[float, ...]]:
    """What a call gives in ten orders."""
    results = set()
    for seed in range(1, 11):
        with emulated(seed=seed, shuffle=True):
            results.add(tuple(run().tolist()))
    return results


def test_an_atomic_whose_order_shows_in_the_result():
    def places():
        out = torch.empty(16, dtype=torch.int32)
        _append[(16,)](torch.zeros(1, dtype=torch.int32), out)
        return out

    def total(values):
        result = torch.zeros(1, dtype=values.dtype)
        _accumulate[(1,)](values, result, BLOCK=256)
        return result

    floats = torch.randn(256)
    assert len(results_by_seed(places)) > 5
    assert all(sorted(result) == list(range(16)) for result in results_by_seed(places))
    assert len(results_by_seed(lambda: total(floats))) > 1
    integers = torch.arange(256, dtype=torch.int32)
    assert results_by_seed(lambda: total(integers)) == {(256 * 255 // 2,)}


def test_a_wrong_rounding_mode():
    a, right, wrong = torch.randn(256), torch.empty(256, dtype=torch.bfloat16), torch.empty(256, dtype=torch.bfloat16)
    with emulated():
        _narrow[(1,)](a, right, BLOCK=256)
    with emulated(edit=lambda ptx: re.sub(r"cvt\.rn\.bf16", "cvt.rz.bf16", ptx)):
        _narrow[(1,)](a, wrong, BLOCK=256)
    assert torch.equal(right, a.bfloat16())
    assert not torch.equal(wrong, right)


@pytest.mark.parametrize(
    ("name", "pattern", "replacement"),
    [
        ("take_kept", r"div\.rn\.f32|mul\.f32|mul\.rn\.f32", "add.f32"),
        ("one_pass bf16", r"cvt\.rn\.bf16x2", "cvt.rz.bf16x2"),
        ("key_sort", r"shr\.u64", "shr.s64"),
        ("focal_loss fp32 K=7 NaN", r"neg\.f32|max\.f32", "abs.f32"),
    ],
)
def test_a_changed_instruction_fails_the_case(name, pattern, replacement):
    """The cases compare what ran: a kernel with other instructions does not pass."""
    changed = []

    def edit(ptx):
        edited, times = re.subn(pattern, replacement, ptx)
        changed.append(times)
        return edited

    outcome = run_case(CASES[name], edit=edit)
    assert sum(changed)
    assert outcome.failures


def test_nothing_is_left_in_the_environment():
    """Where Triton caches what it compiles, above all: a folder within the one of the call before is always empty."""
    before = dict(os.environ), triton.knobs.cache.dir, triton.knobs.runtime.interpret
    with emulated():
        _all_to_one[(1,)](torch.zeros(1, dtype=torch.int32))
    assert (dict(os.environ), triton.knobs.cache.dir, triton.knobs.runtime.interpret) == before


@pytest.mark.parametrize("name", FAULTS)
def test_the_command_plants_its_faults(name, tmp_path):
    """`python -m tests.ptx.faults` takes minutes, but what it changes must stand in the kernels."""
    fault = FAULTS[name]
    before = (ROOT / "kernels" / fault.file).read_text()
    (tmp_path / fault.file).write_text(before)
    plant(fault, tmp_path)
    assert (tmp_path / fault.file).read_text() != before
    assert fault.case in CASES
