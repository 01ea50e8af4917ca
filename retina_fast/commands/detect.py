"""Objects in image files: `retina-fast detect`.

Into the output folder go detections.json, a COCO file with scores, and a picture with boxes for each image. Images and
what is found in them are written as they come: of a million images, what is held is the name of each picture.
"""

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table
from torchvision.io import write_jpeg

from retina_fast.checkpoint import Checkpoint
from retina_fast.commands.predict import predictions
from retina_fast.data.coco import IMAGE_SUFFIXES, Sample, read_image
from retina_fast.draw import above, draw_detections
from retina_fast.errors import ImageError, UserError
from retina_fast.metrics import as_results

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


def detect(
    model: Any, content: Checkpoint, inputs: list[Path], output: Path, score: float, workers: int, console: Console
) -> Found:
    """Find objects in images; write detections.json and the drawn pictures into `output`.

    Args:
        model: a RetinaNet in evaluation mode.
        content: its class names and category ids.
        inputs: image files, folders of them, or lists of them, as for :func:`image_files`.
        output: a folder; files of an earlier run in it are replaced.
        score: the least score of a detection, 0 to 1.
        workers: processes that read images.
        console: where the progress bar is shown, and images that cannot be read are named.

    Raises:
        UserError: for a folder without images, or an output that is a file.

    Example::

        >>> detect(model, content, [Path("photos")], Path("out"), 0.3, 1, Console()).unreadable  # doctest: +SKIP
        0
    """
    total = sum(1 for _ in image_files(inputs))
    if output.exists() and not output.is_dir():
        raise UserError(f"{output}: is a file; give a folder as --output")
    output.mkdir(parents=True, exist_ok=True)
    found = Found()
    drawn: Counter[str] = Counter()
    named = zip(content.category_ids, content.classes, strict=True)
    categories = [{"id": category_id, "name": name} for category_id, name in named]
    predicted = predictions(model, ImageFiles(), workers, image_files(inputs))
    with CocoWriter(output / "detections.json", categories) as coco:
        for image_id, prediction in enumerate(
            track(predicted, "Detecting", total=total, console=console, transient=True), start=1
        ):
            if isinstance(prediction, ImageError):
                found.unreadable += 1
                console.print(f"warning: {prediction}", style="yellow", markup=False, soft_wrap=True)
                continue
            (image, target), detections = prediction
            detections = above(detections, score)
            path = Path(target["path"])
            objects = Counter(content.classes[label] for label in detections["labels"].tolist())
            found.images += 1
            found.objects += objects
            if len(found.first) < _SHOWN:
                found.first[path] = objects
            drawn[path.stem] += 1  # photo.jpg of two folders becomes photo.jpg and photo_2.jpg
            name = path.stem if drawn[path.stem] == 1 else f"{path.stem}_{drawn[path.stem]}"
            write_jpeg(draw_detections(image, detections, content.classes), str(output / f"{name}.jpg"), quality=90)
            record = {"id": image_id, "file_name": str(path), "height": image.shape[1], "width": image.shape[2]}
            coco.add(record, as_results(detections, image_id, list(content.category_ids)))
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
