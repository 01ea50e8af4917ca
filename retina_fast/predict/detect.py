"""Objects in image files.

Into the output folder go detections.json, a COCO file with scores, and a picture with boxes for each image. Images and
detections are written as they come: of a million images, only the names of their pictures are kept in memory. Several
processes, see `retina_fast.data.processes`, share the images; each writes what it finds into a file of its own, and the
first one merges these files.
"""

import heapq
import json
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import islice, tee
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from retina_fast.checkpoint import Checkpoint
from retina_fast.data.errors import ImageError, UserError
from retina_fast.data.metrics import as_results
from retina_fast.data.outputs import check_folder
from retina_fast.data.processes import ALONE, WORKERS, Processes
from retina_fast.data.progress import tracked
from retina_fast.deploy.exported import Exported
from retina_fast.predict.coco_writer import BEGIN, CocoWriter
from retina_fast.predict.draw import above, draw_detections
from retina_fast.predict.images import ImageFiles, image_files, picture_names, silent
from retina_fast.predict.pictures import must_stay, write_picture
from retina_fast.predict.predictions import UnfitImage, predictions

if TYPE_CHECKING:  # rich is needed only where progress is shown
    from rich.console import Console

_FIRST = 50  # images whose objects are kept apart: as many as a person reads through


@dataclass
class Found:
    """The result of :func:`detect`.

    Attributes:
        images: how many images were read.
        unreadable: one message for each image that could not be read.
        unfit: one message for each image of a size that the model cannot take.
        objects: how many objects of each class, in all images.
        first: how many of each class in each of the first 50 images.
    """

    images: int = 0
    unreadable: list[str] = field(default_factory=list)
    unfit: list[str] = field(default_factory=list)
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
        output: a folder, the same one for all processes; files of an earlier run in it are replaced, other pictures
            never: a picture whose name is theirs has a number behind it.
        score: the least score of a detection, 0 to 1.
        workers: how many processes read images.
        console: where the progress bar is shown; nowhere by default.
        processes: they share the images; the first one gives what all of them found, the others None.

    Raises:
        UserError: for a folder without images, an output that cannot be written, or a score that the model cannot give.

    Warns:
        UserWarning: of files in folders that are passed over.

    Example::

        >>> detect(model, content, [Path("photos")], Path("out")).unreadable  # doctest: +SKIP
        ['photos/broken.jpg: not a readable image']
    """
    say = warnings.warn if processes.first else silent
    share = len(processes.share(sum(1 for _ in image_files(inputs, say, output))))
    _check_output(output)
    files = image_files(inputs, drawn_in=output)
    named = enumerate(picture_names(files, lambda name: must_stay(output / f"{name}.jpg")), start=1)
    ours, ahead = tee(islice(named, processes.rank, None, processes.count))
    predicted = zip(ours, predictions(model, ImageFiles(), workers, (path for _, (path, _) in ahead)), strict=True)
    partial = output / f"picture.{processes.rank}.partial"
    with _scores_from(model, score), _part_of(output, processes.rank) as part:
        for (image_id, (path, name)), prediction in tracked(predicted, "Detecting", share, console):
            entry: dict[str, Any] = {"id": image_id}
            if isinstance(prediction, ImageError):
                entry |= {"problem": str(prediction), "unfit": isinstance(prediction, UnfitImage)}
            else:
                (image, _), detections = prediction
                detections = above(detections, score)
                picture = draw_detections(image, detections, content.classes)
                write_picture(picture, output / f"{name}.jpg", partial)
                size = {"height": image.shape[1], "width": image.shape[2]}
                entry["image"] = {"id": image_id, "file_name": str(path), **size}
                entry["results"] = as_results(detections, image_id, list(content.category_ids))
                entry["objects"] = Counter(content.classes[label] for label in detections["labels"].tolist())
            part.write(json.dumps(entry) + "\n")
    processes.gather(None)  # Now all parts are written.
    if not processes.first:
        return None
    try:
        return _merge(output, content, processes.count)
    finally:
        for rank in range(processes.count):
            _part(output, rank).unlink(missing_ok=True)


def _check_output(output: Path) -> None:
    """Raises a UserError if the folder cannot be written into, or its detections.json is no COCO file of detections."""
    file = output / "detections.json"
    check_folder(output, [file.name])
    if not file.exists():
        return
    with file.open("rb") as opened:
        if opened.read(len(BEGIN)) != BEGIN.encode():
            raise UserError(f"{file}: is no file of an earlier detection; give another folder as --output")


@contextmanager
def _scores_from(model: Any, score: float) -> Iterator[None]:
    """Has the model give every detection of at least that score, for the time of the block.

    Raises:
        UserError: for a score outside [0, 1], or below what an exported model was made for.
    """
    if not 0 <= score <= 1:
        raise UserError(f"--score must be at least 0 and at most 1, got {score}")
    if isinstance(model, Exported):
        least = model.metadata["score_thresh"]
        if score < least:
            raise UserError(f"--score {score}: the exported model gives no score under {least}; give at least that")
        yield
        return
    before = getattr(model, "score_thresh", score)
    model.score_thresh = min(before, score)
    try:
        yield
    finally:
        model.score_thresh = before


@contextmanager
def _part_of(output: Path, rank: int) -> Iterator[IO[str]]:
    """The file of what one process finds, opened. After an error, or Ctrl-C, no unfinished file is left."""
    output.mkdir(parents=True, exist_ok=True)
    try:
        with _part(output, rank).open("w") as part:
            yield part
    except BaseException:
        for unfinished in (_part(output, rank), output / f"picture.{rank}.partial"):
            unfinished.unlink(missing_ok=True)
        raise


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
                (found.unfit if entry["unfit"] else found.unreadable).append(entry["problem"])
                continue
            found.images += 1
            found.objects.update(entry["objects"])
            if len(found.first) < _FIRST:
                found.first[Path(entry["image"]["file_name"])] = Counter(entry["objects"])
            coco.add(entry["image"], entry["results"])
    return found
