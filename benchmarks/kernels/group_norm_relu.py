"""GroupNorm + ReLU of a v2 head's block on its five levels, forward and backward: torch eager, torch.compile, ours.

The levels are channels_last, as the convs write and read them. Eager pays for the change of layout that it makes.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.case import Built, Case, run_benchmark
from retina_fast.kernels.group_norm_relu import group_norm_relu, group_norm_relu_reference

CHANNELS, GROUPS = 256, 32


@dataclasses.dataclass(frozen=True)
class Setting:
    batch: int = 8
    height: int = 800
    width: int = 800
    dtype: str = "bfloat16"

    @property
    def name(self) -> str:
        return f"GroupNorm + ReLU, batch {self.batch}, {self.height}x{self.width}"


BASE = Setting()
SETTINGS = [BASE, Setting(dtype="float32"), Setting(batch=1), Setting(batch=32)]
CPU_SETTINGS = [Setting(batch=1, height=256, width=256, dtype="float32")]


def build(setting: Setting, device: torch.device, with_compile: bool) -> Built:
    dtype = getattr(torch, setting.dtype)
    torch.manual_seed(0)
    cells = [(math.ceil(setting.height / s), math.ceil(setting.width / s)) for s in (8, 16, 32, 64, 128)]

    def made() -> list[Tensor]:
        shapes = [(setting.batch, CHANNELS, h, w) for h, w in cells]
        return [
            torch.randn(shape, device=device).to(dtype, memory_format=torch.channels_last).requires_grad_()
            for shape in shapes
        ]

    levels, incoming = made(), [level.detach() for level in made()]
    weight, bias = (torch.rand(CHANNELS, device=device).requires_grad_() for _ in range(2))

    def step(function: Callable[..., list[Tensor]]) -> tuple[Tensor, ...]:
        # as under autocast, the norm computes in float32 and its result has the convs' dtype
        outputs = function(levels, weight, bias, GROUPS)
        outputs = [output.to(dtype, memory_format=torch.channels_last) for output in outputs]
        return *outputs, *torch.autograd.grad(outputs, [*levels, weight, bias], incoming)

    def eager(levels: list[Tensor], weight: Tensor, bias: Tensor, groups: int) -> list[Tensor]:
        return group_norm_relu_reference([level.float() for level in levels], weight, bias, groups)

    baselines: dict[str, Callable[[], Any]] = {"torch eager": functools.partial(step, eager)}
    if with_compile:
        baselines["torch.compile"] = functools.partial(step, torch.compile(eager, dynamic=False))

    def check() -> None:
        tolerance = {"float32": 1e-5, "bfloat16": 2**-8}[setting.dtype]
        *exact_levels, w, b = (tensor.detach().double().requires_grad_() for tensor in (*levels, weight, bias))
        outputs = group_norm_relu_reference(exact_levels, w, b, GROUPS)
        grads = torch.autograd.grad(outputs, [*exact_levels, w, b], [grad.double() for grad in incoming])
        for ours, exact in zip(step(group_norm_relu), (*outputs, *grads), strict=True):
            assert (ours.double() - exact).norm() <= tolerance * exact.norm(), setting

    min_bytes = 4 * sum(level.nbytes for level in levels)  # x and dy read, y and dx written
    return Built(functools.partial(step, group_norm_relu), baselines, check, min_bytes)


def _case(setting: Setting, with_compile: bool = False) -> Case:
    return Case(setting.name, setting.dtype, functools.partial(build, setting, with_compile=with_compile))


CASES = [_case(setting, with_compile=setting == BASE) for setting in SETTINGS]
SMALL = [_case(Setting(2, 64, 64, dtype)) for dtype in ("float32", "bfloat16")]


@pytest.mark.parametrize("setting", SETTINGS if torch.cuda.is_available() else CPU_SETTINGS, ids=str)
@pytest.mark.parametrize("implementation", ["torch eager", "torch.compile", "ours"])
def test_group_norm_relu(implementation: str, setting: Setting, benchmark: Any) -> None:
    with_compile = implementation == "torch.compile"
    run_benchmark(
        functools.partial(build, with_compile=with_compile), setting, setting.dtype, implementation, benchmark
    )
