"""What compiled kernels must hold on GPUs that are not at hand, and the reading of machine code itself.

In every run each kernel is compiled for sm_90 in the variants that goals rest on; in the slow tests, all of them for
all targets.
"""

import os
import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.static.compiled import TARGETS, Row, compile_all, report
from benchmarks.static.sass import basic_blocks, instructions_of, loops, through, usual_path
from tests.instruments.fake_gpu import Launch, launches_of
from tests.instruments.kernel_calls import KERNEL_CALLS, LIMITS_HOLD_FOR

triton = pytest.importorskip("triton")
NIGHTLY = re.compile(
    "fp16|group_norm_relu fp32|selection fp32|one group|one image|32 images|topk|few|iou|smooth|all kept|n=16"
    "|max_pool_relu fp32|shortcut|gradients bf16 C|channels bf16 C=36|K=1$|varifocal|image_batch fp32|best first"
    "|without low|atss_matching$|IOU|chain bf16, two|quality_focal|focal_loss bf16 (losses|sum)"
)
# Bytes a thread, on GPUs of which there is no record, or of a kernel that is in none: how the others are launched was
# measured on an H200.
MAY_SPILL = {
    ("_search_kernel", "sm_80"): 16,
    ("_place_kernel", "sm_80"): 8,
    ("_conv_pointwise_kernel", "sm_80"): 240,
    ("_tiles_kernel", "sm_80"): 96,
    ("_tiles_kernel", "sm_90"): 160,  # pointers, which no loop over boxes reads
    ("_tiles_kernel", "sm_100"): 160,
    ("_tiles_kernel", "gfx942"): 12,
}
ONLY_ON = {"_conv_chain_kernel": ("sm_90", "sm_100")}  # compiled for the others, which do not run it
USUAL = [name for name in KERNEL_CALLS if not NIGHTLY.search(name)]


def free_cores() -> int:
    """Returns the cores that are left to this process where pytest-xdist runs several."""
    return max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))


@pytest.fixture(scope="module", params=["usual", pytest.param("all", marks=pytest.mark.slow)])
def rows(request):
    if request.param == "usual":
        return report(("sm_90",), USUAL, free_cores(), {*WIDE, *COUNTED})
    return report(TARGETS, None, free_cores())


def check_limits(excesses: Iterable[str], version: str = triton.__version__) -> None:
    """Fails if a limit is exceeded; on a Triton for which no limit was set, warns with the figures instead."""
    text = "; ".join(excesses)
    if text and version.startswith(LIMITS_HOLD_FOR):
        pytest.fail(text)
    if text:
        warnings.warn(f"Triton {version}, for which no limits were set: {text}", stacklevel=2)


def test_limits_hold_for_the_compilers_that_they_name():
    check_limits([])
    with pytest.raises(pytest.fail.Exception, match="a kernel spills"):
        check_limits(["a kernel spills"], LIMITS_HOLD_FOR[0] + ".1")
    with pytest.warns(UserWarning, match=r"Triton 99\.0, .*: a kernel spills"):
        check_limits(["a kernel spills"], "99.0")


def test_every_kernel_compiles(rows):
    assert {row.case for row in rows} in (set(KERNEL_CALLS), set(USUAL))
    assert {row.kernel for row in rows} == {
        launch.kernel.__name__ for call in KERNEL_CALLS.values() for launch in launches_of(call.run)
    }
    assert [row for row in rows if row.error] == []


def test_nothing_spills(rows):
    check_limits(
        f"{row.case}: {row.kernel} spills {row.spilled} bytes on {row.target}"
        for row in rows
        if row.spilled > MAY_SPILL.get((row.kernel, row.target), 0) and row.target in ONLY_ON.get(row.kernel, TARGETS)
    )


def test_instructions_an_element(rows):
    measured = [(row, KERNEL_CALLS[row.case]) for row in rows if row.instructions is not None]
    compiled = {row.case for row in rows}
    assert {row.case for row, _ in measured if row.path} == {name for name in compiled if KERNEL_CALLS[name].tile}
    check_limits(
        f"{row.case} on {row.target}: {getattr(row, name):.2f} {name} an element, limit {getattr(call, name)}"
        for row, call in measured
        for name in ("instructions", "mufu")
        if getattr(row, name) > getattr(call, name)
    )


def test_bytes_an_element_by_wide_accesses(rows):
    check_limits(
        f"{row.case} on {row.target}: {row.wide_bytes:.2f} bytes, not {KERNEL_CALLS[row.case].bytes_per_element}"
        for row in rows
        if row.wide_bytes is not None and row.wide_bytes != pytest.approx(KERNEL_CALLS[row.case].bytes_per_element)
    )


COUNTED = (
    "_focal_loss_kernel",
    "_sigmoid_focal_loss_kernel",
    "_list_kernel",
    "_conv_epilogue_kernel",
    "_epilogue_gradients_kernel",
)
WIDE = {
    "_focal_loss_kernel": "focal_loss bf16",
    "_scale_kernel": "one_pass scale bf16",
    "_list_kernel": "candidate_selection",
    "_tile_sums_kernel": "group_norm_relu",
    "_group_norm_relu_kernel": "group_norm_relu",
    "_max_pool_relu_kernel": "max_pool_relu",
}
STORES_LITTLE = ("_list_kernel", "_tile_sums_kernel")


def test_streaming_kernels_read_and_write_16_bytes_at_a_time(rows):
    """The path of a usual tile is known on NVIDIA only; on AMD the norm's accesses are wide wherever they stand."""
    streams = [
        row
        for row in rows
        if row.kernel in WIDE
        and row.case.startswith(WIDE[row.kernel])
        and "K=1" not in row.case
        and (row.target != "gfx942" or "group_norm" in row.case)
    ]
    assert {row.kernel for row in streams} == set(WIDE)
    check_limits(
        f"{row.case}: {row.kernel} on {row.target} loads {row.load_bits} bits and stores {row.store_bits}"
        for row in streams
        if row.load_bits != 128 or (row.store_bits != 128 and row.kernel not in STORES_LITTLE)
    )


def test_pointwise_convs_use_matrix_instructions(rows):
    """A warpgroup's on sm_90; the emulator, which runs the kernel without them, would not see them go."""
    kernels = {"_conv_pointwise_kernel", "_conv_chain_kernel"}
    found = [row for row in rows if row.kernel in kernels and row.target == "sm_90"]
    assert {row.kernel for row in found} == kernels
    check_limits(
        f"{row.case} has no wgmma" for row in found if not any(name.startswith("wgmma.mma_async") for name in row.ptx)
    )


@pytest.mark.parametrize(
    "kernel",
    [
        "_anchor_matching_kernel",
        "_choose_kernel",
        "_offer_kernel",
        "_suppress_kernel",
        "_tiles_kernel",
        "_take_kept_kernel",
        "_write_kept_kernel",
    ],
)
def test_rounds_as_its_reference(kernel, rows):
    """Neither an approximate division nor a contraction: the interpreter cannot see either."""
    compiled = [row for row in rows if row.kernel == kernel and row.target != "gfx942"]
    assert compiled
    for row in compiled:
        assert row.ptx["div.rn.f32"]
        assert not [opcode for opcode in row.ptx if opcode.startswith(("fma", "div.full", "div.approx", "rcp"))]


class Noisy:
    """A kernel whose compiler complains, and yet returns code."""

    def warmup(self, **_):
        os.write(1, b"<inline asm>:1:2: error: invalid instruction\n")
        return SimpleNamespace(asm={"amdgcn": ".vgpr_count: 8"})


class Aborting:
    def warmup(self, **_):
        os._exit(134)


@pytest.mark.parametrize("kernel", [Noisy(), Aborting()])
def test_a_complaint_or_an_abort_of_the_compiler_is_an_error(kernel):
    (row,) = compile_all([(Launch(kernel, (), {}, (1,)), Row("case", "kernel", "gfx942"))], processes=1)
    assert row.error


def test_inline_ptx_stays_in_one_file():
    kernels = Path(__file__).parents[2] / "kernels"
    assert [path.name for path in kernels.glob("*.py") if "inline_asm" in path.read_text()] == ["fast_math.py"]


SASS = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @P0 BRA `(.L_x_0) ;
        /*0020*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0030*/                   MUFU.EX2 R4, R4 ;
        /*0040*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*0050*/                   BRA `(.L_x_1) ;
.L_x_0:
        /*0060*/                   LDG.E.U16 R4, desc[UR4][R2.64] ;
        /*0070*/                   STG.E.U16 desc[UR4][R2.64], R4 ;
        /*0080*/              @P1 BRA `(.L_x_0) ;
.L_x_1:
        /*0090*/              @P2 BRA `(.L_x_3) ;
        /*00a0*/                   LDG.E.128 R8, desc[UR4][R2.64] ;
        /*00b0*/                   BRA `(.L_x_1) ;
.L_x_3:
        /*00c0*/                   EXIT ;
.L_x_2:
        /*00d0*/                   BRA `(.L_x_2);
"""


def opcodes(instructions):
    return [re.split(r"[ .]", instruction)[0] for instruction in instructions]


def test_the_usual_path_is_the_wide_one_with_loops_once():
    assert opcodes(usual_path(basic_blocks(SASS))) == [
        "LDC", "@P0", "LDG", "MUFU", "STG", "BRA", "@P2", "LDG", "BRA", "@P2", "EXIT",
    ]  # fmt: skip


def test_a_far_jump_is_a_branch():
    far = SASS.replace("@P2 BRA", "@P2 CALL.REL.NOINC")
    assert far != SASS
    assert [block.successors for block in basic_blocks(far)] == [block.successors for block in basic_blocks(SASS)]


def test_loops_are_found_and_passed_through():
    """There are two, of which the second goes around the first's exit. A branch to itself is no loop."""
    blocks = basic_blocks(SASS)
    around = [opcodes(instructions_of(blocks, loop)) for loop in loops(blocks)]
    assert around == [["LDG", "STG", "@P1"], ["@P2", "LDG", "BRA"]]
    assert opcodes(through(blocks, loops(blocks)[0])) == ["LDC", "@P0", "LDG", "STG", "@P1", "@P2", "EXIT"]


DIVERGING = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   BRA.DIV UR16, `(.L_x_3) ;
        /*0020*/                   SHFL.BFLY PT, R10, R11, 0x1, 0x1f ;
.L_x_1:
        /*0030*/                   IADD3 R7, R7, 0x1, RZ ;
        /*0040*/              @!P1 BRA `(.L_x_0) ;
        /*0050*/                   EXIT ;
.L_x_3:
        /*0060*/                   WARPSYNC.COLLECTIVE R5, `(.L_x_4) ;
.L_x_4:
        /*0070*/                   ENDCOLLECTIVE ;
        /*0080*/                   BRA `(.L_x_1) ;
"""


def test_a_branch_for_diverged_warps_may_not_be_taken():
    """Triton 3.8's NMS: what follows a BRA.DIV, a loop around it among that, was not seen at all. The handler for
    diverged warps lies behind the exit and jumps back, which closes no loop."""
    blocks = basic_blocks(DIVERGING)
    assert [opcodes(instructions_of(blocks, loop)) for loop in loops(blocks)] == [["BRA", "SHFL", "IADD3", "@!P1"]]
    assert opcodes(usual_path(blocks)) == ["LDC", "BRA", "SHFL", "IADD3", "@!P1", "EXIT"]


OUT_OF_LINE = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/               @P0 BRA `(.L_x_2) ;
        /*0020*/                   EXIT ;
.L_x_1:
        /*0030*/                   FADD R3, R3, R4 ;
        /*0040*/                   BRA `(.L_x_0) ;
.L_x_2:
        /*0050*/                   FMUL R3, R3, R4 ;
        /*0060*/                   BRA `(.L_x_1) ;
"""


def test_a_loop_is_found_wherever_its_blocks_lie():
    blocks = basic_blocks(OUT_OF_LINE)
    assert [opcodes(instructions_of(blocks, loop)) for loop in loops(blocks)] == [["@P0", "FMUL", "BRA", "FADD", "BRA"]]
