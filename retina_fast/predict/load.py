"""Detectors that are ready to detect: from a file, by the name of a network, or the one that comes with the package."""

from pathlib import Path
from typing import Any

import torch
from torchvision.models import get_model_weights

from retina_fast import checkpoint
from retina_fast.builders import MODELS
from retina_fast.checkpoint import Checkpoint
from retina_fast.data.errors import UserError
from retina_fast.deploy.exported import is_exported, load_exported

TREES = Path(__file__).parents[1] / "weights" / "trees.pt"
"""The weights that come with the package: trees in aerial photographs of about 0.1 m a pixel."""


def load(name: str | Path) -> Any:
    """A detector that is ready to ``predict``, on the GPU if there is one, with its classes by name.

    Args:
        name: ``trees`` for the detector that comes with the package; a network with torchvision's COCO weights, such as
            ``retinanet_resnet50_fpn_v2``; or a file: the ``model.pt`` of a training run, or what
            :func:`retina_fast.export` wrote, in any of its formats. The exported formats of PyTorch are programs: open
            only files whose author you trust.

    Returns:
        A :class:`~retina_fast.RetinaNet` in evaluation mode, or an exported model. Both have the method ``predict``,
        and the attributes ``classes`` and ``category_ids``.

    Raises:
        UserError: if there is no such file, or it cannot be used; the message names it and says why.

    Example::

        >>> load("trees").classes
        ['Tree']
    """
    if str(name) == "trees":
        return load_model(TREES)[0]
    if str(name) in MODELS:
        return load_published(str(name), "COCO_V1")[0]
    path = Path(name)
    if not path.exists():
        raise UserError(f"{path}: no such model file, and no name of one: trees, {', '.join(sorted(MODELS))}")
    if path.is_dir():
        raise UserError(f"{path}: is a folder; give a model file")
    return load_exported(path) if is_exported(path) else load_model(path)[0]


def load_model(path: Path) -> tuple[Any, Checkpoint]:
    """The network of a model file, ready to detect and on the GPU if there is one, and the file's content.

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
    return _ready(model, content), content


def load_published(builder: str, weights: str) -> tuple[Any, Checkpoint]:
    """A network with torchvision's published weights, ready to detect, and its classes. torchvision downloads them.

    The network is on the GPU if there is one. Its labels are COCO's category ids, 1 to 90 with gaps: label 0 and the
    labels in the gaps are never found.

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
    return _ready(model, content), content


def _ready(model: Any, content: Checkpoint) -> Any:
    """The model in evaluation mode, on the GPU if there is one, with the names of its classes."""
    model.classes, model.category_ids = list(content.classes), list(content.category_ids)
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
