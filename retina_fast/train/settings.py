"""The settings of a training run: what a person chooses, and what the recipe, the data and the machine fill in."""

import math
from dataclasses import KW_ONLY, asdict, dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from retina_fast.data.augment import Flips
from retina_fast.data.coco import CocoDataset
from retina_fast.data.errors import UserError
from retina_fast.device import has_bfloat16
from retina_fast.losses import check_losses, matcher_of
from retina_fast.train.recipes import recipe_named

RANDOM = "none"
"""In place of the name of weights: the backbone starts from random ones."""

FITTED = "auto"
"""In place of the model's anchors: those that fit the data."""


@dataclass(frozen=True)
class TrainSettings:
    """What a person chooses of a training run. :meth:`resolve` fills in what is left at None.

    Attributes:
        model: a builder's name in `retina_fast.builders.MODELS`.
        steps: optimizer steps, rounded up to a whole number of equal intervals. None takes the recipe's.
        batch_size: images a step, over all processes. None takes the recipe's.
        lr: peak learning rate. None takes the recipe's for this batch size.
        crop: side of the training crops in pixels; 0 trains on whole images or, with SpineNet's recipes, on crops of
            the model's own size. None takes the recipe's crops for a model that scales images by a factor, as the lite
            models do, and 0 for a model that resizes every image to one size.
        flips: which mirror images of a picture are as likely as the picture itself.
        seed: of the weights, the order of the images and the augmentations.
        image_scale: the factor by which the model scales images of any size; training crops have scales of their own.
            None leaves the resizing to the model's builder.
        recipe: its name in `retina_fast.train.recipes.RECIPES`.
        every: the largest number of steps from one checkpoint, and validation, to the next.
        accumulate: into how many parts a process divides its images of a step, so that they fit into memory.
        bf16: whether convolutions are computed in bfloat16. None: where the hardware does.
        weights_backbone: torchvision's name of the weights from which the backbone starts, or "none" for random ones.
            None takes the recipe's.
        arguments: keyword arguments of the builder as plain data: a matcher, losses, a specification.
        anchors: "auto" for one anchor a cell, of sides and a ratio that fit the data, in place of the model's.

    Raises:
        UserError: if there is no such recipe, matcher, loss or kind of anchors, or the recipe is for other models.

    Example::

        >>> TrainSettings("retinanet_resnet18_fpn_lite", steps=500).recipe
        'default'
    """

    model: str
    _: KW_ONLY
    steps: int | None = None
    batch_size: int | None = None
    lr: float | None = None
    crop: int | None = None
    flips: Flips = Flips.HORIZONTAL
    seed: int = 0
    image_scale: float | None = None
    recipe: str = "default"
    every: int = 500
    accumulate: int = 1
    bf16: bool | None = None
    weights_backbone: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    anchors: str | None = None

    def __post_init__(self) -> None:
        recipe = recipe_named(self.recipe)
        if not fnmatchcase(self.model, recipe.model):
            raise UserError(f"the recipe {self.recipe} is for models {recipe.model}, not {self.model}")
        arguments = dict(recipe.kwargs) | self.arguments
        try:
            matcher_of(arguments.get("matcher"))
            check_losses(*map(arguments.get, ("classification_loss", "box_loss", "reg_max", "box_weights")))
        except ValueError as error:
            raise UserError(str(error)) from error
        if self.anchors not in (None, FITTED):
            raise UserError(f"anchors must be {FITTED}, or left out for the model's own, got {self.anchors!r}")

    def resolve(self, data: CocoDataset, start_from: str | Path | None = None) -> "ResolvedSettings":
        """The settings with every choice made. Resolving them again changes nothing.

        Args:
            data: the images to train on, from whose number a recipe of epochs has its number of steps.
            start_from: the model file that the run starts from, if it starts from one.

        Raises:
            UserError: if `weights_backbone` names weights and there is a file to start from, too; or if the recipe
                leaves out images without objects, and there are no others.

        Example::

            >>> TrainSettings("retinanet_resnet18_fpn_lite", batch_size=16).resolve(data).lr  # doctest: +SKIP
            0.004
        """
        if start_from and self.weights_backbone not in (None, RANDOM):
            raise UserError("--weights-backbone and --checkpoint exclude each other: give one of them")
        recipe = recipe_named(self.recipe)
        batch_size = self.batch_size or recipe.batch_size
        by_scale = self.model.endswith("_lite") or self.image_scale is not None  # the others resize to 800 px or so
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        chosen: dict[str, Any] = {
            "steps": self.steps or recipe.steps_for(len(recipe.images_of(data)), batch_size),
            "batch_size": batch_size,
            "lr": recipe.lr_at(batch_size) if self.lr is None else self.lr,
            "crop": (recipe.crop if by_scale else 0) if self.crop is None else self.crop,
            "bf16": has_bfloat16(device) if self.bf16 is None else self.bf16,
            "weights_backbone": self.weights_backbone or recipe.weights_backbone or RANDOM,
        }
        return ResolvedSettings(**asdict(self) | chosen)


@dataclass(frozen=True, kw_only=True)
class ResolvedSettings(TrainSettings):
    """Settings without a choice left open. They decide the weights of a run: a resumed run must have the same.

    Example::

        >>> settings = TrainSettings("retinanet_resnet18_fpn_lite", steps=1001).resolve(data)  # doctest: +SKIP
        >>> settings.interval, settings.total_steps  # doctest: +SKIP
        (334, 1002)
    """

    steps: int
    batch_size: int
    lr: float
    crop: int
    bf16: bool
    weights_backbone: str

    @property
    def interval(self) -> int:
        """Steps from one checkpoint to the next: at most `every`, and the same throughout the run."""
        return math.ceil(self.steps / math.ceil(self.steps / self.every))

    @property
    def total_steps(self) -> int:
        """`steps`, rounded up to whole intervals."""
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
