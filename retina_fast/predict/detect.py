"""Objects in images, into files: what `retina-fast detect` does.

Into the output folder go a picture with boxes for each image, and the files that were asked for: by default
detections.json, a COCO file with scores. Images and detections are written as they come: of a million images, only the
names of their pictures are kept in memory. Several processes, see `retina_fast.data.processes`, share the images; each
writes what it finds into a file of its own, and the first one merges these files. A later run goes on from them.
"""

import json
import warnings
from base64 import b64decode, b64encode
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from retina_fast.predict.parts import FileStamp, Parts, file_stamp
from retina_fast.predict.pictures import Picture
from retina_fast.predict.predict import check_score, default_batch, detector_of, digest_of, results_of
from retina_fast.predict.results import Results
from retina_fast.predict.sources import open_files
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
    resume: bool = False,
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
        resume: whether to go on from what a run that was killed has left in `output`, and, if this one is cut short, to
            leave it there. Images whose file has changed since, or whose drawn picture is gone, are detected in again.
        workers: how many threads read images, if they are not cut.
        console: where the progress bar is shown; nowhere by default.
        processes: they share the images; the first one gives what all of them found, the others None.

    Raises:
        UserError: for a folder without images, an output that cannot be written, a score that the model cannot give,
            or if a run is to go on that had other options, or that watches a camera.

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
    if resume and source.endless:
        raise UserError("a camera or stream shows nothing twice: leave out --resume")
    count = source.count()
    _check_output(output, kinds)
    detector = detector_of(model)
    output.mkdir(parents=True, exist_ok=True)
    digest = digest_of(detector)
    about = {"model": digest, "list of classes": content.classes, "score": score, "tile": tile}
    parts = Parts(
        output, about | {"overlap": tile and overlap, "choice of html": "html" in kinds}, resume, processes.rank
    )
    processes.any(False)  # Now all have looked at what is there.
    if processes.first:
        parts.discard_earlier()
    processes.any(False)  # And none finds there what the first one deletes.
    named = enumerate(picture_names(source.pictures(), lambda name: must_stay(output / f"{name}.jpg")), start=1)
    waiting: deque[tuple[int, str, FileStamp]] = deque()
    batch_size = 1 if source.endless else default_batch(detector)
    names = content.classes, content.category_ids

    def pictures() -> Iterator[Picture]:
        for image_id, (picture, name) in islice(named, processes.rank, None, processes.count):
            stamp = file_stamp(picture)
            if entry := parts.kept(picture, name, stamp):
                kept.write(json.dumps(entry | {"id": image_id}) + "\n")
                continue
            waiting.append((image_id, name, stamp))
            yield picture

    def tiled(tiling: Tiling) -> Iterator[Results]:
        for picture in pictures():
            with_rows = replace(tiling, resume=parts.rows(picture, *waiting[-1][1:]))
            yield from tiled_results_of(detector, [picture], score, *names, with_rows, batch_size, keep=True)

    share = None if count is None else max(0, len(processes.share(count)) - parts.found_before // processes.count)
    if console and parts.found_before:
        console.print(f"Going on: {parts.found_before} images were looked at before")
    partial = output / f"picture.{processes.rank}.partial"
    with parts.opened() as (part, kept), suppress(*[KeyboardInterrupt] * source.endless):
        if tile is None:
            found = results_of(detector, pictures(), score, *names, batch_size, workers, keep=True)
        else:
            found = tiled(Tiling(tile, overlap, about=digest, keep_rows=True))
        for results in tracked(found, "Detecting", share, console):
            image_id, name, stamp = waiting.popleft()
            entry: dict[str, Any] = {"id": image_id, "path": results.path, "name": name, "stamp": stamp}
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
            part.flush()
            parts.delete_rows()  # Not before: drawing a large raster takes long enough to be killed in.
    processes.gather(None)  # Now all parts are written.
    if not processes.first:
        return None
    try:
        result = _merge(output, content, kinds, parts.merged(processes.count))
    except BaseException:
        if not resume:
            parts.delete(processes.count)
        raise
    parts.delete(processes.count)
    return result


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


def _merge(
    output: Path, content: Checkpoint | Exported, kinds: Sequence[str], entries: Iterator[dict[str, Any]]
) -> Found:
    """Writes the files from what was found in each image, in the order of the images."""
    found = Found()
    with ExitStack() as stack:
        files = [output / KINDS[kind] for kind in kinds if kind in KINDS]
        named = content.classes, content.category_ids
        writers = [stack.enter_context(FORMATS[file.suffix][0](file, *named)) for file in files]
        if "yolo" in kinds:
            _begin_labels(output / _LABELS, content.classes)
        for entry in entries:
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
        torch.tensor(entry["boxes"], device="cpu").reshape(-1, 4),
        torch.tensor(entry["scores"], device="cpu"),
        torch.tensor(entry["labels"], dtype=torch.int64, device="cpu"),
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
