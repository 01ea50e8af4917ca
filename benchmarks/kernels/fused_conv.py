"""A conv with bias, sum and ReLU, forward and backward, at sizes of a ResNet-50 and of the heads at 800x800."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.case import Built, Case, run_benchmark
from retina_fast.kernels.fused_conv import fused_conv, fused_conv_reference


@dataclasses.dataclass(frozen=True)
class Setting:
    batch: int = 16
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
        return f"{kind}, forward and backward, batch {self.batch}, {sizes}"


BASE = Setting()
SETTINGS = [BASE, Setting(channels=128, width=512, kernel=1, with_sum=True), Setting(size=25), Setting(dtype="float32")]
CPU_SETTINGS = [dataclasses.replace(setting, batch=1, size=25, dtype="float32") for setting in SETTINGS[:2]]


def build(setting: Setting, device: torch.device, with_compile: bool) -> Built:
    dtype = getattr(torch, setting.dtype)
    generator = torch.Generator().manual_seed(0)

    def made(*shape: int) -> Tensor:
        values = torch.randn(shape, generator=generator).to(device, dtype)
        return values.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else values

    x = made(setting.batch, setting.channels, setting.size, setting.size)
    weight, bias = made(setting.width, setting.channels, setting.kernel, setting.kernel), made(setting.width)
    z, incoming = (made(setting.batch, setting.width, setting.size, setting.size) for _ in range(2))
    tensors = [x, weight, bias, *([z] if setting.with_sum else [])]

    def call(function: Callable[..., Tensor], inputs: list[Tensor], incoming: Tensor) -> tuple[Tensor, ...]:
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        y = function(*leaves[:3], leaves[3] if setting.with_sum else None, True, 1, setting.kernel // 2)
        return y.detach(), *torch.autograd.grad(y, leaves, incoming)

    baselines: dict[str, Callable[[], Any]] = {
        "torch eager": functools.partial(call, fused_conv_reference, tensors, incoming)
    }
    if with_compile:
        compiled = torch.compile(fused_conv_reference, dynamic=False)
        baselines["torch.compile"] = functools.partial(call, compiled, tensors, incoming)
    ours = functools.partial(call, fused_conv, tensors, incoming)

    def check() -> None:
        exact = call(fused_conv_reference, [tensor.double() for tensor in tensors], incoming.double())
        tolerance = {"float32": 2e-5, "bfloat16": 2**-6}[setting.dtype]  # outputs near 0 change sides of the ReLU
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # TF32 keeps 10 bits
            found = ours()
        for mine, right in zip(found, exact, strict=True):
            assert (mine.double() - right).norm() <= tolerance * right.norm(), setting

    # forward x is read and y written, backward dy, y and x are read and dx written; z and dz beside them
    min_bytes = 3 * x.nbytes + 3 * z.nbytes + (2 * z.nbytes if setting.with_sum else 0)
    return Built(ours, baselines, check, min_bytes)


def _case(setting: Setting, with_compile: bool = False) -> Case:
    return Case(setting.name, setting.dtype, functools.partial(build, setting, with_compile=with_compile))


CASES = [_case(setting, with_compile=setting == BASE) for setting in SETTINGS]
SMALL = [
    _case(Setting(2, 16, 24, 9, 3, with_sum, dtype)) for with_sum in (False, True) for dtype in ("float32", "bfloat16")
]


@pytest.mark.parametrize("setting", SETTINGS if torch.cuda.is_available() else CPU_SETTINGS, ids=lambda s: s.name)
@pytest.mark.parametrize("implementation", ["torch eager", "torch.compile", "ours"])
def test_fused_conv(implementation: str, setting: Setting, benchmark: Any) -> None:
    make = functools.partial(build, with_compile=implementation == "torch.compile")
    run_benchmark(make, setting, setting.dtype, implementation, benchmark)
