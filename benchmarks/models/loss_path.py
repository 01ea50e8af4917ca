"""The loss path, from the heads' outputs to their gradients: matching, both losses, backward; torchvision beside ours.

    python -m benchmarks.models.loss_path          on the CPU: batch 2, 512x512, 91 classes, 20 ground truths an image

Both sides start from the heads' outputs as each lays them out: concatenated for torchvision, level by level for ours.
Matchers and losses that torchvision does not have are timed beside its own, and checked against the references.
"""

import dataclasses
import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.case import Built, Case, print_in_turns, run_benchmark
from benchmarks.models import scenes
from retina_fast.forward import HeadOutputs
from retina_fast.kernels.anchor_matching import anchor_matching_reference
from retina_fast.kernels.atss_matching import atss_matching_reference
from retina_fast.kernels.box_loss import box_loss_reference
from retina_fast.kernels.box_quality import box_quality_reference
from retina_fast.kernels.focal_loss import focal_loss_reference
from retina_fast.kernels.levels import flatten_all
from retina_fast.kernels.soft_focal_loss import soft_focal_loss_reference
from retina_fast.losses import detection_losses, matcher_of
from tests.instruments.agreement import models


@dataclasses.dataclass(frozen=True)
class Setting:
    batch: int = 16
    ground_truths: int = 16
    size: int = 800
    num_classes: int = 91
    dtype: str = "bfloat16"
    loss_type: str = "l1"
    matcher: str | None = None
    classification_loss: str = "focal"

    @property
    def name(self) -> str:
        image = f"{self.size}x{self.size}, {self.num_classes} classes, {self.ground_truths} ground truths an image"
        chosen = self.loss_type
        if self.matcher or self.classification_loss != "focal":
            chosen = f"{self.matcher or 'thresholds'}, {self.classification_loss}, {self.loss_type}"
        return f"loss path with {chosen}, batch {self.batch}, {image}"


GOAL = Setting()
SETTINGS = [
    GOAL,
    *[dataclasses.replace(GOAL, ground_truths=count) for count in (1, 100, 500)],
    *[dataclasses.replace(GOAL, batch=batch) for batch in (1, 4)],
    dataclasses.replace(GOAL, loss_type="giou"),
    dataclasses.replace(GOAL, batch=8, dtype="float32"),
    dataclasses.replace(GOAL, loss_type="giou", matcher="atss"),
    dataclasses.replace(GOAL, loss_type="giou", classification_loss="quality_focal"),
    dataclasses.replace(GOAL, loss_type="giou", matcher="atss", classification_loss="varifocal"),
]
CPU_SETTING = Setting(2, 20, 512, 91, "float32")


def build(setting: Setting, device: torch.device) -> Built:
    size, k, dtype = setting.size, setting.num_classes, getattr(torch, setting.dtype)
    theirs, ours = models(k, setting.loss_type)
    if setting.matcher:
        ours.proposal_matcher = matcher_of(setting.matcher)
    ours.classification_loss = setting.classification_loss
    anchors = [scenes.anchors(size, size, device)] * setting.batch
    targets, truths = scenes.scene(setting.batch, setting.ground_truths, size, size, k, device)
    levels = {
        "cls_logits": scenes.levels(setting.batch, k, size, size, dtype, device, -4.6, 1.0),
        "bbox_regression": scenes.levels(setting.batch, 4, size, size, dtype, device, 0.0, 0.1),
    }
    channels = {"cls_logits": k, "bbox_regression": 4}
    joined = {
        key: torch.cat([level.detach() for level in flatten_all(outputs, channels[key])], dim=1).requires_grad_()
        for key, outputs in levels.items()
    }

    def step(model: Any, outputs: dict[str, Any], leaves: list[Tensor]) -> tuple[dict[str, Tensor], Any]:
        losses = model.compute_loss(targets, outputs, anchors)
        return losses, torch.autograd.grad(sum(losses.values()), leaves)

    leaves = [level for outputs in levels.values() for level in outputs]
    step_ours = functools.partial(step, ours, levels, leaves)
    step_torchvision = functools.partial(step, theirs, joined, list(joined.values()))

    def captured() -> Any:  # as in the training step's graph, in whose buffers the ground truths lie flat
        outputs = HeadOutputs(levels, anchors[0], k, {})
        chosen = setting.loss_type, ours.focal_gamma, setting.classification_loss
        losses = detection_losses(outputs, truths, ours.proposal_matcher, *chosen)
        return torch.autograd.grad(losses["classification"] + losses["bbox_regression"], leaves)

    def check_by_references() -> None:
        geometry, offsets = (anchors[0], truths.boxes), truths.offsets
        if setting.matcher == "atss":
            sizes = [level.shape[2:].numel() * scenes.ANCHORS_PER_CELL for level in levels["cls_logits"]]
            arguments = *geometry, truths.labels, offsets, sizes, 9 * scenes.ANCHORS_PER_CELL
            matches = atss_matching_reference(*arguments)
        else:
            matches = anchor_matching_reference(*geometry, truths.labels, offsets)
        normalizers = matches.num_foreground.clamp(min=1) * float(setting.batch)
        where = matches.indices, truths.boxes, offsets
        if setting.classification_loss == "focal":
            exact = focal_loss_reference(levels["cls_logits"], matches.labels, normalizers, k)
        else:
            quality = box_quality_reference(levels["bbox_regression"], anchors[0], *where)
            given = levels["cls_logits"], matches.labels, quality, normalizers, k
            exact = soft_focal_loss_reference(*given, setting.classification_loss)
        box = box_loss_reference(levels["bbox_regression"], anchors[0], *where, normalizers, setting.loss_type)
        for value, expected in zip(step_ours()[0].values(), (exact, box), strict=True):
            assert abs(value - expected) <= 1e-4 * expected, f"{setting}"

    def check() -> None:
        for grad, same in zip(step_ours()[1], captured(), strict=True):
            assert torch.equal(grad, same), f"{setting}: flat ground truths"
        if setting.matcher or setting.classification_loss != "focal":
            return check_by_references()
        (losses, grads), (expected, joined_grads) = step_ours(), step_torchvision()
        # torchvision sums bfloat16 losses in bfloat16
        tolerance = 1e-5 if dtype == torch.float32 else 5e-2
        for key, value in losses.items():
            assert abs(value - expected[key]) <= tolerance * expected[key], f"{setting}: {key}"
        lists = {"cls_logits": grads[:5], "bbox_regression": grads[5:]}
        for (key, levels_of_grads), exact in zip(lists.items(), joined_grads, strict=True):
            grad = torch.cat(flatten_all(levels_of_grads, channels[key]), dim=1)
            for image, image_exact in zip(grad.double(), exact.double(), strict=True):
                assert (image - image_exact).norm() <= 10 * tolerance * image_exact.norm(), f"{setting}: {key}"

    min_bytes = 2 * joined["cls_logits"].nbytes
    return Built(step_ours, {"torchvision eager": step_torchvision}, check, min_bytes, captured=captured)


def _case(setting: Setting, goal: str | None = None) -> Case:
    return Case(setting.name, setting.dtype, functools.partial(build, setting), goal)


CASES = [_case(setting, "K2" if setting == GOAL else None) for setting in SETTINGS]
SMALL = [
    _case(Setting(2, 4, 160, 7), "K2"),
    _case(Setting(2, 4, 160, 7, "float32", "giou")),
    _case(Setting(1, 9, 160, 7)),
    _case(Setting(2, 4, 160, 7, "float32", "giou", "atss")),
    _case(Setting(2, 4, 160, 7, "float32", "giou", "atss", "varifocal")),
    _case(Setting(2, 4, 160, 7, "float32", "giou", None, "quality_focal")),
]


@pytest.mark.parametrize("setting", [GOAL] if torch.cuda.is_available() else [CPU_SETTING], ids=lambda s: s.name)
@pytest.mark.parametrize("implementation", ["torchvision eager", "ours"])
def test_loss_path(implementation: str, setting: Setting, benchmark: Any) -> None:
    run_benchmark(build, setting, setting.dtype, implementation, benchmark)


if __name__ == "__main__":
    print_in_turns(build(CPU_SETTING, torch.device("cpu")), 15)
