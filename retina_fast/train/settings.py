"""What decides the weights of a training run."""

import hashlib
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from retina_fast.data.augment import Flips
from retina_fast.data.coco import CocoDataset
from retina_fast.data.errors import UserError


def has_bf16() -> bool:
    """Whether this machine multiplies bfloat16 matrices in hardware."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported()


@dataclass(frozen=True)
class TrainSettings:
    """What decides the weights of a run; a resumed run must have the same.

    Attributes:
        model: a builder's name in `retina_fast.builders.MODELS`.
        steps: optimizer steps, rounded up to a whole number of equal intervals.
        batch_size: images a step, over all processes.
        lr: peak learning rate.
        crop: side of the training crops in pixels; 0 trains on whole images, or, where the recipe has it so, on crops
            of the model's own size.
        flips: which mirror images of a picture are as likely as itself.
        seed: of the weights, the order of the images and the augmentations.
        image_scale: by which the model scales images, whatever their size; training crops have scales of their own.
            None: the model resizes crops and images as its builder says.
        recipe: its name in `retina_fast.train.recipes.RECIPES`.
        every: the most steps from one checkpoint, and validation, to the next.
        accumulate: in how many parts a process computes its images of a step, to fit into memory.
        bf16: whether convolutions are computed in bfloat16.
        weights_backbone: torchvision's name of the weights from which the backbone starts; None for random ones.
    """

    model: str
    steps: int
    batch_size: int
    lr: float
    crop: int
    flips: Flips
    seed: int
    image_scale: float | None = None
    recipe: str = "default"
    every: int = 500
    accumulate: int = 1
    bf16: bool = field(default_factory=has_bf16)
    weights_backbone: str | None = None

    @property
    def interval(self) -> int:
        return math.ceil(self.steps / math.ceil(self.steps / self.every))

    @property
    def total_steps(self) -> int:
        return math.ceil(self.steps / self.interval) * self.interval

    def share(self, count: int) -> int:
        """Images a step of each of `count` processes.

        Raises:
            UserError: if they cannot be shared evenly.
        """
        if self.batch_size % count or self.batch_size < count * self.accumulate:
            least = count * self.accumulate
            raise UserError(
                f"--batch-size {self.batch_size} is of all {count} processes together, in {self.accumulate} parts each:"
                f" give a multiple of {count}, at least {least}"
            )
        return self.batch_size // count


def fingerprint(data: CocoDataset) -> str:
    """A digest of what is trained on: images by name, boxes and classes in their order; not the pixels.

    Example::

        >>> fingerprint(dataset)  # doctest: +SKIP
        '5f0c...'
    """
    digest = hashlib.sha256(repr((data.classes, data.category_ids)).encode())
    for record in data.images:
        digest.update(repr((record["id"], record["file_name"])).encode())
    for box in data.coco["annotations"]:
        digest.update(repr((box["image_id"], box["category_id"], box["bbox"], box["iscrowd"])).encode())
    return digest.hexdigest()


def check_resume(last: Path, settings: TrainSettings, data: CocoDataset) -> dict[str, Any] | None:
    """Refuse to go on with a run of other settings or data; else the arguments of the builder of its model.

    Runs of earlier versions have no such arguments.

    Raises:
        UserError: naming what differs; or if there is no run, or its file is damaged.
    """
    if not last.exists():
        raise UserError(f"there is no run to resume in {last.parent}: it has no {last.name}")
    try:
        state: dict[str, Any] = torch.load(last, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, EOFError, ValueError, OSError) as error:
        kept = ", ".join(sorted(path.name for path in last.parent.glob("step-*.ckpt"))) or "none"
        raise UserError(f"{last}: damaged; copy an older one in its place (there are: {kept}) to resume") from error
    before = asdict(TrainSettings(**state["settings"]))  # runs of earlier versions lack the latest settings
    for name, value in asdict(settings).items():
        if before[name] != value:
            raise UserError(f"the run in {last.parent} has {name} {before[name]}, not {value}: give it the same")
    if state.get("data") not in (None, fingerprint(data)):
        raise UserError(f"{data.json_file}: is not what the run in {last.parent} was begun with; start a new run")
    return state.get("kwargs")
