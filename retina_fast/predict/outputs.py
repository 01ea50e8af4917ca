"""Results out: files of the detections in many images, written image by image and put in place when they are whole."""

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from retina_fast.data.errors import UserError
from retina_fast.data.files import replacing
from retina_fast.data.outputs import check_file, same_file
from retina_fast.predict.coco_writer import BEGIN as COCO_BEGIN
from retina_fast.predict.coco_writer import CocoWriter
from retina_fast.predict.page import BEGIN as PAGE_BEGIN
from retina_fast.predict.page import page

COLUMNS = ("path", "class", "label", "score", "xmin", "ymin", "xmax", "ymax")
"""Those of a table of detections; boxes are in pixels."""

Add = Callable[..., None]
"""Writes the results of one image, the first argument; the second is the image's id, the third a small JPEG of it."""

_GEOJSON_BEGIN = '{"type": "FeatureCollection", "name": "detections", "features": ['


@contextmanager
def coco(file: Path, classes: Sequence[str], category_ids: Sequence[int]) -> Iterator[Add]:
    """A COCO file; see :class:`~retina_fast.predict.coco_writer.CocoWriter`.

    Args:
        file: as for the others of this module, what is there is replaced at the end of the block, unless it fails.
        classes: the K class names.
        category_ids: their K ids.

    Example::

        >>> with coco(Path("detections.json"), ["Tree"], [1]) as add:  # doctest: +SKIP
        ...     add(results, 1)
    """
    named = zip(category_ids, classes, strict=True)
    with CocoWriter(file, [{"id": category_id, "name": name} for category_id, name in named]) as writer:

        def add(results: Any, image_id: int, *_: object) -> None:
            content = results.to_coco(image_id)
            writer.add(content["images"][0], content["annotations"])

        yield add


@contextmanager
def table(file: Path, *_: object) -> Iterator[Add]:
    """A CSV file with a line for each object.

    Example::

        >>> with table(Path("detections.csv")) as add:  # doctest: +SKIP
        ...     add(results, 1)
    """
    # A name that is no text in UTF-8, as file systems allow, is written with escapes.
    with (
        replacing(file) as partial,
        partial.open("w", newline="", encoding="utf-8", errors="backslashreplace") as opened,
    ):
        lines = csv.DictWriter(opened, COLUMNS)
        lines.writeheader()
        yield lambda results, *_: lines.writerows(results.records())


@contextmanager
def geojson(file: Path, *_: object) -> Iterator[Add]:
    """A GeoJSON file of the boxes; see :meth:`~retina_fast.predict.results.Results.to_geojson`.

    Raises:
        UserError: for an image without a georeference, or with another coordinate system than the first.

    Example::

        >>> with geojson(Path("detections.geojson")) as add:  # doctest: +SKIP
        ...     add(results, 1)
    """
    systems: set[str] = set()
    written = 0

    def add(results: Any, *_: object) -> None:
        nonlocal written
        content = results.to_geojson()
        system = json.dumps(content.get("crs"))
        if systems - {system}:
            raise UserError(f"{results.path}: has another coordinate system than the first image: write them apart")
        systems.add(system)
        for feature in content["features"]:
            opened.write((", " if written else "") + json.dumps(feature))
            written += 1

    with replacing(file) as partial, partial.open("w", encoding="utf-8") as opened:
        opened.write(_GEOJSON_BEGIN)
        yield add
        opened.write("]" + "".join(f', "crs": {crs}' for crs in systems - {"null"}) + "}")


@contextmanager
def yolo(file: Path, *_: object) -> Iterator[Add]:
    """A YOLO text of one image: a line ``label x y width height score`` an object, the box's middle and size as parts
    of the image's.

    Example::

        >>> with yolo(Path("photo.txt")) as add:  # doctest: +SKIP
        ...     add(results, 1)
    """
    with replacing(file) as partial, partial.open("w") as opened:

        def add(results: Any, *_: object) -> None:
            height, width = results.size
            for row in results.records():
                x1, y1, x2, y2 = (row[name] for name in COLUMNS[4:])
                box = (x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height
                opened.write(" ".join([str(row["label"]), *(f"{value:.6f}" for value in (*box, row["score"]))]) + "\n")

        yield add


Format = Callable[[Path, Sequence[str], Sequence[int]], AbstractContextManager[Add]]

FORMATS: dict[str, tuple[Format, str]] = {
    ".json": (coco, COCO_BEGIN),
    ".csv": (table, ",".join(COLUMNS)),
    ".geojson": (geojson, _GEOJSON_BEGIN),
    ".html": (page, PAGE_BEGIN),
}
"""By suffix, the files that hold the detections of many images, and how each of them begins."""

_LISTING = (".json", ".html")  # they list the classes once, for all images
_PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp")


def check_earlier(file: Path) -> None:
    """Raise a UserError if there is a file of that name that was not written by this module.

    Args:
        file: its suffix is one of `FORMATS`.

    Example::

        >>> check_earlier(Path("there/is/none.csv"))
    """
    if not file.exists():
        return
    begin = FORMATS[file.suffix][1].encode()
    with file.open("rb") as opened:
        if opened.read(len(begin)) != begin:
            raise UserError(f"{file}: is no file of an earlier detection; give another folder as --output")


def write(results: Any, file: str | Path) -> None:
    """Write results into a file of the format that its suffix names. A file of that name is replaced.

    Args:
        results: of one image, or an iterable of them; those that could not be read are left out. A picture, and a YOLO
            text, hold one image.
        file: ``.json`` is a COCO file, ``.csv`` a table, ``.geojson`` boxes on the map, ``.html`` a page to look
            through, ``.txt`` a YOLO text, and ``.jpg``, ``.png``, ``.webp``, ``.tif`` or ``.bmp`` the drawn picture.

    Raises:
        UserError: for another suffix, for several images where the file holds one, for a file that cannot be written,
            or that is one of the images themselves, and for results of different classes where the file lists them.
        ImageError: if the file holds one image, and that could not be read.

    Example::

        >>> write(model.predict("photos/"), "trees.html")  # doctest: +SKIP
    """
    file, every = Path(file), [results] if hasattr(results, "plot") else list(results)
    suffix = file.suffix.lower()
    if suffix not in (*FORMATS, ".txt", *_PICTURES):
        raise UserError(f"{file}: the suffix must be one of {', '.join((*FORMATS, '.txt', *_PICTURES))}")
    if len(every) != 1 and suffix not in FORMATS:
        raise UserError(f"{file}: holds the results of one image, got those of {len(every)}")
    check_file(file)
    for result in every:
        if result.path and same_file(file, result.file or Path(result.path)):
            raise UserError(f"{file}: would replace the image itself; give another name")
    if suffix not in FORMATS and every[0].error:
        raise every[0].error
    if suffix in _PICTURES:
        with replacing(file) as partial:
            every[0].plot().save(partial, Image.registered_extensions()[suffix])
        return
    read = {number: result for number, result in enumerate(every, start=1) if not result.error}
    named = max(read.values(), key=lambda result: len(result.classes), default=every[0] if every else None)
    classes, ids = (named.classes, named.category_ids) if named else ((), ())
    for result in read.values() if suffix in _LISTING else ():
        count = len(result.classes)
        if result.classes != classes[:count] or result.category_ids != ids[:count]:
            raise UserError(f"{file}: would hold results of different classes: write those of each model apart")
    with (yolo if suffix == ".txt" else FORMATS[suffix][0])(file, classes, ids) as add:
        for number, result in read.items():
            add(result, number)
