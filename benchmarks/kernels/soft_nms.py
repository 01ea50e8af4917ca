"""Soft-NMS: PyTorch's operations step by step, which are the reference, and ours."""

import dataclasses
import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.case import Built, Case, run_benchmark
from retina_fast.kernels.soft_nms import SoftKept, soft_nms, soft_nms_reference


@dataclasses.dataclass(frozen=True)
class Setting:
    batch: int = 8
    boxes: int = 5000
    method: str = "gaussian"
    most: int = 300

    @property
    def name(self) -> str:
        return f"Soft-NMS, {self.method}, batch {self.batch}, {self.boxes} boxes in 91 classes"


SETTINGS = [Setting(), Setting(batch=1), Setting(method="linear")]
CPU_SETTING = Setting(batch=2, boxes=1000)


def inputs(batch: int, boxes: int, device: torch.device) -> list[Tensor]:
    """Returns boxes (B, M, 4), scores and labels (B, M) in 91 classes, and counts (B,)."""
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(batch, boxes, 2, generator=generator) * 700
    made = torch.cat((corner, corner + 20 + torch.rand(batch, boxes, 2, generator=generator) * 80), dim=2)
    scores, labels = (
        torch.rand(batch, boxes, generator=generator),
        torch.randint(91, (batch, boxes), generator=generator),
    )
    return [row.to(device) for row in (made, scores, labels, torch.full((batch,), boxes))]


def build(setting: Setting, device: torch.device) -> Built:
    arguments: Any = inputs(setting.batch, setting.boxes, device)
    rest: Any = (setting.method, 0.3, 0.5, 0.05, setting.most)

    def ours() -> SoftKept:
        return soft_nms(*arguments, *rest)

    def check() -> None:
        found, exact = ours(), soft_nms_reference(*arguments, *rest)
        assert torch.equal(found.counts, exact.counts), setting
        torch.testing.assert_close(found.scores, exact.scores, rtol=1e-5, atol=1e-6)  # equal ones may change places

    baselines: dict[str, Any] = {"torch eager": functools.partial(soft_nms_reference, *arguments, *rest)}
    return Built(ours, baselines, check, min_bytes=sum(row.nbytes for row in arguments))


def _case(setting: Setting) -> Case:
    return Case(setting.name, "float32", functools.partial(build, setting))


CASES = [_case(setting) for setting in SETTINGS]
SMALL = [_case(Setting(2, 90, method, 20)) for method in ("gaussian", "linear")]


@pytest.mark.parametrize("setting", SETTINGS if torch.cuda.is_available() else [CPU_SETTING], ids=lambda s: s.name)
@pytest.mark.parametrize("implementation", ["torch eager", "ours"])
def test_soft_nms(implementation: str, setting: Setting, benchmark: Any) -> None:
    run_benchmark(build, setting, "float32", implementation, benchmark)
