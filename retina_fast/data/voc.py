"""Data sets in the Pascal VOC format, with an .xml file for each image, read into the COCO format.

Pascal VOC counts pixels from 1, and the last column and row belong to the box: a box from 1 to 10 is 10 pixels wide,
and becomes x 0, width 10. Objects marked as difficult become crowd regions: as in VOC's own evaluation, they count
neither for nor against a detector, and nothing is learnt from them.
"""

import warnings
from collections.abc import Callable, Container, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from retina_fast.data.coco import IMAGE_SUFFIXES, CocoDataset, read_json, refuse
from retina_fast.data.errors import UserError

_CORNERS = ("xmin", "ymin", "xmax", "ymax")


def open_data(
    annotations: str | Path, images: str | Path | None = None, classes: Sequence[str] | None = None
) -> CocoDataset:
    """The data set of a COCO JSON file or of Pascal VOC files.

    Args:
        annotations: a .json file; or what :func:`read_voc` takes.
        images: the folder of the images, which a .json file needs.
        classes: the class names in the order of their labels, for Pascal VOC files, which do not list their classes.

    Raises:
        UserError: if something is missing or broken; the message names it.

    Example::

        >>> open_data("val.json", "val/").classes  # doctest: +SKIP
        >>> open_data("VOC2012/ImageSets/Main/train.txt").classes  # doctest: +SKIP
    """
    annotations, images = Path(annotations), Path(images) if images else None
    content, folder = read_annotations(annotations, images, classes)
    return CocoDataset(annotations, folder, content)


def read_annotations(
    annotations: Path,
    images: Path | None,
    classes: Sequence[str] | None = None,
    problem: Callable[[str], None] = refuse,
) -> tuple[dict[str, Any], Path]:
    """The annotations in the COCO format, and the folder of the images.

    Args:
        annotations, images, classes: as of :func:`open_data`.
        problem: called with a message for each broken entry; if it returns, the entry is left out.

    Raises:
        UserError: if there is nothing to read, or a .json file comes without a folder of images.

    Example::

        >>> content, folder = read_annotations(Path("VOC2012"), None)  # doctest: +SKIP
    """
    if annotations.is_dir() or annotations.suffix == ".txt":
        return read_voc(annotations, images, classes, problem)
    if images is None:
        raise UserError(f"{annotations}: give the folder of its images, too, as --images or --val-images")
    return read_json(annotations, problem), images


def read_voc(
    path: Path,
    images: Path | None = None,
    classes: Sequence[str] | None = None,
    problem: Callable[[str], None] = refuse,
) -> tuple[dict[str, Any], Path]:
    """Pascal VOC files as the content of a COCO file, and the folder of their images.

    Args:
        path: a folder with Annotations and JPEGImages in it; or one of .xml files with the images beside them; or a
            .txt file in such a folder, or in its ImageSets/Main, that names the images of a split, one a line.
        images: the folder of the images, if it is another one.
        classes: the class names in the order of their labels; by default all names that occur in the folder, in a
            split or not, sorted.
        problem: called with a message for each file that cannot be read and each broken object; if it returns, that
            image or object is left out.

    Raises:
        UserError: if there are no such files.

    Example::

        >>> content, folder = read_voc(Path("VOC2012/ImageSets/Main/train.txt"))  # doctest: +SKIP
        >>> folder  # doctest: +SKIP
        PosixPath('VOC2012/JPEGImages')
    """
    root = path if path.is_dir() else path.parents[2 if path.parent.parent.name == "ImageSets" else 0]
    folder = root / "Annotations" if (root / "Annotations").is_dir() else root
    images = images or (root / "JPEGImages" if (root / "JPEGImages").is_dir() else folder)
    trees = {file.stem: _parsed(file, problem) for file in sorted(folder.glob("*.xml"))}
    if not trees:
        raise UserError(f"{folder}: holds no .xml file of Pascal VOC")
    wanted = list(trees) if path.is_dir() else _split(path, trees)
    if classes is None:
        items = (item for tree in trees.values() if tree is not None for item in tree.iter("object"))
        classes = sorted({name for name in map(_name, items) if name})
    ids = {name: number for number, name in enumerate(classes, start=1)}
    records: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id, stem in enumerate(wanted, start=1):
        file = folder / f"{stem}.xml"
        tree = trees.get(stem)
        if stem not in trees:
            problem(f"{file}: no such file, but {path} names it")
        if tree is None:
            continue
        records.append({"id": image_id, "file_name": _image_name(images, stem, tree)} | _size(tree))
        for number, item in enumerate(tree.iter("object"), start=1):
            source, name, bbox = f"{file}: object {number}", _name(item), _bbox(item)
            if name not in ids:
                problem(f"{source} is a {name!r}, not one of {', '.join(classes)}")
            elif bbox is None:
                problem(f"{source} has no numbers as {', '.join(_CORNERS)} of its bndbox")
            else:
                crowd = int(item.findtext("difficult", "0").strip() == "1")
                box = {"id": len(annotations) + 1, "image_id": image_id, "category_id": ids[name], "bbox": bbox}
                annotations.append(box | {"iscrowd": crowd, "source": source})
    if not records or not ids:
        raise UserError(f"{path}: lists no {'objects' if records else 'images'}")
    if any(min(annotation["bbox"][:2]) <= -1 for annotation in annotations):
        warnings.warn(
            f"{path}: some boxes begin at pixel 0, but Pascal VOC counts from 1: boxes may be a pixel off", stacklevel=2
        )
    categories = [{"id": number, "name": name} for name, number in ids.items()]
    return {"images": records, "annotations": annotations, "categories": categories}, images


def _parsed(file: Path, problem: Callable[[str], None]) -> Element | None:
    """The content of an .xml file; None if it is broken and `problem` returns."""
    try:
        tree = ElementTree.parse(file).getroot()
    except (ElementTree.ParseError, OSError) as error:
        problem(f"{file}: not an XML file ({error})")
        return None
    return tree


def _split(path: Path, known: Container[str]) -> list[str]:
    """The names in a list of images. VOC's lists of one class have a second column, which is ignored."""
    try:
        lines = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    return list(dict.fromkeys(line if line in known else line.split()[0] for line in lines))


def _name(item: Element) -> str:
    return item.findtext("name", "").strip()


def _image_name(folder: Path, stem: str, tree: Element) -> str:
    """The image that the file names, if it exists; else the one with the file's own name.

    Editors of annotations leave outdated names behind.
    """
    named = Path(tree.findtext("filename", "").strip()).name
    suffixes = [case for suffix in IMAGE_SUFFIXES for case in (suffix, suffix.upper())]
    names = [named, *(stem + suffix for suffix in suffixes)]
    return next((name for name in names if name and (folder / name).is_file()), named or f"{stem}.jpg")


def _size(tree: Element) -> dict[str, int]:
    """The width and height of the image, those that the file gives."""
    texts = {side: tree.findtext(f"size/{side}", "").strip() for side in ("width", "height")}
    return {side: int(text) for side, text in texts.items() if text.isdecimal() and int(text) > 0}


def _bbox(item: Element) -> list[float] | None:
    """x, y, width and height; None if the corners are not numbers."""
    try:
        x1, y1, x2, y2 = (float(item.findtext(f"bndbox/{corner}", "")) for corner in _CORNERS)
    except ValueError:
        return None
    return [x1 - 1, y1 - 1, x2 - x1 + 1, y2 - y1 + 1]
