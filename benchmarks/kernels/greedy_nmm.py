"""Greedy non-maximum merging beside SAHI's, where that is installed: boxes as they come from overlapping tiles.

`python -m benchmarks.kernels.greedy_nmm` times 33,000 boxes on a CPU.
"""

import dataclasses
import functools
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from benchmarks.case import Built, Case, print_in_turns, run_benchmark
from retina_fast.kernels.greedy_nmm import Merged, greedy_nmm, greedy_nmm_reference


@dataclasses.dataclass(frozen=True)
class Setting:
    batch: int = 1
    boxes: int = 33000
    side: int = 20000
    metric: str = "IOS"

    @property
    def name(self) -> str:
        return f"merging, {self.metric}, batch {self.batch}, {self.boxes} boxes on {self.side} pixels"


SETTINGS = [Setting(), Setting(side=1000), Setting(metric="IOU"), Setting(batch=8, boxes=3000, side=2000)]
CPU_SETTING = Setting(batch=2, boxes=3000, side=2000)


def tensors(setting: Setting) -> tuple[Any, ...]:
    """Objects of 20 to 100 pixels, each found two or three times, a little differently."""
    generator = torch.Generator().manual_seed(0)
    shape = setting.batch, setting.boxes
    objects = torch.randint(0, max(1, setting.boxes * 2 // 5), shape, generator=generator)
    corners = torch.rand(setting.batch, setting.boxes, 2, generator=generator) * setting.side
    sides = 20 + torch.rand(setting.batch, setting.boxes, 2, generator=generator) * 80
    places = torch.cat((corners, corners + sides), dim=2).gather(1, objects[..., None].expand(-1, -1, 4))
    boxes = places + torch.randn(*shape, 4, generator=generator) * 2
    return boxes, torch.rand(shape, generator=generator), None, torch.full(shape[:1], setting.boxes)


def sahi(boxes: Any, scores: Any, metric: str) -> int:
    """SAHI's own, from arrays to merged predictions, which it makes one by one; the number left."""
    from sahi.postprocess.combine import GreedyNMMPostprocess
    from sahi.prediction import ObjectPrediction

    merge = GreedyNMMPostprocess(match_threshold=0.5, match_metric=metric)
    left = 0
    for image_boxes, image_scores in zip(boxes.tolist(), scores.tolist(), strict=True):
        pairs = zip(image_boxes, image_scores, strict=True)
        left += len(merge([ObjectPrediction(bbox=box, score=score, category_id=0) for box, score in pairs]))
    return left


def build(setting: Setting, device: torch.device) -> Built:
    boxes, scores, _, counts = tensors(setting)
    arguments: Any = boxes.to(device), scores.to(device), None, counts.to(device), setting.metric, 0.5, setting.boxes

    def ours() -> Merged:
        return greedy_nmm(*arguments)

    def check() -> None:
        """Some boxes against the reference, and on a GPU all of them against the way without one."""
        few: Any = boxes[:, :1000], scores[:, :1000], None, counts.clamp(max=1000)
        there: Any = [None if row is None else row.to(device) for row in few]
        compared = [greedy_nmm(*there, *arguments[4:])]
        exact = [greedy_nmm_reference(*few, *arguments[4:])]
        if device.type == "cuda":
            compared.append(ours())
            exact.append(greedy_nmm(boxes, scores, None, counts, *arguments[4:]))
        for found, expected in zip(compared, exact, strict=True):
            assert all(torch.equal(row.cpu(), other) for row, other in zip(found, expected, strict=True)), setting

    baseline: dict[str, Any] = {"torch eager": functools.partial(greedy_nmm_reference, *arguments)}
    if device.type == "cuda":  # where the reference would wait for the GPU at each of thousands of boxes
        baseline = {"CPU": functools.partial(greedy_nmm, boxes, scores, None, counts, *arguments[4:])}
    elif find_spec("sahi"):
        baseline = {"SAHI": functools.partial(sahi, boxes, scores, setting.metric)}
    return Built(ours, baseline, check, min_bytes=boxes.nbytes + scores.nbytes)


def _case(setting: Setting) -> Case:
    return Case(setting.name, "float32", functools.partial(build, setting))


CASES = [_case(setting) for setting in SETTINGS]
SMALL = [_case(Setting(2, 90, 200, metric)) for metric in ("IOS", "IOU")]


@pytest.mark.parametrize("setting", SETTINGS if torch.cuda.is_available() else [CPU_SETTING], ids=lambda s: s.name)
@pytest.mark.parametrize("implementation", ["ours"])
def test_greedy_nmm(implementation: str, setting: Setting, benchmark: Any) -> None:
    run_benchmark(build, setting, "float32", implementation, benchmark)


if __name__ == "__main__":
    for one in (Setting(), Setting(side=1000)):
        print(one.name)
        print_in_turns(build(one, torch.device("cpu")), 3)
