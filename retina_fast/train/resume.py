"""Whether a run can be begun or resumed in a folder.

A new run replaces no file that is there already; a resumed one must have the same settings and annotations as before.
"""

import hashlib
import itertools
import os
import warnings
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from retina_fast import checkpoint
from retina_fast.data.coco import CocoDataset
from retina_fast.data.errors import UserError
from retina_fast.data.outputs import check_folder
from retina_fast.train.settings import RANDOM, ResolvedSettings, TrainSettings

_MODELS = ("model.pt", "best.pt")
_RECORDS = ("log.csv", "loss.png", "precision_recall.png")
_STATE = ("settings", "global_step", "state_dict", "optimizer_states", "loops", "callbacks")


def check_new_run(output: Path) -> None:
    """Look whether the files of a new run can be written into the folder without replacing others.

    Files of a run that ended before its first checkpoint are no hindrance: :func:`set_aside` keeps them.

    Raises:
        UserError: if not, or if there is a run already; the message names the file and what to do.

    Example::

        >>> check_new_run(Path("runs/a"))  # doctest: +SKIP
    """
    check_folder(output, ("last.ckpt", *_RECORDS))
    if (output / "last.ckpt").exists():
        raise UserError(f"{output} already holds a run: add --resume to go on with it, or choose another --output")
    if (output / "tensorboard").is_file():
        raise UserError(f"{output / 'tensorboard'}: is a file, where the run needs a folder: choose another --output")
    steps = sorted(path.name for path in output.glob("step-*.ckpt"))
    for name in (*steps, *(() if _was_begun(output) else (*_MODELS, *_RECORDS))):
        if (output / name).exists():
            raise UserError(f"{output} already holds {name}, which the run would replace: choose another --output")


def set_aside(output: Path) -> None:
    """Give other names to the files of a run without a checkpoint, and warn of it.

    The last file of an interval is last.ckpt, so that a run that is killed in its first one may leave others alone.

    Example::

        >>> set_aside(Path("runs/a"))  # doctest: +SKIP
    """
    there = [output / name for name in (*_MODELS, *_RECORDS) if os.path.lexists(output / name)]
    for number in itertools.count(1):
        others = [file.with_name(f"{file.stem}.{number}{file.suffix}") for file in there]
        if not any(map(os.path.lexists, others)):
            break
    for file, other in zip(there, others, strict=True):
        file.rename(other)
    if there:
        names = ", ".join(other.name for other in others)
        warnings.warn(f"{output}: the files of a run that left no checkpoint are now {names}", stacklevel=2)


def _was_begun(output: Path) -> bool:
    """Whether the folder's log.csv is of a run."""
    log = output / "log.csv"
    return log.is_file() and log.read_bytes().startswith(b"step,")


def fingerprint(data: CocoDataset) -> str:
    """A digest of what is trained on: the images' names, the boxes and the classes in their order, but not the pixels.

    Example::

        >>> fingerprint(dataset)  # doctest: +SKIP
        '5f0c...'
    """
    digest = hashlib.sha256(repr((data.classes, data.category_ids)).encode())
    for record in data.images:
        digest.update(repr((record["id"], record["file_name"])).encode())
    for box in data.coco["annotations"]:
        digest.update(repr((box["image_id"], box["category_id"], box["bbox"], box["iscrowd"])).encode())
    return digest.hexdigest()


def check_resume(last: Path, settings: ResolvedSettings, data: CocoDataset) -> dict[str, Any] | None:
    """The keyword arguments of the model's builder in the run to be resumed; None if its file does not hold them.

    Args:
        last: the run's last.ckpt.
        settings: those that the resumed run is given.
        data: the images that it is given.

    Raises:
        UserError: if settings or data differ from the run's, naming what differs; or if there is no run, or its file
            is damaged.

    Example::

        >>> check_resume(Path("runs/a/last.ckpt"), settings, data)  # doctest: +SKIP
        {'min_size': None, 'image_scale': 1.25}
    """
    if not last.exists():
        raise UserError(f"there is no run to resume in {last.parent}: it has no {last.name}")
    check_folder(last.parent)
    kept = ", ".join(sorted(path.name for path in last.parent.glob("step-*.ckpt"))) or "none"
    problem = f"damaged; copy an older one in its place (there are: {kept}) to resume"
    state = checkpoint.read(last, problem, "without one, start a new run in another folder", mmap=True)
    missing = [name for name in _STATE if not isinstance(state, dict) or name not in state]
    if missing:
        raise UserError(f"{last}: is not what retina-fast train wrote: it has no {', '.join(missing)}")
    before = _saved_settings(last, state["settings"], data)
    for name, value in asdict(settings).items():
        if before[name] != value:
            raise UserError(f"the run in {last.parent} has {name} {before[name]}, not {value}: give it the same")
    if state.get("data") not in (None, fingerprint(data)):
        raise UserError(f"{data.json_file}: is not what the run in {last.parent} was begun with; start a new run")
    return state.get("kwargs")


def _saved_settings(last: Path, saved: Any, data: CocoDataset) -> dict[str, Any]:
    """The settings that a run's file holds, with every choice made."""
    if not isinstance(saved, dict):
        raise UserError(f"{last}: is not what retina-fast train wrote: its settings are {saved!r:.60}")
    unknown = sorted(str(name) for name in saved.keys() - {field.name for field in fields(TrainSettings)})
    if unknown:
        raise UserError(f"{last}: has settings of another version of retina_fast, {', '.join(unknown)}: use that one")
    backbone = saved.get("weights_backbone") or RANDOM  # None, in runs that were begun earlier
    try:
        return asdict(TrainSettings(**saved | {"weights_backbone": backbone}).resolve(data))
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{last}: is not what retina-fast train wrote: its settings are {saved!r:.200}") from error
