"""The pooling of a ResNet's stem with its bias and ReLU, at sizes of 800x800: PyTorch's passes, compiled, and ours."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.case import Built, Case, run_benchmark
from retina_fast.kernels.max_pool_relu import max_pool_relu, max_pool_relu_reference


@dataclasses.dataclass(frozen=True)
class Setting:
    batch: int = 8
    channels: int = 64
    size: int = 400
    dtype: str = "bfloat16"

    @property
    def name(self) -> str:
        return f"bias, ReLU and max pooling: batch {self.batch}, {self.channels} channels, {self.size}x{self.size}"


BASE = Setting()
SETTINGS = [BASE, Setting(batch=1), Setting(batch=32), Setting(dtype="float32")]
CPU_SETTINGS = [dataclasses.replace(BASE, batch=1, dtype=dtype) for dtype in ("float32", "bfloat16")]


def eager(x: Tensor, bias: Tensor) -> Tensor:
    """One pass for each, as PyTorch runs them."""
    return F.max_pool2d((x + bias[:, None, None]).relu_(), kernel_size=3, stride=2, padding=1)


def build(setting: Setting, device: torch.device, with_compile: bool) -> Built:
    dtype = getattr(torch, setting.dtype)
    generator = torch.Generator().manual_seed(0)
    shape = setting.batch, setting.channels, setting.size, setting.size
    x = torch.randn(shape, generator=generator).to(device, dtype).contiguous(memory_format=torch.channels_last)
    bias = torch.randn(setting.channels, generator=generator).to(device, dtype)

    def call(function: Callable[..., Tensor]) -> Tensor:
        with torch.no_grad():
            return function(x, bias)

    baselines: dict[str, Callable[[], Any]] = {"torch eager": functools.partial(call, eager)}
    if with_compile:
        baselines["torch.compile"] = functools.partial(call, torch.compile(eager, dynamic=False))

    def check() -> None:
        expected = max_pool_relu_reference(x, bias)
        assert torch.equal(call(max_pool_relu), expected), setting
        assert torch.equal(call(eager), expected), setting

    min_bytes = x.nbytes + x.nbytes // 4
    return Built(functools.partial(call, max_pool_relu), baselines, check, min_bytes)


def _case(setting: Setting, with_compile: bool = False) -> Case:
    return Case(setting.name, setting.dtype, functools.partial(build, setting, with_compile=with_compile))


CASES = [_case(setting, with_compile=setting == BASE) for setting in SETTINGS]
SMALL = [_case(Setting(2, channels, 19, dtype)) for channels, dtype in ((64, "float32"), (12, "bfloat16"))]


@pytest.mark.parametrize("setting", SETTINGS if torch.cuda.is_available() else CPU_SETTINGS, ids=lambda s: s.name)
@pytest.mark.parametrize("implementation", ["torch eager", "torch.compile", "ours"])
def test_max_pool_relu(implementation: str, setting: Setting, benchmark: Any) -> None:
    make = functools.partial(build, with_compile=implementation == "torch.compile")
    run_benchmark(make, setting, setting.dtype, implementation, benchmark)
