"""A conv with its sum and ReLU at sizes of a ResNet-50 and of the heads at 800x800: eager, torch.compile, ours."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from retina_fast.kernels.conv_relu import conv_add_relu, conv_add_relu_reference, conv_relu, conv_relu_reference
from torch import Tensor

from benchmarks.case import Built, Case, run_benchmark


@dataclasses.dataclass(frozen=True)
class Setting:
    batch: int = 8
    channels: int = 256
    width: int = 256  # output channels
    size: int = 100
    kernel: int = 3
    with_sum: bool = False
    dtype: str = "bfloat16"

    @property
    def name(self) -> str:
        kind = "conv + sum + ReLU" if self.with_sum else "conv + ReLU"
        sizes = f"{self.kernel}x{self.kernel}, {self.channels} to {self.width} channels, {self.size}x{self.size}"
        return f"{kind}, batch {self.batch}, {sizes}"


BASE = Setting()
SETTINGS = [BASE, Setting(channels=64, size=200, kernel=1, with_sum=True), Setting(batch=1), Setting(dtype="float32")]
CPU_SETTINGS = [
    dataclasses.replace(setting, batch=1, dtype=dtype) for setting in SETTINGS[:2] for dtype in ("float32", "bfloat16")
]


def build(setting: Setting, device: torch.device, with_compile: bool) -> Built:
    dtype = getattr(torch, setting.dtype)
    generator = torch.Generator().manual_seed(0)

    def made(*shape: int) -> Tensor:
        values = torch.randn(shape, generator=generator).to(device, dtype)
        return values.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else values

    x = made(setting.batch, setting.channels, setting.size, setting.size)
    weight, bias = made(setting.width, setting.channels, setting.kernel, setting.kernel), made(setting.width)
    z = made(setting.batch, setting.width, setting.size, setting.size)
    tensors = (x, weight, bias, z) if setting.with_sum else (x, weight, bias)
    eager: Callable[..., Tensor] = conv_add_relu_reference if setting.with_sum else conv_relu_reference
    fused: Callable[..., Tensor] = conv_add_relu if setting.with_sum else conv_relu

    def call(function: Callable[..., Tensor]) -> Tensor:
        with torch.no_grad():
            return function(*tensors, padding=setting.kernel // 2)

    baselines: dict[str, Callable[[], Any]] = {"torch eager": functools.partial(call, eager)}
    if with_compile:
        baselines["torch.compile"] = functools.partial(call, torch.compile(eager, dynamic=False))

    def check() -> None:
        exact = eager(*(tensor.double() for tensor in tensors), padding=setting.kernel // 2)
        tolerance = {"float32": 1e-5, "bfloat16": 2**-8}[setting.dtype]
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # TF32 keeps 10 bits
            found = call(fused).double()
        assert (found - exact).norm() <= tolerance * exact.norm(), setting

    min_bytes = sum(tensor.nbytes for tensor in tensors) + z.nbytes
    return Built(functools.partial(call, fused), baselines, check, min_bytes)


def _case(setting: Setting, with_compile: bool = False) -> Case:
    return Case(setting.name, setting.dtype, functools.partial(build, setting, with_compile=with_compile))


CASES = [_case(setting, with_compile=setting == BASE) for setting in SETTINGS]
SMALL = [
    _case(Setting(2, 16, 24, 9, 3, with_sum, dtype)) for with_sum in (False, True) for dtype in ("float32", "bfloat16")
]


@pytest.mark.parametrize("setting", SETTINGS if torch.cuda.is_available() else CPU_SETTINGS, ids=lambda s: s.name)
@pytest.mark.parametrize("implementation", ["torch eager", "torch.compile", "ours"])
def test_conv_relu(implementation: str, setting: Setting, benchmark: Any) -> None:
    make = functools.partial(build, with_compile=implementation == "torch.compile")
    run_benchmark(make, setting, setting.dtype, implementation, benchmark)
