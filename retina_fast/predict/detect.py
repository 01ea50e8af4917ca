"""Objects in image files.

Into the output folder go detections.json, a COCO file with scores, and a picture with boxes for each image. Images and
detections are written as they come: of a million images, only the names of their pictures are kept in memory. Several
processes, see `retina_fast.data.processes`, share the images; each writes what it finds into a file of its own, and the
first one merges these files.
"""

import heapq
import json
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice, tee
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchvision.io import write_jpeg

from retina_fast.checkpoint import Checkpoint
from retina_fast.data.errors import ImageError, UserError
from retina_fast.data.metrics import as_results
from retina_fast.data.processes import ALONE, WORKERS, Processes
from retina_fast.data.progress import tracked
from retina_fast.deploy.exported import Exported
from retina_fast.predict.coco_writer import CocoWriter
from retina_fast.predict.draw import above, draw_detections
from retina_fast.predict.images import ImageFiles, image_files, picture_names
from retina_fast.predict.predictions import predictions

if TYPE_CHECKING:  # rich is needed only where progress is shown
    from rich.console import Console

_FIRST = 50  # images whose objects are kept apart: as many as a person reads through


@dataclass
class Found:
    """The result of :func:`detect`.

    Attributes:
        images: how many images were read.
        unreadable: one message for each image that could not be read.
        objects: how many objects of each class, in all images.
        first: how many of each class in each of the first 50 images.
    """

    images: int = 0
    unreadable: list[str] = field(default_factory=list)
    objects: Counter[str] = field(default_factory=Counter)
    first: dict[Path, Counter[str]] = field(default_factory=dict)


def detect(
    model: Any,
    content: Checkpoint | Exported,
    inputs: list[Path],
    output: Path,
    score: float = 0.3,
    *,
    workers: int = WORKERS,
    console: "Console | None" = None,
    processes: Processes = ALONE,
) -> Found | None:
    """Find objects in images; write detections.json and the drawn pictures into `output`.

    Args:
        model: a RetinaNet in evaluation mode, or an exported one that takes uint8 images.
        content: its class names and category ids.
        inputs: image files, folders of them, or lists of them, as for :func:`image_files`.
        output: a folder, the same one for all processes; files of an earlier run in it are replaced.
        score: the least score of a detection, 0 to 1.
        workers: how many processes read images.
        console: where the progress bar is shown; nowhere by default.
        processes: they share the images; the first one gives what all of them found, the others None.

    Raises:
        UserError: for a folder without images, or an output that is a file.

    Example::

        >>> detect(model, content, [Path("photos")], Path("out")).unreadable  # doctest: +SKIP
        ['photos/broken.jpg: not a readable image']
    """
    share = len(processes.share(sum(1 for _ in image_files(inputs))))
    if output.exists() and not output.is_dir():
        raise UserError(f"{output}: is a file; give a folder as --output")
    output.mkdir(parents=True, exist_ok=True)
    named = enumerate(picture_names(image_files(inputs)), start=1)
    ours, ahead = tee(islice(named, processes.rank, None, processes.count))
    predicted = zip(ours, predictions(model, ImageFiles(), workers, (path for _, (path, _) in ahead)), strict=True)
    with _part(output, processes.rank).open("w") as part:
        for (image_id, (path, name)), prediction in tracked(predicted, "Detecting", share, console):
            entry: dict[str, Any] = {"id": image_id}
            if isinstance(prediction, ImageError):
                entry["problem"] = str(prediction)
            else:
                (image, _), detections = prediction
                detections = above(detections, score)
                write_jpeg(draw_detections(image, detections, content.classes), str(output / f"{name}.jpg"), quality=90)
                size = {"height": image.shape[1], "width": image.shape[2]}
                entry["image"] = {"id": image_id, "file_name": str(path), **size}
                entry["results"] = as_results(detections, image_id, list(content.category_ids))
                entry["objects"] = Counter(content.classes[label] for label in detections["labels"].tolist())
            part.write(json.dumps(entry) + "\n")
    processes.gather(None)  # Now all parts are written.
    return _merge(output, content, processes.count) if processes.first else None


def _part(output: Path, rank: int) -> Path:
    """The file of what one process finds: a JSON object in each line, for each of its images."""
    return output / f"detections.{rank}.partial"


def _merge(output: Path, content: Checkpoint | Exported, count: int) -> Found:
    """Writes detections.json from the files of `count` processes, line by line in the order of the images."""
    found, parts = Found(), [_part(output, rank) for rank in range(count)]
    named = zip(content.category_ids, content.classes, strict=True)
    categories = [{"id": category_id, "name": name} for category_id, name in named]
    with ExitStack() as stack:
        coco = stack.enter_context(CocoWriter(output / "detections.json", categories))
        lines = [map(json.loads, stack.enter_context(part.open())) for part in parts]
        for entry in heapq.merge(*lines, key=lambda entry: entry["id"]):
            if "problem" in entry:
                found.unreadable.append(entry["problem"])
                continue
            found.images += 1
            found.objects.update(entry["objects"])
            if len(found.first) < _FIRST:
                found.first[Path(entry["image"]["file_name"])] = Counter(entry["objects"])
            coco.add(entry["image"], entry["results"])
    for part in parts:
        part.unlink()
    return found
