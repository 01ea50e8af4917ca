"""Limits of what kernels execute, where a goal rests on their speed."""

import pytest
import triton

from tests.ptx.counts import COUNTS, count

# For each case: the kernel, its instructions an element, and the sectors of a request over those that its bytes need.
LIMITS = {
    "focal_loss bf16 K=91 background tiles": ("_focal_loss_kernel", 28.0, 1.25),  # K1-bf16: nearly all tiles
    "focal_loss bf16 K=91 mixed tiles": ("_focal_loss_kernel", 52.0, 1.5),
    "focal_loss fp32 K=91 background tiles": ("_focal_loss_kernel", 28.0, 1.25),  # K1-fp32
    "one_pass bf16": ("_scale_kernel", 8.5, 1.05),  # K2, where a loss is weighted
    "anchor_matching an anchor, 32 ground truths": ("_anchor_matching_kernel", 1000.0, 2.5),  # K3, of two launches
    "candidate_selection bf16 none above": ("_list_kernel", 7.5, 1.3),  # K4
    "image_batch uint8 to bf16": ("_image_batch_kernel", 31.0, 7.5),  # K6
    "conv_epilogue bf16 sum": ("_conv_epilogue_kernel", 16.0, 3.5),  # E1 and E2
    "group_norm_relu bf16 forward": ("_group_norm_relu_kernel", 12.5, 1.05),  # E1 to E3 of v2 models
}


NIGHTLY = ("candidate_selection bf16 none above", "group_norm_relu bf16 forward")  # tests/benchmarks/test_static.py
# counts the instructions of the one and the bytes an access of both as they are written


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in NIGHTLY else name for name in LIMITS]
)
def test_instructions_and_sectors(name):
    kernel, instructions, sectors = LIMITS[name]
    launches = [(result, each) for result, each in count(name) if result.name == kernel]
    assert sum(each for _, each in launches) <= instructions
    for kind in ("global ld", "global st"):
        traffic = [result.total(kind) for result, _ in launches]
        assert sum(t.moved for t in traffic) <= sectors * sum(t.ideal for t in traffic)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in COUNTS if name not in LIMITS])
def test_what_has_no_limit_is_counted(name):
    assert all(instructions > 0 for _, instructions in count(name))


def test_barriers_of_a_focal_loss():
    """Two sums over the program, and one for the labels of its tile; Triton 3.6 puts two barriers into each sum."""
    (result, _), _ = count("focal_loss bf16 K=91 background tiles")
    most = 5 if triton.__version__.startswith("3.6") else 3
    assert result.barriers <= most * result.ctas
