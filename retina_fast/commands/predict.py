"""A model over a data set, image by image: what evaluate and detect share."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from retina_fast import checkpoint
from retina_fast.checkpoint import Checkpoint
from retina_fast.data.coco import Sample, Tried, plain
from retina_fast.errors import ImageError, UserError

TREES = Path(__file__).parents[1] / "weights" / "trees.pt"
"""The weights that come with the package: trees in aerial photographs of about 0.1 m a pixel."""


def load_model(path: Path) -> tuple[Any, Checkpoint]:
    """The network of a model file, ready to detect, on the GPU if there is one; and the file's content.

    Raises:
        UserError: if the file cannot be used; the message names it and says why.

    Example::

        >>> model, content = load_model(TREES)  # doctest: +SKIP
    """
    content = checkpoint.load(path)
    try:
        model = content.build()
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu"), content


@torch.inference_mode()
def predictions(
    model: Any, dataset: Any, workers: int, indices: Sequence[int]
) -> Iterator[tuple[Sample, dict[str, Tensor]] | ImageError]:
    """Each item's sample and detections (`boxes` (D, 4), `scores`, `labels`, on the CPU), or why it cannot be read.

    Args:
        model: a RetinaNet in evaluation mode.
        dataset: gives (image (3, H, W) uint8, target) by index.
        workers: processes that read images.
        indices: of the items, in the order in which they come.

    Example::

        >>> for sample, detections in predictions(model, dataset, 1, range(len(dataset))): ...  # doctest: +SKIP
    """
    device = next(model.parameters()).device
    for sample in DataLoader(Tried(dataset), batch_size=None, sampler=indices, collate_fn=plain, num_workers=workers):
        if isinstance(sample, ImageError):
            yield sample
            continue
        (detections,) = model([sample[0].to(device).float() / 255])
        yield sample, {name: value.cpu() for name, value in detections.items()}
