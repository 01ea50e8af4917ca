"""Box loss, forward and backward, from given matches: torchvision's head image by image, ours for the batch."""

import dataclasses
import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder, _box_loss

from benchmarks.case import Built, Case, run_benchmark
from benchmarks.models import scenes
from retina_fast.kernels.anchor_matching import anchor_matching
from retina_fast.kernels.box_loss import LOSS_TYPES, box_loss
from retina_fast.kernels.levels import flatten_all


@dataclasses.dataclass(frozen=True)
class Setting:
    loss_type: str
    batch: int = 8
    ground_truths: int = 16
    size: int = 800
    dtype: str = "bfloat16"

    @property
    def name(self) -> str:
        image = f"{self.size}x{self.size}, {self.ground_truths} ground truths an image"
        return f"box loss {self.loss_type}, batch {self.batch}, {image}"


SETTINGS = [Setting(loss_type) for loss_type in LOSS_TYPES]
CPU_SETTINGS = [Setting(loss_type, 2, 8, 256, "float32") for loss_type in ("l1", "ciou")]


def build(setting: Setting, device: torch.device) -> Built:
    size, dtype = setting.size, getattr(torch, setting.dtype)
    anchors = scenes.anchors(size, size, device)
    targets, truths = scenes.scene(setting.batch, setting.ground_truths, size, size, 91, device)
    matches = anchor_matching(anchors, truths.boxes, truths.labels, truths.offsets)
    normalizers = matches.num_foreground.clamp(min=1) * float(setting.batch)
    deltas = scenes.levels(setting.batch, 4, size, size, dtype, device, 0.0, 0.3)
    flat = torch.cat([level.detach() for level in flatten_all(deltas, 4)], dim=1).requires_grad_()  # (B, N, 4)
    coder = BoxCoder((1.0, 1.0, 1.0, 1.0))

    def ours() -> tuple[Tensor, ...]:
        arguments = anchors, matches.indices, truths.boxes, truths.offsets, normalizers, setting.loss_type
        loss = box_loss(deltas, *arguments)
        return loss.detach(), *torch.autograd.grad(loss, deltas)

    def torchvision_loss() -> tuple[Tensor, ...]:
        losses = []
        for b, target in enumerate(targets):
            foreground = torch.where(matches.indices[b] >= 0)[0]
            boxes = target["boxes"][matches.indices[b][foreground].long()]
            loss = _box_loss(setting.loss_type, coder, anchors[foreground], boxes, flat[b][foreground])
            losses.append(loss / max(1, foreground.numel()))
        mean: Any = sum(losses) / setting.batch
        return mean.detach(), *torch.autograd.grad(mean, flat)

    def check() -> None:
        (loss, *grads), (expected, grad) = ours(), torchvision_loss()
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2  # torchvision decodes in bfloat16
        assert abs(loss - expected) <= tolerance * expected, f"{setting}: loss"
        joined = torch.cat(flatten_all(grads, 4), dim=1).double()
        assert (joined - grad.double()).norm() <= 10 * tolerance * joined.norm(), f"{setting}: gradient"

    min_bytes = matches.indices.nbytes + flat.nbytes  # an index in, a gradient out
    return Built(ours, {"torchvision eager": torchvision_loss}, check, min_bytes)


def _case(setting: Setting) -> Case:
    return Case(setting.name, setting.dtype, functools.partial(build, setting))


CASES = [_case(setting) for setting in SETTINGS]
SMALL = [_case(Setting(loss_type, 2, 4, 160, "float32")) for loss_type in LOSS_TYPES]


@pytest.mark.parametrize("setting", CPU_SETTINGS if not torch.cuda.is_available() else SETTINGS, ids=lambda s: s.name)
@pytest.mark.parametrize("implementation", ["torchvision eager", "ours"])
def test_box_loss(implementation: str, setting: Setting, benchmark: Any) -> None:
    run_benchmark(build, setting, setting.dtype, implementation, benchmark)
