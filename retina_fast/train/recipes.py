"""Training recipes by name: what `retina-fast train --recipe` does with its optimizer, learning rate and images.

`default` is this package's own, for small data sets and machines. `torchvision-v1` and `torchvision-v2` are what
torchvision's published weights were trained by (https://github.com/pytorch/vision/tree/main/references/detection
#retinanet and https://github.com/pytorch/vision/pull/5756); docs/coco.md has their commands. The others are the
published protocols of SpineNet (https://arxiv.org/abs/1912.05027, table 2 of its code's model zoo): SGD from random
weights over hundreds of epochs; docs/spinenet.md says where they differ from what was published.
"""

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torchvision.ops._utils import split_normalization_params
from torchvision.transforms import v2

from retina_fast.data.augment import Flips, augmentation, scale_jitter, whole_images
from retina_fast.data.errors import UserError


def warmup_cosine(step: int, total: int) -> float:
    """Up in the first 5% of the steps, then down to a hundredth along a cosine."""
    warmup = max(1, round(total * 0.05))
    if step < warmup:
        return (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    return 0.01 + 0.99 * (1 + math.cos(math.pi * done)) / 2


def warmup_drops(step: int, total: int, warmup: float, start: float, drops: Mapping[float, float]) -> float:
    """From `start` up to 1 in the first `warmup` of the steps, then the factor of the last drop that has begun."""
    done = step / total
    if done < warmup:
        return start + (1 - start) * done / warmup
    return min((factor for begin, factor in drops.items() if done >= begin), default=1.0)


def torchvision_steps(step: int, total: int) -> float:
    """Up from a thousandth in 1,000 steps, or the first of 26 epochs if that is shorter; tenths after 16 and 22."""
    warmup = min(1000, total // 26 - 1) / total
    return warmup_drops(step, total, warmup, start=1 / 1000, drops={16 / 26: 0.1, 22 / 26: 0.01})


def matrices(model: nn.Module) -> list[nn.Parameter]:
    """The kernels of convs: neither norms nor biases."""
    return [p for p in model.parameters() if p.requires_grad and p.ndim > 1]


def all_but_norms(model: nn.Module) -> list[nn.Parameter]:
    """Kernels and biases, as torchvision splits them off."""
    return split_normalization_params(model)[1]


def everything(model: nn.Module) -> list[nn.Parameter]:
    """All that is trained."""
    return [p for p in model.parameters() if p.requires_grad]


@dataclass(frozen=True)
class Recipe:
    """What is not the user's data or machine.

    Attributes:
        optimizer: from parameter groups and `lr` to the optimizer.
        schedule: from `step` and `total`, the steps in all, to the factor of the learning rate.
        lr: the peak learning rate, at `batch_size` images a step.
        batch_size: images a step.
        weight_decay: of the parameters that `decayed` finds in the model.
        gradient_norm: to which gradients are clipped; None leaves them.
        augmentation: of the images, from the side of the crops and the flips.
        decayed: the others have no weight decay.
        average: decay of the averaged weights; 0 keeps the last ones.
        steps: optimizer steps, where `epochs` is 0.
        epochs: passes over the data.
        lr_power: of the batch size to which the learning rate is proportional: 1 for SGD (https://arxiv.org/abs/1706.02677);
            0.5 for Adam, which divides by the gradient's size (https://arxiv.org/abs/2205.10287).
        focal_gamma: the focusing exponent of the classification loss.
        box_weight: factor of the box loss.
        kwargs: of the model's builder.
        weights_backbone: torchvision's name of the weights from which the backbone starts.
        crop: side of the crops, if none is given, of models that scale images by a factor.
        crops_are_the_size: of the images that the model is built for: crops have it, and a given crop sets it.
        only_objects: images without an object are left out.
        alike: so many images that follow each other in a step have about the same aspect ratio, and so little padding.
        model: a pattern of the names of its models.
    """

    optimizer: Callable[..., Optimizer]
    schedule: Callable[..., float]
    lr: float
    batch_size: int
    weight_decay: float
    gradient_norm: float | None
    augmentation: Callable[[int, Flips], v2.Compose]
    decayed: Callable[[nn.Module], list[nn.Parameter]] = matrices
    average: float = 0.0
    steps: int = 0
    epochs: int = 0
    lr_power: float = 1.0
    focal_gamma: float = 2.0
    box_weight: float = 1.0
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    weights_backbone: str | None = None
    crop: int = 0
    crops_are_the_size: bool = False
    only_objects: bool = False
    alike: int = 1
    model: str = "*"

    def lr_at(self, batch_size: int) -> float:
        """The peak learning rate for another batch size."""
        return self.lr * (batch_size / self.batch_size) ** self.lr_power

    def steps_for(self, images: int, batch_size: int) -> int:
        """Optimizer steps on a data set of so many images: whole ones an epoch, as the published programs count.

        Example::

            >>> RECIPES["torchvision-v1"].steps_for(117_266, 16)  # COCO's images with objects: 7,329 an epoch
            190554
        """
        if not self.epochs:
            return self.steps
        return self.epochs * (images // batch_size) or math.ceil(self.epochs * images / batch_size)


_WARMUP_EPOCHS = 2000 / 463  # steps of 256 images


def _published(epochs: int, scales: tuple[float, float], **changes: Any) -> Recipe:
    lr = changes.pop("lr", 0.28)
    drops = {1 - 30 / epochs: 0.1, 1 - 10 / epochs: 0.01}
    return Recipe(
        optimizer=functools.partial(torch.optim.SGD, momentum=0.9),
        schedule=functools.partial(warmup_drops, warmup=_WARMUP_EPOCHS / epochs, start=0.0067 / 0.28, drops=drops),
        lr=lr,
        batch_size=256,
        weight_decay=4e-5,
        gradient_norm=10.0,
        augmentation=functools.partial(scale_jitter, scales=scales),
        epochs=epochs,
        crops_are_the_size=True,
        focal_gamma=1.5,
        # Published: 50 times Huber's loss with delta 0.1, over 4 coordinates. Beyond delta its slope is that of L1.
        box_weight=50 * 0.1 / 4,
        **{"kwargs": {"bg_iou_thresh": 0.5, "detections_per_img": 100}} | changes,
    )


_SWISH = {"bg_iou_thresh": 0.5, "detections_per_img": 100, "activation": "silu", "stochastic_depth": 0.2}
_C = functools.partial(_published, epochs=500, scales=(0.5, 2.0), kwargs=_SWISH, model="retinanet_spinenet*")

_TORCHVISION = functools.partial(
    Recipe,
    schedule=torchvision_steps,
    batch_size=16,  # 8 GPUs with 2 images each
    gradient_norm=None,
    augmentation=whole_images,
    epochs=26,
    only_objects=True,
    alike=2,
)

RECIPES = {
    "default": Recipe(
        optimizer=functools.partial(torch.optim.AdamW, betas=(0.9, 0.99), fused=True),
        schedule=warmup_cosine,
        lr=2e-3,
        batch_size=4,
        weight_decay=0.05,
        gradient_norm=1.0,
        augmentation=augmentation,
        average=0.998,
        steps=6000,
        lr_power=0.5,
        crop=256,
    ),
    "torchvision-v1": _TORCHVISION(
        optimizer=functools.partial(torch.optim.SGD, momentum=0.9),
        lr=0.01,
        weight_decay=1e-4,
        decayed=everything,
        weights_backbone="IMAGENET1K_V1",
        model="retinanet_resn*_fpn",
    ),
    "torchvision-v2": _TORCHVISION(
        optimizer=functools.partial(torch.optim.AdamW, fused=True),
        lr=1e-4,
        lr_power=0.5,
        weight_decay=0.05,
        decayed=all_but_norms,
        weights_backbone="IMAGENET1K_V2",
        # The model draws the shorter side in training, and takes the last one in evaluation.
        kwargs={"min_size": list(range(480, 801, 32))},
        model="retinanet_resn*_fpn_v2",
    ),
    "spinenet-b": _published(350, (0.5, 2.0)),
    "spinenet-c": _C(),
    "spinenet-c-143": _C(scales=(0.1, 1.9), kwargs=_SWISH | {"stochastic_depth": 0.16}),
    "spinenet-c-190": _C(epochs=400, scales=(0.1, 1.9), lr=0.30),
}
"""Every recipe by its name."""


def recipe_named(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        UserError: if there is none; the message lists those that there are.

    Example::

        >>> recipe_named("spinenet-b").lr_at(batch_size=64)
        0.07
    """
    if name not in RECIPES:
        raise UserError(f"there is no recipe {name!r}; choose one of {', '.join(RECIPES)}")
    return RECIPES[name]
