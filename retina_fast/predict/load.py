"""A model over a data set, image by image: what evaluate and detect share."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.models import get_model_weights

from retina_fast import checkpoint
from retina_fast.builders import MODELS
from retina_fast.checkpoint import Checkpoint
from retina_fast.data.coco import Sample, Tried, plain
from retina_fast.data.errors import ImageError, UserError
from retina_fast.deploy.exported import Exported

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


def load_published(builder: str, weights: str) -> tuple[Any, Checkpoint]:
    """A network with torchvision's published weights, ready to detect; and its classes. torchvision downloads them.

    Its labels are COCO's category ids, 1 to 90 with gaps: label 0 and those of the gaps are never found.

    Args:
        builder: its name in `retina_fast.builders.MODELS`.
        weights: their name in torchvision, `COCO_V1`.

    Raises:
        UserError: if there are no such weights, or they cannot be downloaded; the message says where to put them.

    Example::

        >>> model, content = load_published("retinanet_resnet50_fpn_v2", "COCO_V1")  # doctest: +SKIP
        >>> content.classes[17], content.category_ids[17]  # doctest: +SKIP
        ('cat', 17)
    """
    if builder not in MODELS:
        raise UserError(f"there is no model {builder!r}; choose one of {', '.join(sorted(MODELS))}")
    try:
        model = MODELS[builder](weights=weights)
        classes = list(get_model_weights(builder)[weights].meta["categories"])
    except (KeyError, ValueError, ConnectionError) as error:
        raise UserError(f"{builder} with the weights {weights}: {error.args[0]}") from error
    content = Checkpoint(builder, {}, classes, list(range(len(classes))), {})
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu"), content


@torch.inference_mode()
def predictions(
    model: Any, dataset: Any, workers: int, keys: Iterable[Any] | None = None
) -> Iterator[tuple[Sample, dict[str, Tensor]] | ImageError]:
    """Each item's sample and detections (`boxes` (D, 4), `scores`, `labels`, on the CPU), or why it cannot be read.

    Args:
        model: a RetinaNet in evaluation mode, or an exported one that takes uint8 images.
        dataset: gives (image (3, H, W) uint8, target) by key.
        workers: processes that read images, each two ahead at most.
        keys: of the items, taken as they are needed; by default every index.

    Example::

        >>> for sample, detections in predictions(model, dataset, workers=1): ...  # doctest: +SKIP
    """
    run = (lambda image: model(image[None]).to_list()) if isinstance(model, Exported) else _by_network(model)
    sampler = range(len(dataset)) if keys is None else keys
    for sample in DataLoader(Tried(dataset), batch_size=None, sampler=sampler, collate_fn=plain, num_workers=workers):
        if isinstance(sample, ImageError):
            yield sample
            continue
        try:
            (detections,) = run(sample[0].as_subclass(Tensor))
        except UserError as error:  # an exported model is for images of one size
            yield ImageError(f"{sample[1]['path']}: {error}")
            continue
        yield sample, {name: value.cpu() for name, value in detections.items()}


def _by_network(model: Any) -> Callable[[Tensor], list[dict[str, Tensor]]]:
    device = next(model.parameters()).device
    return lambda image: model([image.to(device).float() / 255])
