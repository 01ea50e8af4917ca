"""What check, the loader of train and evaluate each say of a data set, and that the three agree."""

import io
import math
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor, nn

from retina_fast.checkpoint import build
from retina_fast.commands.check import print_checked
from retina_fast.commands.evaluate import print_evaluation
from retina_fast.data.augment import Flips, TrainingSet, augmentation
from retina_fast.data.check import check, warn_of_faults, warn_of_other_classes
from retina_fast.data.coco import CocoDataset, Tried
from retina_fast.data.errors import ImageError, UserError
from retina_fast.data.faults import REFUSED, Fault, Kind
from retina_fast.data.fitting import FittingImages
from retina_fast.data.voc import open_data
from retina_fast.predict.evaluate import evaluate


class Answer(NamedTuple):
    """What one of the three says: why it refuses the data, or how many images it cannot read and boxes it takes."""

    refused: str = ""
    unreadable: int = 0
    boxes: int = 0

    @property
    def comparable(self) -> tuple[bool, int, int]:
        return bool(self.refused), self.unreadable, self.boxes


class Truth(nn.Module):
    """A detector that knows the true boxes of each picture of a data set, by its pixels."""

    def __init__(self, data: CocoDataset) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.detections_per_img, self.transform = 1000, _MODEL.transform
        tried = Tried(FittingImages(data, _MODEL.transform))
        samples = [sample for sample in map(tried.__getitem__, range(len(data))) if not isinstance(sample, ImageError)]
        self.targets = {self.key(image.as_subclass(Tensor).float() / 255): target for image, target in samples}
        self.distinct = len(self.targets) == len(samples)

    @staticmethod
    def key(image: Tensor) -> tuple[Any, ...]:
        return (*image.shape, image.numpy().tobytes())

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        found = [self.targets[self.key(image)] for image in images]
        return [
            {
                "boxes": x["boxes"].as_subclass(Tensor),
                "labels": x["labels"],
                "scores": torch.full((len(x["labels"]),), 0.9),
            }
            for x in found
        ]


_MODEL = build("retinanet_resnet18_fpn_lite", 1, min_size=800, max_size=1333)  # would resize some to nothing


def by_check(annotations: Path, images: Path | None) -> tuple[Answer, list[Fault]]:
    """The answer of check, and the faults that it names."""
    faults: list[Fault] = []
    try:
        checked = check(annotations, images, _MODEL, faults.append, workers=0)
    except UserError as error:
        return Answer(str(error)), faults
    console = Console(file=io.StringIO())
    print_checked(checked, console)
    for fault in faults:
        str(fault).encode()  # can be printed
        if fault.kind in REFUSED:
            return Answer(str(fault)), faults
    unreadable = sum(fault.kind == Kind.IMAGE for fault in faults)
    if unreadable == checked.images:
        return Answer("not one image can be read"), faults
    return Answer("", unreadable, checked.objects.total()), faults


def by_train(annotations: Path, images: Path | None) -> Answer:
    """The answer of train's loader."""
    try:
        data = open_data(annotations, images)
        warn_of_faults(data)
        fitting: Any = FittingImages(data, _MODEL.transform)
        training_set = TrainingSet(fitting, augmentation(0, Flips.NONE), seed=0)
        for index in range(len(data)):
            boxes = training_set[0, index][1]["boxes"]
            assert torch.isfinite(boxes).all()
            assert (boxes[:, 2:] > boxes[:, :2]).all()
    except UserError as error:
        return Answer(str(error))
    unreadable = sum(isinstance(sample, ImageError) for sample in map(Tried(fitting).__getitem__, range(len(data))))
    return Answer("", unreadable, sum(not box["iscrowd"] for box in data.coco["annotations"]))


def by_evaluate(annotations: Path, images: Path | None) -> tuple[Answer, float]:
    """The answer of evaluate, and the AP of a perfect detector; NaN where none can be expected to have one."""
    try:
        data = open_data(annotations, images)
        warn_of_other_classes(["Tree"], data)
        model = Truth(data)
        found = evaluate(model, data.classes, data, workers=0)
    except UserError as error:
        return Answer(str(error)), math.nan
    assert found is not None
    print_evaluation(found, Console(file=io.StringIO()))
    boxes = [box for box in data.coco["annotations"] if not box["iscrowd"]]
    # float32, in which detectors give boxes, is too coarse for a speck or for what is far away.
    exact = all(min(box["bbox"][2:]) > 0.1 and max(map(abs, box["bbox"])) < 1e4 for box in boxes)
    ap = found.metrics.values["AP"] if exact and model.distinct else math.nan
    return Answer("", len(found.unreadable), len(boxes)), ap


def agreed(annotations: Path, images: Path | None = None) -> tuple[Answer, list[Fault]]:
    """The one answer of all three, and the faults that check names.

    Raises:
        AssertionError: if they differ, or a perfect detector is not found to be one.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        answer, faults = by_check(annotations, images)
        train, (evaluated, ap) = by_train(annotations, images), by_evaluate(annotations, images)
    assert answer.comparable == train.comparable == evaluated.comparable, (answer, train, evaluated)
    assert math.isnan(ap) or ap > 0.999, f"a perfect detector has AP {ap}"
    return answer, faults
