"""Whether a run can be resumed: it must have the same settings and the same annotations as before."""

import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from retina_fast.data.coco import CocoDataset
from retina_fast.data.errors import UserError
from retina_fast.train.settings import RANDOM, ResolvedSettings, TrainSettings


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
    try:
        state: dict[str, Any] = torch.load(last, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, EOFError, ValueError, OSError) as error:
        kept = ", ".join(sorted(path.name for path in last.parent.glob("step-*.ckpt"))) or "none"
        raise UserError(f"{last}: damaged; copy an older one in its place (there are: {kept}) to resume") from error
    saved = state["settings"]
    saved["weights_backbone"] = saved.get("weights_backbone") or RANDOM  # None, in runs that were begun earlier
    before = asdict(TrainSettings(**saved).resolve(data))
    for name, value in asdict(settings).items():
        if before[name] != value:
            raise UserError(f"the run in {last.parent} has {name} {before[name]}, not {value}: give it the same")
    if state.get("data") not in (None, fingerprint(data)):
        raise UserError(f"{data.json_file}: is not what the run in {last.parent} was begun with; start a new run")
    return state.get("kwargs")
