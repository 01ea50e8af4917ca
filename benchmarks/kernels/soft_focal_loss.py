"""Quality focal loss and varifocal loss, forward and backward: the definition in eager PyTorch beside ours."""

import dataclasses
import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.case import Built, Case, run_benchmark
from benchmarks.kernels import focal_loss as focal
from retina_fast.kernels.levels import flatten_all
from retina_fast.kernels.soft_focal_loss import WEIGHTS, soft_focal_loss, soft_focal_loss_reference


@dataclasses.dataclass(frozen=True)
class Setting:
    loss_type: str
    batch: int = 8
    size: int = 800
    num_classes: int = 91
    dtype: str = "bfloat16"

    @property
    def name(self) -> str:
        return f"{self.loss_type} loss, batch {self.batch}, {self.size}x{self.size}, {self.num_classes} classes"


SETTINGS = [Setting(loss_type, dtype=dtype) for loss_type in WEIGHTS for dtype in ("float32", "bfloat16")]
CPU_SETTINGS = [Setting(loss_type, 2, 256, 91, "float32") for loss_type in WEIGHTS]


def build(setting: Setting, device: torch.device) -> Built:
    k, size = setting.num_classes, setting.size
    levels, labels, normalizers = focal.inputs(focal.Setting(setting.batch, size, size, k, setting.dtype), device)
    quality = torch.rand(labels.shape, generator=torch.Generator().manual_seed(0)).to(device)
    flat = torch.cat([level.detach() for level in flatten_all(levels, k)], dim=1).requires_grad_()  # (B, N, K)
    rest = labels, quality, normalizers, k, setting.loss_type

    def ours() -> tuple[Tensor, ...]:
        loss = soft_focal_loss(levels, *rest)
        return loss.detach(), *torch.autograd.grad(loss, levels)

    def in_eager() -> tuple[Tensor, ...]:
        loss = soft_focal_loss_reference([flat], *rest)
        return loss.detach(), *torch.autograd.grad(loss, flat)

    def check() -> None:
        (loss, *grads), (expected, exact) = ours(), in_eager()
        assert abs(loss - expected) <= 1e-4 * expected, f"{setting}: loss"
        joined, limit = torch.cat(flatten_all(grads, k), dim=1), 1e-4 if setting.dtype == "float32" else 2**-7
        for grad, of_image in zip(joined.double(), exact.double(), strict=True):
            assert (grad - of_image).norm() <= limit * of_image.norm(), f"{setting}: gradient"

    return Built(ours, {"eager PyTorch": in_eager}, check, min_bytes=2 * flat.nbytes + labels.nbytes)


def _case(setting: Setting) -> Case:
    return Case(setting.name, setting.dtype, functools.partial(build, setting))


CASES = [_case(setting) for setting in SETTINGS]
SMALL = [_case(Setting(loss_type, 2, 96, 7, dtype)) for loss_type in WEIGHTS for dtype in ("float32", "bfloat16")]


@pytest.mark.parametrize("setting", CPU_SETTINGS if not torch.cuda.is_available() else SETTINGS, ids=lambda s: s.name)
@pytest.mark.parametrize("implementation", ["eager PyTorch", "ours"])
def test_soft_focal_loss(implementation: str, setting: Setting, benchmark: Any) -> None:
    run_benchmark(build, setting, setting.dtype, implementation, benchmark)
