"""The last conv of a head, whose channels are no multiple of 8, with its bias: as cuDNN pads it, and padded beforehand.

A call with gradients is the conv forward and backward, with respect to its input, weights and bias.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.case import Built, Case, run_benchmark
from retina_fast.kernels.first_channels import first_channels, padded_weight


@dataclasses.dataclass(frozen=True)
class Setting:
    batch: int = 8
    channels: int = 819
    size: int = 100
    width: int = 256  # of the conv's input
    gradients: bool = False
    dtype: str = "bfloat16"

    @property
    def name(self) -> str:
        how = "conv to {} channels, forward and backward" if self.gradients else "conv to {} channels"
        return f"{how.format(self.channels)}, batch {self.batch}, {self.width} channels, {self.size}x{self.size}"


BASE = Setting()
SETTINGS = [BASE, Setting(channels=36), Setting(batch=1), Setting(gradients=True), Setting(channels=36, gradients=True)]
CPU_SETTINGS = [dataclasses.replace(BASE, batch=1, size=25, gradients=gradients) for gradients in (False, True)]


def build(setting: Setting, device: torch.device, with_compile: bool) -> Built:
    dtype = getattr(torch, setting.dtype)
    generator = torch.Generator().manual_seed(0)

    def made(*shape: int) -> Tensor:
        values = torch.randn(shape, generator=generator).to(device, dtype)
        return values.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else values

    x = made(setting.batch, setting.width, setting.size, setting.size).relu_()
    weight, bias = made(setting.channels, setting.width, 3, 3) / 48, made(setting.channels)
    dy = made(setting.batch, setting.channels, setting.size, setting.size)
    inputs = [tensor.requires_grad_(setting.gradients) for tensor in (x, weight, bias)]
    wide = padded_weight(weight).detach()

    def plain() -> Tensor:
        return F.conv2d(x, weight, bias, padding=1)

    def padded() -> Tensor:
        return first_channels(F.conv2d(x, padded_weight(weight) if setting.gradients else wide, padding=1), bias)

    def call(forward: Callable[[], Tensor]) -> Any:
        return torch.autograd.grad(forward(), inputs, dy) if setting.gradients else forward()

    baselines: dict[str, Callable[[], Any]] = {"torch eager": functools.partial(call, plain)}
    if with_compile:
        baselines["torch.compile"] = functools.partial(call, torch.compile(plain, dynamic=False))

    def check() -> None:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            found, expected = call(padded), call(plain)
        for ours, theirs in zip(found, expected, strict=True) if setting.gradients else [(found, expected)]:
            error = (ours.double() - theirs.double()).norm() / theirs.double().norm()
            assert error <= {"float32": 1e-5, "bfloat16": 2**-7}[setting.dtype], (setting, error)

    min_bytes = x.nbytes + weight.nbytes + dy.nbytes
    if setting.gradients:
        min_bytes *= 2
    return Built(functools.partial(call, padded), baselines, check, min_bytes)


def _case(setting: Setting, with_compile: bool = False) -> Case:
    return Case(setting.name, setting.dtype, functools.partial(build, setting, with_compile=with_compile))


CASES = [_case(setting, with_compile=setting == BASE) for setting in SETTINGS]
SMALL = [_case(Setting(2, 27, 9, 16, gradients, "bfloat16")) for gradients in (False, True)]


@pytest.mark.parametrize("setting", SETTINGS if torch.cuda.is_available() else CPU_SETTINGS, ids=lambda s: s.name)
@pytest.mark.parametrize("implementation", ["torch eager", "torch.compile", "ours"])
def test_first_channels(implementation: str, setting: Setting, benchmark: Any) -> None:
    make = functools.partial(build, with_compile=implementation == "torch.compile")
    run_benchmark(make, setting, setting.dtype, implementation, benchmark)
