"""From the heads' outputs to detections: torchvision eager, ours.

    python -m benchmarks.kernels.postprocess

compares the two on a CPU, in turns, at 512x512 with 91 classes: at batch 8 and 1 with 1% of the scores above the
threshold, and at batch 1 with 10%. In CASES one factor is varied at a time from 8 images of 800x800 with 91 classes in
bfloat16, 1% above. torchvision is given its concatenated outputs ready-made, and its detections are not rescaled, which
ours are.
"""

import dataclasses
import functools
import math
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torchvision.models.detection.image_list import ImageList

from benchmarks.case import Built, Case, print_in_turns, run_benchmark
from retina_fast.detections import Detections, Thresholds, detect
from retina_fast.forward import HeadOutputs
from retina_fast.kernels.batched_nms import batched_nms, batched_nms_reference
from retina_fast.kernels.box_decode import box_decode, box_decode_reference
from retina_fast.kernels.candidate_selection import candidate_selection, candidate_selection_reference, logit
from retina_fast.kernels.levels import flatten_all
from retina_fast.kernels.take_kept import take_kept, take_kept_reference
from tests.instruments.agreement import models

ANCHORS_PER_CELL = 9
THRESHOLD, TOPK, IOU, KEPT = 0.05, 1000, 0.5, 300


@dataclasses.dataclass(frozen=True)
class Setting:
    what: ClassVar[str] = "postprocess"
    batch: int = 8
    height: int = 800
    width: int = 800
    num_classes: int = 91
    dtype: str = "bfloat16"
    above: float = 0.01

    @property
    def name(self) -> str:
        return (
            f"{self.what}, batch {self.batch}, {self.height}x{self.width}, {self.num_classes} classes, "
            f"{self.above:.1%} above the threshold"
        )


BASE = Setting()
SETTINGS = [
    *[dataclasses.replace(BASE, batch=batch) for batch in (1, 8, 32, 2, 4, 16)],
    *[dataclasses.replace(BASE, above=above) for above in (0.0, 0.001, 0.1, 1.0)],
    dataclasses.replace(BASE, dtype="float32"),
    dataclasses.replace(BASE, num_classes=1),
    dataclasses.replace(BASE, width=1344),
]
GOALS = {dataclasses.replace(BASE, batch=batch): f"K4-b{batch}" for batch in (1, 8, 32)}
CPU_SETTING = Setting(height=512, width=512, dtype="float32")


def inputs(setting: Setting, device: torch.device) -> tuple[dict[str, list[Tensor]], Tensor, list[int]]:
    """Returns head outputs (channels_last) by level, the anchors (N, 4), and how many anchors each level has."""
    cells = [(math.ceil(setting.height / s), math.ceil(setting.width / s)) for s in (8, 16, 32, 64, 128)]
    tail = torch.special.ndtri(torch.tensor(1 - setting.above)).clamp(-8, 8).item()  # standard deviations
    generator = torch.Generator(device).manual_seed(0)

    def made(channels: int, mean: float, deviation: float) -> list[Tensor]:
        dtype, layout = getattr(torch, setting.dtype), torch.channels_last
        empty = [
            torch.empty(setting.batch, channels, *c, dtype=dtype, device=device, memory_format=layout) for c in cells
        ]
        return [level.normal_(mean, deviation, generator=generator) for level in empty]

    outputs = {
        "cls_logits": made(ANCHORS_PER_CELL * setting.num_classes, logit(THRESHOLD) - tail, 1.0),
        "bbox_regression": made(ANCHORS_PER_CELL * 4, 0.0, 0.1),
    }
    grids = [torch.zeros(1, 1, *cell, device=device) for cell in cells]
    images = ImageList(
        torch.zeros(1, 3, setting.height, setting.width, device=device), [(setting.height, setting.width)]
    )
    return outputs, models()[0].anchor_generator(images, grids)[0], [h * w * ANCHORS_PER_CELL for h, w in cells]


def check(ours: Detections, outputs: dict[str, list[Tensor]], anchors: Tensor, sizes: Tensor, k: int) -> None:
    """Checks each operation against its reference on the same input, exactly but for the last bit of exp."""
    logits, deltas = outputs["cls_logits"], outputs["bbox_regression"]
    candidates = candidate_selection(logits, k, THRESHOLD, TOPK)
    expected = candidate_selection_reference(logits, k, THRESHOLD, TOPK)
    assert all(
        torch.equal(getattr(candidates, name), getattr(expected, name)) for name in ("anchors", "labels", "counts")
    )
    torch.testing.assert_close(candidates.scores, expected.scores, rtol=1e-6, atol=0)
    boxes = box_decode(deltas, anchors, candidates.anchors, sizes)
    exact = box_decode_reference(deltas, anchors, candidates.anchors, sizes)
    torch.testing.assert_close(boxes, exact, rtol=1e-6, atol=1e-6 * float(sizes.max()))
    labels, counts, most = candidates.labels, candidates.counts, min(KEPT, boxes.shape[1])
    kept = batched_nms(boxes, None, labels, counts, IOU, most)
    greedy = batched_nms_reference(boxes.cpu(), None, labels.cpu(), counts.cpu(), IOU, most)
    assert torch.equal(kept.positions.cpu(), greedy.positions)
    assert torch.equal(kept.counts.cpu(), greedy.counts)
    chosen = boxes, candidates.scores, candidates.labels, kept.positions, kept.counts, sizes, sizes
    for taken, taken_exactly, whole in zip(take_kept(*chosen), take_kept_reference(*chosen), ours[:3], strict=True):
        assert torch.equal(taken, taken_exactly)
        assert torch.equal(taken, whole)


@torch.no_grad()
def build(setting: Setting, device: torch.device) -> Built:
    outputs, anchors, lengths = inputs(setting, device)
    k, size = setting.num_classes, (setting.height, setting.width)
    channels = {"cls_logits": k, "bbox_regression": 4}
    joined = {key: torch.cat(flatten_all(outputs[key], channels[key]), dim=1) for key in outputs}
    split = {key: list(value.split(lengths, dim=1)) for key, value in joined.items()}
    image_anchors = [list(anchors.split(lengths))] * setting.batch
    theirs = models()[0]
    sizes = torch.tensor([size] * setting.batch, device=device)

    @torch.no_grad()
    def ours() -> Detections:
        return detect(HeadOutputs(outputs, anchors, k, {}), sizes, sizes, Thresholds(THRESHOLD, TOPK, IOU, KEPT))

    @torch.no_grad()
    def torchvision_eager() -> Any:
        with torch.autocast(
            device.type, torch.bfloat16, enabled=setting.dtype == "bfloat16"
        ):  # it has no NMS for boxes
            return theirs.postprocess_detections(split, image_anchors, [size] * setting.batch)

    return Built(
        ours,
        {"torchvision eager": torchvision_eager},
        lambda: check(ours(), outputs, anchors, sizes, k),
        min_bytes=joined["cls_logits"].nbytes,
    )


def _case(setting: Setting, goal: str | None = None) -> Case:
    return Case(setting.name, setting.dtype, functools.partial(build, setting), goal)


CASES = [_case(setting, GOALS.get(setting)) for setting in SETTINGS]
SMALL = [
    *[_case(Setting(batch, 128, 96, 11), f"K4-b{goal}") for batch, goal in ((1, 1), (2, 8), (3, 32))],
    *[_case(Setting(2, 128, 96, 11, above=above)) for above in (0.0, 1.0)],
]


@pytest.mark.parametrize("setting", SETTINGS if torch.cuda.is_available() else [CPU_SETTING], ids=str)
@pytest.mark.parametrize("implementation", ["torchvision eager", "ours"])
def test_postprocess(implementation: str, setting: Setting, benchmark: Any) -> None:
    run_benchmark(build, setting, setting.dtype, implementation, benchmark)


if __name__ == "__main__":
    one = dataclasses.replace(CPU_SETTING, batch=1)
    for setting in (CPU_SETTING, one, dataclasses.replace(one, above=0.1)):
        print(f"{setting.name}, {setting.dtype}")
        print_in_turns(build(setting, torch.device("cpu")), 9)
