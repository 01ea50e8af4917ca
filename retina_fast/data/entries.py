"""The entries of a COCO file brought into one form, whichever tool wrote it.

Tools write ids as numbers or as words, numbers in quotation marks, unknown sizes as null, 0 or -1, and flags in several
ways. This is the one place that decides what such a value means. What has no clear meaning is a fault that names the
entry and the value: `train` and `evaluate` refuse the file for it, and `retina-fast check` reports it.
"""

import math
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from retina_fast.data.errors import UserError
from retina_fast.data.faults import REFUSED, Fault, Kind, look_alikes, place

Found = Callable[[Fault], None]

_WHOLE = re.compile(r"0|-?[1-9][0-9]{0,999}")  # Python reads no more than 4300 digits.
_NUMBER = re.compile(r"[+-]?((\d+\.?\d*|\.\d+)(e[+-]?\d+)?|nan|inf|infinity)", re.IGNORECASE | re.ASCII)
_FLAGS = {"": False, "false": False, "no": False, "true": True, "yes": True}
_LONGEST_SIDE = 2**31 - 1  # px: more than any image format can store


def refuse(fault: Fault) -> None:
    """Raise a UserError for a fault for which a file is refused; return for a lesser one.

    Example::

        >>> refuse(Fault(Kind.CUT, "val.json: annotation 7", "reaches out of its image"))
    """
    if fault.kind in REFUSED:
        raise UserError(str(fault))


def as_text(value: Any) -> str | None:
    """A word or name as it is written; None if it is empty, no text, or has parts of characters that no file can hold.

    Example::

        >>> as_text("a.jpg"), as_text(None), as_text("  "), as_text(chr(0xD800))
        ('a.jpg', None, None, None)
    """
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        return None
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can express half of a surrogate pair.
        return None
    return value


def as_id(value: Any) -> int | str | None:
    """An id: a whole number, however it is written, is that number; any other word is itself; None for what is no id.

    Example::

        >>> as_id(7), as_id("7"), as_id(7.0), as_id("007"), as_id("img_7"), as_id(None), as_id([7])
        (7, 7, 7, '007', 'img_7', None, None)
    """
    if type(value) is int:
        return value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    text = as_text(value)
    return int(text) if text and _WHOLE.fullmatch(text) else text


def as_name(value: Any) -> str | None:
    """The name of a class, which may be a number. Letters with accents are the same in both of Unicode's spellings.

    Example::

        >>> as_name("Tree"), as_name(5), as_name("e" + chr(0x301)) == chr(0xE9), as_name(None), as_name(float("nan"))
        ('Tree', '5', True, None, None)
    """
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        value = str(value)
    text = as_text(value)
    return text and unicodedata.normalize("NFC", text)


def as_number(value: Any) -> int | float | None:
    """A number, which may stand in quotation marks; None for anything else. One beyond floats is infinite.

    Example::

        >>> as_number(4), as_number("4"), as_number(" 4.5 "), as_number("4,5"), as_number(True), as_number(10**400)
        (4, 4, 4.5, None, None, inf)
    """
    if type(value) is float:
        return value
    if isinstance(value, str):
        if not _NUMBER.fullmatch(value.strip()):
            return None
        found = float(value)
        return int(found) if found.is_integer() and abs(found) < 2**53 else found
    if type(value) is not int:
        return None
    if abs(value) < 2**53:
        return value
    return math.inf * (1 if value > 0 else -1) if abs(value) >= 2**1000 else float(value)


def as_side(value: Any) -> int | None:
    """Width or height in pixels; 0 where it is unknown (null, 0 or negative); None for what is no size.

    Example::

        >>> as_side(160), as_side("160"), as_side(None), as_side(-1), as_side("wide"), as_side(0.5)
        (160, 160, 0, 0, None, None)
    """
    number = as_number(value) if value not in (None, "") else 0
    if number is None or not math.isfinite(number) or number != int(number) or number > _LONGEST_SIDE:
        return None
    return max(0, int(number))


def as_flag(value: Any) -> bool | None:
    """A flag: null means no; None is the answer for what is neither yes nor no.

    Example::

        >>> as_flag(1), as_flag("0"), as_flag(None), as_flag("true"), as_flag(2)
        (True, False, False, True, None)
    """
    if value is None or isinstance(value, bool):
        return bool(value)
    if isinstance(value, str) and value.strip().lower() in _FLAGS:
        return _FLAGS[value.strip().lower()]
    number = as_number(value)
    return bool(number) if number in (0, 1) else None


def shown(value: Any) -> str:
    """A value of a file as a message shows it, not longer than a line.

    Example::

        >>> shown([1, "a"]), len(shown("x" * 1000))
        ("[1, 'a']", 200)
    """
    try:
        text = repr(value)
    except RecursionError:
        return "a list in a list in a list ..."
    return text if len(text) <= 200 else text[:197] + "..."


class _Field(NamedTuple):
    """A field that an entry needs: how it is read, and the words for what is expected."""

    name: str
    read: Callable[[Any], Any]
    expected: str


_ID = _Field("id", as_id, "where a number or a word is expected")
_FILE_NAME = _Field("file_name", as_text, "where the name of a file is expected")
_NAME = _Field("name", as_name, "where the name of a class is expected")


def clean(content: Mapping[str, Any], source: str, found: Found = refuse) -> dict[str, Any]:
    """The images, categories and annotations of a COCO file in one form.

    Ids are numbers or words, see :func:`as_id`. Images have `width` and `height` where they are known. Categories are
    in the order of their ids, which are numbers: if the file has others, they are numbered from 1 in its order.
    Annotations have `image_id`, `category_id`, `bbox` of four numbers, `area` and `iscrowd`, 0 or 1, and nothing else;
    one without an id has its place in the list as its `source`.

    Args:
        content: the lists `images`, `annotations` and `categories`, as they were read.
        source: the words that name the file.
        found: called with each fault; if it returns, the entry of a fault that refuses the file is left out.

    Raises:
        UserError: if no image or no category is left.

    Example::

        >>> images, classes = [{"id": "a", "file_name": "a.jpg", "width": "9"}], [{"id": "tree", "name": "Tree"}]
        >>> boxes = [{"image_id": "a", "category_id": "tree", "bbox": ["1", 2, 3, 4], "iscrowd": "0"}]
        >>> content = clean({"images": images, "annotations": boxes, "categories": classes}, "a.json")
        >>> content["annotations"][0]["category_id"], content["annotations"][0]["bbox"]
        (1, [1, 2, 3, 4])
    """
    images = list(_images(content["images"], source, found))
    named = list(_categories(content["categories"], source, found))
    if not images or not named:
        raise UserError(f"{source}: lists no {'categories' if images else 'images'}")
    if all(isinstance(category["id"], int) for category in named):
        named.sort(key=lambda category: category["id"])
        numbers = {category["id"]: category["id"] for category in named}
    else:
        numbers = {category["id"]: number for number, category in enumerate(named, start=1)}
    categories = [category | {"id": numbers[category["id"]]} for category in named]
    for fault in look_alikes((category["name"] for category in categories), source):
        found(fault)
    files = {image["id"]: image["file_name"] for image in images}
    annotations = list(_annotations(content["annotations"], files, numbers, source, found))
    return {"images": images, "annotations": annotations, "categories": categories}


def _whole_entries(
    entries: Sequence[Any], key: str, needed: Sequence[_Field], source: str, found: Found
) -> Iterator[dict[str, Any]]:
    """The entries with the fields that they need, read; those that lack one are faults."""
    for entry in entries:
        if not isinstance(entry, dict):
            found(Fault(Kind.FILE, f"{source}: an entry of {key!r}", f"has no fields: {shown(entry)}"))
            continue
        values = {field.name: field.read(entry.get(field.name)) for field in needed}
        broken = next((field for field in needed if values[field.name] is None), None)
        if broken is None:
            yield entry | values
        elif broken.name not in entry:
            found(Fault(Kind.FILE, f"{source}: an entry of {key!r}", f"has no {broken.name!r}: {shown(entry)}"))
        else:
            what = f"has the {broken.name} {shown(entry[broken.name])}, {broken.expected}: {shown(entry)}"
            found(Fault(Kind.FILE, f"{source}: an entry of {key!r}", what))


def _is_first(value: Any, seen: set[Any], field: str, where: str, found: Found, kind: Kind = Kind.FILE) -> bool:
    """Whether no earlier entry has this value, which is then noted; else it is a fault."""
    if value in seen:
        found(Fault(kind, where, f"have the {field} {value!r} more than once"))
        return False
    seen.add(value)
    return True


def _images(entries: Sequence[Any], source: str, found: Found) -> Iterator[dict[str, Any]]:
    where = f"{source}: images"
    ids: set[Any] = set()
    names: set[Any] = set()
    for image in _whole_entries(entries, "images", (_ID, _FILE_NAME), source, found):
        _is_first(image["file_name"], names, "file name", where, found, Kind.TWICE)
        if not _is_first(image["id"], ids, "id", where, found):
            continue
        this = image.pop("source", None) or f"{source}: image {image['id']}"
        for side in ("width", "height"):
            given = image.pop(side, None)
            pixels = as_side(given)
            if pixels is None:
                what = f"has the {side} {shown(given)}, where a whole number of pixels is expected"
                found(Fault(Kind.FILE, this, what, image["file_name"]))
            if pixels:
                image[side] = pixels
        yield image


def _categories(entries: Sequence[Any], source: str, found: Found) -> Iterator[dict[str, Any]]:
    where = f"{source}: categories"
    ids: set[Any] = set()
    names: set[Any] = set()
    for category in _whole_entries(entries, "categories", (_ID, _NAME), source, found):
        first_id = _is_first(category["id"], ids, "id", where, found)
        first_name = _is_first(category["name"], names, "name", where, found, Kind.LABEL)
        if first_id and first_name:
            yield category


def _annotations(
    entries: Sequence[Any], files: Mapping[Any, str], numbers: Mapping[Any, int], source: str, found: Found
) -> Iterator[dict[str, Any]]:
    """The annotations of the images in `files`, with the categories that `numbers` gives for those in the file."""
    ids: set[Any] = set()
    for number, entry in enumerate(entries, start=1):
        if not isinstance(entry, dict):
            found(Fault(Kind.FILE, f"{source}: an entry of 'annotations'", f"has no fields: {shown(entry)}"))
            continue
        given, image_id = entry.get("id"), as_id(entry.get("image_id"))
        category_id, iscrowd = as_id(entry.get("category_id")), as_flag(entry.get("iscrowd"))
        annotation = {"id": as_id(given), "image_id": image_id, "category_id": numbers.get(category_id)}
        if "source" in entry:
            annotation["source"] = entry["source"]
        elif annotation["id"] is None:
            annotation["source"] = f"{source}: annotation number {number} of the list"
        box = entry.get("bbox")
        bbox = [as_number(x) for x in box] if isinstance(box, list) and len(box) == 4 else [None]
        kind = Kind.FILE
        if given is not None and annotation["id"] is None:
            what = f"has the id {shown(given)}, where a number or a word is expected"
        elif image_id not in files:
            what = f"belongs to image {_bare(entry.get('image_id'))}, which the file does not list"
        elif category_id not in numbers:
            kind, what = Kind.LABEL, f"has category {_bare(entry.get('category_id'))}, which the file does not list"
        elif None in bbox:
            what = f"has bbox {shown(box)}; four numbers, x, y, width and height, are expected"
        elif iscrowd is None:
            what = f"has the iscrowd {shown(entry['iscrowd'])}, where 0 or 1 is expected"
        else:
            if given is None or _is_first(annotation["id"], ids, "id", f"{source}: annotations", found):
                yield annotation | {"bbox": bbox, "area": _area(entry.get("area"), bbox), "iscrowd": int(iscrowd)}
            continue
        found(Fault(kind, place(source, annotation), what, files.get(image_id, "")))


def _bare(value: Any) -> str:
    """An id as a message shows it: a word without quotation marks."""
    return value if as_text(value) and len(value) < 200 else shown(value)


def _area(given: Any, bbox: Sequence[Any]) -> float:
    """The area in square pixels that the file gives; that of the box where it gives none."""
    area = as_number(given)
    return area if area is not None and math.isfinite(area) and area > 0 else bbox[2] * bbox[3]
