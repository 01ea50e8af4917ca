"""What every choice of matcher and losses takes on an H200, from the heads' outputs to their gradients, and the memory.

`python -m benchmarks.predict.options` writes the table of NOTES.md for the cases of benchmarks/models/loss_path.py: 16
images of 800x800, 91 classes, 16 ground truths an image, bfloat16. Foreground is taken to lie as the thresholds' does.

Memory is that of all tensors that the launches write or read beside their inputs, as if none were freed before the end.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torchvision.models.detection._utils import Matcher

from benchmarks.gpu.report import write_between
from benchmarks.models import loss_path, scenes
from benchmarks.predict import roofline
from benchmarks.predict.goals import matching_scene
from benchmarks.predict.predictions import NOTES, by_variant, steps_of
from benchmarks.predict.work import Scene
from benchmarks.static.compiled import report
from retina_fast.forward import DELTAS, LOGITS, HeadOutputs
from retina_fast.kernels.match_keys import centres_of
from retina_fast.kernels.one_pass import scale_op
from retina_fast.kernels.side_distributions import box_channels
from retina_fast.losses import detection_losses, matcher_of
from retina_fast.targets import GroundTruths
from tests.instruments import kernel_calls
from tests.instruments.fake_gpu import Launch, gpu_work_of

BEGIN, END = "<!-- options -->", "<!-- end of options -->"
_CODE = "anchor_matching", "atss_matching", "task_aligned", "focal", "soft_focal", "box_", "distribution", "one_pass"
_TILE = 128


def scene_of(setting: loss_path.Setting) -> Scene:
    """Returns how many tiles and anchors the ground truths of the first image meet, beside what thresholds match."""
    anchors = scenes.anchors(setting.size, setting.size, torch.device("cpu"))
    given = setting.batch, setting.ground_truths, setting.size, setting.size, setting.num_classes
    boxes = scenes.scene(*given, torch.device("cpu")).truths.boxes[: setting.ground_truths]
    tiles = [centres_of(tile) for tile in anchors.split(_TILE)]
    bounds = torch.stack([torch.cat((tile.amin(0), tile.amax(0))) for tile in tiles])  # (T, 4)
    met = (boxes[:, None, :2] < bounds[:, 2:]).all(2) & (boxes[:, None, 2:] > bounds[:, :2]).all(2)  # (G, T)
    centres = torch.cat(tiles)
    inside = (centres > boxes[:, None, :2]).all(2) & (centres < boxes[:, None, 2:]).all(2)  # (G, N)
    return dataclasses.replace(
        matching_scene(setting.batch, setting.ground_truths),
        near=float(met.sum(1).float().mean()),
        most_near=int(met.sum(1).max()),
        inside=float(inside.sum(1).float().mean()),
        decoded=float(met.any(0).float().mean()),
    )


def call_of(setting: loss_path.Setting, inputs: list[Tensor]) -> None:
    """Calls the loss path of a setting on fake CUDA tensors, which it adds to the inputs."""
    dtype, batch = getattr(torch, setting.dtype), setting.batch
    channels = {LOGITS: setting.num_classes, DELTAS: box_channels(setting.reg_max)}
    levels = {name: kernel_calls.levels_of(dtype, count, batch) for name, count in channels.items()}
    anchors = torch.empty(120087, 4, device="cuda")
    flat = kernel_calls.ground_truths(setting.ground_truths * batch, batch)
    inputs += [*tree_leaves(levels), anchors, *flat]
    truths = GroundTruths(*flat, [setting.ground_truths] * batch)
    outputs = HeadOutputs(
        levels, anchors, setting.num_classes, {}, [100**2, 50**2, 25**2, 13**2, 7**2], setting.reg_max
    )
    matcher = matcher_of(setting.matcher) or Matcher(0.5, 0.4, True)
    chosen = setting.loss_type, 2.0, setting.classification_loss, setting.box_weights
    losses = detection_losses(outputs, truths, matcher, *chosen)
    sum(loss.detach() for loss in losses.values())
    for name, count in channels.items():
        grads = [level.detach() for level in kernel_calls.flatten_all(levels[name], count)]
        scale_op(grads, torch.ones((), device="cuda"))


def bytes_of(launches: list[Launch], inputs: list[Tensor]) -> int:
    """Returns the bytes of all storages that the launches are given, but for those of the inputs."""
    tensors: list[Any] = [x for launch in launches for x in tree_leaves(launch.args) if isinstance(x, Tensor)]
    sizes = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in tensors}
    return sum(size for key, size in sizes.items() if key not in {x.untyped_storage()._cdata for x in inputs})


def table() -> Iterator[str]:
    """Returns the predictions as rows of markdown."""
    code = by_variant(report(["sm_90"], [name for name in kernel_calls.KERNEL_CALLS if name.startswith(_CODE)]))
    yield "| loss path | predicted, ms | as a graph | MB | longest |\n|---|---|---|---|---|"
    for option in loss_path.OPTIONS:
        setting, inputs = dataclasses.replace(loss_path.GOAL, **option), list[Tensor]()
        work = gpu_work_of(functools.partial(call_of, setting, inputs))
        steps = steps_of(work, code, scene_of(setting))
        size = bytes_of([step for step in work if isinstance(step, Launch)], inputs)
        first = sorted(steps, key=lambda step: -step.seconds)[:3]
        longest = ", ".join(f"{step.name} {1e6 * step.seconds:.0f} us" for step in first)
        eager, graph = (1e3 * roofline.total(steps, graph) for graph in (False, True))
        yield f"| {setting.chosen} | {eager:.3f} | {graph:.3f} | {size / 1e6:.0f} | {longest} |"


if __name__ == "__main__":
    rows = "\n".join(table())
    write_between(NOTES, BEGIN, END, f"\n{rows}\n")
    print(rows)
