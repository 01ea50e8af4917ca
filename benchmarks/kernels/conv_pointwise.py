"""1x1 convs with what follows them, at sizes of a ResNet-50 with a pyramid at 800x800: eager, a conv with one pass
after it, and ours."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.case import Built, Case, run_benchmark
from retina_fast.kernels.conv_epilogue import conv_epilogue_
from retina_fast.kernels.conv_pointwise import Shortcut, conv_pointwise, conv_pointwise_reference


@dataclasses.dataclass(frozen=True)
class Setting:
    batch: int = 32
    channels: int = 64
    width: int = 256  # output channels
    size: int = 200
    summand: str = "sum"  # of the output's size; or the level "above", of half that size; or a "shortcut" conv
    activation: str = "relu"
    dtype: str = "bfloat16"

    @property
    def name(self) -> str:
        followed = " + ".join(["bias", self.summand, *[self.activation] * (self.activation != "none")])
        shape = f"{self.channels} to {self.width} channels, {self.size}x{self.size}"
        return f"pointwise conv + {followed}, batch {self.batch}, {shape}"


BASE = Setting()
SETTINGS = [
    BASE,
    Setting(channels=128, width=512, size=100),
    Setting(channels=512, width=2048, size=25),
    Setting(channels=512, size=100, summand="above", activation="none"),
    Setting(summand="shortcut"),
    Setting(batch=1),
    Setting(batch=1, channels=512, width=2048, size=25),
]
CPU_SETTINGS = [Setting(batch=1, size=100, dtype=dtype) for dtype in ("float32", "bfloat16")]


def _summands(x: Tensor, weight: Tensor, z: Tensor | None, shortcut: Shortcut | None) -> tuple[Tensor, Tensor]:
    """The conv, and what is added to it."""
    y = F.conv2d(x, weight)
    if shortcut is not None:
        z = F.conv2d(*shortcut[:2])
    assert z is not None
    return y, z if z.shape == y.shape else F.interpolate(z, y.shape[2:], mode="nearest")


def eager(x: Tensor, weight: Tensor, bias: Tensor, z: Tensor | None, activation: str, *, shortcut: Any) -> Tensor:
    """One pass for each, as PyTorch runs a conv's bias on a GPU and what follows."""
    y, z = _summands(x, weight, z, shortcut)
    y.add_(bias[:, None, None]).add_(z)
    return y.relu_() if activation == "relu" else y


def one_pass(x: Tensor, weight: Tensor, bias: Tensor, z: Tensor | None, activation: str, *, shortcut: Any) -> Tensor:
    """A conv, then one pass of ours over its output."""
    y, z = _summands(x, weight, z, shortcut)
    return conv_epilogue_(y.contiguous(memory_format=torch.channels_last), bias, z, activation)


def build(setting: Setting, device: torch.device, with_compile: bool) -> Built:
    dtype = getattr(torch, setting.dtype)
    generator = torch.Generator(device).manual_seed(0)

    def made(*shape: int) -> Tensor:
        values = torch.randn(shape, generator=generator, device=device).to(dtype)
        return values.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else values

    def weight_of(channels: int) -> Tensor:
        return made(setting.width, channels, 1, 1) / channels**0.5

    x, weight = made(setting.batch, setting.channels, setting.size, setting.size), weight_of(setting.channels)
    shortcut, z = None, None
    if setting.summand == "shortcut":
        shortcut = made(*x.shape), weight_of(setting.channels), 1
    else:
        half = (setting.size + 1) // 2 if setting.summand == "above" else setting.size
        z = made(setting.batch, setting.width, half, half)
    arguments = x, weight, made(setting.width), z, setting.activation

    def call(function: Callable[..., Tensor]) -> Tensor:
        with torch.no_grad():
            return function(*arguments, shortcut=shortcut)

    baselines: dict[str, Callable[[], Any]] = {
        "torch eager": functools.partial(call, eager),
        "conv, then one pass": functools.partial(call, one_pass),
    }
    if with_compile:
        baselines["torch.compile"] = functools.partial(call, torch.compile(eager, dynamic=False))

    def check() -> None:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            found, exact = call(conv_pointwise), call(conv_pointwise_reference).double()  # float32 sums, rounded once
        tolerance = {"float32": 1e-5, "bfloat16": 2**-8}[setting.dtype]
        error = (found.double() - exact).norm()
        assert error <= tolerance * exact.norm(), setting

    read = [tensor for tensor in (*arguments, *(shortcut or ())) if isinstance(tensor, Tensor)]
    written = x.numel() // setting.channels * setting.width * x.element_size()
    min_bytes = sum(tensor.nbytes for tensor in read) + written
    return Built(functools.partial(call, conv_pointwise), baselines, check, min_bytes)


def _case(setting: Setting, with_compile: bool = False) -> Case:
    return Case(setting.name, setting.dtype, functools.partial(build, setting, with_compile=with_compile))


CASES = [_case(setting, with_compile=setting == BASE) for setting in SETTINGS]
SMALL = [
    _case(Setting(2, 16, 24, 9, summand, activation, dtype))
    for summand, activation, dtype in (
        ("sum", "relu", "float32"),
        ("above", "none", "bfloat16"),
        ("shortcut", "relu", "bfloat16"),
    )
]


@pytest.mark.parametrize("setting", SETTINGS if torch.cuda.is_available() else CPU_SETTINGS, ids=lambda s: s.name)
@pytest.mark.parametrize("implementation", ["torch eager", "conv, then one pass", "torch.compile", "ours"])
def test_conv_pointwise(implementation: str, setting: Setting, benchmark: Any) -> None:
    make = functools.partial(build, with_compile=implementation == "torch.compile")
    run_benchmark(make, setting, setting.dtype, implementation, benchmark)
