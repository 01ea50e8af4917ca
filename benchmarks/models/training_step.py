"""A whole training step: torchvision eager in float32, under AMP, and compiled; ours as one CUDA graph.

Images and ground truths (16 an image) lie on the device, and the optimizer is SGD with momentum. As in torchvision's
own training, three stages of the trunk are trained, and v1 has FrozenBatchNorm. The compiled baseline compiles trunk,
heads and losses, in channels_last and with a fused optimizer; what in its losses depends on the number of foreground
anchors breaks its graph. Images a second are the batch over the time. Peak memory is that of an uncaptured step, and a
graph holds as much for good.

`python -m benchmarks.models.training_step` times it on a CPU, in float32 and bfloat16, beside torchvision in float32.
"""

import copy
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.detection import retinanet as tv

import retina_fast
from benchmarks.case import COMPILED_SECONDS, SECONDS, Built, Case, print_in_turns, run_benchmark
from retina_fast import RetinaNet, TrainingStep
from retina_fast.backbones.frozen_norm import FrozenBatchNorm2d, as_torchvision
from retina_fast.backbones.resnet_fpn import resnet_fpn

OBJECTS = 16  # an image
LR = 1e-4  # random weights must not run away


@dataclasses.dataclass(frozen=True)
class Setting:
    version: int = 1
    batch: int = 16
    size: int = 800
    trunk: str = "resnet50"
    num_classes: int = 91

    @property
    def name(self) -> str:
        builder = f"retinanet_{self.trunk}_fpn{'_v2' if self.version == 2 else ''}"
        return f"training step, {builder}, batch {self.batch}, {self.size}x{self.size}, {self.num_classes} classes"

    @property
    def image_sizes(self) -> tuple[int, int]:
        """Returns min_size and max_size, at 800 pixels 800 and 1333, so that nothing is resized."""
        return self.size, self.size * 5 // 3


BASE = Setting()
MLPERF = Setting(trunk="resnext50_32x4d", num_classes=264)  # the model of MLPerf Training v5.1
CPU_SETTING = Setting(batch=2, size=128, trunk="resnet18", num_classes=5)


def network(setting: Setting) -> RetinaNet:
    """Returns the model with random weights, of whose trunk the last three stages are trained."""
    torch.manual_seed(0)
    if setting.version == 1:
        trunk = getattr(torchvision.models, setting.trunk)(norm_layer=FrozenBatchNorm2d)
        backbone = resnet_fpn(trunk, 3, p6_from_c5=False)
        return RetinaNet(backbone, setting.num_classes, *setting.image_sizes).train()
    builder = getattr(retina_fast, f"retinanet_{setting.trunk}_fpn_v2")
    sizes = dict(zip(("min_size", "max_size"), setting.image_sizes, strict=True))
    model = builder(weights=None, weights_backbone=None, num_classes=setting.num_classes, **sizes)
    for name in ("conv1", "bn1", "layer1"):
        model.backbone.body[name].requires_grad_(False)
    return model.train()


def torchvision_copy(model: RetinaNet, setting: Setting) -> tv.RetinaNet:
    """Returns torchvision's model with the same weights."""
    parts = {name: copy.deepcopy(getattr(model, name)) for name in ("anchor_generator", "head")}
    backbone = copy.deepcopy(model.backbone)
    as_torchvision(backbone)
    return tv.RetinaNet(backbone, setting.num_classes, *setting.image_sizes, **parts).train()


def inputs(setting: Setting, device: torch.device) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Returns images and their targets."""
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(3, setting.size, setting.size, generator=generator).to(device) for _ in range(setting.batch)]
    targets = []
    for _ in range(setting.batch):
        corner = torch.rand(OBJECTS, 2, generator=generator) * 0.7
        side = 0.02 + torch.rand(OBJECTS, 2, generator=generator) * 0.28
        boxes = (torch.cat((corner, corner + side), dim=1) * setting.size).to(device)
        labels = torch.randint(0, setting.num_classes, (OBJECTS,), generator=generator).to(device)
        targets.append({"boxes": boxes, "labels": labels})
    return images, targets


def _sgd(model: nn.Module, **kwargs: Any) -> torch.optim.SGD:
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.SGD(trained, lr=LR, momentum=0.9, weight_decay=1e-4, **kwargs)


def _eager(
    model: nn.Module, optimizer: torch.optim.Optimizer, images: Any, targets: Any, half: bool
) -> dict[str, Tensor]:
    optimizer.zero_grad(set_to_none=True)
    with torch.autocast(images[0].device.type, dtype=torch.bfloat16, enabled=half):
        losses = model(images, targets)
    (losses["classification"] + losses["bbox_regression"]).backward()
    optimizer.step()
    return {name: loss.detach() for name, loss in losses.items()}


def _compiled(model: tv.RetinaNet) -> tv.RetinaNet:
    """Compiles trunk and heads for the one shape that a case has, and the losses for any number of foreground."""
    model = model.to(memory_format=torch.channels_last)
    model.backbone.compile(dynamic=False)
    for head in (model.head.classification_head, model.head.regression_head):
        head.compile(dynamic=False)
        head.compute_loss = torch.compile(head.compute_loss)
    return model


def build(
    setting: Setting, device: torch.device, baselines: tuple[str, ...], dtype: torch.dtype | None = torch.bfloat16
) -> Built:
    """Makes a case with baselines among "torchvision eager", the same with "AMP" or "compiled", and "uncaptured"; ours
    in mixed precision, or with dtype None in float32."""
    model = network(setting).to(device)
    batch = inputs(setting, device)

    def step_of(model: RetinaNet, max_boxes: int) -> Callable[[], dict[str, Tensor]]:
        step = TrainingStep(model, _sgd(model, fused=True), max_boxes, dtype=dtype)
        steps.append(step)
        return functools.partial(step, *batch)

    def baseline(name: str) -> Callable[[], dict[str, Tensor]]:
        if name == "uncaptured":
            return uncaptured
        theirs = torchvision_copy(model, setting).to(device)
        compiled = name == "torchvision compiled"
        theirs = _compiled(theirs) if compiled else theirs
        optimizer = _sgd(theirs, fused=compiled or None)
        return functools.partial(_eager, theirs, optimizer, *batch, half=name != "torchvision eager")

    steps: list[TrainingStep] = []
    uncaptured = step_of(copy.deepcopy(model), max_boxes=1)  # into which the ground truths never fit
    built = {name: baseline(name) for name in baselines}
    ours = step_of(model, max_boxes=100 * setting.batch)

    def check() -> None:
        """Compares the losses of the first steps from the same weights. On a GPU, a step must be one replay that never
        waits for the host."""
        for number in range(2):
            losses = ours()
            for name, call in built.items():
                for key, expected in call().items():
                    error = abs(losses[key] - expected) / expected
                    assert error <= 0.03, f"{setting.name}, step {number}: {key} of {name} differs by {error:.1%}"
        if device.type == "cuda":
            for _ in range(3):
                ours()
            replayed = steps[1].replayed_steps
            torch.cuda.set_sync_debug_mode("error")
            try:
                ours()
            finally:
                torch.cuda.set_sync_debug_mode("default")
            assert steps[1].replayed_steps == replayed + 1
            assert steps[0].replayed_steps == 0

    weights = sum(p.nbytes for p in model.parameters())
    moved = sum(image.nbytes for image in batch[0]) + 2 * weights  # images read, weights read and written
    return Built(ours, built, check, moved, uncaptured)


_EAGER, _AMP, _COMPILED = "torchvision eager", "torchvision eager AMP", "torchvision compiled"


def _case(setting: Setting, baselines: tuple[str, ...], goal: str | None = None, suffix: str = "") -> Case:
    seconds = COMPILED_SECONDS if _COMPILED in baselines else SECONDS
    return Case(
        setting.name + suffix, "bfloat16", functools.partial(build, setting, baselines=baselines), goal, seconds
    )


CASES = [
    _case(BASE, (_AMP, _COMPILED, _EAGER), "E3"),
    _case(BASE, ("uncaptured",), "E4", ", captured"),
    _case(MLPERF, (_AMP,), "E3-mlperf"),
    _case(dataclasses.replace(BASE, version=2), (_AMP, _COMPILED)),
]
_SMALL = dataclasses.replace(CPU_SETTING, size=64)
SMALL = [
    _case(_SMALL, (_AMP, _COMPILED, _EAGER), "E3"),
    _case(_SMALL, ("uncaptured",), "E4", ", captured"),
    _case(dataclasses.replace(_SMALL, num_classes=7), (_AMP,), "E3-mlperf"),
    _case(dataclasses.replace(_SMALL, version=2), (_AMP,)),
]


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("implementation", [_AMP, _COMPILED, "ours"])
def test_training_step(implementation: str, version: int, benchmark: Any) -> None:
    setting = dataclasses.replace(BASE if torch.cuda.is_available() else CPU_SETTING, version=version)
    baselines = (_AMP,) if implementation == "ours" else (implementation,)
    run_benchmark(functools.partial(build, baselines=baselines), setting, "bfloat16", implementation, benchmark)


if __name__ == "__main__":
    on_cpu = dataclasses.replace(BASE, batch=2, size=512)
    for dtype in (None, torch.bfloat16):
        print(f"{on_cpu.name}, {'float32' if dtype is None else 'bfloat16'}")
        print_in_turns(build(on_cpu, torch.device("cpu"), (_EAGER,), dtype), 5)
