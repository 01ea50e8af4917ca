"""Bias, sum and activation after a conv, in place: PyTorch's passes one after the other, compiled, and ours in one.

A call works on what the call before it has left. That changes the values, and not how many bytes are moved.
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
from retina_fast.kernels.conv_epilogue import conv_epilogue_, conv_epilogue_reference


@dataclasses.dataclass(frozen=True)
class Setting:
    batch: int = 8
    channels: int = 256
    size: int = 100
    with_sum: bool = True
    activation: str = "relu"
    dtype: str = "bfloat16"

    @property
    def name(self) -> str:
        followed = [*["sum"] * self.with_sum, *[self.activation] * (self.activation != "none")]
        shape = f"{self.channels} channels, {self.size}x{self.size}"
        return f"after a conv: {' + '.join(['bias', *followed])}, batch {self.batch}, {shape}"


BASE = Setting()
SETTINGS = [
    BASE,
    Setting(with_sum=False),
    Setting(batch=1),
    Setting(channels=819, with_sum=False, activation="none"),
    Setting(with_sum=False, activation="swish"),
    Setting(dtype="float32"),
]
CPU_SETTINGS = [dataclasses.replace(BASE, batch=1, dtype=dtype) for dtype in ("float32", "bfloat16")]


def eager(y: Tensor, bias: Tensor, z: Tensor | None, activation: str) -> Tensor:
    """One pass for each, in place, as PyTorch runs a conv's bias on a GPU and what follows."""
    y.add_(bias[:, None, None])
    if z is not None:
        y.add_(z)
    return y.relu_() if activation == "relu" else F.silu(y, inplace=True) if activation == "swish" else y


def build(setting: Setting, device: torch.device, with_compile: bool) -> Built:
    dtype = getattr(torch, setting.dtype)
    generator = torch.Generator().manual_seed(0)
    shape = setting.batch, setting.channels, setting.size, setting.size

    def made() -> Tensor:
        values = torch.randn(shape, generator=generator).to(device, dtype)
        return values.contiguous(memory_format=torch.channels_last)

    y, z = made(), made() if setting.with_sum else None
    rest = torch.randn(setting.channels, generator=generator).to(device, dtype), z, setting.activation

    def call(function: Callable[..., Tensor], y: Tensor = y) -> Tensor:
        with torch.no_grad():
            return function(y, *rest)

    baselines: dict[str, Callable[[], Any]] = {"torch eager": functools.partial(call, eager)}
    if with_compile:
        baselines["torch.compile"] = functools.partial(call, torch.compile(eager, dynamic=False))

    def check() -> None:
        exact = conv_epilogue_reference(y.double(), *rest)
        ours = call(conv_epilogue_, y.clone(memory_format=torch.preserve_format))
        tolerance = {"float32": 1e-6, "bfloat16": 2**-8}[setting.dtype]
        assert (ours.double() - exact).norm() <= tolerance * exact.norm(), setting

    min_bytes = 2 * y.nbytes + (0 if z is None else z.nbytes)
    return Built(functools.partial(call, conv_epilogue_), baselines, check, min_bytes)


def _case(setting: Setting, with_compile: bool = False) -> Case:
    return Case(setting.name, setting.dtype, functools.partial(build, setting, with_compile=with_compile))


CASES = [_case(setting, with_compile=setting == BASE) for setting in SETTINGS]
SMALL = [
    _case(Setting(2, 24, 9, with_sum, activation, dtype))
    for with_sum, activation, dtype in (
        (True, "relu", "float32"),
        (False, "swish", "bfloat16"),
        (False, "none", "bfloat16"),
    )
]


@pytest.mark.parametrize("setting", SETTINGS if torch.cuda.is_available() else CPU_SETTINGS, ids=lambda s: s.name)
@pytest.mark.parametrize("implementation", ["torch eager", "torch.compile", "ours"])
def test_conv_epilogue(implementation: str, setting: Setting, benchmark: Any) -> None:
    make = functools.partial(build, with_compile=implementation == "torch.compile")
    run_benchmark(make, setting, setting.dtype, implementation, benchmark)
