"""Anchor matching: torchvision's matcher image by image, ours for the batch, with 1 to 500 ground truths an image."""

import dataclasses
import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.models.detection._utils import Matcher
from torchvision.ops import box_iou

from benchmarks.case import Built, Case, run_benchmark
from benchmarks.models import scenes
from retina_fast.kernels.anchor_matching import Matches, anchor_matching


@dataclasses.dataclass(frozen=True)
class Setting:
    batch: int = 8
    ground_truths: int = 16
    height: int = 800
    width: int = 800

    @property
    def name(self) -> str:
        return f"matching, batch {self.batch}, {self.height}x{self.width}, {self.ground_truths} ground truths an image"


GOALS = {Setting(8, 500): "K3-g500", Setting(16, 16): "K3-b16"}
SETTINGS = [*GOALS, *[Setting(8, count) for count in (1, 16, 50, 100, 200)], Setting(1, 16), Setting(8, 50, width=1344)]
CPU_SETTINGS = [Setting(2, count, 256, 256) for count in (1, 50)]


def build(setting: Setting, device: torch.device) -> Built:
    anchors = scenes.anchors(setting.height, setting.width, device)
    scene = scenes.scene(setting.batch, setting.ground_truths, setting.height, setting.width, 91, device)
    matcher = Matcher(0.5, 0.4, allow_low_quality_matches=True)

    def ours() -> Matches:
        return anchor_matching(anchors, scene.truths.boxes, scene.truths.labels, scene.truths.offsets)

    def torchvision_matches() -> list[Tensor]:
        return [matcher(box_iou(target["boxes"], anchors)) for target in scene.targets]

    def check() -> None:
        matches = ours()
        for b, expected in enumerate(torchvision_matches()):
            assert torch.equal(matches.indices[b].long(), expected), f"{setting}: image {b}"
            labels = scene.targets[b]["labels"][expected.clamp(min=0)]
            assert torch.equal(matches.labels[b].long(), torch.where(expected >= 0, labels, expected)), f"image {b}"
            assert matches.num_foreground[b] == (expected >= 0).sum()

    min_bytes = anchors.nbytes + 8 * setting.batch * len(anchors)  # anchors in, an index and a label out
    return Built(ours, {"torchvision eager": torchvision_matches}, check, min_bytes)


def _case(setting: Setting, goal: str | None = None) -> Case:
    return Case(setting.name, "float32", functools.partial(build, setting), goal)


CASES = [_case(setting, GOALS.get(setting)) for setting in SETTINGS]
_SMALL = {(2, 30): "K3-g500", (3, 16): "K3-b16", (2, 1): None}
SMALL = [_case(Setting(*sizes, 128, 160), goal) for sizes, goal in _SMALL.items()]


@pytest.mark.parametrize("setting", CPU_SETTINGS if not torch.cuda.is_available() else GOALS, ids=lambda s: s.name)
@pytest.mark.parametrize("implementation", ["torchvision eager", "ours"])
def test_anchor_matching(implementation: str, setting: Setting, benchmark: Any) -> None:
    run_benchmark(build, setting, "float32", implementation, benchmark)
