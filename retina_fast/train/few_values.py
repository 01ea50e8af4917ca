"""A look, before training, at how many values the BatchNorms of a network will see.

In training a BatchNorm takes mean and variance of a channel over the cells of all images of a step; in detection it
takes the running averages of these. Over a few values they scatter so much that the averages fit none of them, and a
network that trains well finds nothing. On a pyramid's coarse levels small crops have few cells.
"""

import warnings
from typing import Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from retina_fast.convert import copied
from retina_fast.data.coco import CocoDataset
from retina_fast.data.errors import UserError
from retina_fast.forward import run_convs
from retina_fast.train.settings import ResolvedSettings
from retina_fast.transform import resized_size

_ENOUGH = 64
"""Values of a channel. SpineNet-49S, which saw 32 at its coarsest level, had hundreds of times the loss in detection:
docs/spinenet.md."""


def fewest_cells(network: Any, height: int, width: int) -> tuple[int, int, str] | None:
    """Height and width of the smallest input of a BatchNorm, and the norm's name; None if no BatchNorm is trained.

    Args:
        network: a RetinaNet in training mode; a copy without numbers is run.
        height, width: of the batch, in pixels.

    Example::

        >>> from retina_fast import retinanet_resnet18_fpn_lite
        >>> fewest_cells(retinanet_resnet18_fpn_lite(num_classes=1), 256, 256)
        (16, 16, 'backbone.body.layer3.0.bn1')
    """
    probe = copied(network).to("meta")
    seen: list[tuple[int, int, str]] = []
    for name, part in probe.named_modules():
        if isinstance(part, _BatchNorm) and part.training and part.track_running_stats:
            part.register_forward_pre_hook(lambda _, inputs, name=name: seen.append((*inputs[0].shape[-2:], name)))
    with torch.no_grad():
        run_convs(probe, torch.empty(2, 3, height, width, device="meta"))
    return min(seen, key=lambda one: one[0] * one[1], default=None)


def warn_of_few_values(network: Any, settings: ResolvedSettings, data: CocoDataset, crop: int) -> None:
    """Warn if a BatchNorm will see too few values of a channel in a step for its averages to be of use in detection.

    Args:
        network: in training mode.
        settings: of the run.
        data: the images to train on; where these are not cut, the one of median size stands for all.
        crop: side of the crops in pixels; 0 for whole images.

    Raises:
        UserError: if it will see a single value, of which there is no variance.

    Example::

        >>> warn_of_few_values(network, settings, data, crop=256)  # doctest: +SKIP
    """
    sizes = [(crop, crop)] if crop else [size for size in data.sizes.values() if size]
    if not sizes:
        return
    sizes.sort(key=lambda size: size[0] * size[1])
    size = sizes[len(sizes) // 2]
    with torch.random.fork_rng(devices=[]):  # it draws the numbers that a step draws
        sides = resized_size(network.transform, *size)
    multiple = network.transform.size_divisible
    found = fewest_cells(network, *(-(-max(side, 1) // multiple) * multiple for side in sides))
    if found is None:
        return
    height, width, name = found
    images = settings.batch_size // settings.accumulate
    values = images * height * width
    what = f"{name} will see {values} value{'s' * (values > 1)} of a channel, {images} x {height} x {width} cells"
    more = "give a larger --crop or --batch-size" + (", or a smaller --accumulate" if settings.accumulate > 1 else "")
    if values == 1:
        raise UserError(f"{what}, which has no variance: {more}")
    if values < _ENOUGH:
        warnings.warn(
            f"{what}: its averages of so few may fit none of them, and a model that trains well find nothing: {more}",
            stacklevel=2,
        )
