"""A model over a data set, image by image."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from retina_fast.data.coco import Sample, Tried, plain
from retina_fast.data.errors import ImageError, UserError
from retina_fast.data.fitting import check_fit
from retina_fast.deploy.exported import Exported


class UnfitImage(ImageError):
    """An image was read, but is of a size that the model cannot take. The message names it and says why."""


@torch.inference_mode()
def predictions(
    model: Any, dataset: Any, workers: int, keys: Iterable[Any] | None = None
) -> Iterator[tuple[Sample, dict[str, Tensor]] | ImageError]:
    """Each item's sample and detections; or, if its image cannot be read or does not fit the model, the error.

    Args:
        model: a RetinaNet in evaluation mode, or an exported one that takes uint8 images.
        dataset: gives (image (3, H, W) uint8, target) by key.
        workers: how many processes read images, each at most two images ahead.
        keys: of the items, taken as they are needed; by default every index.

    Yields:
        The sample and `boxes` (D, 4) xyxy in pixels, `scores` (D,) and `labels` (D,) on the CPU; or an ImageError.

    Example::

        >>> for sample, detections in predictions(model, dataset, workers=1): ...  # doctest: +SKIP
    """
    run = _by_exported(model) if isinstance(model, Exported) else _by_network(model)
    sampler = range(len(dataset)) if keys is None else keys
    for sample in DataLoader(Tried(dataset), batch_size=None, sampler=sampler, collate_fn=plain, num_workers=workers):
        if isinstance(sample, ImageError):
            yield sample
            continue
        try:
            (detections,) = run(sample[0].as_subclass(Tensor))
        except UserError as error:
            yield UnfitImage(f"{sample[1]['path']}: {error}")
            continue
        yield sample, {name: value.cpu() for name, value in detections.items()}


def _by_network(model: Any) -> Callable[[Tensor], list[dict[str, Tensor]]]:
    """The model as a function of one uint8 image (3, H, W)."""
    device = next(model.parameters()).device
    transform = getattr(model, "transform", None)

    def run(image: Tensor) -> list[dict[str, Tensor]]:
        check_fit(transform, *image.shape[1:])
        return model([image.to(device).float() / 255])

    return run


def _by_exported(model: Exported) -> Callable[[Tensor], list[dict[str, Tensor]]]:
    """The exported model, which takes images of one size, as a function of one uint8 image (3, H, W)."""
    height, width = model.metadata["image_size"]

    def run(image: Tensor) -> list[dict[str, Tensor]]:
        try:
            return model(image[None]).to_list()
        except UserError as error:
            given = f"is {image.shape[2]}x{image.shape[1]} pixels, but the model was exported for {width}x{height}"
            raise UserError(f"{error}: it {given}; resize it, or export the model for its size") from error

    return run
