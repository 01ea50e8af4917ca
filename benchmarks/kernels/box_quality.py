"""The IoU of predicted boxes with their ground truths: by torchvision's coder image by image, ours for the batch."""

import dataclasses
import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder

from benchmarks.case import Built, Case, run_benchmark
from benchmarks.models import scenes
from retina_fast.kernels.anchor_matching import anchor_matching
from retina_fast.kernels.box_quality import box_quality
from retina_fast.kernels.levels import flatten_all
from retina_fast.kernels.pair_iou import box_iou


@dataclasses.dataclass(frozen=True)
class Setting:
    batch: int = 8
    ground_truths: int = 16
    size: int = 800
    dtype: str = "bfloat16"

    @property
    def name(self) -> str:
        image = f"{self.size}x{self.size}, {self.ground_truths} ground truths an image"
        return f"box quality, batch {self.batch}, {image}"


SETTINGS = [Setting(), Setting(16), Setting(ground_truths=500)]
CPU_SETTINGS = [Setting(2, 8, 256, "float32")]


def build(setting: Setting, device: torch.device) -> Built:
    size, dtype = setting.size, getattr(torch, setting.dtype)
    anchors = scenes.anchors(size, size, device)
    targets, truths = scenes.scene(setting.batch, setting.ground_truths, size, size, 91, device)
    indices = anchor_matching(anchors, truths.boxes, truths.labels, truths.offsets).indices
    deltas = [level.detach() for level in scenes.levels(setting.batch, 4, size, size, dtype, device, 0.0, 0.3)]
    flat = torch.cat(flatten_all(deltas, 4), dim=1)  # (B, N, 4)
    coder = BoxCoder((1.0, 1.0, 1.0, 1.0))

    def ours() -> Tensor:
        return box_quality(deltas, anchors, indices, truths.boxes, truths.offsets)

    def by_image() -> Tensor:
        quality = torch.zeros(indices.shape, device=device)
        for b, target in enumerate(targets):
            foreground = torch.where(indices[b] >= 0)[0]
            boxes = coder.decode_single(flat[b][foreground].float(), anchors[foreground])
            quality[b, foreground] = box_iou(boxes, target["boxes"][indices[b][foreground].long()])
        return quality

    def check() -> None:
        assert (ours() - by_image()).abs().max() <= 1e-4, f"{setting}"

    min_bytes = indices.nbytes + 4 * indices.numel()  # an index in, a quality out
    return Built(ours, {"eager PyTorch": by_image}, check, min_bytes)


def _case(setting: Setting) -> Case:
    return Case(setting.name, setting.dtype, functools.partial(build, setting))


CASES = [_case(setting) for setting in SETTINGS]
SMALL = [_case(Setting(2, 4, 160, "float32")), _case(Setting(1, 9, 160))]


@pytest.mark.parametrize("setting", CPU_SETTINGS if not torch.cuda.is_available() else SETTINGS, ids=lambda s: s.name)
@pytest.mark.parametrize("implementation", ["eager PyTorch", "ours"])
def test_box_quality(implementation: str, setting: Setting, benchmark: Any) -> None:
    run_benchmark(build, setting, setting.dtype, implementation, benchmark)
