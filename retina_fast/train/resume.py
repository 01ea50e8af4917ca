"""Whether a run can be begun or resumed in a folder.

A new run replaces no file that is there already; a resumed one must have the same settings and annotations as before.
"""

import hashlib
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from retina_fast import checkpoint
from retina_fast.data.coco import CocoDataset
from retina_fast.data.errors import UserError
from retina_fast.data.outputs import check_file, check_folder
from retina_fast.train.settings import RANDOM, ResolvedSettings, TrainSettings

_STATE = ("settings", "global_step", "state_dict", "optimizer_states", "loops", "callbacks")


def check_new_run(output: Path) -> None:
    """Make the folder of a new run, and look whether its files can be written there without replacing others.

    Raises:
        UserError: if not, or if there is a run already; the message names the file and what to do.

    Example::

        >>> check_new_run(Path("runs/a"))  # doctest: +SKIP
    """
    check_folder(output)
    if (output / "last.ckpt").exists():
        raise UserError(f"{output} already holds a run: add --resume to go on with it, or choose another --output")
    log = output / "log.csv"
    begun = log.is_file() and log.read_bytes().startswith(b"step,")  # by a run that ended before its first checkpoint
    pictures = () if begun else ("log.csv", "loss.png", "precision_recall.png")
    steps = sorted(path.name for path in output.glob("step-*.ckpt"))
    for name in ("model.pt", "best.pt", *steps, *pictures):
        if (output / name).exists():
            raise UserError(f"{output} already holds {name}, which the run would replace: choose another --output")
    for name in ("last.ckpt", "log.csv", "loss.png", "precision_recall.png"):
        check_file(output / name)


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
    saved = state["settings"]
    unknown = sorted(set(saved) - {field.name for field in fields(TrainSettings)})
    if unknown:
        raise UserError(f"{last}: has the settings {', '.join(unknown)} of a newer retina_fast: update retina_fast")
    saved["weights_backbone"] = saved.get("weights_backbone") or RANDOM  # None, in runs that were begun earlier
    before = asdict(TrainSettings(**saved).resolve(data))
    for name, value in asdict(settings).items():
        if before[name] != value:
            raise UserError(f"the run in {last.parent} has {name} {before[name]}, not {value}: give it the same")
    if state.get("data") not in (None, fingerprint(data)):
        raise UserError(f"{data.json_file}: is not what the run in {last.parent} was begun with; start a new run")
    return state.get("kwargs")
