"""Networks that are ready to detect, from a model file or with torchvision's published weights."""

from pathlib import Path
from typing import Any

import torch
from torchvision.models import get_model_weights

from retina_fast import checkpoint
from retina_fast.builders import MODELS
from retina_fast.checkpoint import Checkpoint
from retina_fast.data.errors import UserError

TREES = Path(__file__).parents[1] / "weights" / "trees.pt"
"""The weights that come with the package: trees in aerial photographs of about 0.1 m a pixel."""


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
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu"), content


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
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu"), content
