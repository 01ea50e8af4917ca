"""Distribution focal loss with GIoU, forward and backward, from given matches: PyTorch's operations, and ours."""

import dataclasses
import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.case import Built, Case, run_benchmark
from benchmarks.models import scenes
from retina_fast.kernels.anchor_matching import anchor_matching
from retina_fast.kernels.distribution_loss import distribution_loss, distribution_loss_reference
from retina_fast.kernels.side_distributions import box_channels


@dataclasses.dataclass(frozen=True)
class Setting:
    batch: int = 8
    ground_truths: int = 16
    size: int = 800
    dtype: str = "bfloat16"
    reg_max: int = 16

    @property
    def name(self) -> str:
        image = f"{self.size}x{self.size}, {self.ground_truths} ground truths an image"
        return f"distribution loss, n={self.reg_max}, batch {self.batch}, {image}"


SETTINGS = [Setting(), Setting(ground_truths=100)]
CPU_SETTINGS = [Setting(2, 8, 256, "float32")]


def build(setting: Setting, device: torch.device) -> Built:
    size, dtype = setting.size, getattr(torch, setting.dtype)
    anchors = scenes.anchors(size, size, device)
    _, truths = scenes.scene(setting.batch, setting.ground_truths, size, size, 91, device)
    matches = anchor_matching(anchors, truths.boxes, truths.labels, truths.offsets)
    normalizers = matches.num_foreground.clamp(min=1) * float(setting.batch)
    channels = box_channels(setting.reg_max)
    levels = scenes.levels(setting.batch, channels, size, size, dtype, device, 0.0, 1.0)
    arguments = anchors, matches.indices, truths.boxes, truths.offsets, normalizers, setting.reg_max

    def by(loss_of: Any) -> tuple[Tensor, ...]:
        loss = loss_of(levels, *arguments)
        return loss.detach(), *torch.autograd.grad(loss, levels)

    ours, eager = functools.partial(by, distribution_loss), functools.partial(by, distribution_loss_reference)

    def check() -> None:
        (loss, *grads), (expected, *exact) = ours(), eager()
        assert abs(loss - expected) <= 1e-4 * expected, f"{setting}: loss"
        for grad, other in zip(grads, exact, strict=True):
            tolerance = 1e-4 if dtype == torch.float32 else 2e-2
            assert (grad.double() - other.double()).norm() <= tolerance * other.double().norm(), f"{setting}: gradient"

    min_bytes = matches.indices.nbytes + sum(level.nbytes for level in levels)  # an index in, a gradient out
    return Built(ours, {"eager PyTorch": eager}, check, min_bytes)


def _case(setting: Setting) -> Case:
    return Case(setting.name, setting.dtype, functools.partial(build, setting))


CASES = [_case(setting) for setting in SETTINGS]
SMALL = [_case(Setting(2, 4, 160, "float32")), _case(Setting(1, 9, 160, reg_max=7))]


@pytest.mark.parametrize("setting", CPU_SETTINGS if not torch.cuda.is_available() else SETTINGS, ids=lambda s: s.name)
@pytest.mark.parametrize("implementation", ["eager PyTorch", "ours"])
def test_distribution_loss(implementation: str, setting: Setting, benchmark: Any) -> None:
    run_benchmark(build, setting, setting.dtype, implementation, benchmark)
