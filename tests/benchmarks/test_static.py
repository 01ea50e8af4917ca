"""The limits that compiled kernels must hold on GPUs that are not at hand, and the reading of machine code itself."""

import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.predict import predictions as predict
from benchmarks.static.launches import CASES
from benchmarks.static.machine_code import TARGETS, Row, _compile_all, basic_blocks, loops, report, usual_path
from benchmarks.static.recorder import Launch

triton = pytest.importorskip("triton")


@pytest.fixture(scope="module")
def rows():
    return report()


def test_every_kernel_compiles_for_every_target(rows):
    assert {row.case for row in rows} == set(CASES)
    assert {row.target for row in rows} == set(TARGETS)
    assert not [row for row in rows if row.error]


def test_nothing_spills(rows):
    assert not [row for row in rows if row.spilled]


def test_instructions_and_widths_an_element(rows):
    for row in rows:
        case = CASES[row.case]
        if row.instructions is not None:
            assert row.instructions <= case.instructions, row
            assert row.mufu <= case.mufu, row
            assert row.wide_bytes == pytest.approx(case.bytes_per_element), row


def test_focal_loss_in_bfloat16_holds_its_limits(rows):
    for row in rows:
        if row.case == "focal_loss bf16" and row.target != "gfx942":
            assert row.instructions <= 28
            assert row.mufu <= 3
            assert (row.load_bits, row.store_bits, row.spilled) == (128, 128, 0)
        if row.case == "one_pass scale bf16" and row.target != "gfx942":
            assert (row.load_bits, row.store_bits) == (128, 128)


@pytest.mark.parametrize("kernel", ["_anchor_matching_kernel", "_suppress_kernel", "_take_kept_kernel"])
def test_rounds_as_its_reference(kernel, rows):
    """Neither an approximate division nor a contraction: the interpreter cannot see either."""
    compiled = [row for row in rows if row.kernel == kernel and row.target != "gfx942"]
    assert compiled
    for row in compiled:
        assert row.ptx["div.rn.f32"]
        assert not [opcode for opcode in row.ptx if opcode.startswith(("fma", "div.full", "div.approx", "rcp"))]


def test_group_norm_relu_reads_and_writes_16_bytes_at_a_time(rows):
    of_tiles = [row for row in rows if row.kernel in ("_tile_sums_kernel", "_group_norm_relu_kernel")]
    assert len(of_tiles) == 2 * 6 * len(TARGETS)
    for row in of_tiles:
        assert row.load_bits == 128
        assert row.store_bits == 128 or row.kernel == "_tile_sums_kernel"  # whose sums are few


def test_candidate_selection_spends_little_on_what_is_below_the_threshold(rows):
    listing = [row for row in rows if row.kernel == "_list_kernel" and row.target != "gfx942"]
    assert len(listing) == 6
    for row in listing:
        assert row.instructions <= 6
        assert (row.load_bits, row.spilled) == (128, 0)


def test_what_is_predicted_follows_from_the_code(rows):
    """benchmarks/predictions.json is what `python -m benchmarks.predict` gives, for this Triton."""
    stored = json.loads(predict.PREDICTIONS.read_text())
    if triton.__version__ not in stored:
        pytest.skip(f"predicted for Triton {' and '.join(stored)}")
    for name, goal in predict.predictions(predict.by_variant(rows)).items():
        expected = stored[triton.__version__][name]["ms"]
        assert goal["ms"] == pytest.approx(expected, rel=0.05), f"{name}: run benchmarks.predict again"


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
    (row,) = _compile_all([(Launch(kernel, (), {}, (1,)), Row("case", "kernel", "gfx942"), None)])
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


def test_the_usual_path_is_the_wide_one_with_loops_once():
    path = usual_path(basic_blocks(SASS))
    assert [re.split(r"[ .]", instruction)[0] for instruction in path] == [
        "LDC", "@P0", "LDG", "MUFU", "STG", "BRA", "@P2", "LDG", "BRA", "@P2", "EXIT",
    ]  # fmt: skip


def test_loops_are_found_and_passed_through():
    """Two, the second around the first's exit; the branch of an instruction to itself is none."""
    blocks = basic_blocks(SASS)
    of_blocks = [[re.split(r"[ .]", i)[0] for b in loop for i in blocks[b].instructions] for loop in loops(blocks)]
    assert of_blocks == [["LDG", "STG", "@P1"], ["@P2", "LDG", "BRA"]]
