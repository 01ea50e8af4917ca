"""The first conv of a ResNet on images of 800x800: PyTorch's conv, compiled, and ours."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.case import Built, Case, run_benchmark
from retina_fast.kernels.stem_conv import stem_conv, stem_conv_reference


@dataclasses.dataclass(frozen=True)
class Setting:
    batch: int = 8
    size: int = 800
    dtype: str = "bfloat16"

    @property
    def name(self) -> str:
        return f"conv of a ResNet's stem: batch {self.batch}, {self.size}x{self.size}"


BASE = Setting()
SETTINGS = [BASE, Setting(batch=1), Setting(batch=32), Setting(dtype="float16")]
CPU_SETTINGS = [dataclasses.replace(BASE, batch=1)]


def build(setting: Setting, device: torch.device, with_compile: bool) -> Built:
    dtype = getattr(torch, setting.dtype)
    generator = torch.Generator().manual_seed(0)

    def made(*shape: int) -> Tensor:
        values = torch.randn(shape, generator=generator).to(device, dtype)
        return values.contiguous(memory_format=torch.channels_last)

    x, weight = made(setting.batch, 3, setting.size, setting.size), made(64, 3, 7, 7)

    def call(function: Callable[..., Tensor]) -> Tensor:
        with torch.no_grad():
            return function(x, weight)

    baselines: dict[str, Callable[[], Any]] = {"torch eager": functools.partial(call, stem_conv_reference)}
    if with_compile:
        compiled = torch.compile(stem_conv_reference, dynamic=False)
        baselines["torch.compile"] = functools.partial(call, compiled)

    def check() -> None:
        exact, ours = stem_conv_reference(x[:1].double(), weight.double()), call(stem_conv)[:1].double()
        tolerance = {"bfloat16": 2**-8, "float16": 2**-11}[setting.dtype]
        assert (ours - exact).norm() <= tolerance * exact.norm(), setting

    min_bytes = x.nbytes + weight.nbytes + setting.batch * 64 * (setting.size // 2) ** 2 * x.element_size()
    return Built(functools.partial(call, stem_conv), baselines, check, min_bytes)


def _case(setting: Setting, with_compile: bool = False) -> Case:
    return Case(setting.name, setting.dtype, functools.partial(build, setting, with_compile=with_compile))


CASES = [_case(setting, with_compile=setting == BASE) for setting in SETTINGS]
SMALL = [_case(Setting(2, size, dtype)) for size, dtype in ((32, "bfloat16"), (18, "float16"))]


@pytest.mark.parametrize("setting", SETTINGS if torch.cuda.is_available() else CPU_SETTINGS, ids=lambda s: s.name)
@pytest.mark.parametrize("implementation", ["torch eager", "torch.compile", "ours"])
def test_stem_conv(implementation: str, setting: Setting, benchmark: Any) -> None:
    make = functools.partial(build, with_compile=implementation == "torch.compile")
    run_benchmark(make, setting, setting.dtype, implementation, benchmark)
