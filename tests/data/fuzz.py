"""Random damage to COCO and Pascal VOC data: python -m tests.data.fuzz SEED COUNT.

Each case is a small sound data set with a few random changes, as tools, editors and archives make them and as no tool
would. check, the loader of train and evaluate must end with one answer, and none of them with a traceback.
"""

import copy
import json
import random
import re
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from tests.data.three import agreed

VALUES: list[Any] = [
    None, 0, -1, 1, 2, 7, 1.0, 1.5, -0.5, True, False, "", "0", "1", "01", " 1 ", "x", "Tree", "tree ", "Ba\u0308ume",
    "\u6811", "nan", "inf", "1e3", "1_0", "12,5", "true", "\ud800", "a" * 5000, "a\0b", "../p0.png", "[b]", "[/b]",
    float("nan"), float("inf"), float("-inf"), 10**20, 10**400, -(10**400), 1e308, 1e-30, 2**31, [], {}, [1], {"a": 1},
    [1, 2, 3, 4], ["1", "2", "30", "40"], [0, 0, 0, 0], [5, 5, 1e308, 1e308], [-9, -9, 500, 500], [900, 900, 5, 5],
]  # fmt: skip
TURNED: list[Callable[[Any], Any]] = [str, "n_{}".format, float, lambda x: [x], lambda x: None, lambda x: -1]
ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1", "gb18030", "cp1252"]
DECLARED = [*ENCODINGS, "gb2312", "GBK", "us-ascii", "x-own", "rot13", "hex", "undefined", "big5", "shift_jis", "utf-7"]
SIZE = (64, 48)


def write_pictures(folder: Path, count: int) -> None:
    """Distinct pictures p0.png, p1.png ..., of one size."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        Image.new("RGB", SIZE, (60 * number + 20, 90, 30)).save(folder / f"p{number}.png")


def sound_coco(count: int = 3) -> dict[str, Any]:
    """A COCO file's content for these pictures, with two boxes and one class each."""
    width, height = SIZE
    images = [{"id": i + 1, "file_name": f"p{i}.png", "width": width, "height": height} for i in range(count)]
    annotations = [
        {"id": 2 * i + j + 1, "image_id": i + 1, "category_id": j + 1, "bbox": [8 + 20 * j, 10, 18, 20 + j],
         "area": 18 * (20 + j), "iscrowd": 0, "segmentation": []}
        for i in range(count) for j in range(2)
    ]  # fmt: skip
    categories = [{"id": 1, "name": "Tree"}, {"id": 2, "name": "Bush"}]
    return {"images": images, "annotations": annotations, "categories": categories}


def change_entries(content: dict[str, Any], r: random.Random) -> None:
    """One random change of a COCO file's content."""
    key = r.choice(["images", "annotations", "annotations", "categories"])
    entries = content.get(key)
    if not isinstance(entries, list) or not entries or r.random() < 0.02:
        content[key] = copy.deepcopy(r.choice(VALUES))
        return
    entry = r.choice(entries)
    kind = r.random()
    if kind < 0.06:
        entries.append(copy.deepcopy(entry))
    elif kind < 0.1:
        entries.remove(entry)
    elif kind < 0.13:
        entries.append(copy.deepcopy(r.choice(VALUES)))
    elif not isinstance(entry, dict) or not entry:
        return
    elif kind < 0.2:
        del entry[r.choice(list(entry))]
    elif kind < 0.3:  # every entry, as by a tool
        field = r.choice(list(entry))
        turned = r.choice(TURNED)
        for other in entries:
            if isinstance(other, dict) and field in other:
                try:
                    other[field] = turned(other[field])
                except (TypeError, ValueError, OverflowError):
                    other[field] = None
    elif kind < 0.4 and isinstance(entry.get("bbox"), list) and entry["bbox"]:
        entry["bbox"][r.randrange(len(entry["bbox"]))] = copy.deepcopy(r.choice(VALUES))
    else:
        entry[r.choice([*entry, "source", "ignore"])] = copy.deepcopy(r.choice(VALUES))


def change_bytes(file: Path, r: random.Random) -> None:
    """Cuts a file, changes a byte of it, or empties it."""
    content = bytearray(file.read_bytes())
    kind = r.random()
    if kind < 0.4:
        content = content[: r.randrange(len(content) + 1)]
    elif kind < 0.9 and content:
        content[r.randrange(len(content))] = r.randrange(256)
    else:
        content = bytearray(r.choice([b"", b"no image", b"[" * 100_000, b"\xff\xfe", b"\xef\xbb\xbf", b"{}", b"null"]))
    file.write_bytes(content)


def change_picture(folder: Path, r: random.Random) -> None:
    """One random change of a picture, or of its name."""
    pictures = sorted(path for path in folder.glob("*.png") if path.is_file())
    if not pictures:
        return
    file = r.choice(pictures)
    kind = r.randrange(6)
    if kind == 0:
        change_bytes(file, r)
    elif kind == 1:
        file.unlink()
    elif kind == 2:
        exif = Image.Exif()
        exif[0x0112] = r.choice([0, 1, 3, 5, 6, 8, 9, 300])
        Image.new("RGB", SIZE, (9, 9, r.randrange(256))).save(file, exif=exif)
    elif kind == 3:
        Image.new(r.choice(["L", "P", "1", "RGBA"]), r.choice([SIZE, (1, 1), (48, 64), (1, 300)])).save(file)
    elif kind == 4:
        file.rename(file.with_suffix(r.choice([".PNG", ".jpg", ".Jpeg", ".bmp"])))
    else:
        (folder / f"._{file.name}").write_bytes(b"\0\5\x16\7")
        (folder / "Thumbs.db").write_bytes(b"\xd0\xcf")


def coco_case(folder: Path, r: random.Random) -> tuple[Path, Path]:
    """A damaged COCO file, and the folder of its pictures."""
    write_pictures(folder / "img", 3)
    content = sound_coco()
    for _ in range(r.choice([1, 1, 2, 4])):
        change_entries(content, r)
    file = folder / "data.json"
    text = json.dumps(content, ensure_ascii=r.random() < 0.5)
    encoding = r.choice(ENCODINGS) if r.random() < 0.3 else "utf-8"
    file.write_bytes(text.encode(encoding, "surrogatepass" if encoding.startswith("utf") else "replace"))
    if r.random() < 0.1:
        change_bytes(file, r)
    if r.random() < 0.3:
        change_picture(folder / "img", r)
    return file, folder / "img"


XML = (
    "<annotation><folder>x</folder><filename>{file}</filename><size><width>64</width><height>48</height></size>"
    "<object><name>Tree</name><difficult>0</difficult><bndbox><xmin>5</xmin><ymin>6</ymin><xmax>30</xmax><ymax>40</ymax>"
    "</bndbox><part><name>head</name><bndbox><xmin>7</xmin><ymin>8</ymin><xmax>9</xmax><ymax>9</ymax></bndbox></part>"
    "</object><object><name>Bush</name><bndbox><xmin>34</xmin><ymin>9</ymin><xmax>60</xmax><ymax>44</ymax></bndbox>"
    "</object></annotation>"
)


def change_xml(text: str, r: random.Random) -> str:
    """One random change of the text of an annotation file."""
    spans = [match.span(1) for match in re.finditer(r">([^<>]+)<", text)]
    kind = r.random()
    if kind < 0.7 and spans:
        start, end = r.choice(spans)
        strange = ["C:\\x\\p1.png", "/home/x/p2.png", "p1", "", "&amp;", "&x;", "12.7", "1e400", "-3", "Unspecified"]
        value = r.choice([*strange, *(str(x)[:99] for x in VALUES if isinstance(x, str | float))])
        return text[:start] + value + text[end:]
    tags = [match.span() for match in re.finditer(r"</?\w+/?>", text)]
    if not tags:
        return text
    start, end = r.choice(tags)
    return text[:start] + r.choice(["", text[start:end] * 2, "<object/>", "<x>"]) + text[end:]


def voc_case(folder: Path, r: random.Random) -> tuple[Path, None]:
    """Damaged Pascal VOC files: their folder, or a list of its images."""
    flat = r.random() < 0.3
    annotations, images = (folder, folder) if flat else (folder / "Annotations", folder / "JPEGImages")
    annotations.mkdir(parents=True, exist_ok=True)
    write_pictures(images, 3)
    damaged = r.randrange(3)
    for number in range(3):
        text = XML.format(file=f"p{number}.png")
        if number == damaged:
            for _ in range(r.choice([0, 1, 1, 2])):
                text = change_xml(text, r)
            encoding = r.choice(ENCODINGS) if r.random() < 0.5 else "utf-8"
            if r.random() < 0.5:
                text = f'<?xml version="1.0" encoding="{r.choice([encoding, r.choice(DECLARED)])}"?>\n' + text
        else:
            encoding = "utf-8"
        (annotations / f"p{number}.xml").write_bytes(text.encode(encoding, "replace"))
    if r.random() < 0.2:
        (annotations / "._p0.xml").write_bytes(b"\0\5\x16\7")
        (annotations / "desktop.ini").write_bytes(b"[x]")
        (annotations / "p0.xml").rename(annotations / r.choice(["p0.XML", "p9.xml"]))
    if r.random() < 0.1:
        change_bytes(annotations / f"p{damaged}.xml" if damaged else annotations / "p1.xml", r)
    if r.random() < 0.3:
        change_picture(images, r)
    if r.random() < 0.4:
        lines = r.choice(
            ["p0\np1\n", "p0  1\r\np1 -1\r\n", "p1.png\n", "JPEGImages/p2.png\n\n", "._p0\np1\n", "", "\0"]
        )
        encoding = r.choice(ENCODINGS)
        (folder / "list.txt").write_bytes(lines.encode(encoding))
        return folder / "list.txt", None
    return folder, None


def run(seed: int) -> str:
    """The answer of all three to the case of a seed: why the data is refused, or that it is taken.

    Raises:
        AssertionError: if they differ.
    """
    r = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        case = coco_case if r.random() < 0.6 else voc_case
        answer, _ = agreed(*case(Path(folder) / "case", r))
        return answer.refused.replace(folder, "") or "taken"


def main() -> None:
    """Runs COUNT cases from SEED on, prints each that fails and, in the end, how many were taken and refused."""
    first, count = map(int, sys.argv[1:])
    answers: Counter[str] = Counter()
    for seed in range(first, first + count):
        try:
            answers["taken" if run(seed) == "taken" else "refused"] += 1
        except Exception:
            answers["failed"] += 1
            print(f"seed {seed}:", traceback.format_exc(limit=-3))
    print(dict(answers))
    sys.exit(1 if answers["failed"] else 0)


if __name__ == "__main__":
    main()
