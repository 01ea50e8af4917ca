"""Task-aligned assignment: matrices of anchors x ground truths in eager PyTorch, image by image, beside ours."""

import dataclasses
import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.ops import box_iou

from benchmarks.case import Built, Case, run_benchmark
from benchmarks.models import scenes
from retina_fast.kernels.box_decode import decode
from retina_fast.kernels.levels import flatten_all
from retina_fast.kernels.match_keys import centres_of
from retina_fast.kernels.side_distributions import box_channels
from retina_fast.kernels.task_aligned_matching import (
    AlignedMatches,
    task_aligned_matching,
    task_aligned_matching_reference,
)

TOP_K, ALPHA, BETA = 13, 1.0, 6.0
"""The paper's."""


@dataclasses.dataclass(frozen=True)
class Setting:
    batch: int = 8
    ground_truths: int = 16
    height: int = 800
    width: int = 800
    num_classes: int = 91
    reg_max: int = 0
    dtype: str = "bfloat16"

    @property
    def name(self) -> str:
        kind = ", distributions" if self.reg_max else ""
        size = f"{self.height}x{self.width}, {self.num_classes} classes{kind}"
        return f"task-aligned, batch {self.batch}, {size}, {self.ground_truths} ground truths an image"


SETTINGS = [*[Setting(8, count) for count in (1, 16, 100, 500)], Setting(1), Setting(16), Setting(reg_max=16)]
CPU_SETTINGS = [Setting(2, count, 256, 256, 20, dtype="float32") for count in (1, 50)]


def eager(logits: Tensor, deltas: Tensor, anchors: Tensor, boxes: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The matched indices and the targets (N,) of one image, by matrices of anchors x ground truths."""
    iou = box_iou(boxes, decode(deltas.float(), anchors))  # (G, N)
    scores = logits[:, labels].float().sigmoid().T  # (G, N)
    centres = centres_of(anchors)
    inside = ((centres > boxes[:, None, :2]) & (centres < boxes[:, None, 2:])).all(dim=2)
    alignment = torch.where(inside, scores**ALPHA * iou**BETA, 0.0)
    found = alignment.topk(min(TOP_K, len(anchors)))
    marks = torch.full_like(iou, -1.0)
    marks.scatter_(1, found.indices, torch.where(found.values > 0, iou.gather(1, found.indices), -1.0))
    value, index = marks.max(dim=0)
    own = (index == torch.arange(len(boxes), device=index.device)[:, None]) & (value >= 0)  # (G, N)
    alignment, peak = torch.where(own, alignment, 0.0), torch.where(own, iou, 0.0).amax(dim=1, keepdim=True)
    scaled = alignment / alignment.amax(dim=1, keepdim=True).clamp(min=1e-30) * peak
    return torch.where(value >= 0, index, -1), scaled.sum(dim=0)


def build(setting: Setting, device: torch.device) -> Built:
    anchors = scenes.anchors(setting.height, setting.width, device)
    scene = scenes.scene(
        setting.batch, setting.ground_truths, setting.height, setting.width, setting.num_classes, device
    )
    dtype, channels = getattr(torch, setting.dtype), box_channels(setting.reg_max)
    size = setting.height, setting.width, dtype, device
    logits = scenes.levels(setting.batch, setting.num_classes, *size, -4.6, 1.0)
    deltas = scenes.levels(setting.batch, channels, *size, 0.0, 0.1)
    logits, deltas = ([level.detach() for level in levels] for levels in (logits, deltas))
    truths = scene.truths
    arguments = logits, deltas, anchors, truths.boxes, truths.labels, truths.offsets, setting.num_classes
    constants = TOP_K, ALPHA, BETA, setting.reg_max
    joined = [
        torch.cat(flatten_all(levels, c), dim=1) for levels, c in ((logits, setting.num_classes), (deltas, channels))
    ]

    def ours() -> AlignedMatches:
        return task_aligned_matching(*arguments, *constants)

    def in_eager() -> list[tuple[Tensor, Tensor]]:
        return [
            eager(joined[0][b], joined[1][b], anchors, target["boxes"], target["labels"])
            for b, target in enumerate(scene.targets)
        ]

    def check() -> None:
        matches, exact = ours(), task_aligned_matching_reference(*arguments, *constants)
        others = [torch.stack(parts) for parts in zip(*in_eager(), strict=True)]
        for expected in ((exact.indices, exact.targets), (others[0].int(), others[1])):  # which round otherwise
            same = matches.indices == expected[0]
            assert (~same).sum() <= 0.01 * matches.num_foreground.sum() + 4, f"{setting}: matches"
            wrong = (matches.targets - expected[1]).abs() > 1e-3
            assert (wrong & same).sum() <= 13 * (~same).sum(), f"{setting}: targets"

    # boxes and anchors in, of the logits a sector a pair that is near, an index, a label and a target out
    min_bytes = anchors.nbytes + sum(level.nbytes for level in deltas) + 12 * setting.batch * len(anchors)
    return Built(ours, {"eager PyTorch": in_eager}, check, min_bytes)


def _case(setting: Setting) -> Case:
    return Case(setting.name, setting.dtype, functools.partial(build, setting))


CASES = [_case(setting) for setting in SETTINGS]
SMALL = [
    _case(Setting(2, 30, 128, 160, 7)),
    _case(Setting(2, 3, 128, 160, 1, 4, "float32")),
    _case(Setting(1, 1, 128, 160, 7, dtype="float32")),
]


@pytest.mark.parametrize("setting", CPU_SETTINGS if not torch.cuda.is_available() else SETTINGS, ids=lambda s: s.name)
@pytest.mark.parametrize("implementation", ["eager PyTorch", "ours"])
def test_task_aligned_matching(implementation: str, setting: Setting, benchmark: Any) -> None:
    run_benchmark(build, setting, setting.dtype, implementation, benchmark)
