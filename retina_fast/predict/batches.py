"""Runs a model over images in batches."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from retina_fast.data.coco import Sample, Tried, plain
from retina_fast.data.errors import ImageError, UserError
from retina_fast.data.fitting import check_fit
from retina_fast.deploy.engine import Engine
from retina_fast.deploy.export.exported import Exported

Key = TypeVar("Key")
Item = TypeVar("Item")
Prediction = tuple[Sample, dict[str, Tensor]] | ImageError


class UnfitImage(ImageError):
    """An image was read, but is of a size that the model cannot take. The message names it and says why."""


def predictions(model: Any, dataset: Any, workers: int, keys: Iterable[Any] | None = None) -> Iterator[Prediction]:
    """Each item's sample and detections; or, if its image cannot be read or does not fit the model, the error.

    Args:
        model: see :func:`detections_of`.
        dataset: gives (image (3, H, W) uint8, target) by key.
        workers: how many processes read images, each at most two images ahead.
        keys: of the items, taken as they are needed; by default every index.

    Example::

        >>> for sample, detections in predictions(model, dataset, workers=1): ...  # doctest: +SKIP
    """
    sampler = range(len(dataset)) if keys is None else keys
    samples = DataLoader(Tried(dataset), batch_size=None, sampler=sampler, collate_fn=plain, num_workers=workers)
    return detections_of(model, samples)


@torch.no_grad()
def detections_of(
    model: Any, samples: Iterable[Sample | ImageError], batch_size: int = 1, score: float | None = None
) -> Iterator[Prediction]:
    """Each sample with its detections; or the error, if it is one or its image does not fit the model.

    Images that follow each other and are of one size share a batch, so that no image is padded for another's sake.

    Args:
        model: a RetinaNet in evaluation mode, an engine, or an exported one that takes uint8 images.
        samples: (image (3, H, W) uint8, target with its ``path``), or the error of one that could not be read.
        batch_size: the most images of a batch.
        score: detections of at least that score are wanted, also where the model's own threshold is higher.

    Yields:
        In turn, the sample and `boxes` (D, 4) xyxy in pixels, `scores` (D,) and `labels` (D,) on the CPU; or an
        ImageError.

    Example::

        >>> for sample, detections in detections_of(model, [(image, {"path": "a.jpg"})]): ...  # doctest: +SKIP
    """
    check, run = _by_exported(model) if isinstance(model, Exported) else _by_network(model)
    batch: list[Sample] = []
    for sample in samples:
        if not isinstance(sample, ImageError):
            try:
                check(sample[0])
            except UserError as error:
                sample = UnfitImage(f"{sample[1]['path']}: {error}")
        if isinstance(sample, ImageError) or (batch and sample[0].shape != batch[0][0].shape):
            yield from _finished(model, run, batch, score)
            batch = []
        if isinstance(sample, ImageError):
            yield sample
            continue
        batch.append(sample)
        del sample  # else its pixels would stay while the next one is read
        if len(batch) == batch_size:
            yield from _finished(model, run, batch, score)
            batch = []
    yield from _finished(model, run, batch, score)


Run = Callable[[list[Tensor]], list[dict[str, Tensor]]]


def _finished(model: Any, run: Run, batch: list[Sample], score: float | None) -> Iterator[Prediction]:
    if not batch:
        return
    with _scores_from(model, score):
        found = run([sample[0].as_subclass(Tensor) for sample in batch])
    while batch:
        yield batch.pop(0), {name: value.cpu() for name, value in found.pop(0).items()}


@contextmanager
def _scores_from(model: Any, score: float | None) -> Iterator[None]:
    """Has the model give every detection of at least that score, for the time of the block."""
    before = getattr(model, "score_thresh", None)
    if score is None or before is None or before <= score:
        yield
        return
    model.score_thresh = score
    try:
        yield
    finally:
        model.score_thresh = before


def _by_network(model: Any) -> tuple[Callable[[Tensor], None], Run]:
    """What checks one uint8 image (3, H, W), and the model as a function of several of one size."""
    transform = getattr(model, "transform", None)

    def check(image: Tensor) -> None:
        check_fit(transform, *image.shape[1:])

    if isinstance(model, Engine):
        return check, model
    weight = next(model.parameters())
    return check, lambda images: model([(image.to(weight.device).float() / 255).to(weight.dtype) for image in images])


def _by_exported(model: Exported) -> tuple[Callable[[Tensor], None], Run]:
    """The same for an exported model, which takes images of one size."""
    height, width = model.metadata["image_size"]

    def check(image: Tensor) -> None:
        try:
            model.check(image[None])
        except UserError as error:
            given = f"is {image.shape[2]}x{image.shape[1]} pixels, but the model was exported for {width}x{height}"
            raise UserError(f"{error}: it {given}; resize it, or export the model for its size") from error

    return check, lambda images: model(torch.stack(images)).to_list()


def read_ahead(read: Callable[[Key], Item], keys: Iterable[Key], workers: int) -> Iterator[Item]:
    """What `read` gives for each key in turn, read by threads that are at most two keys each ahead.

    Args:
        read: must be safe to call in several threads; decoders of images let go of Python's lock.
        keys: taken as they are needed, in the caller's thread.
        workers: how many threads; 0 reads when it is asked for.

    Example::

        >>> list(read_ahead(str, [1, 2, 3], workers=2))
        ['1', '2', '3']
    """
    if not workers:
        yield from map(read, keys)
        return
    waiting: deque[Future[Item]] = deque()
    with ThreadPoolExecutor(workers, "retina_fast-read") as threads:
        try:
            for key in keys:
                waiting.append(threads.submit(read, key))
                if len(waiting) == 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
