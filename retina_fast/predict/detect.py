"""Objects in images, into files: what `retina-fast detect` does.

Into the output folder go a picture with boxes for each image, and the files that were asked for: by default
detections.json, a COCO file with scores. Images and detections are written as they come: of a million images, only the
names of their pictures are kept in memory. Several processes, see `retina_fast.data.processes`, share the images; each
writes what it finds into a file of its own, and the first one merges these files.
"""

import heapq
import json
import warnings
from base64 import b64decode, b64encode
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch

from retina_fast.checkpoint import Checkpoint
from retina_fast.data.errors import UserError
from retina_fast.data.outputs import check_folder
from retina_fast.data.processes import ALONE, WORKERS, Processes
from retina_fast.data.progress import tracked
from retina_fast.deploy.export.exported import Exported
from retina_fast.predict.batches import UnfitImage
from retina_fast.predict.draw import draw_detections
from retina_fast.predict.drawn_pictures import must_stay, write_picture
from retina_fast.predict.georeference import Georeference
from retina_fast.predict.image_files import picture_names, silent
from retina_fast.predict.outputs import FORMATS, check_earlier, yolo
from retina_fast.predict.page import small_jpeg
from retina_fast.predict.predict import check_score, default_batch, detector_of, results_of
from retina_fast.predict.results import Results
from retina_fast.predict.sources import Picture, open_files
from retina_fast.predict.tiled_results import Tiling, tiled_results_of

if TYPE_CHECKING:  # rich is needed only where progress is shown
    from rich.console import Console

KINDS = {"coco": "detections.json", "csv": "detections.csv", "geojson": "detections.geojson", "html": "detections.html"}
"""The files of detections by kind. A further kind, `yolo`, is a folder of texts."""

_LABELS = "labels"  # the folder of YOLO texts
_ABOUT = "about.md"  # the file in it that says who wrote them, without which no text in it is replaced
_ABOUT_BEGIN = "Written by retina-fast detect: "
_LONGEST = 8192  # px: the longer side of pictures of images that were cut into tiles
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
    first: dict[str, Counter[str]] = field(default_factory=dict)


def detect(
    model: Any,
    content: Checkpoint | Exported,
    inputs: Sequence[str | Path],
    output: Path,
    score: float = 0.3,
    *,
    kinds: Sequence[str] = ("coco",),
    tile: int | None = None,
    overlap: float = 0.2,
    workers: int = WORKERS,
    console: "Console | None" = None,
    processes: Processes = ALONE,
) -> Found | None:
    """Find objects in images; write the drawn pictures and files of the detections into `output`.

    Args:
        model: a RetinaNet in evaluation mode, which detects by its engine, or an exported one.
        content: its class names and category ids.
        inputs: paths, URLs, globs and cameras, as for :func:`retina_fast.predict.sources.open_files`. A camera is
            watched until Ctrl-C.
        output: a folder, the same one for all processes; files of an earlier run in it are replaced, other files
            never: a picture whose name is theirs has a number behind it.
        score: the least score of a detection, 0 to 1.
        kinds: of the files: `coco`, `csv`, `geojson`, `html` and `yolo`.
        tile: the sides of tiles in pixels, into which larger images are cut; by default none is cut. Rasters are then
            read in windows, and pictures have at most 8192 pixels a side, so that memory stays bounded.
        overlap: the part of a side that neighbouring tiles share.
        workers: how many threads read images, if they are not cut.
        console: where the progress bar is shown; nowhere by default.
        processes: they share the images; the first one gives what all of them found, the others None.

    Raises:
        UserError: for a folder without images, an output that cannot be written, or a score that the model cannot give.

    Warns:
        UserWarning: of files in folders that are passed over; and beside other kinds, of images that have no place in
            the GeoJSON file.

    Example::

        >>> detect(model, content, [Path("photos")], Path("out")).unreadable  # doctest: +SKIP
        ['photos/broken.jpg: not a readable image']
    """
    check_score(model, score)
    kinds = list(dict.fromkeys(kinds))
    source = open_files(inputs, warnings.warn if processes.first else silent, output)
    count = source.count()
    _check_output(output, kinds)
    detector = detector_of(model)
    named = enumerate(picture_names(source.pictures(), lambda name: must_stay(output / f"{name}.jpg")), start=1)
    waiting: deque[tuple[int, str]] = deque()

    def pictures() -> Iterator[Picture]:
        for image_id, (picture, name) in islice(named, processes.rank, None, processes.count):
            waiting.append((image_id, name))
            yield picture

    batch_size = 1 if source.endless else default_batch(detector)
    about = detector, pictures(), score, content.classes, content.category_ids
    if tile is None:
        found = results_of(*about, batch_size=batch_size, workers=workers, keep=True)
    else:
        found = tiled_results_of(*about, Tiling(tile, overlap), batch_size, keep=True)
    share = None if count is None else len(processes.share(count))
    partial = output / f"picture.{processes.rank}.partial"
    with _part_of(output, processes.rank) as part, suppress(*[KeyboardInterrupt] * source.endless):
        for results in tracked(found, "Detecting", share, console):
            image_id, name = waiting.popleft()
            entry: dict[str, Any] = {"id": image_id, "path": results.path, "name": name}
            if results.error:
                entry |= {"problem": str(results.error), "unfit": isinstance(results.error, UnfitImage)}
            else:
                if kinds == ["geojson"]:
                    results.to_geojson()  # raises now, and not when all is done, for an image without a place
                small = results if tile is None else results.reduced(_LONGEST)
                picture = draw_detections(small.image, small.detections(), small.classes)
                write_picture(picture, output / f"{name}.jpg", partial)
                entry |= {key: value.tolist() for key, value in results.detections().items()}
                entry |= {"size": results.size, "georeference": results.georeference}
                if "html" in kinds:
                    entry["jpeg"] = b64encode(small_jpeg(results)).decode()
            part.write(json.dumps(entry) + "\n")
    processes.gather(None)  # Now all parts are written.
    if not processes.first:
        return None
    try:
        return _merge(output, content, kinds, processes.count)
    finally:
        for rank in range(processes.count):
            _part(output, rank).unlink(missing_ok=True)


def _check_output(output: Path, kinds: Sequence[str]) -> None:
    """Raises a UserError if the folder cannot be written into, or holds another's files of the names of these kinds."""
    files = [KINDS[kind] for kind in kinds if kind in KINDS]
    check_folder(output, files)
    for file in files:
        check_earlier(output / file)
    labels, about = output / _LABELS, output / _LABELS / _ABOUT
    if "yolo" in kinds and labels.exists():
        earlier = about.is_file() and about.read_text(errors="replace").startswith(_ABOUT_BEGIN)
        if not earlier and not (labels.is_dir() and not any(labels.iterdir())):
            raise UserError(f"{labels}: is not of an earlier detection; give another folder as --output")


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


def _merge(output: Path, content: Checkpoint | Exported, kinds: Sequence[str], count: int) -> Found:
    """Writes the files from the parts of `count` processes, line by line in the order of the images."""
    found, parts = Found(), [_part(output, rank) for rank in range(count)]
    with ExitStack() as stack:
        files = [output / KINDS[kind] for kind in kinds if kind in KINDS]
        named = content.classes, content.category_ids
        writers = [stack.enter_context(FORMATS[file.suffix][0](file, *named)) for file in files]
        if "yolo" in kinds:
            _begin_labels(output / _LABELS, content.classes)
        lines = [map(json.loads, stack.enter_context(part.open())) for part in parts]
        for entry in heapq.merge(*lines, key=lambda entry: entry["id"]):
            if "problem" in entry:
                (found.unfit if entry["unfit"] else found.unreadable).append(entry["problem"])
                continue
            results = _restored(entry, content)
            found.images += 1
            found.objects.update(results.counts())
            if len(found.first) < _FIRST:
                found.first[results.path or entry["name"]] = results.counts()
            for file, add in zip(files, writers, strict=True):
                try:
                    add(results, entry["id"], b64decode(entry.get("jpeg", "")))
                except UserError as error:
                    if file.suffix != ".geojson" or len(kinds) == 1:
                        raise
                    warnings.warn(f"{error}; it is left out of {file.name}", stacklevel=2)  # the other files hold it
            if "yolo" in kinds:
                with yolo(output / _LABELS / f"{entry['name']}.txt") as add:
                    add(results)
    return found


def _restored(entry: dict[str, Any], content: Checkpoint | Exported) -> Results:
    """The results that a line of a part holds."""
    placed = entry["georeference"]
    return Results(
        torch.tensor(entry["boxes"]).reshape(-1, 4),
        torch.tensor(entry["scores"]),
        torch.tensor(entry["labels"], dtype=torch.int64),
        tuple(entry["size"]),
        content.classes,
        content.category_ids,
        entry["path"],
        georeference=placed and Georeference(tuple(placed[0]), placed[1]),
    )


def _begin_labels(folder: Path, classes: Sequence[str]) -> None:
    """Makes the folder of YOLO texts, with a file that says what they are."""
    folder.mkdir(exist_ok=True)
    lines = [f"- {label}: {' '.join(name.split())}" for label, name in enumerate(classes)]
    line = (
        f"{_ABOUT_BEGIN}a text for each image, in it a line for each object: label, middle x, middle y, width, height"
    )
    (folder / _ABOUT).write_text("\n".join([line + " (parts of the image's), score.", "", *lines, ""]), "utf-8")
