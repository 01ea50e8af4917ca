"""What `docs/faults.md` says of COCO files, by the answers of check, of the loader of train, and of evaluate."""

import gzip
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.data.faults_page import outcome, rows
from tests.data.fuzz import SIZE, sound_coco, write_pictures

ROWS = rows("COCO JSON")
UNKNOWN: tuple[Any, ...] = (None, 0, -1, "", "0", -1.0)  # sizes
Change = Callable[[dict, Path], Any]


def each(key: str, **fields: Any) -> Change:
    """Changes these fields of all entries; a function gives the value from the one that is there."""

    def change(content: dict, images: Path) -> None:
        for entry in content[key]:
            entry.update({name: value(entry[name]) if callable(value) else value for name, value in fields.items()})

    return change


def first(key: str, **fields: Any) -> Change:
    """Changes these fields of the first entry."""
    return lambda content, images: content[key][0].update(fields)


def of_first(key: str, field: str, *values: Any) -> list[Change]:
    return [first(key, **{field: value}) for value in values]


def of_each(key: str, field: str, *values: Any) -> list[Change]:
    return [each(key, **{field: value}) for value in values]


def without(key: str, *fields: str) -> Change:
    """All entries without these fields."""

    def change(content: dict, images: Path) -> None:
        for entry in content[key]:
            for name in fields:
                del entry[name]

    return change


def again(key: str, **changes: Any) -> Change:
    """The first entry a second time, with changes."""
    return lambda content, images: content[key].append(content[key][0] | changes)


def ids(image: Callable[[int], Any], category: Callable[[int], Any], box: Callable[[int], Any]) -> Change:
    """Other ids of everything, also where an entry refers to another."""

    def change(content: dict, images: Path) -> None:
        each("images", id=image)(content, images)
        each("categories", id=category)(content, images)
        each("annotations", id=box, image_id=image, category_id=category)(content, images)

    return change


def several(*changes: Change) -> Change:
    def change(content: dict, images: Path) -> None:
        for one in changes:
            one(content, images)

    return change


def picture(change: Callable[[Path], Any]) -> Change:
    """Changes the file of the first image."""
    return lambda content, images: change(images / "p0.png")


def appended_null(key: str) -> Change:
    return lambda content, images: content[key].append(None)


def without_pictures(content: dict, images: Path) -> None:
    for path in images.iterdir():
        path.unlink()


def in_a_folder_of_windows(content: dict, images: Path) -> None:
    (images / "a").mkdir()
    (images / "p0.png").rename(images / "a" / "p0.png")
    content["images"][0]["file_name"] = "a\\p0.png"


def renamed(name: str, listed: str) -> Change:
    """Another name of the first image's file, and the one that the data gives it."""

    def change(content: dict, images: Path) -> None:
        (images / "p0.png").rename(images / name)
        content["images"][0]["file_name"] = listed

    return change


def nested(depth: int) -> list:
    """A list in a list in a list."""
    found: list = []
    for _ in range(depth):
        found = [found]
    return found


def turned_before_it_was_measured(content: dict, images: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", SIZE, (9, 9, 200)).save(images / "p0.png", exif=exif)


COCO: dict[str, list[Change]] = {
    "ids from 0, huge, or with gaps": [
        ids(lambda i: i - 1, lambda i: i - 1, lambda i: i - 1),
        ids(lambda i: i + 10**30, lambda i: i * 10**12, lambda i: i + 2**63),
        ids(lambda i: -i, lambda i: 90 - 7 * i, lambda i: 5 - i),
    ],
    "ids that are words or UUIDs": [
        ids("img_{}".format, "class {}".format, "3f2a-{}".format),
        ids("\u6811{}".format, "{}/x".format, "0{}".format),
    ],
    "ids of which some are numbers and some words": [
        ids(lambda i: "x" if i == 1 else i, lambda i: "x" if i == 1 else i, lambda i: "x" if i == 1 else i)
    ],
    'an id that is a string in one place and a number in another: `"7"` and `7`': [
        each("annotations", image_id=str, category_id=str),
        each("images", id=str),
        each("categories", id=float),
        several(
            ids(lambda i: i * 10**22, lambda i: i * 10**22, lambda i: i * 10**22),
            each("annotations", image_id=str, category_id=str, id=str),
        ),
    ],
    "a null id of an annotation, or none": [
        each("annotations", id=None),
        without("annotations", "id"),
        first("annotations", id=None),
        lambda content, images: content["annotations"][3].pop("id"),
    ],
    "a null id of an image": [first("images", id=None), without("images", "id"), first("images", id="")],
    "a list as an id": [
        first("images", id=[1]),
        first("annotations", id={"a": 1}),
        first("categories", id=[1]),
        first("annotations", image_id=[1]),
        first("annotations", category_id={}),
        first("annotations", id=True),
        first("images", id=1.5),
    ],
    "two images with one id": [again("images", file_name="p9.png")],
    '`1` and `"1"` as ids of two images': [again("images", file_name="p9.png", id="1")],
    "two annotations with one id": [again("annotations", bbox=[1, 1, 4, 4])],
    "two images with one file name": [again("images", id=99)],
    "width and height null, 0, -1 or missing": [
        *(each("images", width=value, height=value) for value in UNKNOWN),
        without("images", "width", "height"),
        without("images", "width"),
    ],
    'width and height as words: `"160"`': [
        each("images", width=str, height=str),
        each("images", width=float, height=lambda x: f" {x}.0 "),
    ],
    "a width that is no whole number": [
        *of_first("images", "width", "wide", 63.5, [64], float("nan"), float("inf"), True, 10**400)
    ],
    "a size that is not the image's": [first("images", width=SIZE[0] + 1), first("images", width=2**31 - 1)],
    "a size from before EXIF turned the image upright": [turned_before_it_was_measured],
    '`iscrowd` null, missing, `"0"` or false': [
        *of_each("annotations", "iscrowd", None, "0", False, 0.0, "", "false", "False", "no", " 0 "),
        without("annotations", "iscrowd"),
    ],
    "`iscrowd` that is neither 0 nor 1": [
        *of_first("annotations", "iscrowd", 2, -1, "maybe", [], {}, 0.5, float("nan"), 10**400)
    ],
    'a bbox of words: `["8", "10", "18", "20"]`': [
        each("annotations", bbox=lambda box: [str(x) for x in box]),
        each("annotations", bbox=lambda box: [f" {x}.0" for x in box]),
        each("annotations", bbox=lambda box: [f"{x}e0" for x in box]),
    ],
    "a bbox of other than four numbers": [
        *of_first("annotations", "bbox", [1, 2, 3], [], None, "1,2,3,4", {"x": 1}, [[1, 2, 3, 4]], nested(500), [1] * 5,
                  [1, 2, 3, "x"], [1, 2, 3, None], [True, 2, 3, 4], ["1_0", 2, 3, 4], ["1,5", 2, 3, 4])
    ],
    "a bbox without an extent, or with NaN": [
        *of_first("annotations", "bbox", [5, 5, 0, 4], [5, 5, 4, -4], [5, 5, "nan", 4], [5, 5, 1e-30, 4], [0, 0, 0, 0],
                  [5, 5, 10**400, 4], [1e300, 5, 9, 9], [5, 5, float("inf"), 4])
    ],
    "a bbox outside its image, whose size the file does not give": [
        several(first("annotations", bbox=[500, 500, 9, 9]), without("images", "width", "height")),
        several(first("annotations", bbox=[-50, 5, 9, 9]), each("images", width=0, height=None)),
    ],
    "a bbox that reaches out of its image": [
        first("annotations", bbox=[50, 10, 30, 20]),
        several(first("annotations", bbox=[50, 10, 30, 20]), without("images", "width", "height")),
    ],
    "a bbox smaller than a pixel, as fractions of the image are": [
        first("annotations", bbox=[0.1, 0.2, 0.5, 0.4]),
        several(first("annotations", bbox=[0.1, 0.2, 0.5, 0.4]), without("images", "width", "height")),
        each("annotations", bbox=lambda bbox: [x / 100 for x in bbox]),
    ],
    "a bbox twice": [again("annotations", id=99), again("annotations", id=99, category_id=2)],
    "an area null, missing, 0 or a word": [
        *of_each("annotations", "area", None, 0, "324", "big", -1, float("nan"), [], True, 10**400),
        without("annotations", "area"),
    ],
    "a segmentation as polygons, RLE or nothing": [
        *of_each("annotations", "segmentation", [[1, 2, 3, 4, 5, 6]], {"counts": "abc", "size": [48, 64]},
                 {"counts": [1, 2]}, None, "", [[]]),
        without("annotations", "segmentation"),
    ],
    "no annotation at all, or none but of crowds": [
        lambda content, images: content.update(annotations=[]),
        each("annotations", iscrowd=1),
    ],
    "an annotation of an image that is not listed": [
        first("annotations", image_id=99),
        first("annotations", image_id=None),
        without("annotations", "image_id"),
        first("annotations", image_id="01"),
        first("annotations", image_id=True),
    ],
    "an annotation of a category that is not listed": [
        first("annotations", category_id=99),
        first("annotations", category_id=None),
        first("annotations", category_id="Tree"),
        without("annotations", "category_id"),
    ],
    "an entry that is null": [appended_null(key) for key in ("images", "annotations", "categories")],
    "an image without its file": [
        picture(Path.unlink),
        first("images", file_name="../none/p0.png"),
        first("images", file_name="a" * 5000),
        first("images", file_name="."),
        first("images", file_name="http://host/p0.png"),
    ],
    "a damaged image": [
        picture(lambda path: path.write_bytes(path.read_bytes()[:60])),
        picture(lambda path: path.write_bytes(b"")),
        picture(lambda path: path.write_text("no image")),
        several(picture(lambda path: path.write_bytes(b"x")), without("images", "width", "height")),
    ],
    "an image so thin that the model would resize it to nothing": [
        several(picture(Image.new("RGB", size, (9, 9, 200)).save), without("images", "width", "height"))
        for size in ((10_000, 1), (1, 3000))
    ],
    "no image that can be read": [without_pictures],
    "a null file name": [
        *of_first("images", "file_name", None, "", " ", 7, ["p0.png"], "\ud800", "a\0b")
    ],
    "a file name with Windows' separators": [in_a_folder_of_windows],
    "a file name escaped as in URLs: `my%20photo.png`": [renamed("my photo.png", "my%20photo.png")],
    "a null name of a class, or NaN": [
        *of_first("categories", "name", None, math.nan, math.inf, "", "  ", [], {}, True, "\ud800"),
        without("categories", "name"),
    ],
    "a number as the name of a class": [first("categories", name=5), first("categories", name=0)],
    "two classes of one name": [
        first("categories", name="Bush"),
        again("categories", id=0),
        several(first("categories", name="\xe9"), again("categories", id=9, name="e\u0301")),
    ],
    "two classes of almost one name: `Tree`, `tree `": [
        again("categories", id=9, name="tree "),
        again("categories", id=9, name="T_ree"),
    ],
    "names beyond ASCII, in either of Unicode's spellings": [
        first("categories", name="Ba\u0308ume"),
        first("categories", name="\u6811\u6728 \U0001f333"),
        first("categories", name="[red]"),
        first("categories", name="[/]"),
        several(
            picture(lambda path: path.rename(path.with_name("B\xe4ume \u6811.png"))),
            first("images", file_name="B\xe4ume \u6811.png"),
        ),
        several(
            picture(lambda path: path.rename(path.with_name("Ba\u0308ume.png"))),
            first("images", file_name="B\xe4ume.png"),
        ),
    ],
    "fields that detection does not need": [
        each("annotations", keypoints=[], source="cvat", ignore=1, score=0.3, attributes={"id": [1]}),
        each("images", license=None, source={"x": 1}, date_captured=0),
        each("categories", supercategory=None, skeleton=[[1, 2]]),
        lambda content, images: content.update(info=None, licenses="x"),
    ],
}  # fmt: skip


def encoded(encoding: str, name: str = "Tree") -> Callable[[str], bytes]:
    """A file in an encoding, with a class of this name."""
    return lambda text: text.replace("Tree", name).encode(encoding)


def twice(key: str, value: Any) -> Callable[[str], bytes]:
    """A file in which the first such key is twice, with this value and with its own."""
    return lambda text: text.replace(f'"{key}": ', f'"{key}": {json.dumps(value)}, "{key}": ', 1).encode()


def cut(end: int) -> Callable[[str], bytes]:
    return lambda text: text[:end].encode()


FILES: dict[str, list[Callable[[str], bytes]]] = {
    "a byte order mark, UTF-16 or UTF-32": [
        encoded(encoding)
        for encoding in ("utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le")
    ],
    "another encoding than Unicode's": [
        encoded(encoding, "Bl\xe4tter")
        for encoding in ("latin-1", "gb18030", "cp1252")
    ],
    "a file that ends too early": [cut(end) for end in (0, 1, 2, 100, -1)],
    "packed by gzip": [lambda text: gzip.compress(text.encode())],
    "a key twice with one value": [twice("image_id", 1), twice("width", 64)],
    "a key twice with different values": [twice("image_id", 2), twice("images", [{}]), twice("name", "Bush")],
    "brackets nested too deeply": [lambda text: b"[" * 200_000, lambda text: b'{"images": ' * 100_000],
}  # fmt: skip

COCO_CASES = [(row, number) for row, cases in (COCO | FILES).items() for number in range(len(cases))]


@pytest.mark.parametrize(("row", "number"), COCO_CASES, ids=lambda value: str(value))
def test_coco(row, number, tmp_path):
    write_pictures(tmp_path / "img", 3)
    content, file = sound_coco(), tmp_path / "data.json"
    if row in COCO:
        COCO[row][number](content, tmp_path / "img")
        file.write_text(json.dumps(content))
    else:
        file.write_bytes(FILES[row][number](json.dumps(content, ensure_ascii=False)))
    assert outcome(file, tmp_path / "img") == ROWS[row]


def test_every_row_of_the_page_is_tested():
    assert set(ROWS) == {*COCO, *FILES}
