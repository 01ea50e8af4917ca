"""Detectors that are ready to detect: from a file, by the name of a network, or the one that comes with the package."""

import os
import re
from pathlib import Path
from typing import Any

import torch
from torchvision.models import get_model_weights

from retina_fast import checkpoint
from retina_fast.builders import MODELS
from retina_fast.checkpoint import Checkpoint
from retina_fast.data.errors import UserError
from retina_fast.deploy.deepforest import deepforest_checkpoint, from_deepforest, is_deepforest
from retina_fast.deploy.export.exported import is_exported, load_exported
from retina_fast.deploy.hub import read_pretrained

TREES = Path(__file__).parents[1] / "weights" / "trees.pt"
"""The weights that come with the package: trees in aerial photographs of about 0.1 m a pixel."""

_HUB = re.compile(r"[\w.-]+/[\w.-]+")  # the owner and the repository
_SUFFIXES = (".pt", ".pth", ".pt2", ".onnx", ".xml", ".ckpt", ".pl")  # of files that are missing, and of no repository


def load(name: Any) -> Any:
    """A detector that is ready to ``predict``, on the GPU if there is one, with its classes by name.

    Args:
        name: ``trees`` for the detector that comes with the package; a network with torchvision's COCO weights, such as
            ``retinanet_resnet50_fpn_v2``; or a file: the ``model.pt`` of a training run, or what
            :func:`retina_fast.export` wrote, in any of its formats. The exported formats of PyTorch are programs: open
            only files whose author you trust. Also a folder that :func:`retina_fast.save_pretrained` wrote, the name of
            a repository on the Hugging Face Hub, such as ``me/street`` or ``weecology/deepforest-tree``, a checkpoint
            of DeepForest's, and a live DeepForest model, which stays on its device and shares its weights.

    Returns:
        A :class:`~retina_fast.RetinaNet` in evaluation mode, or an exported model. Both have the method ``predict``,
        and the attributes ``classes`` and ``category_ids``.

    Raises:
        UserError: if there is no such file, or it cannot be used; the message names it and says why.

    Example::

        >>> load("trees").classes
        ['Tree']
    """
    if is_deepforest(name):
        model, names = from_deepforest(name)
        model.classes, model.category_ids = names, list(range(len(names)))
        return model
    if not isinstance(name, str | Path):
        raise TypeError(f"name must be a name or a path, or a DeepForest model, got {type(name)}")
    if str(name) == "trees":
        return load_model(TREES)[0]
    if str(name) in MODELS:
        return load_published(str(name), "COCO_V1")[0]
    path = Path(name)
    there = os.path.exists(path)
    if os.path.isdir(path) or (not there and _HUB.fullmatch(str(name)) and path.suffix not in _SUFFIXES):
        return from_pretrained(name)
    if not there:
        raise UserError(f"{path}: no such model file, and no name of one: trees, {', '.join(sorted(MODELS))}")
    return load_exported(path) if is_exported(path) else load_model(path)[0]


def from_pretrained(
    source: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Any:
    """A network from a folder or a repository of the Hugging Face Hub, ready to detect, with its classes by name.

    Args:
        source: a folder that :func:`retina_fast.save_pretrained` wrote, or the owner's and the repository's name. Those
            of DeepForest are read, too.
        revision, token, cache_dir, local_files_only: as for :func:`retina_fast.deploy.hub.read_pretrained`.

    Raises:
        UserError: if there is no such model, it is damaged, or huggingface_hub or safetensors is not installed.

    Example::

        >>> model = from_pretrained("weecology/deepforest-tree", revision="main")  # doctest: +SKIP
    """
    options: Any = {"revision": revision, "token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    content = read_pretrained(source, **options)
    return _ready(_built(content, source), content)


def load_model(path: Path) -> tuple[Any, Checkpoint]:
    """The network of a model file, ready to detect and on the GPU if there is one, and the file's content.

    The file is this package's, or a checkpoint of DeepForest's.

    Raises:
        UserError: if the file cannot be used; the message names it and says why.

    Example::

        >>> model, content = load_model(TREES)  # doctest: +SKIP
    """
    held = checkpoint.read_model_file(path)
    content = _of_deepforest(held, path) if is_deepforest(held) else checkpoint.checked(held, path)
    return _ready(_built(content, path), content), content


def _of_deepforest(held: Any, path: Path) -> Checkpoint:
    try:
        return deepforest_checkpoint(held)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _built(content: Checkpoint, source: str | Path) -> Any:
    try:
        return content.build()
    except UserError as error:
        raise UserError(f"{source}: {error}") from error


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
        reason = "there are none of that name" if isinstance(error, KeyError) else error.args[0]
        raise UserError(f"{builder} with the weights {weights}: {reason}") from error
    content = Checkpoint(builder, {}, classes, list(range(len(classes))), {})
    return _ready(model, content), content


def _ready(model: Any, content: Checkpoint) -> Any:
    """The model in evaluation mode, on the GPU if there is one, with the names of its classes."""
    model.classes, model.category_ids = list(content.classes), list(content.category_ids)
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
