"""Training recipes by name: the optimizer, learning rates, losses and images of `retina-fast train --recipe`.

`default` is this package's own, for small data sets and machines. `torchvision-v1` and `torchvision-v2` are the recipes
of torchvision's published weights (https://github.com/pytorch/vision/tree/main/references/detection#retinanet and
https://github.com/pytorch/vision/pull/5756); docs/coco.md has their commands. `atss-1x` to `tood-2x` are the schedules
of other matchers and losses, by the configurations of mmdetection for a ResNet-50
(https://github.com/open-mmlab/mmdetection/tree/main/configs); docs/losses.md says what differs. The others are the
published protocols of SpineNet (https://arxiv.org/abs/1912.05027, table 2 of its code's model zoo), which train with
SGD from random weights over hundreds of epochs; docs/spinenet.md says where they differ from what was published.
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
from retina_fast.data.coco import CocoDataset
from retina_fast.data.errors import UserError
from retina_fast.train.schedules import epoch_drops, warmup_cosine, warmup_drops


def trained_matrices(model: nn.Module) -> list[nn.Parameter]:
    """The trained parameters with more than one dimension: the kernels of convolutions, but no norms and no biases.

    Example::

        >>> [p.shape for p in trained_matrices(nn.Linear(3, 2))]
        [torch.Size([2, 3])]
    """
    return [p for p in model.parameters() if p.requires_grad and p.ndim > 1]


def trained_outside_norms(model: nn.Module) -> list[nn.Parameter]:
    """The trained parameters of all layers but norms, as torchvision separates them.

    Example::

        >>> len(trained_outside_norms(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))))
        2
    """
    return split_normalization_params(model)[1]


def all_trained(model: nn.Module) -> list[nn.Parameter]:
    """All trained parameters.

    Example::

        >>> len(all_trained(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))))
        4
    """
    return [p for p in model.parameters() if p.requires_grad]


@dataclass(frozen=True)
class Recipe:
    """The hyper-parameters of a training recipe.

    Attributes:
        optimizer: makes the optimizer from parameter groups and `lr`.
        schedule: gives the factor of the learning rate from `step` and `total`, the number of steps in all.
        lr: the peak learning rate at `batch_size` images a step.
        batch_size: images a step.
        weight_decay: of the parameters that `decayed_parameters` selects.
        gradient_norm: the norm to which gradients are clipped; None does not clip.
        augmentation: makes the transforms of the images from the side of the crops and the flips.
        decayed_parameters: selects the parameters that get weight decay.
        average: decay of the moving average of the weights; 0 keeps the latest weights.
        steps: optimizer steps, where `epochs` is 0.
        epochs: passes over the data.
        lr_power: the learning rate grows as this power of the batch size: 1 for SGD (https://arxiv.org/abs/1706.02677);
            0.5 for Adam, which divides by the gradient's size (https://arxiv.org/abs/2205.10287).
        focal_gamma: the focusing exponent of the focal loss.
        box_weight: factor of the box loss.
        kwargs: keyword arguments of the model's builder.
        weights_backbone: torchvision's name of the weights from which the backbone starts; None for random ones.
        crop: side of the crops for models that scale images by a factor, where the user gives none.
        crops_are_the_size: whether crops have the size of the images that the model is built for. A crop that the user
            gives then sets that size.
        only_objects: whether images without an object are left out.
        group_size: size of the groups of images in a batch that have about the same aspect ratio, and so little
            padding.
        model: a pattern of the names of the models that it is for.
    """

    optimizer: Callable[..., Optimizer]
    schedule: Callable[..., float]
    lr: float
    batch_size: int
    weight_decay: float
    gradient_norm: float | None
    augmentation: Callable[[int, Flips], v2.Compose]
    decayed_parameters: Callable[[nn.Module], list[nn.Parameter]] = trained_matrices
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
    group_size: int = 1
    model: str = "*"

    def lr_at(self, batch_size: int) -> float:
        """The peak learning rate at another batch size."""
        return self.lr * (batch_size / self.batch_size) ** self.lr_power

    def steps_for(self, images: int, batch_size: int) -> int:
        """The number of optimizer steps on a data set of `images` images.

        An epoch has a whole number of steps, as in the published programs.

        Example::

            >>> RECIPES["torchvision-v1"].steps_for(117_266, 16)  # COCO's images with objects: 7,329 an epoch
            190554
        """
        if not self.epochs:
            return self.steps
        return self.epochs * (images // batch_size) or math.ceil(self.epochs * images / batch_size)

    def images_of(self, data: CocoDataset) -> CocoDataset:
        """The part of the data that the recipe trains on.

        Raises:
            UserError: if it leaves out images without objects, and there are no others.
        """
        return data.with_objects() if self.only_objects else data


_WARMUP_EPOCHS = 2000 / 463  # 2,000 steps of 256 images, 463 of which are an epoch of COCO


def _spinenet(epochs: int, scales: tuple[float, float], **changes: Any) -> Recipe:
    """A protocol of SpineNet that trains for `epochs` and scales images by factors between `scales`."""
    lr, weight_decay = changes.pop("lr", 0.28), changes.pop("weight_decay", 4e-5)
    changes = {"kwargs": {"bg_iou_thresh": 0.5, "detections_per_img": 100}, **changes}
    drops = {1 - 30 / epochs: 0.1, 1 - 10 / epochs: 0.01}
    return Recipe(
        optimizer=functools.partial(torch.optim.SGD, momentum=0.9),
        schedule=functools.partial(warmup_drops, warmup=_WARMUP_EPOCHS / epochs, start=0.0067 / 0.28, drops=drops),
        lr=lr,
        batch_size=256,
        weight_decay=weight_decay,
        gradient_norm=10.0,
        augmentation=functools.partial(scale_jitter, scales=scales),
        epochs=epochs,
        crops_are_the_size=True,
        focal_gamma=1.5,
        # Published is 50 times Huber's loss with delta 0.1, a mean over 4 coordinates. Beyond delta, its slope is
        # that of an L1 loss with this factor.
        box_weight=50 * 0.1 / 4,
        **changes,
    )


_SWISH = {"bg_iou_thresh": 0.5, "detections_per_img": 100, "activation": "silu", "stochastic_depth": 0.2}
_SPINENET_C = functools.partial(_spinenet, epochs=500, scales=(0.5, 2.0), kwargs=_SWISH, model="retinanet_spinenet*")

_TORCHVISION = functools.partial(
    Recipe,
    schedule=functools.partial(epoch_drops, epochs=26, drops=(16, 22), warmup=1000),
    batch_size=16,  # 8 GPUs with 2 images each
    gradient_norm=None,
    augmentation=whole_images,
    epochs=26,
    weights_backbone="IMAGENET1K_V1",
    only_objects=True,
    group_size=2,  # the images of one GPU
)

_STRIDES = (8, 16, 32, 64, 128)
_QUALITY = {"classification_loss": "quality_focal", "box_weights": "quality"}
_METHODS: dict[str, dict[str, Any]] = {
    "atss": {"matcher": "atss"},
    "gfl": {"matcher": "atss", "reg_max": 16} | _QUALITY,
    "vfnet": {"matcher": "atss", "classification_loss": "varifocal", "box_weights": "quality"},
    "tood": {"matcher": "task_aligned"} | _QUALITY,
}


def _assigned(method: str, times: int) -> Recipe:
    """The schedule of 12 epochs, or of twice as many with images of many sizes, for a way to assign anchors."""
    sizes: dict[str, Any] = {}
    if times > 1:  # The model draws the shorter side in training; in evaluation it takes the last one.
        longest = 960 if method == "vfnet" else 800
        sizes["min_size"] = [*range(801, longest + 1), *range(480, 801)]
    drops, start = ((8, 11) if times == 1 else (16, 22)), 0.1 if method == "vfnet" else 1e-3
    return _TORCHVISION(
        optimizer=functools.partial(torch.optim.SGD, momentum=0.9),
        schedule=functools.partial(epoch_drops, epochs=12 * times, drops=drops, warmup=500, start=start),
        lr=0.01,
        epochs=12 * times,
        weight_decay=1e-4,
        decayed_parameters=all_trained,
        box_weight=2.0,
        kwargs=_METHODS[method] | sizes | {
            "box_loss": "giou",
            "anchors": {"sizes": [[8 * stride] for stride in _STRIDES], "ratios": [1.0]},
            "nms_thresh": 0.6,
            "detections_per_img": 100,
        },
        model="retinanet_resn*_fpn*",
    )  # fmt: skip


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
        decayed_parameters=all_trained,
        model="retinanet_resn*_fpn",
    ),
    "torchvision-v2": _TORCHVISION(
        optimizer=functools.partial(torch.optim.AdamW, fused=True),
        lr=1e-4,
        lr_power=0.5,
        weight_decay=0.05,
        decayed_parameters=trained_outside_norms,
        weights_backbone="IMAGENET1K_V2",
        # In training the model draws the shorter side from these; in evaluation it takes the last one.
        kwargs={"min_size": list(range(480, 801, 32))},
        model="retinanet_resn*_fpn_v2",
    ),
    "atss-1x": _assigned("atss", 1),
    **{f"{method}-{times}x": _assigned(method, times) for method in ("gfl", "vfnet", "tood") for times in (1, 2)},
    "spinenet-b": _spinenet(350, (0.5, 2.0)),
    "spinenet-c": _SPINENET_C(),
    "spinenet-c-143": _SPINENET_C(scales=(0.1, 1.9), kwargs=_SWISH | {"stochastic_depth": 0.16}),
    "spinenet-c-190": _SPINENET_C(epochs=400, scales=(0.1, 1.9), lr=0.30),
    # So the program for TPUs trains size 49. The one in Keras has rate 0.32, stochastic depth 0.2, and for the sizes 49
    # and 49s hard swish.
    "spinenet-mobile": _spinenet(600, (0.5, 2.0), weight_decay=3e-5, model="retinanet_spinenet*_mobile"),
}
"""Every recipe by its name."""


def recipe_named(name: str) -> Recipe:
    """The recipe with that name.

    Raises:
        UserError: if there is none; the message lists all names.

    Example::

        >>> recipe_named("spinenet-b").lr_at(batch_size=64)
        0.07
    """
    if name not in RECIPES:
        raise UserError(f"there is no recipe {name!r}; choose one of {', '.join(RECIPES)}")
    return RECIPES[name]
