"""The images of a training run and of its validations, as this process loads them."""

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

from retina_fast.data.augment import TrainingSet, batches
from retina_fast.data.coco import CocoDataset, Sample, Tried, plain
from retina_fast.data.fitting import FittingImages
from retina_fast.train.detector import Batch, Detector
from retina_fast.train.recipes import recipe_named
from retina_fast.train.settings import ResolvedSettings
from retina_fast.train.stopping import ignore_signals


class StepSampler:
    """The keys of this process's images, step by step, from the step at which the run stands to the interval's end.

    Args:
        module: knows that step, the settings and the processes.
        data: the images.

    Example::

        >>> next(iter(StepSampler(module, data)))  # the (epoch, index) pairs of the first step  # doctest: +SKIP
        [(0, 2), (0, 1), (0, 5), (0, 0)]
    """

    def __init__(self, module: Detector, data: CocoDataset) -> None:
        self.module, self.length, self.aspects = module, len(data), data.aspects()

    def __len__(self) -> int:
        return self.module.settings.interval

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        settings, processes = self.module.settings, self.module.processes
        begin = self.module.global_step
        end = (begin // settings.interval + 1) * settings.interval
        share, group_size = settings.share(processes.count), self.module.recipe.group_size
        steps = range(begin, end)
        for keys in batches(self.length, settings.batch_size, settings.seed, steps, self.aspects, group_size):
            yield keys[processes.rank * share :][:share]


def crop_of(settings: ResolvedSettings, network: Any) -> int:
    """The side of the training crops in pixels; 0 for whole images.

    Example::

        >>> crop_of(settings, network)  # doctest: +SKIP
        256
    """
    return settings.crop or (network.transform.max_size if recipe_named(settings.recipe).crops_are_the_size else 0)


def training_loader(module: Detector, data: CocoDataset, workers: int) -> DataLoader:
    """The batches of an interval, augmented by the recipe.

    Raises:
        UserError: if no image can be read, or the recipe has no crops and the settings have.

    Example::

        >>> images, targets = next(iter(training_loader(module, data, workers=2)))  # doctest: +SKIP
    """
    settings, recipe = module.settings, module.recipe
    crop = crop_of(settings, module.model)
    images: Any = data if crop else FittingImages(data, module.model.transform)
    training_set = TrainingSet(images, recipe.augmentation(crop, settings.flips), settings.seed)
    training_set[0, 0]  # If no image can be read, the error is raised here, and not in a worker.
    return DataLoader(
        training_set,
        batch_sampler=StepSampler(module, data),
        collate_fn=_collate,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=ignore_signals,
    )


def validation_loader(module: Detector, data: CocoDataset, workers: int) -> DataLoader:
    """This process's share of the validation images, one by one; an ImageError in place of one that cannot be read.

    Example::

        >>> image, target = next(iter(validation_loader(module, data, workers=2)))  # doctest: +SKIP
    """
    return DataLoader(
        Tried(FittingImages(data, module.model.transform)),
        sampler=module.processes.share(len(data)),
        batch_size=None,
        collate_fn=plain,
        num_workers=workers,
        worker_init_fn=ignore_signals,
    )


def _collate(samples: list[Sample]) -> Batch:
    images, targets = zip(*map(plain, samples), strict=True)
    return list(images), list(targets)
