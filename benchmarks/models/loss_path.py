"""The loss path, from the heads' outputs to their gradients: matching, both losses, backward; torchvision beside ours.

    python -m benchmarks.models.loss_path          on the CPU: batch 2, 512x512, 91 classes, 20 ground truths an image
    python -m benchmarks.models.loss_path options  the same for every choice of matcher and losses, with peak memory

Both sides start from the heads' outputs as each lays them out: concatenated for torchvision, level by level for ours.
Matchers and losses that torchvision does not have are timed beside its own, and checked against the references. Where
boxes are distributions, torchvision has its four deltas.
"""

import dataclasses
import functools
import math
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.case import Built, Case, print_in_turns, run_benchmark
from benchmarks.models import scenes
from benchmarks.timing import in_turns, peak_mb
from retina_fast.forward import HeadOutputs
from retina_fast.heads import give_distributions
from retina_fast.kernels.anchor_matching import anchor_matching_reference
from retina_fast.kernels.atss_matching import atss_matching_reference
from retina_fast.kernels.box_loss import box_loss_reference
from retina_fast.kernels.box_quality import box_quality_reference
from retina_fast.kernels.distribution_loss import distribution_loss_reference
from retina_fast.kernels.focal_loss import focal_loss_reference
from retina_fast.kernels.levels import flatten_all
from retina_fast.kernels.side_distributions import box_channels
from retina_fast.kernels.soft_focal_loss import soft_focal_loss_reference
from retina_fast.kernels.task_aligned_matching import AlignedMatches, task_aligned_matching_reference
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
    reg_max: int = 0
    box_weights: str | None = None

    @property
    def chosen(self) -> str:
        chosen = self.loss_type
        if not self.is_torchvisions:
            chosen = f"{self.matcher or 'thresholds'}, {self.classification_loss}, {self.loss_type}"
        chosen += f", distributions over {self.reg_max + 1}" * bool(self.reg_max)
        return chosen + ", by quality" * bool(self.box_weights)

    @property
    def is_torchvisions(self) -> bool:
        return not (self.matcher or self.classification_loss != "focal" or self.reg_max or self.box_weights)

    @property
    def name(self) -> str:
        image = f"{self.size}x{self.size}, {self.num_classes} classes, {self.ground_truths} ground truths an image"
        return f"loss path with {self.chosen}, batch {self.batch}, {image}"


GOAL = Setting()
OPTIONS: list[dict[str, Any]] = [
    {},
    {"loss_type": "giou"},
    {"loss_type": "giou", "matcher": "atss"},
    {"loss_type": "giou", "classification_loss": "quality_focal"},
    {"loss_type": "giou", "matcher": "atss", "classification_loss": "varifocal"},
    {"loss_type": "giou", "matcher": "atss", "classification_loss": "quality_focal", "reg_max": 16},
    {"loss_type": "giou", "matcher": "task_aligned", "classification_loss": "quality_focal", "box_weights": "quality"},
    {"loss_type": "giou", "matcher": "task_aligned", "classification_loss": "quality_focal", "box_weights": "quality",
     "reg_max": 16},
]  # fmt: skip
"""Matchers and losses: torchvision's, and what they can be instead."""
SETTINGS = [
    GOAL,
    *[dataclasses.replace(GOAL, ground_truths=count) for count in (1, 100, 500)],
    *[dataclasses.replace(GOAL, batch=batch) for batch in (1, 4)],
    dataclasses.replace(GOAL, batch=8, dtype="float32"),
    *[dataclasses.replace(GOAL, **option) for option in OPTIONS[1:]],
]
CPU_SETTING = Setting(2, 20, 512, 91, "float32")


def build(setting: Setting, device: torch.device) -> Built:
    size, k, dtype = setting.size, setting.num_classes, getattr(torch, setting.dtype)
    theirs, ours = models(k, setting.loss_type)
    if setting.matcher:
        ours.proposal_matcher = matcher_of(setting.matcher)
    ours.classification_loss, ours.box_weights = setting.classification_loss, setting.box_weights
    if setting.reg_max:
        give_distributions(ours, setting.reg_max)
    anchors = [scenes.anchors(size, size, device)] * setting.batch
    targets, truths = scenes.scene(setting.batch, setting.ground_truths, size, size, k, device)
    channels = {"cls_logits": k, "bbox_regression": box_channels(setting.reg_max)}
    spread = {"cls_logits": (-4.6, 1.0), "bbox_regression": (0.0, 0.1)}
    levels = {
        key: scenes.levels(setting.batch, count, size, size, dtype, device, *spread[key])
        for key, count in channels.items()
    }
    joined = {  # of distributions the first four numbers, which are deltas like any others
        key: torch.cat([level.detach() for level in flatten_all(outputs, channels[key])], dim=1)
        for key, outputs in levels.items()
    }
    joined["bbox_regression"] = joined["bbox_regression"][..., :4].contiguous()
    joined = {key: output.requires_grad_() for key, output in joined.items()}

    def step(model: Any, outputs: dict[str, Any], leaves: list[Tensor]) -> tuple[dict[str, Tensor], Any]:
        losses = model.compute_loss(targets, outputs, anchors)
        total: Any = sum(losses.values())
        return losses, torch.autograd.grad(total, leaves)

    leaves = [level for outputs in levels.values() for level in outputs]
    step_ours = functools.partial(step, ours, levels, leaves)
    step_torchvision = functools.partial(step, theirs, joined, list(joined.values()))

    def captured() -> Any:  # as in the training step's graph, in whose buffers the ground truths lie flat
        outputs = HeadOutputs(levels, anchors[0], k, {}, reg_max=setting.reg_max)
        chosen = setting.loss_type, ours.focal_gamma, setting.classification_loss, setting.box_weights
        losses = detection_losses(outputs, truths, ours.proposal_matcher, *chosen)
        return torch.autograd.grad(losses["classification"] + losses["bbox_regression"], leaves)

    def check_by_references() -> None:
        given: Any
        logits, deltas = levels.values()
        geometry, offsets = (anchors[0], truths.boxes), truths.offsets
        sizes = [level.shape[2:].numel() * scenes.ANCHORS_PER_CELL for level in logits]
        if setting.matcher == "atss":
            given = *geometry, truths.labels, offsets, sizes, 9 * scenes.ANCHORS_PER_CELL
            matches: Any = atss_matching_reference(*given)
        elif setting.matcher == "task_aligned":
            given = logits, deltas, *geometry, truths.labels, offsets, k, 13, 1.0, 6.0, setting.reg_max
            matches = task_aligned_matching_reference(*given)
        else:
            matches = anchor_matching_reference(*geometry, truths.labels, offsets)
        normalizers = matches.num_foreground.clamp(min=1) * float(setting.batch)
        where = anchors[0], matches.indices, truths.boxes, offsets
        aligned = isinstance(matches, AlignedMatches)
        quality = matches.targets if aligned else box_quality_reference(deltas, *where, setting.reg_max)
        if setting.classification_loss == "focal":
            exact = focal_loss_reference(logits, matches.labels, normalizers, k)
        else:
            given = logits, matches.labels, quality, normalizers, k, setting.classification_loss
            exact = soft_focal_loss_reference(*given)
        weights = quality if setting.box_weights else None
        if weights is not None:
            normalizers = weights.sum(dim=1).clamp(min=1) * setting.batch
        if setting.reg_max:
            given = *where, normalizers, setting.reg_max, setting.loss_type, weights
            box = distribution_loss_reference(deltas, *given)
        else:
            box = box_loss_reference(deltas, *where, normalizers, setting.loss_type, weights)
        tolerance = 1e-3 if aligned else 1e-4  # the kernel rounds alignments otherwise
        for value, expected in zip(step_ours()[0].values(), (exact, box), strict=True):
            assert abs(value - expected) <= tolerance * expected, f"{setting}"

    def check() -> None:
        for grad, same in zip(step_ours()[1], captured(), strict=True):
            assert torch.equal(grad, same), f"{setting}: flat ground truths"
        if not setting.is_torchvisions:
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
    _case(Setting(2, 4, 160, 7, "float32", "giou", "task_aligned", "quality_focal", 16, "quality")),
]


@pytest.mark.parametrize("setting", [GOAL] if torch.cuda.is_available() else [CPU_SETTING], ids=lambda s: s.name)
@pytest.mark.parametrize("implementation", ["torchvision eager", "ours"])
def test_loss_path(implementation: str, setting: Setting, benchmark: Any) -> None:
    run_benchmark(build, setting, setting.dtype, implementation, benchmark)


def options(repetitions: int = 15) -> Iterator[str]:
    """Rows of markdown: the medians of every option beside torchvision's own loss path on a CPU, in turns."""
    device = torch.device("cpu")
    settings = [dataclasses.replace(CPU_SETTING, **option) for option in OPTIONS]
    built = [build(setting, device) for setting in settings]
    for case in built:
        case.check()
    calls = {"torchvision": built[0].baselines["torchvision eager"]}
    calls |= {setting.chosen: case.ours for setting, case in zip(settings, built, strict=True)}
    times = in_turns(calls, device, repetitions, math.inf)
    whole = times["torchvision"]["median"]
    yield "| loss path | ms | torchvision's over it | peak MB |\n|---|---|---|---|"
    for name, call in calls.items():
        ms = times[name]["median"]
        yield f"| {name} | {ms:.1f} | {whole / ms:.2f} | {peak_mb(call, device):.0f} |"


if __name__ == "__main__":
    if "options" in sys.argv[1:]:
        print("\n".join(options()))
    else:
        print_in_turns(build(CPU_SETTING, torch.device("cpu")), 15)
