"""Adaptive training sample selection: the paper's algorithm in eager PyTorch, image by image, beside ours."""

import dataclasses
import functools
from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.ops import box_iou

from benchmarks.case import Built, Case, run_benchmark
from benchmarks.models import scenes
from retina_fast.kernels.anchor_matching import Matches
from retina_fast.kernels.atss_matching import atss_matching, atss_matching_reference
from retina_fast.kernels.match_keys import centres_of

CELLS = 9
"""The paper's k."""


@dataclasses.dataclass(frozen=True)
class Setting:
    batch: int = 8
    ground_truths: int = 16
    height: int = 800
    width: int = 800

    @property
    def name(self) -> str:
        return f"ATSS, batch {self.batch}, {self.height}x{self.width}, {self.ground_truths} ground truths an image"


SETTINGS = [*[Setting(8, count) for count in (1, 16, 100, 500)], Setting(1, 16), Setting(16, 16)]
CPU_SETTINGS = [Setting(2, count, 256, 256) for count in (1, 50)]


def eager(anchors: Tensor, boxes: Tensor, sizes: list[int], top_k: int) -> Tensor:
    """The matched indices (N,) of one image with ground truths, by matrices of anchors x ground truths."""
    iou = box_iou(boxes, anchors)  # (G, N)
    centres = centres_of(anchors)
    distance = torch.cdist(centres_of(boxes), centres)  # (G, N)
    candidates = torch.cat(
        [
            distance[:, start:stop].topk(min(top_k, stop - start), largest=False).indices + start
            for start, stop in pairwise(accumulate(sizes, initial=0))
        ],
        dim=1,
    )
    found = iou.gather(1, candidates)
    threshold = found.mean(dim=1, keepdim=True) + found.std(dim=1, keepdim=True)
    inside = ((centres[candidates] > boxes[:, None, :2]) & (centres[candidates] < boxes[:, None, 2:])).all(dim=2)
    chosen = torch.where(inside & (found >= threshold), found, -1.0)
    marks = torch.full_like(iou, -1.0).scatter_(1, candidates, chosen)
    value, index = marks.max(dim=0)
    return torch.where(value >= 0, index, -1)


def build(setting: Setting, device: torch.device) -> Built:
    anchors = scenes.anchors(setting.height, setting.width, device)
    sizes = [h * w * scenes.ANCHORS_PER_CELL for h, w in scenes.grids(setting.height, setting.width)]
    scene = scenes.scene(setting.batch, setting.ground_truths, setting.height, setting.width, 91, device)
    arguments = anchors, scene.truths.boxes, scene.truths.labels, scene.truths.offsets, sizes
    top_k = CELLS * scenes.ANCHORS_PER_CELL

    def ours() -> Matches:
        return atss_matching(*arguments, top_k)

    def in_eager() -> list[Tensor]:
        return [eager(anchors, target["boxes"], sizes, top_k) for target in scene.targets]

    def check() -> None:
        matches = ours()
        for name, result, expected in zip(
            Matches._fields, matches, atss_matching_reference(*arguments, top_k), strict=True
        ):
            assert torch.equal(result, expected), f"{setting}: {name}"
        for b, expected in enumerate(in_eager()):  # which rounds distances and IoUs otherwise
            differ = (matches.indices[b] != expected).sum()
            assert differ <= 0.1 * matches.num_foreground[b] + 5, f"{setting}: {differ} anchors of image {b}"

    min_bytes = anchors.nbytes + 8 * setting.batch * len(anchors)  # anchors in, an index and a label out
    return Built(ours, {"eager PyTorch": in_eager}, check, min_bytes)


def _case(setting: Setting) -> Case:
    return Case(setting.name, "float32", functools.partial(build, setting))


CASES = [_case(setting) for setting in SETTINGS]
SMALL = [_case(Setting(*sizes, 128, 160)) for sizes in ((2, 30), (3, 16), (2, 1))]


@pytest.mark.parametrize("setting", CPU_SETTINGS if not torch.cuda.is_available() else SETTINGS, ids=lambda s: s.name)
@pytest.mark.parametrize("implementation", ["eager PyTorch", "ours"])
def test_atss_matching(implementation: str, setting: Setting, benchmark: Any) -> None:
    run_benchmark(build, setting, "float32", implementation, benchmark)
