"""The end of a bottleneck and the first conv of the next one, at sizes of a ResNet-50 at 800x800: eager, one after the
other by kernels of ours, cuDNN and cuBLAS, and as one kernel."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.case import Built, Case, run_benchmark
from retina_fast.kernels.conv_chain import Before, Shortcut, conv_chain, conv_chain_reference
from retina_fast.kernels.conv_epilogue import conv_epilogue_
from retina_fast.kernels.conv_pointwise import conv_pointwise


@dataclasses.dataclass(frozen=True)
class Setting:
    batch: int = 32
    channels: int = 64
    width: int = 256  # of the tensor between the convs
    following: int = 64  # output channels of the second conv
    size: int = 200
    shortcut: bool = False  # a conv in place of the sum
    filtered: bool = False  # with the 3x3 conv
    dtype: str = "bfloat16"

    @property
    def name(self) -> str:
        widths = f"{self.channels} to {self.width} to {self.following} channels, {self.size}x{self.size}"
        convs = "3x3 conv and two pointwise ones" if self.filtered else "two pointwise convs"
        return f"{convs} in a row{' + shortcut' * self.shortcut}, batch {self.batch}, {widths}"


BASE = Setting()
SETTINGS = [
    BASE,
    Setting(filtered=True),
    Setting(filtered=True, shortcut=True),
    Setting(filtered=True, following=128),
    Setting(channels=128, width=512, following=128, size=100),
    Setting(channels=128, width=512, following=256, size=100),
    Setting(batch=1, filtered=True),
    Setting(batch=1, channels=128, width=512, following=128, size=100),
]
CPU_SETTINGS = [Setting(batch=1, size=100, dtype=dtype) for dtype in ("float32", "bfloat16")]


def eager(
    x: Tensor, *weights: Any, z: Tensor | None, shortcut: Shortcut | None, before: Before | None
) -> tuple[Tensor, Tensor]:
    """One pass for each, as PyTorch runs a conv's bias on a GPU and what follows."""
    weight, bias, next_weight, next_bias = weights
    if before is not None:
        x = F.conv2d(x, before[0], padding=1).add_(before[1][:, None, None]).relu_()
    y = F.conv2d(x, weight).add_(bias[:, None, None])
    if shortcut is not None:
        z = F.conv2d(*shortcut)
    assert z is not None
    y = y.add_(z).relu_()
    return y, F.conv2d(y, next_weight).add_(next_bias[:, None, None]).relu_()


def apart(
    x: Tensor, *weights: Any, z: Tensor | None, shortcut: Shortcut | None, before: Before | None
) -> tuple[Tensor, Tensor]:
    """A conv and a pass, then two products of matrices, of which cuBLAS computes the second."""
    weight, bias, next_weight, next_bias = weights
    if before is not None:
        x = F.conv2d(x, before[0], padding=1).contiguous(memory_format=torch.channels_last)
        x = conv_epilogue_(x, before[1], None, "relu")
    y = conv_pointwise(x, weight, bias, z, "relu", 1, None if shortcut is None else (*shortcut, 1))
    pixels = y.permute(0, 2, 3, 1)
    following = torch._addmm_activation(next_bias, pixels.flatten(0, 2), next_weight.flatten(1).t())
    return y, following.view(*pixels.shape[:3], -1).permute(0, 3, 1, 2)


def build(setting: Setting, device: torch.device, with_compile: bool) -> Built:
    dtype = getattr(torch, setting.dtype)
    generator = torch.Generator(device).manual_seed(0)

    def made(*shape: int) -> Tensor:
        values = torch.randn(shape, generator=generator, device=device).to(dtype)
        return values.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else values

    def weight_of(channels_out: int, channels: int) -> Tensor:
        return made(channels_out, channels, 1, 1) / channels**0.5

    channels, size = setting.channels, setting.size
    x = made(setting.batch, channels, size, size)
    weights = (
        *(weight_of(setting.width, channels), made(setting.width)),
        *(weight_of(setting.following, setting.width), made(setting.following)),
    )
    z, shortcut, before = None, None, None
    if setting.shortcut:
        shortcut = made(*x.shape), weight_of(setting.width, channels)
    else:
        z = made(setting.batch, setting.width, size, size)
    if setting.filtered:
        before = made(channels, channels, 3, 3) / (3 * channels**0.5), made(channels)

    def call(function: Callable[..., tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return function(x, *weights, z=z, shortcut=shortcut, before=before)

    baselines: dict[str, Callable[[], Any]] = {
        "torch eager": functools.partial(call, eager),
        "one after the other": functools.partial(call, apart),
    }
    if with_compile:
        baselines["torch.compile"] = functools.partial(call, torch.compile(eager, dynamic=False))

    def check() -> None:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            found, exact = call(conv_chain), call(conv_chain_reference)  # float32 sums, rounded once
            following = F.conv2d(found[0].float(), weights[2].float(), weights[3].float()).relu()
        tolerance = {"float32": 1e-5, "bfloat16": 2**-7}[setting.dtype]
        for ours, expected in zip(found, (exact[0], following), strict=True):
            error = (ours.double() - expected.double()).norm()
            assert error <= tolerance * expected.double().norm(), setting

    read = [tensor for tensor in (x, *weights, z, *(shortcut or ()), *(before or ())) if tensor is not None]
    min_bytes = sum(tensor.nbytes for tensor in read)
    min_bytes += x.numel() // channels * (setting.width + setting.following) * x.element_size()
    return Built(functools.partial(call, conv_chain), baselines, check, min_bytes)


def _case(setting: Setting, with_compile: bool = False) -> Case:
    return Case(setting.name, setting.dtype, functools.partial(build, setting, with_compile=with_compile))


CASES = [_case(setting, with_compile=setting == BASE) for setting in SETTINGS]
SMALL = [
    _case(Setting(2, 16, 32, 16, 9, shortcut, filtered, dtype))
    for shortcut, filtered, dtype in ((False, False, "float32"), (True, True, "bfloat16"))
]


@pytest.mark.parametrize("setting", SETTINGS if torch.cuda.is_available() else CPU_SETTINGS, ids=lambda s: s.name)
@pytest.mark.parametrize("implementation", ["torch eager", "one after the other", "torch.compile", "ours"])
def test_conv_chain(implementation: str, setting: Setting, benchmark: Any) -> None:
    make = functools.partial(build, with_compile=implementation == "torch.compile")
    run_benchmark(make, setting, setting.dtype, implementation, benchmark)
