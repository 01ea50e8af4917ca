"""Detections from the candidates that NMS kept: a dozen PyTorch operations, the same compiled, ours in one launch."""

import dataclasses
import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.case import Built, Case, run_benchmark
from retina_fast.kernels.take_kept import take_kept, take_kept_reference


@dataclasses.dataclass(frozen=True)
class Setting:
    batch: int = 8
    candidates: int = 5000
    kept: int = 300

    @property
    def name(self) -> str:
        return f"taking detections, batch {self.batch}, {self.kept} of {self.candidates} candidates"


SETTINGS = [Setting(), Setting(batch=1), Setting(batch=32)]
CPU_SETTING = Setting()


def build(setting: Setting, device: torch.device, with_compile: bool) -> Built:
    generator = torch.Generator().manual_seed(0)
    shape = setting.batch, setting.candidates
    boxes, scores = torch.rand(*shape, 4, generator=generator) * 800, torch.rand(shape, generator=generator)
    labels = torch.randint(0, 91, shape, generator=generator)
    positions = torch.randint(0, setting.candidates, (setting.batch, setting.kept), generator=generator)
    counts = torch.randint(0, setting.kept + 1, (setting.batch,), generator=generator)
    sizes = torch.tensor([[800, 800]] * setting.batch)
    inputs = boxes, scores, labels, positions, counts, sizes, sizes * 3 // 2
    arguments = [tensor.to(device) for tensor in inputs]

    def ours() -> tuple[Tensor, ...]:
        return take_kept(*arguments)

    baselines: dict[str, Any] = {"torch eager": functools.partial(take_kept_reference, *arguments)}
    if with_compile:
        baselines["torch.compile"] = functools.partial(torch.compile(take_kept_reference, dynamic=False), *arguments)

    def check() -> None:
        for taken, exact in zip(ours(), take_kept_reference(*arguments), strict=True):
            assert torch.equal(taken, exact), setting

    # a position of 8 bytes, and a box, a score and a label in and out
    return Built(ours, baselines, check, min_bytes=positions.numel() * (8 + 2 * (16 + 4 + 8)))


def _case(setting: Setting, with_compile: bool = True) -> Case:
    return Case(setting.name, "float32", functools.partial(build, setting, with_compile=with_compile))


CASES = [_case(setting, with_compile=setting == SETTINGS[0]) for setting in SETTINGS]  # compiling takes long
SMALL = [_case(Setting(2, 70, 31))]


@pytest.mark.parametrize("setting", SETTINGS if torch.cuda.is_available() else [CPU_SETTING], ids=lambda s: s.name)
@pytest.mark.parametrize("implementation", ["torch eager", "torch.compile", "ours"])
def test_take_kept(implementation: str, setting: Setting, benchmark: Any) -> None:
    make = functools.partial(build, with_compile=implementation == "torch.compile")
    run_benchmark(make, setting, "float32", implementation, benchmark)
