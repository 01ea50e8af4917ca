"""Whole models, from image tensors to detections: torchvision eager, under autocast, and compiled; ours, the engine.

The compiled baseline compiles trunk and heads, in channels_last, because the rest depends on the data and would break
the graph at every level. Weights are random, so the last layer is scaled to let about 1% of the scores exceed the
threshold, as on photographs. torchvision is given float images and the engine uint8 ones, as each takes them.
"""

import copy
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.case import COMPILED_SECONDS, SECONDS, Built, Case
from retina_fast import RetinaNet, compile_inference
from retina_fast.builders import MODELS
from retina_fast.convert import to_torchvision
from retina_fast.deploy.engine import Engine, timed_convs
from retina_fast.deploy.report import difference


@dataclasses.dataclass(frozen=True)
class Setting:
    model: str = "retinanet_resnet50_fpn"
    batch: int = 1
    size: int = 800
    num_classes: int = 91
    dtype: str = "bfloat16"

    @property
    def name(self) -> str:
        return f"inference, {self.model}, batch {self.batch}, {self.size}x{self.size}, {self.num_classes} classes"


GOALS = {Setting(batch=1): "E1", Setting(batch=32): "E2"}
SETTINGS = [
    Setting(model, batch) for model in ("retinanet_resnet50_fpn", "retinanet_resnet50_fpn_v2") for batch in (1, 32, 8)
]


@torch.no_grad()
def spread(model: RetinaNet, image: Tensor) -> None:
    """Scales the last layer to logits of mean -4.6 and deviation 0.72, of which 1% exceed the logit of 0.05."""
    layer = model.head.classification_head.cls_logits
    seen: list[Tensor] = []
    handle = layer.register_forward_hook(lambda _, inputs, output: seen.append(output.flatten() - layer.bias.mean()))
    model([image])
    handle.remove()
    layer.weight.mul_(0.72 / torch.cat(seen).std())
    layer.bias.fill_(-4.6)


def build(setting: Setting, device: torch.device, with_compile: bool) -> Built:
    torch.manual_seed(0)
    make = MODELS[setting.model]
    model = make(
        weights=None, weights_backbone=None, num_classes=setting.num_classes, min_size=setting.size, max_size=1333
    )
    model = model.eval().to(device)
    shape = setting.batch, 3, setting.size, setting.size
    images = list(torch.randint(0, 256, shape, dtype=torch.uint8, device=device))
    floats = [image / 255 for image in images]
    spread(model, floats[0])
    dtype = getattr(torch, setting.dtype)
    engine = compile_inference(model, dtype=dtype)
    plain = compile_inference(model, dtype=dtype, max_shapes=0)
    exact = compile_inference(model, dtype=torch.float32)
    theirs = to_torchvision(model)
    compiled = _compiled(copy.deepcopy(theirs)) if with_compile else None

    def run(network: Any, half: bool) -> list[dict[str, Tensor]]:
        with torch.no_grad(), torch.autocast(device.type, dtype=dtype, enabled=half):
            return network(floats)

    baselines: dict[str, Callable[[], Any]] = {"torchvision eager": functools.partial(run, theirs, False)}
    if dtype != torch.float32:
        baselines["torchvision eager AMP"] = functools.partial(run, theirs, True)
    if compiled is not None:
        baselines["torchvision compiled"] = functools.partial(run, compiled, True)

    def check() -> None:
        """The float32 engine must find what torchvision finds, but for pairs within rounding of a threshold. The
        scores and boxes of the timed engine must stay near the model's."""
        tf32 = torch.backends.cudnn.allow_tf32
        torch.backends.cudnn.allow_tf32 = False
        try:
            for found, expected in zip(exact(images), run(theirs, False), strict=True):
                assert len(expected["boxes"]) > 0, setting
                agreeing = _agreeing(found, expected)
                assert agreeing >= 0.98 * len(expected["boxes"]), (setting, agreeing, len(expected["boxes"]))
            seen = difference(model, engine.model, images[:1])
        finally:
            torch.backends.cudnn.allow_tf32 = tf32
        assert seen.scores < 0.05, (setting, seen)
        assert seen.boxes_mean < 1, (setting, seen)
        if device.type == "cuda":
            _check_graph(engine, plain, images)

    weights = sum(parameter.nbytes for parameter in engine.parameters())
    min_bytes = weights + sum(image.nbytes for image in images)
    return Built(lambda: engine.detect(images), baselines, check, min_bytes, uncaptured=lambda: plain.detect(images))


def _compiled(model: Any) -> Any:
    """Compiles trunk and heads for the one shape that a case has."""
    model = model.to(memory_format=torch.channels_last)
    for part in (model.backbone, model.head.classification_head, model.head.regression_head):
        part.compile(dynamic=False)
    return model


def _check_graph(engine: Engine, plain: Engine, images: list[Tensor]) -> None:
    """Checks that a call does not wait for the GPU, and that the replay finds what the same work finds uncaptured."""
    engine.detect(images)
    torch.cuda.set_sync_debug_mode("error")
    try:
        replayed = engine.detect(images)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with timed_convs():  # as in the capture, so that cuDNN chooses the same algorithms
        uncaptured = plain.detect(images)
    for name in ("boxes", "scores"):
        torch.testing.assert_close(getattr(replayed, name), getattr(uncaptured, name), rtol=0, atol=1e-3)
    assert torch.equal(replayed.counts, uncaptured.counts)


def _agreeing(found: dict[str, Tensor], expected: dict[str, Tensor]) -> int:
    """Returns how many expected detections were found, the box within 0.1 px and the score within 1e-3."""
    if not len(found["boxes"]):
        return 0
    near = (expected["boxes"][:, None] - found["boxes"]).abs().amax(dim=2) < 0.1  # (E, F)
    near &= (expected["scores"][:, None] - found["scores"]).abs() < 1e-3
    near &= expected["labels"][:, None] == found["labels"]
    return int(near.any(dim=1).sum())


def _case(setting: Setting, goal: str | None = None) -> Case:
    # compiling takes minutes, so only the goals are compiled
    make = functools.partial(build, setting, with_compile=goal is not None)
    return Case(setting.name, setting.dtype, make, goal, COMPILED_SECONDS if goal else SECONDS)


CASES = [_case(setting, GOALS.get(setting)) for setting in SETTINGS]
_SMALL = Setting("retinanet_resnet18_fpn_v2", 1, 96, 3)
SMALL = [
    _case(_SMALL, "E1"),
    _case(dataclasses.replace(_SMALL, batch=2), "E2"),
    _case(dataclasses.replace(_SMALL, batch=2, dtype="float32")),
]
