"""Focal loss of a dense target, forward and backward, summed: torchvision eager, torch.compile of the same, ours."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor

from benchmarks.case import Built, Case, run_benchmark
from retina_fast.kernels.sigmoid_focal_loss import sigmoid_focal_loss, sigmoid_focal_loss_reference


@dataclasses.dataclass(frozen=True)
class Setting:
    batch: int = 8
    anchors: int = 120_087  # of an image of 800x800
    num_classes: int = 91
    dtype: str = "bfloat16"

    @property
    def name(self) -> str:
        return f"dense focal loss, batch {self.batch}, {self.anchors} anchors, {self.num_classes} classes"


SETTINGS = [Setting(), Setting(dtype="float32")]
CPU_SETTING = Setting(2, 9000, 20, "float32")


def build(setting: Setting, device: torch.device, with_compile: bool) -> Built:
    dtype = getattr(torch, setting.dtype)
    shape = setting.batch, setting.anchors, setting.num_classes
    torch.manual_seed(0)
    logits = torch.randn(shape, device=device).sub_(4).to(dtype).requires_grad_()
    targets = (torch.rand(shape, device=device) < 0.001).to(dtype)

    def step(function: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        loss = function(logits, targets, reduction="sum")
        return loss.detach(), *torch.autograd.grad(loss, logits)

    baselines: dict[str, Callable[[], Any]] = {
        "torchvision eager": functools.partial(step, torchvision.ops.sigmoid_focal_loss)
    }
    if with_compile:
        compiled = torch.compile(sigmoid_focal_loss_reference, dynamic=False)
        baselines["torch.compile"] = functools.partial(step, compiled)

    def check() -> None:
        tolerance = {"float32": 1e-5, "bfloat16": 2**-8}[setting.dtype]
        loss, grad = step(sigmoid_focal_loss)
        total = 0.0
        for b in range(setting.batch):  # one image at a time, since float64 takes room
            exact = logits[b].detach().double().requires_grad_()
            value = sigmoid_focal_loss_reference(exact, targets[b].double(), reduction="sum")
            (expected,) = torch.autograd.grad(value, exact)
            assert (grad[b] - expected).norm() <= tolerance * expected.norm(), f"{setting}: gradient of image {b}"
            total += value.item()
        assert abs(loss - total) <= tolerance * total, f"{setting}: loss"

    # forward reads logits and targets, backward reads them again and writes the gradient
    return Built(functools.partial(step, sigmoid_focal_loss), baselines, check, min_bytes=5 * logits.nbytes)


def _case(setting: Setting, with_compile: bool = True) -> Case:
    return Case(setting.name, setting.dtype, functools.partial(build, setting, with_compile=with_compile))


CASES = [_case(setting, with_compile=setting == SETTINGS[0]) for setting in SETTINGS]  # compiling takes long
SMALL = [_case(Setting(2, 301, 7, "float32"))]


@pytest.mark.parametrize("setting", SETTINGS if torch.cuda.is_available() else [CPU_SETTING], ids=lambda s: s.name)
@pytest.mark.parametrize("implementation", ["torchvision eager", "torch.compile", "ours"])
def test_sigmoid_focal_loss(implementation: str, setting: Setting, benchmark: Any) -> None:
    make = functools.partial(build, with_compile=implementation == "torch.compile")
    run_benchmark(make, setting, setting.dtype, implementation, benchmark)
