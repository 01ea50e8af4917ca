"""Box voting: PyTorch's operations on all pairs of a kept box and another, and ours in one launch."""

import dataclasses
import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.case import Built, Case, run_benchmark
from benchmarks.kernels import soft_nms
from retina_fast.kernels.box_voting import box_voting, box_voting_reference


@dataclasses.dataclass(frozen=True)
class Setting:
    batch: int = 8
    boxes: int = 5000
    kept: int = 300

    @property
    def name(self) -> str:
        return f"box voting, batch {self.batch}, {self.boxes} boxes for {self.kept} kept ones"


SETTINGS = [Setting(), Setting(batch=1)]
CPU_SETTING = Setting(batch=2, boxes=1000)


def build(setting: Setting, device: torch.device) -> Built:
    kept = torch.randint(setting.boxes, (setting.batch, setting.kept), generator=torch.Generator().manual_seed(1))
    counts = torch.full((setting.batch,), setting.kept)
    arguments: Any = [*soft_nms.inputs(setting.batch, setting.boxes, device), kept.to(device), counts.to(device)]

    def ours() -> Tensor:
        return box_voting(*arguments)

    def check() -> None:
        placed, weights, *rest = arguments
        exact = box_voting_reference(placed.double(), weights.double(), *rest)
        torch.testing.assert_close(ours().double(), exact, rtol=1e-5, atol=1e-3)

    baselines: dict[str, Any] = {"torch eager": functools.partial(box_voting_reference, *arguments)}
    return Built(ours, baselines, check, min_bytes=sum(row.nbytes for row in arguments))


def _case(setting: Setting) -> Case:
    return Case(setting.name, "float32", functools.partial(build, setting))


CASES = [_case(setting) for setting in SETTINGS]
SMALL = [_case(Setting(2, 90, 20))]


@pytest.mark.parametrize("setting", SETTINGS if torch.cuda.is_available() else [CPU_SETTING], ids=lambda s: s.name)
@pytest.mark.parametrize("implementation", ["torch eager", "ours"])
def test_box_voting(implementation: str, setting: Setting, benchmark: Any) -> None:
    run_benchmark(build, setting, "float32", implementation, benchmark)
