"""SpineNet detectors beside ResNet-50-FPN at the same image size: forward, and forward with backward, in bfloat16.

What is timed differs between the models: backbone and heads, from a batch to logits and deltas, and back from their
gradients. Images a second are the batch over the time. The ratio of a record is ResNet's time over SpineNet's.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.case import Built, Case, run_benchmark
from retina_fast.builders import MODELS
from retina_fast.forward import run_convs

BASELINE = "retinanet_resnet50_fpn"
NUM_CLASSES = 91


@dataclasses.dataclass(frozen=True)
class Setting:
    model: str
    side: int
    batch: int
    training: bool = False

    @property
    def name(self) -> str:
        work = "forward and backward" if self.training else "forward"
        return f"{self.model}, batch {self.batch}, {self.side}x{self.side}, {work}"


SETTINGS = [
    Setting(f"retinanet_spinenet{size}", side, batch, training)
    for size, side, largest in (("49s", 640, 32), ("49", 640, 32), ("96", 1024, 16))
    for batch, training in ((1, False), (largest, False), (largest, True))
]
CPU_SETTINGS = [Setting("retinanet_spinenet49s", 128, 2, training) for training in (False, True)]


def _outputs(model: Any, batch: Tensor) -> list[Tensor]:
    outputs = run_convs(model, batch)[1]
    return [*outputs["cls_logits"], *outputs["bbox_regression"]]


def _call(name: str, setting: Setting, device: torch.device) -> tuple[Any, Callable[[], list[Tensor]]]:
    """Returns the model and a call of it, which gives its outputs, or in training the gradients of its parameters."""
    torch.manual_seed(0)
    model = MODELS[name](weights=None, weights_backbone=None, num_classes=NUM_CLASSES).to(device)
    model = model.train(setting.training).to(memory_format=torch.channels_last)
    batch = torch.rand(setting.batch, 3, setting.side, setting.side, device=device)
    batch = batch.contiguous(memory_format=torch.channels_last)
    parameters = [p for p in model.parameters() if p.requires_grad]

    def outputs() -> list[Tensor]:
        # A cache of cast weights would outlive the CUDA graph that filled it.
        with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
            return _outputs(model, batch)

    def forward() -> list[Tensor]:
        with torch.no_grad():
            return outputs()

    if not setting.training:
        return model, forward
    seeds = [torch.randn_like(output) for output in forward()]
    return model, lambda: list(torch.autograd.grad(outputs(), parameters, seeds))


def build(setting: Setting, device: torch.device) -> Built:
    model, ours = _call(setting.model, setting, device)
    _, resnet = _call(BASELINE, setting, device)
    weights = sum(p.nbytes for p in model.parameters())
    images = setting.batch * 3 * setting.side**2 * 4

    def check() -> None:
        """Compares the maps in bfloat16 with float32 on one image, and the shapes of the outputs with ResNet's."""
        image = torch.rand(1, 3, setting.side, setting.side, device=device)
        was_training = model.training
        with torch.no_grad():
            exact = model.eval().backbone(image)
            with torch.autocast(device.type, torch.bfloat16):
                maps = model.backbone(image)
        model.train(was_training)
        for name, level in exact.items():
            assert (maps[name] - level).norm() <= 0.1 * level.norm(), f"{setting}: {name}"
        results = ours()
        assert all(torch.isfinite(result).all() for result in results), setting
        if setting.training:
            assert [result.shape for result in results] == [p.shape for p in model.parameters()], setting
        else:
            assert [result.shape for result in results] == [result.shape for result in resnet()], setting

    return Built(ours, {BASELINE: resnet}, check, min_bytes=images + weights * (2 if setting.training else 1))


def _case(setting: Setting) -> Case:
    return Case(setting.name, "bfloat16", functools.partial(build, setting))


CASES = [_case(setting) for setting in SETTINGS]
SMALL = [_case(setting) for setting in CPU_SETTINGS]


@pytest.mark.parametrize("setting", SETTINGS if torch.cuda.is_available() else CPU_SETTINGS, ids=str)
@pytest.mark.parametrize("implementation", [BASELINE, "ours"])
def test_spinenet(implementation: str, setting: Setting, benchmark: Any) -> None:
    run_benchmark(build, setting, "bfloat16", implementation, benchmark)
