"""Objects in image files: `retina-fast detect`.

Into the output folder go detections.json, a COCO file with scores, and a picture with boxes for each image. Images and
what is found in them are written as they come: of a million images, what is held is the name of each picture. Several
processes, see `processes`, share the images; each notes what it finds in a file of its own, and the first merges them.
"""

import heapq
import json
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice, tee
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table
from torchvision.io import write_jpeg

from retina_fast.checkpoint import Checkpoint
from retina_fast.data.coco import IMAGE_SUFFIXES, Sample, read_image
from retina_fast.data.errors import ImageError, UserError
from retina_fast.data.metrics import as_results
from retina_fast.data.processes import ALONE, Processes
from retina_fast.deploy.exported import Exported
from retina_fast.predict.draw import above, draw_detections
from retina_fast.predict.load import predictions

_SHOWN = 50  # rows of the table that is printed; the rest is in the file


@dataclass
class Found:
    """What :func:`detect` found.

    Attributes:
        images: how many images were read.
        unreadable: how many were not.
        objects: how many objects of each class.
        first: those of the first 50 images.
    """

    images: int = 0
    unreadable: int = 0
    objects: Counter[str] = field(default_factory=Counter)
    first: dict[Path, Counter[str]] = field(default_factory=dict)


class ImageFiles:
    """A data set of image files without annotations; its keys are their paths.

    Example::

        >>> image, target = ImageFiles()[Path("photo.jpg")]  # doctest: +SKIP
    """

    def __getitem__(self, path: Path) -> Sample:
        return read_image(path), {"path": str(path)}


def image_files(inputs: list[Path]) -> Iterator[Path]:
    """The image files that are given, in turn: by name, as the content of a folder, or as the lines of a .txt file.

    No file comes twice, unless a list names it that others name, too. The names of one folder at a time are held.

    Raises:
        UserError: for a folder without images, or a list that cannot be read.

    Example::

        >>> list(image_files([Path("photos"), Path("another.jpg"), Path("list.txt")]))  # doctest: +SKIP
    """
    seen: set[Path] = set()
    for path in inputs:
        if path in seen or path.parent in seen:
            continue
        if path.suffix == ".txt":
            yield from _listed(path)
        elif path.is_dir():
            inside = sorted(p for p in path.glob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
            if not inside:
                raise UserError(f"{path}: holds no image ({', '.join(IMAGE_SUFFIXES)})")
            yield from (file for file in inside if file not in seen)
        else:
            yield path
        seen.add(path)


def _listed(path: Path) -> Iterator[Path]:
    try:
        with path.open() as lines:
            for line in lines:
                if line.strip():
                    yield Path(line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a list of image files, one a line ({error})") from error


class CocoWriter:
    """A COCO file, written image by image; it is there when the last one is, and whole.

    Example::

        >>> with CocoWriter(Path("out/detections.json"), categories) as coco:  # doctest: +SKIP
        ...     coco.add({"id": 1, "file_name": "photo.jpg"}, results)  # doctest: +SKIP
    """

    def __init__(self, path: Path, categories: list[dict[str, Any]]) -> None:
        self.path, self.categories = path, categories
        self.images, self.annotations = 0, 0

    def __enter__(self) -> "CocoWriter":
        self._whole, self._boxes = (self.path.with_suffix(suffix) for suffix in (".partial", ".annotations.partial"))
        with ExitStack() as stack:
            self._image_file, self._box_file = (stack.enter_context(x.open("w+")) for x in (self._whole, self._boxes))
            self._stack = stack.pop_all()
        self._image_file.write('{"images": [')
        return self

    def add(self, image: dict[str, Any], results: list[dict[str, Any]]) -> None:
        """Write an image and its detections, COCO results."""
        self._image_file.write((", " if self.images else "") + json.dumps(image))
        self.images += 1
        for result in results:
            area = result["bbox"][2] * result["bbox"][3]
            box = {"id": self.annotations + 1, **result, "area": area, "iscrowd": 0}
            self._box_file.write((", " if self.annotations else "") + json.dumps(box))
            self.annotations += 1

    def __exit__(self, kind: object, *_: object) -> None:
        with self._stack:
            if kind is None:
                self._image_file.write('], "annotations": [')
                self._box_file.seek(0)
                shutil.copyfileobj(self._box_file, self._image_file)
                self._image_file.write(f'], "categories": {json.dumps(self.categories)}}}')
        self._boxes.unlink()
        if kind is None:
            self._whole.replace(self.path)
        else:
            self._whole.unlink()


def picture_names(files: Iterable[Path]) -> Iterator[tuple[Path, str]]:
    """Each file with the name of its picture, its own where no other has it.

    Example::

        >>> [name for _, name in picture_names(map(Path, ["a/x.png", "b/x.png", "x_2.png"]))]
        ['x', 'x_2', 'x_2_2']
    """
    names: set[str] = set()
    count: Counter[str] = Counter()
    for path in files:
        name = path.stem
        while name in names:
            count[path.stem] += 1
            name = f"{path.stem}_{count[path.stem] + 1}"
        names.add(name)
        yield path, name


def detect(
    model: Any,
    content: Checkpoint | Exported,
    inputs: list[Path],
    output: Path,
    score: float,
    workers: int,
    console: Console,
    processes: Processes = ALONE,
) -> Found | None:
    """Find objects in images; write detections.json and the drawn pictures into `output`.

    Args:
        model: a RetinaNet in evaluation mode, or an exported one that takes uint8 images.
        content: its class names and category ids.
        inputs: image files, folders of them, or lists of them, as for :func:`image_files`.
        output: a folder, the same one for all processes; files of an earlier run in it are replaced.
        score: the least score of a detection, 0 to 1.
        workers: processes that read images.
        console: where the progress bar is shown, and images that cannot be read are named.
        processes: they share the images; the first one gives what all of them found, the others None.

    Raises:
        UserError: for a folder without images, or an output that is a file.

    Example::

        >>> detect(model, content, [Path("photos")], Path("out"), 0.3, 1, Console()).unreadable  # doctest: +SKIP
        0
    """
    share = len(processes.share(sum(1 for _ in image_files(inputs))))
    if output.exists() and not output.is_dir():
        raise UserError(f"{output}: is a file; give a folder as --output")
    output.mkdir(parents=True, exist_ok=True)
    named = enumerate(picture_names(image_files(inputs)), start=1)
    ours, ahead = tee(islice(named, processes.rank, None, processes.count))
    predicted = zip(ours, predictions(model, ImageFiles(), workers, (path for _, (path, _) in ahead)), strict=True)
    with _part(output, processes.rank).open("w") as part:
        for (image_id, (path, name)), prediction in track(
            predicted, "Detecting", total=share, console=console, transient=True
        ):
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
    processes.gather(None)  # all parts are written
    return _merge(output, content, console, processes.count) if processes.first else None


def _part(output: Path, rank: int) -> Path:
    return output / f"detections.{rank}.partial"


def _merge(output: Path, content: Checkpoint | Exported, console: Console, count: int) -> Found:
    """One file of what all processes noted, in the order of the images, line by line."""
    found, parts = Found(), [_part(output, rank) for rank in range(count)]
    named = zip(content.category_ids, content.classes, strict=True)
    categories = [{"id": category_id, "name": name} for category_id, name in named]
    with ExitStack() as stack:
        coco = stack.enter_context(CocoWriter(output / "detections.json", categories))
        lines = [map(json.loads, stack.enter_context(part.open())) for part in parts]
        for entry in heapq.merge(*lines, key=lambda entry: entry["id"]):
            if "problem" in entry:
                found.unreadable += 1
                console.print(f"warning: {entry['problem']}", style="yellow", markup=False, soft_wrap=True)
                continue
            found.images += 1
            found.objects.update(entry["objects"])
            if len(found.first) < _SHOWN:
                found.first[Path(entry["image"]["file_name"])] = Counter(entry["objects"])
            coco.add(entry["image"], entry["results"])
    for part in parts:
        part.unlink()
    return found


def report(found: Found, console: Console) -> None:
    """Print a table of the first images and their objects, and how many there are in all.

    Example::

        >>> report(found, Console())  # doctest: +SKIP
    """

    def words(counts: Counter[str]) -> str:
        return ", ".join(f"{count} {name}" for name, count in counts.most_common()) or "none"

    table = Table("image", "objects")
    for path, counts in found.first.items():
        table.add_row(str(path), words(counts))
    if found.images > len(found.first):
        table.add_row(f"... all {found.images}", words(found.objects))
    if found.images:
        console.print(table)
    if found.unreadable:
        console.print(f"{found.unreadable} of {found.unreadable + found.images} images could not be read")
