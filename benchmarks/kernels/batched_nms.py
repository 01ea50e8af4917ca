"""Batched NMS: torchvision image by image, ours.

    python -m benchmarks.kernels.batched_nms

compares the two on a CPU, in turns, on one image with 5,000 boxes of one class. torchvision adds offsets by class to
the boxes, which rounds them, so its result may differ on borderline pairs. Ours is checked against the reference.
"""

import dataclasses
import functools
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor

from benchmarks.case import Built, Case, print_in_turns, run_benchmark
from retina_fast.kernels.batched_nms import Kept, batched_nms, batched_nms_reference
from retina_fast.ops import nms

IOU, KEPT = 0.5, 300
SETS = ("clustered", "uniform", "all overlapping", "none overlapping", "chain")


@dataclasses.dataclass(frozen=True)
class Setting:
    batch: int = 1
    boxes: int = 5000
    classes: int = 91
    kind: str = "clustered"
    kept: int = KEPT

    @property
    def name(self) -> str:
        boxes = f"{self.boxes} {self.kind} boxes in {self.classes} classes"
        return f"NMS, batch {self.batch}, {boxes}, at most {self.kept} kept"


BASES = [Setting(), Setting(batch=32)]
SETTINGS = [
    *BASES,
    Setting(batch=8),
    *[dataclasses.replace(base, kind=kind) for base in BASES for kind in SETS[1:]],
    *[Setting(classes=1, kind=kind) for kind in SETS],
    *[Setting(boxes=boxes) for boxes in (0, 1000, 20_000, 100_000)],
    Setting(kept=5000),
    Setting(boxes=20_000, classes=1, kept=20_000),
]
GOALS = {base: f"K5-b{base.batch}" for base in BASES}
CPU_SETTING = Setting(classes=1)
ALL_KEPT = Setting(boxes=100_000, classes=1, kind="none overlapping", kept=100_000)


def boxes_of(setting: Setting, generator: torch.Generator) -> Tensor:
    """Returns boxes (B, M, 4), in most sets on a canvas of 800x800; "clustered" are about 20 an object, as detected."""
    shape = setting.batch, setting.boxes

    def rand(*sides: int) -> Tensor:
        return torch.rand(setting.batch, *sides, generator=generator)

    if setting.kind == "clustered":
        objects = max(1, setting.boxes // 20)
        corner, side = rand(objects, 2) * 700, 20 + rand(objects, 2) * 80
        of = torch.randint(0, objects, shape, generator=generator)[..., None].expand(-1, -1, 2)
        corner = corner.gather(1, of) + torch.randn(*shape, 2, generator=generator) * 4
        return torch.cat((corner, corner + side.gather(1, of) * (0.9 + 0.2 * rand(setting.boxes, 2))), dim=2)
    if setting.kind == "uniform":
        corner = rand(setting.boxes, 2) * 700
        return torch.cat((corner, corner + 10 + rand(setting.boxes, 2) * 90), dim=2)
    if setting.kind == "all overlapping":
        return torch.tensor([0.0, 0, 100, 100]) + rand(setting.boxes, 4)
    step = 2.5 if setting.kind == "chain" else 20.0  # of boxes 10 wide: an IoU of 0.6 with the next
    x = (torch.arange(setting.boxes) * step).repeat(setting.batch, 1)
    if setting.kind == "chain":  # a tile that begins at an even rank begins with a box that the tile before suppresses
        x[:, :1] = -1000.0
    return torch.stack((x, torch.zeros(shape), x + 10, torch.full(shape, 10.0)), dim=2)


def inputs(setting: Setting, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns boxes (B, M, 4), scores (B, M), labels (B, M), counts (B,). The neighbours in a chain share a class."""
    generator = torch.Generator().manual_seed(0)
    boxes = boxes_of(setting, generator)
    shape = setting.batch, setting.boxes
    if setting.kind == "chain":
        scores = torch.linspace(1, 0, setting.boxes).expand(shape).contiguous()
        labels = (torch.arange(setting.boxes) * setting.classes // max(1, setting.boxes)).expand(shape).contiguous()
    else:
        scores = torch.rand(shape, generator=generator)
        labels = torch.randint(0, setting.classes, shape, generator=generator)
        if setting.kind == "clustered":  # an object is of one class
            labels = ((boxes[..., 0] + boxes[..., 1]) // 16).long() % setting.classes
    counts = torch.full((setting.batch,), setting.boxes)
    return boxes.to(device), scores.to(device), labels.to(device), counts.to(device)


def build(setting: Setting, device: torch.device) -> Built:
    arguments = inputs(setting, device)
    boxes, scores, labels, counts = arguments

    def ours() -> Kept:
        return batched_nms(*arguments, IOU, setting.kept)

    def torchvision_eager() -> list[Tensor]:
        return [
            torchvision.ops.batched_nms(*image, IOU)[: setting.kept]
            for image in zip(boxes, scores, labels, strict=True)
        ]

    def check() -> None:
        kept = ours()
        exact = batched_nms_reference(boxes.cpu(), scores.cpu(), labels.cpu(), counts.cpu(), IOU, setting.kept)
        assert torch.equal(kept.positions.cpu(), exact.positions), setting
        assert torch.equal(kept.counts.cpu(), exact.counts), setting
        theirs = sum(len(positions) for positions in torchvision_eager())
        assert abs(theirs - int(exact.counts.sum())) <= 0.02 * theirs, setting  # they compute the same function

    return Built(ours, {"torchvision eager": torchvision_eager}, check, min_bytes=boxes.nbytes + scores.nbytes)


def build_nms(setting: Setting, device: torch.device) -> Built:
    """Makes the case of `ops.nms`, which returns as many positions as it keeps and so waits for the GPU."""
    boxes, scores = (tensor[0] for tensor in inputs(setting, device)[:2])

    def ours() -> Tensor:
        return nms(boxes, scores, IOU)

    def torchvision_eager() -> Tensor:
        return torchvision.ops.nms(boxes, scores, IOU)

    def check() -> None:
        kept = ours()
        assert torch.equal(kept, torchvision_eager()), setting
        assert len(kept) == setting.kept, setting

    return Built(ours, {"torchvision eager": torchvision_eager}, check, boxes.nbytes + scores.nbytes, uncaptured=ours)


def _case(setting: Setting, goal: str | None = None) -> Case:
    return Case(setting.name, "float32", functools.partial(build, setting), goal)


def _case_of_nms(setting: Setting) -> Case:
    return Case(f"ops.{setting.name}", "float32", functools.partial(build_nms, setting), "K5-all")


CASES = [*[_case(setting, GOALS.get(setting)) for setting in SETTINGS], _case_of_nms(ALL_KEPT)]
SMALL = [
    _case_of_nms(dataclasses.replace(ALL_KEPT, boxes=300, kept=300)),
    _case(Setting(boxes=200, classes=11, kept=250), "K5-b1"),
    _case(Setting(2, 200, 11, kept=250), "K5-b32"),
    *[_case(Setting(2, 200, 1, kind, 250)) for kind in SETS],
    *[_case(Setting(1, 1500, 1, kind, 1500)) for kind in ("clustered", "chain")],  # tiles that wait for each other
    _case(Setting(boxes=0)),
]


@pytest.mark.parametrize("setting", SETTINGS if torch.cuda.is_available() else [CPU_SETTING], ids=str)
@pytest.mark.parametrize("implementation", ["torchvision eager", "ours"])
def test_batched_nms(implementation: str, setting: Setting, benchmark: Any) -> None:
    run_benchmark(build, setting, "float32", implementation, benchmark)


if __name__ == "__main__":
    for kind in ("clustered", "uniform"):
        setting = dataclasses.replace(CPU_SETTING, kind=kind)
        print(setting.name)
        print_in_turns(build(setting, torch.device("cpu")), 15)
