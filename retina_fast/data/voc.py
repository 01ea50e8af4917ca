"""Data sets in the Pascal VOC format, with an .xml file for each image, read into the COCO format.

Pascal VOC counts pixels from 1, and the last column and row belong to the box: a box from 1 to 10 is 10 pixels wide,
and becomes x 0, width 10. Objects marked as difficult become crowd regions: as in VOC's own evaluation, they count
neither for nor against a detector, and nothing is learnt from them.
"""

import codecs
import contextlib
import re
import unicodedata
import warnings
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from retina_fast.data.coco import CocoDataset, read_json
from retina_fast.data.encodings import encoding_of
from retina_fast.data.entries import Found, as_name, as_number, refuse
from retina_fast.data.errors import UserError
from retina_fast.data.faults import Fault, Kind
from retina_fast.data.images import IMAGE_SUFFIXES

_CORNERS = ("xmin", "ymin", "xmax", "ymax")
_BOXED = ("object", "part")  # tags of what has a bndbox
_ONCE = ("name", "bndbox", *(f"bndbox/{corner}" for corner in _CORNERS))  # in an object
_DECLARED = re.compile(rb"""\s*<\?xml[^>]*?\bencoding\s*=\s*["']([\w.:-]+)["']""")
_CHINESE = ("gb2312", "gbk")  # Programs that declare these write any character of gb18030, which contains both.
_LITTER = ("thumbs.db", "desktop.ini", "__macosx")  # which Windows and macOS leave in folders and archives


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
    found: Found = refuse,
) -> tuple[dict[str, Any], Path]:
    """The annotations in the COCO format, as they are written, and the folder of the images.

    Args:
        annotations, images, classes: as of :func:`open_data`.
        found: called with each file or object of Pascal VOC that cannot be read; if it returns, that is left out.

    Raises:
        UserError: if there is nothing to read, or a .json file comes without a folder of images.

    Example::

        >>> content, folder = read_annotations(Path("VOC2012"), None)  # doctest: +SKIP
    """
    if annotations.is_dir() or annotations.suffix.lower() == ".txt":
        return read_voc(annotations, images, classes, found)
    if images is None:
        raise UserError(f"{annotations}: give the folder of its images, too, as --images or --val-images")
    return read_json(annotations), images


def read_places(annotations: Path, images: Path | None) -> list[Path]:
    """The files, and folders of files, that :func:`open_data` reads, for commands that must not replace them.

    Example::

        >>> read_places(Path("VOC2012/ImageSets/Main/train.txt"), None)
        [PosixPath('VOC2012')]
    """
    voc = annotations.is_dir() or annotations.suffix.lower() == ".txt"
    return [_root(annotations) if voc else annotations, *([images] if images else [])]


def read_voc(
    path: Path,
    images: Path | None = None,
    classes: Sequence[str] | None = None,
    found: Found = refuse,
) -> tuple[dict[str, Any], Path]:
    """Pascal VOC files as the content of a COCO file, and the folder of their images.

    Args:
        path: a folder with Annotations and JPEGImages in it; or one of .xml files with the images beside them; or a
            .txt file in such a folder, or in its ImageSets/Main, that names the images of a split, one a line.
        images: the folder of the images, if it is another one.
        classes: the class names in the order of their labels; by default all names that occur in the folder, in a
            split or not, sorted.
        found: called with each file that cannot be read and each broken object; if it returns, that image or object is
            left out.

    Raises:
        UserError: if there are no such files.

    Example::

        >>> content, folder = read_voc(Path("VOC2012/ImageSets/Main/train.txt"))  # doctest: +SKIP
        >>> folder  # doctest: +SKIP
        PosixPath('VOC2012/JPEGImages')
    """
    root = _root(path)
    folder = root / "Annotations" if (root / "Annotations").is_dir() else root
    images = images or (root / "JPEGImages" if (root / "JPEGImages").is_dir() else folder)
    inside = sorted(folder.iterdir()) if folder.is_dir() else []
    files = {_composed(file.stem): file for file in inside if file.suffix.lower() == ".xml" and _counts(file)}
    trees = {stem: _parsed(file, found) for stem, file in files.items()}
    if not trees:
        raise UserError(f"{folder}: holds no .xml file of Pascal VOC")
    deeper = [file for file in folder.glob("*/**/*.xml") if _counts(file)] if path.is_dir() else []
    if deeper:
        warnings.warn(f"{folder}: {len(deeper)} .xml files in folders in it are not read, as {deeper[0]}", stacklevel=2)
    wanted = list(trees) if path.is_dir() else _split(path, trees)
    if classes is None:
        items = (item for tree in trees.values() if tree is not None for item in tree.iter("object"))
        classes = sorted({name for name in map(_name, items) if name})
    ids = {name: number for number, name in enumerate(classes, start=1)}
    pictures = _Pictures(file.name for file in images.iterdir()) if images.is_dir() else _Pictures([])
    records: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id, stem in enumerate(wanted, start=1):
        file = files.get(stem, folder / f"{stem}.xml")
        tree = trees.get(stem)
        if stem not in trees:
            found(Fault(Kind.FILE, f"{file}: no such file,", f"but {path} names it"))
        if tree is None:
            continue
        sides = {side: tree.findtext(f"size/{side}", "").strip() for side in ("width", "height")}
        named = tree.findtext("filename", "").strip()
        records.append({"id": image_id, "file_name": pictures.of(stem, named), "source": str(file)} | sides)
        for part in tree.iter():
            if part.tag not in _BOXED and part.find("bndbox") is not None:
                found(Fault(Kind.FILE, f"{file}: <{part.tag}>", "has a bndbox, which is read in an <object> alone"))
        for number, item in enumerate(tree.iter("object"), start=1):
            source, name, bbox = f"{file}: object {number}", _name(item), _bbox(item)
            twice = [tag for tag in _ONCE if len(item.findall(tag)) > 1]
            if twice:
                found(Fault(Kind.FILE, source, f"has <{twice[0].rpartition('/')[2]}> more than once"))
            elif name not in ids:
                found(Fault(Kind.LABEL, source, f"is a {name!r}, not one of {', '.join(classes)}"))
            elif bbox is None:
                found(Fault(Kind.FILE, source, f"has no numbers as {', '.join(_CORNERS)} of its bndbox"))
            else:
                crowd = item.findtext("difficult", "")
                box = {"image_id": image_id, "category_id": ids[name], "bbox": bbox}
                annotations.append(box | {"iscrowd": crowd, "source": source})
    if not records or not ids:
        raise UserError(f"{path}: lists no {'objects' if records else 'images'}")
    if any(min(annotation["bbox"][:2]) <= -1 for annotation in annotations):
        warnings.warn(
            f"{path}: some boxes begin at pixel 0, but Pascal VOC counts from 1: boxes may be a pixel off", stacklevel=2
        )
    categories = [{"id": number, "name": name} for name, number in ids.items()]
    return {"images": records, "annotations": annotations, "categories": categories}, images


def _root(path: Path) -> Path:
    """The folder of Pascal VOC files, given itself or a list of images in it."""
    return path if path.is_dir() else path.parents[2 if path.parent.parent.name == "ImageSets" else 0]


def _counts(path: Path) -> bool:
    """Whether a file is the data set's own: not macOS' `._name` beside each file, nor what Windows keeps in folders."""
    return not path.name.startswith(".") and not any(part.lower() in _LITTER for part in path.parts)


def _parsed(file: Path, found: Found) -> Element | None:
    """The content of an .xml file; None if it is broken and `found` returns."""
    try:
        tree = ElementTree.fromstring(_text(file))
    except (ElementTree.ParseError, OSError, ValueError) as error:
        found(Fault(Kind.FILE, f"{file}: not an XML file", f"({error})"))
        return None
    if tree.tag != "annotation":
        found(Fault(Kind.FILE, f"{file}: not a file of Pascal VOC:", f"its root is <{tree.tag}>, not <annotation>"))
        return None
    return tree


def _text(file: Path) -> str:
    """The text of an .xml file, in the encoding of its first bytes or else the one that it declares.

    A file that is not in the encoding that it declares, or declares one that is not known, is read as UTF-8, which is
    what most programs write whatever they declare.

    Raises:
        OSError, ValueError: if it cannot be read, or is in no such encoding.
    """
    content, encoding = file.read_bytes(), encoding_of(file)
    declared = _DECLARED.match(content) if encoding == "utf-8" else None
    name = declared.group(1).decode().lower() if declared else encoding
    with contextlib.suppress(LookupError, UnicodeError):
        # ASCII letters are there to be read, so that UTF-16 and UTF-32 cannot be what the file is in.
        if not codecs.lookup(name).name.startswith(("utf-16", "utf-32")) or not declared:
            return content.decode("gb18030" if name in _CHINESE else name)
    return content.decode()


def _split(path: Path, known: Collection[str]) -> list[str]:
    """The names in a list of images, which may be those of their files. VOC's lists of a class have a second column."""
    try:
        lines = [line.strip() for line in path.read_text(encoding=encoding_of(path)).splitlines() if line.strip()]
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeError as error:
        raise UserError(f"{path}: is neither in UTF-8 nor in UTF-16 ({error})") from error
    return list(dict.fromkeys(_listed(line, known) for line in lines if _counts(Path(_base(line)))))


def _listed(line: str, known: Collection[str]) -> str:
    """The annotation file, without its suffix, that a line of a list names: by itself, by its image, or by a path."""
    words = [_composed(line), _composed(line).split()[0]]
    names = [*words, *map(_base, words)]
    stems = [name.rpartition(".")[0] for name in names if name.lower().endswith((*IMAGE_SUFFIXES, ".xml"))]
    return next((name for name in names + stems if name in known), words[-1])


def _composed(name: str) -> str:
    """A name in Unicode's composed form: macOS spells an accent as a character of its own."""
    return unicodedata.normalize("NFC", name)


def _base(name: str) -> str:
    """The last part of a path, written with the separators of any system."""
    return re.split(r"[\\/]", name)[-1]


def _name(item: Element) -> str:
    """The name of an object's class."""
    return as_name(item.findtext("name", "").strip()) or ""


class _Pictures:
    """The images of a folder by their names, whatever case their suffixes have and however their accents are spelled.

    Args:
        names: of the files in the folder.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.by_name = {_composed(name): name for name in names}
        self.by_stem: dict[str, str] = {}
        for suffix in IMAGE_SUFFIXES:
            for name in sorted(self.by_name):
                if name.lower().endswith(suffix) and _counts(Path(name)):
                    self.by_stem.setdefault(Path(name).stem, self.by_name[name])

    def of(self, stem: str, named: str) -> str:
        """The image of an annotation file.

        Editors of annotations leave outdated names behind, so that an image with the annotation file's own name comes
        before one that the file names, unless the two differ in their suffix alone.

        Args:
            stem: the name of the annotation file without its suffix, composed.
            named: the name of the image, or its path on some machine, as the file gives it; it may be empty.
        """
        base = _composed(_base(named))
        given = self.by_name.get(base) or self.by_stem.get(base)
        if given and Path(base).stem == stem:
            return given
        return self.by_stem.get(stem) or given or base or f"{stem}.jpg"


def _bbox(item: Element) -> list[float] | None:
    """x, y, width and height; None if the corners are not numbers."""
    corners = [as_number(item.findtext(f"bndbox/{corner}", "")) for corner in _CORNERS]
    if None in corners:
        return None
    x1, y1, x2, y2 = (float(corner) for corner in corners if corner is not None)
    return [x1 - 1, y1 - 1, _extent(x1, x2), _extent(y1, y2)]


def _extent(first: float, last: float) -> float:
    """The number of pixels from the first to the last; negative if they are in the wrong order."""
    return last - first + 1 if last >= first else last - first
