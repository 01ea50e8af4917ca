"""Calls of every operation of the project, as compiled code, against its reference.

A case makes inputs from a generator, computes what is expected, and gives a function that calls the operation and
yields comparisons. CASES names the cases, each by its operation first; :func:`run_case` runs one on the emulator.
"""

import re
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Generator

from tests.ptx import cases_convs as convs
from tests.ptx import cases_detection as detection
from tests.ptx import cases_losses as losses
from tests.ptx.inputs import Comparison, Run
from tests.ptx.launch import Log, emulated
from tests.ptx.memory import Fault

BF16, F32, F16 = torch.bfloat16, torch.float32, torch.float16
_SMALL = ((7, 6), (3, 2), (1, 1))
_TINY = ((4, 4), (1, 1))
_WIDE = ((33, 40), (7, 5), (1, 1))  # levels for one class, so that there are several tiles

CASES: dict[str, Callable[[Generator], Run]] = {
    "focal_loss bf16 K=91": partial(losses.focal_loss, dtype=BF16, num_classes=91),
    "focal_loss fp32 K=91": partial(losses.focal_loss, dtype=F32, num_classes=91),
    "focal_loss fp16 K=91": partial(losses.focal_loss, dtype=F16, num_classes=91),
    "focal_loss bf16 K=1": partial(losses.focal_loss, dtype=BF16, num_classes=1, shapes=_WIDE),
    "focal_loss fp32 K=1 gamma=1.5": partial(losses.focal_loss, dtype=F32, num_classes=1, gamma=1.5, shapes=_WIDE),
    "focal_loss bf16 K=7 unaligned": partial(losses.focal_loss, dtype=BF16, num_classes=7, shift=3),
    "focal_loss fp32 K=7 NaN": partial(losses.focal_loss, dtype=F32, num_classes=7, nan=True),
    "soft_focal_loss bf16 K=7 quality_focal": partial(
        losses.soft_focal_loss, dtype=BF16, num_classes=7, loss_type="quality_focal", shapes=_SMALL
    ),
    "soft_focal_loss fp32 K=1 quality_focal gamma=1.5": partial(
        losses.soft_focal_loss, dtype=F32, num_classes=1, loss_type="quality_focal", gamma=1.5, shapes=_WIDE
    ),
    "soft_focal_loss fp32 K=91 varifocal unaligned": partial(
        losses.soft_focal_loss, dtype=F32, num_classes=91, loss_type="varifocal", shapes=_SMALL, shift=3
    ),
    "box_quality fp32": partial(losses.box_quality, dtype=F32),
    "box_quality bf16 unaligned": partial(losses.box_quality, dtype=BF16, own=True, shift=1),
    "box_quality bf16 n=16": partial(losses.box_quality, dtype=BF16, reg_max=16),
    "sigmoid_focal_loss bf16": partial(losses.sigmoid_focal_loss, dtype=BF16, soft=False),
    "sigmoid_focal_loss fp32": partial(losses.sigmoid_focal_loss, dtype=F32, soft=True),
    "sigmoid_focal_loss fp32 gamma=1.5": partial(losses.sigmoid_focal_loss, dtype=F32, soft=True, gamma=1.5),
    "sigmoid_focal_loss bf16 unaligned": partial(losses.sigmoid_focal_loss, dtype=BF16, soft=True, shift=1),
    "box_loss fp32 l1": partial(losses.box_loss, dtype=F32, loss_type="l1"),
    "box_loss bf16 smooth_l1": partial(losses.box_loss, dtype=BF16, loss_type="smooth_l1"),
    "box_loss fp32 giou": partial(losses.box_loss, dtype=F32, loss_type="giou"),
    "box_loss bf16 giou unaligned": partial(losses.box_loss, dtype=BF16, loss_type="giou", shift=3, weighted=True),
    "box_loss fp32 diou": partial(losses.box_loss, dtype=F32, loss_type="diou"),
    "box_loss fp32 ciou": partial(losses.box_loss, dtype=F32, loss_type="ciou"),
    "box_loss bf16 ciou": partial(losses.box_loss, dtype=BF16, loss_type="ciou"),
    "distribution_loss bf16 giou": partial(losses.distribution_loss, dtype=BF16, loss_type="giou", shapes=_TINY),
    "distribution_loss fp32 ciou n=7 unaligned": partial(
        losses.distribution_loss, dtype=F32, loss_type="ciou", reg_max=7, shapes=_TINY, shift=1, weighted=True
    ),
    "one_pass bf16": partial(convs.scale, dtype=BF16),
    "one_pass fp32": partial(convs.scale, dtype=F32),
    "one_pass bf16 unaligned": partial(convs.scale, dtype=BF16, shift=1),
    "group_norm_relu bf16 C=256": partial(convs.group_norm_relu, dtype=BF16, channels=256, groups=32),
    "group_norm_relu fp32 C=256": partial(convs.group_norm_relu, dtype=F32, channels=256, groups=32),
    "group_norm_relu fp32 C=12": partial(convs.group_norm_relu, dtype=F32, channels=12, groups=3),
    "group_norm_relu bf16 unaligned": partial(convs.group_norm_relu, dtype=BF16, channels=24, groups=8, shift=1),
    "conv_epilogue bf16 C=64": partial(convs.conv_epilogue, dtype=BF16, channels=64, activation="relu"),
    "conv_epilogue fp32 C=36 swish": partial(
        convs.conv_epilogue, dtype=F32, channels=36, activation="swish", with_z=False
    ),
    "conv_epilogue fp16 C=819 unaligned": partial(
        convs.conv_epilogue, dtype=F16, channels=819, activation="none", with_bias=False, sides=(3, 4), shift=1
    ),
    "epilogue_gradients bf16 C=64": partial(convs.epilogue_gradients, dtype=BF16, channels=64),
    "epilogue_gradients bf16 C=99 merged": partial(convs.epilogue_gradients, dtype=BF16, channels=99, with_relu=False),
    "epilogue_gradients fp32 C=300 unaligned": partial(
        convs.epilogue_gradients, dtype=F32, channels=300, sides=(5, 3), shift=1
    ),
    "max_pool_relu bf16 C=64": partial(convs.max_pool_relu, dtype=BF16, channels=64),
    "max_pool_relu fp32 C=36": partial(convs.max_pool_relu, dtype=F32, channels=36, with_bias=False, sides=(6, 9)),
    "max_pool_relu fp16 C=130 unaligned": partial(convs.max_pool_relu, dtype=F16, channels=130, sides=(3, 4), shift=1),
    "stem_conv bf16 C=64": partial(convs.stem_conv, dtype=BF16, channels=64, sides=(12, 64)),
    "stem_conv fp16 C=24 unaligned": partial(
        convs.stem_conv, dtype=F16, channels=24, sides=(9, 35), layout=torch.contiguous_format, shift=1
    ),
    "conv_chain bf16, three": partial(convs.conv_chain, dtype=BF16, filtered=16),
    "conv_chain fp16 shortcut, unaligned": partial(convs.conv_chain, dtype=F16, second=16, shift=1),
    "conv_pointwise bf16": partial(convs.conv_pointwise, dtype=BF16, channels=16, activation="relu"),
    "conv_pointwise fp16 shortcut, resized unaligned": partial(
        convs.conv_pointwise, dtype=F16, channels=20, activation="swish", stride=2, z_sides=(3, 3), second=8, shift=1
    ),
    "first_channels bf16 C=36": partial(convs.first_channels, dtype=BF16, channels=36, width=40),
    "first_channels fp16 C=819 unaligned": partial(
        convs.first_channels, dtype=F16, channels=819, width=824, bias_dtype=F16, sides=(3, 4), shift=1
    ),
    "image_batch uint8 to bf16": partial(convs.image_batch, dtype=torch.uint8, out_dtype=BF16),
    "image_batch fp32 to fp32": partial(convs.image_batch, dtype=F32, out_dtype=F32),
    "anchor_matching": partial(detection.anchor_matching, low_quality=True),
    "anchor_matching without low quality": partial(detection.anchor_matching, low_quality=False),
    "anchor_matching unaligned": partial(detection.anchor_matching, low_quality=True, boxes_each=9, shift=1),
    "atss_matching": detection.atss_matching,
    "atss_matching three anchors a cell unaligned": partial(
        detection.atss_matching, per_cell=3, top_k=27, boxes_each=2, shapes=((7, 9), (2, 2)), own=True, shift=1
    ),
    "task_aligned_matching fp32": partial(detection.task_aligned_matching, shapes=((7, 5), (2, 2), (1, 1))),
    "task_aligned_matching bf16 K=1 n=3 unaligned": partial(
        detection.task_aligned_matching,
        dtype=BF16,
        num_classes=1,
        reg_max=3,
        top_k=13,
        boxes_each=2,
        own=True,
        shapes=((7, 5), (2, 2)),
        shift=1,
    ),
    "candidate_selection bf16 K=91": partial(
        detection.candidate_selection, dtype=BF16, num_classes=91, topk=1000, shapes=_SMALL
    ),
    "candidate_selection fp32 K=91 few above": partial(
        detection.candidate_selection, dtype=F32, num_classes=91, score_thresh=0.7, topk=50, ties=True
    ),
    "candidate_selection bf16 K=1": partial(
        detection.candidate_selection, dtype=BF16, num_classes=1, topk=100, ties=True, shapes=_WIDE
    ),
    "candidate_selection fp32 K=7 mixed": partial(
        detection.candidate_selection, dtype=F32, num_classes=7, topk=50, shapes=_WIDE, mixed=True
    ),
    "candidate_selection fp32 K=7 mixed unaligned": partial(
        detection.candidate_selection, dtype=F32, num_classes=7, topk=50, shapes=_WIDE, mixed=True, shift=3
    ),
    "candidate_selection bf16 K=7 all": partial(
        detection.candidate_selection, dtype=BF16, num_classes=7, topk=10**10, shapes=_WIDE
    ),
    "candidate_selection bf16 K=7 mixed": partial(
        detection.candidate_selection, dtype=BF16, num_classes=7, topk=50, shapes=_WIDE, mixed=True
    ),
    "candidate_selection bf16 K=7 equal": partial(
        detection.candidate_selection, dtype=BF16, num_classes=7, topk=100, shapes=_WIDE, scale=0.0
    ),
    "key_sort": detection.key_sort,
    "key_sort in runs": partial(detection.key_sort, counted=False),
    "batched_nms": partial(detection.batched_nms, by_class=True, best_first=False),
    "batched_nms best first": partial(detection.batched_nms, by_class=True, best_first=True),
    "batched_nms class-agnostic unaligned": partial(
        detection.batched_nms, by_class=False, best_first=True, count=400, iou_thresh=0.3, limit=40, shift=1
    ),
    "batched_nms tiles": partial(
        detection.batched_nms, by_class=True, best_first=False, count=700, limit=700, classes=5, small_tiles=True
    ),
    "batched_nms chain in tiles": partial(
        detection.batched_nms, by_class=False, best_first=False, count=1500, limit=1500, small_tiles=True, chain=True
    ),
    "batched_nms chain best first in tiles": partial(
        detection.batched_nms, by_class=False, best_first=True, count=600, limit=600, small_tiles=True, chain=True
    ),
    "batched_nms class-agnostic tiles": partial(
        detection.batched_nms, by_class=False, best_first=True, count=700, limit=600, shift=1
    ),
    "box_decode bf16": partial(detection.box_decode, dtype=BF16),
    "box_decode fp32": partial(detection.box_decode, dtype=F32),
    "box_decode bf16 n=16": partial(detection.box_decode, dtype=BF16, reg_max=16),
    "take_kept": detection.take_kept,
    "soft_nms gaussian": partial(detection.soft_nms, method="gaussian", by_class=True),
    "soft_nms linear class-agnostic": partial(detection.soft_nms, method="linear", by_class=False, count=600, limit=6),
    "box_voting": partial(detection.box_voting, by_class=True),
    "box_voting class-agnostic unaligned": partial(detection.box_voting, by_class=False, shift=1),
    "greedy_nmm": partial(detection.greedy_nmm, match_metric="IOS", by_class=True),
    "greedy_nmm IOU class-agnostic": partial(
        detection.greedy_nmm, match_metric="IOU", by_class=False, count=90, limit=20, threshold=0.3
    ),
    "postprocess bf16": partial(detection.postprocess, dtype=BF16),
    "postprocess fp32 one image": partial(detection.postprocess, dtype=F32, images=1),
    "postprocess bf16 n=16": partial(detection.postprocess, dtype=BF16, images=1, reg_max=16, shapes=_TINY),
}

OPERATIONS = sorted({name.split()[0] for name in CASES})

OTHER_ORDERS: dict[str, dict[str, Any]] = {
    "sm_90, another order": {"seed": 1, "together": 3},
    "sm_90, random warps, inexact functions": {"seed": 2, "shuffle": True, "together": 4, "perturb": 1},
    "sm_80": {"capability": 80},
    "sm_80, random warps, inexact functions": {
        "capability": 80,
        "seed": 3,
        "shuffle": True,
        "together": 4,
        "perturb": 1,
    },
}
"""Options of ``emulated`` beside its defaults, in which every case must hold, too."""


def division_of_zero_faults(ptx: str) -> str:
    """An ``edit`` by which a division of 0 reads from nowhere. On a GPU it takes the slow path of div.rn, some 30
    instructions, so kernels that meet many pairs without an intersection make none."""
    declared = ".reg .pred %zero<1>;\n.reg .b32 %nothing<1>;\n.reg .b64 %nowhere<1>;\nmov.b64 %nowhere0, 0;"
    read = r"setp.eq.f32 %zero0, \1, 0f00000000;\n@%zero0 ld.global.b32 %nothing0, [%nowhere0];"
    return re.sub(r"div\.rn\.f32\s+%\w+, (%\w+), %\w+;", rf"{declared}\n{read}\n\g<0>", ptx)


NIGHTLY = (
    "focal_loss fp16 K=91",
    "focal_loss fp32 K=91",
    "focal_loss fp32 K=1 gamma=1.5",
    "sigmoid_focal_loss fp32 gamma=1.5",
    "box_loss bf16 smooth_l1",
    "box_loss fp32 diou",
    "box_loss bf16 ciou",
    "group_norm_relu fp32 C=256",
    "candidate_selection bf16 K=7 equal",
    "candidate_selection bf16 K=7 mixed",
    "candidate_selection bf16 K=91",
    "candidate_selection bf16 K=1",
    "candidate_selection fp32 K=7 mixed",
    "batched_nms best first",
)
"""Cases of the slow tests: each differs from others of its operation by one step that the interpreter executes too."""


def names(operation: str) -> list[Any]:
    """The cases of an operation, as parameters of a test."""
    import pytest

    own = [name for name in CASES if name.split()[0] == operation]
    return [pytest.param(name, marks=pytest.mark.slow) if name in NIGHTLY else name for name in own]


class Outcome(NamedTuple):
    """What became of a case.

    Args:
        fault: the emulator's, or "".
        comparisons: of the results with the reference.
        seconds: of processor time, compilation included.
    """

    fault: str
    comparisons: list[Comparison]
    seconds: float
    log: Log

    @property
    def failures(self) -> list[str]:
        wrong = [f"{c.what}: error {c.error:.1e}, limit {c.limit:.1e}" for c in self.comparisons if not c.holds]
        return [*([self.fault] if self.fault else []), *wrong]


def run_case(case: Callable[[Generator], Run], seed_of_inputs: int = 0, **options: Any) -> Outcome:
    """Runs a case on the emulator, with the options of ``emulated``."""
    start = time.process_time()
    run = case(torch.Generator().manual_seed(seed_of_inputs))
    fault, comparisons = "", []
    with emulated(**options) as log:
        try:
            for comparison in run():
                comparisons.append(comparison)
        except Fault as error:
            fault = str(error)
    return Outcome(fault, comparisons, time.process_time() - start, log)


def check(name: str, **options: Any) -> None:
    """Asserts that a case faults nowhere, launches a kernel and gives what its reference gives."""
    outcome = run_case(CASES[name], **options)
    assert not outcome.failures, "; ".join(map(str, outcome.failures))
    assert outcome.log.results
