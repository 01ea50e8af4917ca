"""Model files: the weights, how to build the network that they fit, and the names of its classes.

The file is a plain dictionary, read with `torch.load(weights_only=True)`, so that opening one runs no code of its
author's. Floats are stored as float16, unless they overflow; this halves the file and changes AP by too little to
measure.
"""

import pickle
import zipfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from retina_fast.builders import MODELS
from retina_fast.data.errors import UserError
from retina_fast.data.files import damage, replacing

VERSION = 1


@dataclass
class Checkpoint:
    """A model and what a person must know to use it.

    Attributes:
        builder: its name in `retina_fast.builders.MODELS`.
        kwargs: the builder's keyword arguments, without the class count; numbers, strings, booleans, and lists and
            dictionaries of them only.
        classes: K class names, by label.
        category_ids: the K category ids of the data set that it was trained on.
        state_dict: the weights.
        metrics: whatever was measured, by name.

    Example::

        >>> checkpoint = load("runs/trees/model.pt")  # doctest: +SKIP
        >>> model = checkpoint.build().eval()  # doctest: +SKIP
    """

    builder: str
    kwargs: dict[str, Any]
    classes: list[str]
    category_ids: list[int]
    state_dict: dict[str, Tensor]
    metrics: dict[str, float] = field(default_factory=dict)

    def build(self) -> Any:
        """The network with the weights, float32, on the CPU, in training mode.

        Raises:
            UserError: if this version of the package has no such builder, or the arguments or weights do not fit it.
        """
        try:
            model = build(self.builder, len(self.classes), fetch=False, **self.kwargs)
        except UserError:
            raise
        except Exception as error:  # whatever a builder says of arguments that are not its own
            raise UserError(f"the arguments {self.kwargs} do not fit {self.builder}: {error}") from error
        for name, own in model.state_dict().items():
            value = self.state_dict.get(name, own)  # load_state_dict would turn whatever it is into numbers of its own
            if own.is_floating_point() and isinstance(value, Tensor) and not value.is_floating_point():
                raise UserError(f"the weights do not fit {self.builder}: {name} is {value.dtype}, not floating point")
        try:
            problems = model.load_state_dict(self.state_dict, strict=False)
        except RuntimeError as error:  # the shapes differ
            raise UserError(f"the weights do not fit {self.builder}: {str(error).splitlines()[-1].strip()}") from error
        for kind, keys in (("lack", problems.missing_keys), ("have an unknown", problems.unexpected_keys)):
            if keys:
                raise UserError(f"the weights do not fit {self.builder}: they {kind} {keys[0]} ({len(keys)} in all)")
        return model


def build(builder: str, num_classes: int, fetch: bool = False, **kwargs: Any) -> nn.Module:
    """The network of that name.

    Args:
        builder: its name in `retina_fast.builders.MODELS`.
        num_classes: K.
        fetch: whether the weights that `weights_backbone` in `kwargs` names are loaded; torchvision downloads them.
            Without it all weights are random, and that name only decides which layers are frozen.
        **kwargs: the builder's.

    Raises:
        UserError: if there is no such network; the message then lists the known ones. Also if there are no such
            weights or they cannot be downloaded; the message then says where to put the file.

    Example::

        >>> build("retinanet_resnet18_fpn_lite", num_classes=1)  # doctest: +SKIP
    """
    if builder not in MODELS:
        raise UserError(f"there is no model {builder!r}; choose one of {', '.join(sorted(MODELS))}")
    backbone = kwargs.pop("weights_backbone", None)
    if backbone and not fetch:
        kwargs["_fetch"] = False
    try:
        return MODELS[builder](weights=None, weights_backbone=backbone, num_classes=num_classes, **kwargs)
    except (KeyError, ValueError, ConnectionError) as error:
        if not backbone:
            raise
        reason = "there are none of that name" if isinstance(error, KeyError) else error.args[0]
        raise UserError(
            f"{builder} with the backbone's weights {backbone}: {reason}; or give --weights-backbone others, or none"
        ) from error


def plain(checkpoint: Checkpoint) -> Checkpoint:
    """The same content of the kinds that a file can hold: NumPy's numbers and words become Python's own.

    Raises:
        UserError: for what could not be read again; the message names it.

    Example::

        >>> plain(Checkpoint("retinanet_resnet18_fpn_lite", {}, ("Tree",), np.array([1]), {})).category_ids
        [1]
    """
    lists = {name: getattr(checkpoint, name) for name in ("classes", "category_ids")}
    lists = {name: list(value) if isinstance(value, tuple | np.ndarray) else value for name, value in lists.items()}
    rest = {name: getattr(checkpoint, name) for name in ("builder", "kwargs", "metrics")}
    checkpoint = replace(checkpoint, **{name: _plain(value, name) for name, value in (lists | rest).items()})
    _refuse_other(vars(checkpoint), "the model")
    return checkpoint


def _plain(value: Any, name: str) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, dict):
        return {key: _plain(entry, f"{name}[{key!r}]") for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_plain(entry, f"{name}[{i}]") for i, entry in enumerate(value))
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise UserError(f"the model cannot be written: its {name} is {value!r}, where numbers and words are expected")


def save(checkpoint: Checkpoint, path: str | Path) -> None:
    """Write a model file; floats become float16.

    Raises:
        UserError: if it cannot be written, or could not be read again.

    Example::

        >>> save(checkpoint, "model.pt")  # doctest: +SKIP
    """
    checkpoint = plain(checkpoint)
    content = vars(checkpoint) | {"version": VERSION}
    content["state_dict"] = {name: _small(value) for name, value in checkpoint.state_dict.items()}
    with replacing(Path(path)) as partial:
        torch.save(content, partial)


def read(path: Path, problem: str, remedy: str, mmap: bool = False) -> Any:
    """The content of a file that `torch.save` wrote, on the CPU. Code that the file names does not run.

    Args:
        path: the file.
        problem: what the error says of a file that cannot be read.
        remedy: what the error says that a person should do.
        mmap: whether tensors stay in the file until they are used, which must then stay as it is.

    Raises:
        UserError: if the file is damaged, or holds code; the message names it.

    Example::

        >>> read(Path("runs/trees/last.ckpt"), "damaged", "copy it again")["global_step"]  # doctest: +SKIP
        500
    """
    found = damage(path)
    try:
        if found:
            raise ValueError(found)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # A damaged file makes the unpickler raise anything.
        code = isinstance(error, pickle.UnpicklingError) and zipfile.is_zipfile(path)
        why = found or ("it asks for code to be run, which is refused" if code else "it is no file of weights")
        raise UserError(f"{path}: {problem} ({why}): {remedy}") from error


def load(path: str | Path) -> Checkpoint:
    """Read a model file; float16 becomes float32.

    Raises:
        UserError: if the file is missing, damaged, or something else than a model file.

    Example::

        >>> load("runs/trees/model.pt").classes  # doctest: +SKIP
        ['Tree']
    """
    return checked(read_model_file(Path(path)), Path(path))


def read_model_file(path: Path) -> Any:
    """What is in a model file, on the CPU, not looked at yet.

    Raises:
        UserError: if the file is missing or damaged.

    Example::

        >>> sorted(read_model_file(Path("runs/trees/model.pt")))[:2]  # doctest: +SKIP
        ['builder', 'category_ids']
    """
    if not path.is_file():
        raise UserError(f"{path}: no such model file")
    problem = "damaged, or not a model file written by retina-fast train"
    return read(path, problem, "copy it again, or give another")


def checked(content: Any, path: Path) -> Checkpoint:
    """The content of a model file, looked at; float16 becomes float32.

    Args:
        content: what the file holds.
        path: the file, which the errors name.

    Raises:
        UserError: if something is missing or of another kind than it must be.

    Example::

        >>> checked(torch.load("runs/trees/model.pt"), Path("runs/trees/model.pt")).classes  # doctest: +SKIP
        ['Tree']
    """
    expected = set(Checkpoint.__dataclass_fields__)
    missing = expected - set(content) if isinstance(content, dict) else expected
    if missing:
        names = ", ".join(sorted(missing))
        raise UserError(f"{path}: not a model file of retina_fast: it has no {names}{_what_it_is(content)}")
    if content.get("version") != VERSION:
        raise UserError(
            f"{path}: is of version {content.get('version')!r}, this package reads {VERSION}: update retina_fast"
        )
    _refuse_other(content, f"{path}: not a model file of retina_fast")
    checkpoint = Checkpoint(**{name: content[name] for name in expected})
    broken = [name for name, value in checkpoint.state_dict.items() if not _is_finite(value)]
    if broken:
        what = "NaN" if checkpoint.state_dict[broken[0]].isnan().any() else "infinite numbers"
        raise UserError(
            f"{path}: damaged, or of a run that diverged: {broken[0]} holds {what} ({len(broken)} tensors in all), "
            "with which nothing is found: take an earlier file"
        )
    checkpoint.state_dict = {
        name: value.float() if value.dtype == torch.float16 else value for name, value in checkpoint.state_dict.items()
    }
    return checkpoint


def _refuse_other(content: dict[str, Any], where: str) -> None:
    """Raises a UserError if a part of a model file's content is of another kind than it must be."""
    kinds = {"builder": str, "kwargs": dict, "classes": list, "category_ids": list, "state_dict": dict, "metrics": dict}
    for name, kind in kinds.items():
        if not isinstance(content[name], kind):
            raise UserError(f"{where}: its {name} is no {kind.__name__}")
    names, ids, weights = content["classes"], content["category_ids"], content["state_dict"]
    if not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in weights.items()):
        raise UserError(f"{where}: its state_dict holds more than tensors by their names")
    for name, value in weights.items():
        if value.layout == torch.strided and value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise UserError(f"{where}: its {name} is larger than the numbers that it holds")
    if not names or not all(isinstance(name, str) for name in names):
        raise UserError(f"{where}: its classes are no list of names")
    if len(ids) != len(names) or not all(type(number) is int for number in ids):
        raise UserError(f"{where}: its category_ids are not one number a class")
    if not all(isinstance(number, int | float) for number in content["metrics"].values()):
        raise UserError(f"{where}: its metrics are not one number a name")


def _what_it_is(content: Any) -> str:
    """What a file of weights is that is no model file, and what to do with it; empty if nobody knows."""
    if not isinstance(content, dict):
        return ""
    if "pytorch-lightning_version" in content:
        return ": it is a checkpoint of Lightning's, which goes on with --resume; the model is model.pt beside it"
    if content and all(isinstance(value, Tensor) for value in content.values()):
        return ": it holds weights alone: give them to the network that they are of, by its load_state_dict"
    return ""


def _is_finite(value: Tensor) -> bool:
    usual = value.is_floating_point() and value.layout == torch.strided and value.is_cpu
    return not usual or bool(value.float().isfinite().all())


def _small(value: Tensor) -> Tensor:
    value = value.detach().cpu().contiguous()
    if not value.is_floating_point():
        return value
    half = value.half()
    return value.clone() if half.isinf().any() else half
