"""Random damage to COCO and Pascal VOC data and to pictures: python -m tests.data.fuzz SEED COUNT.

Each case is a small sound data set with a few random changes, as tools, editors and archives make them and as no tool
would: of six cases, three are COCO files, two Pascal VOC files and one pictures. check, the loader of train and
evaluate must end with one answer in one sentence, and none of them with a traceback.
"""

import copy
import json
import random
import re
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from tests.data.damage import DEEP, ENCODINGS, SIZE, VALUES, change_bytes, change_picture, change_text, picture
from tests.data.three import agreed

TURNED: list[Callable[[Any], Any]] = [
    str, "n_{}".format, float, lambda x: [x], lambda x: None, lambda x: -1, lambda x: x - 1, lambda x: x * 10**30,
    "{:03}".format, lambda x: {"$oid": str(x)}, bool, lambda x: f" {x} ", lambda x: 0, lambda x: -x,
]  # fmt: skip
DECLARED = [*ENCODINGS, "gb2312", "GBK", "us-ascii", "x-own", "rot13", "hex", "undefined", "big5", "shift_jis", "utf-7"]


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
    if not isinstance(entries, list) or not entries or r.random() < 0.03:
        content[key] = r.choice([copy.deepcopy(r.choice(VALUES)), entries, {"0": entries}])
        if r.random() < 0.3:
            del content[key]
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
                other[field] = _turned(other[field], turned)
    elif kind < 0.36:  # every id of a kind, wherever it stands
        turned = r.choice(TURNED)
        for where, field in r.choice(REFERENCES):
            for other in content[where] if isinstance(content.get(where), list) else []:
                if isinstance(other, dict) and field in other:
                    other[field] = _turned(other[field], turned)
    elif kind < 0.46 and isinstance(entry.get("bbox"), list) and entry["bbox"]:
        entry["bbox"][r.randrange(len(entry["bbox"]))] = copy.deepcopy(r.choice(VALUES))
    elif kind < 0.5:  # a value from another place
        other = r.choice(content["images"]) if isinstance(content.get("images"), list) and content["images"] else entry
        if isinstance(other, dict) and other:
            entry[r.choice(list(entry))] = copy.deepcopy(other[r.choice(list(other))])
    elif kind < 0.53:
        entry[r.choice(list(entry))] = DEEP
    else:
        extra = ["source", "ignore", "segmentation", "supercategory", "", "ID", "keypoints", "license"]
        entry[r.choice([*entry, *entry, *extra])] = copy.deepcopy(r.choice(VALUES))


REFERENCES = [
    [("images", "id"), ("annotations", "image_id")],
    [("categories", "id"), ("annotations", "category_id")],
    [("images", "id"), ("annotations", "image_id"), ("categories", "id"), ("annotations", "category_id")],
    [("annotations", "id")],
]


def _turned(value: Any, turned: Callable[[Any], Any]) -> Any:
    try:
        return turned(value)
    except (TypeError, ValueError, OverflowError):
        return None


def coco_case(folder: Path, r: random.Random) -> tuple[Path, Path]:
    """A damaged COCO file, and the folder of its pictures."""
    write_pictures(folder / "img", 3)
    content = sound_coco()
    for _ in range(r.choice([1, 1, 2, 4, 9])):
        change_entries(content, r)
    text = json.dumps(content, ensure_ascii=r.random() < 0.5, indent=r.choice([None, None, 1, "\t"]))
    depth = r.choice([3, 500, 900, 100_000])
    text = text.replace(f'"{DEEP}"', r.choice(["[" * depth + "]" * depth, '{"id": ' * depth + "1" + "}" * depth]))
    if r.random() < 0.15:
        text = change_text(text, r)
    file = folder / "data.json"
    encoding = r.choice(ENCODINGS) if r.random() < 0.3 else "utf-8"
    file.write_bytes(text.encode(encoding, "surrogatepass" if encoding.startswith("utf") else "replace"))
    if r.random() < 0.1:
        file.write_bytes(change_bytes(file.read_bytes(), r))
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


STRANGE = [
    "C:\\x\\p1.png", "/home/x/p2.png", "p1", "", "&amp;", "&x;", "&lol;", "12.7", "1e400", "-3", "Unspecified", "nan",
    "-inf", "5.0", " 5\n", "<![CDATA[Tree]]>", "<![CDATA[7]]>", "<b>7</b>", "Tree<!-- x -->s", "&#0;", "&#x1F333;",
    "&#55296;", "<?x?>7", "7<x/>", "]]>", "&lt;b&gt;", *(str(x)[:99] for x in VALUES if isinstance(x, str | float)),
]  # fmt: skip
BOX = "<bndbox><xmin>3</xmin><ymin>4</ymin><xmax>20</xmax><ymax>20</ymax></bndbox>"
PARTS = [
    "", "<object/>", "<x>", "<object><name>Tree</name></object>", "<object><object><name>Bush</name></object></object>",
    BOX, "<size/>", "<name>Car</name>", "<!-- x -->", "<annotation/>", "<polygon><x1>1</x1></polygon>",
    "<part><name>x</name></part>", "<filename>p2.png</filename>", f"<object><name>Tree</name>{BOX}</object>",
]  # fmt: skip
HEADS = [
    '<!DOCTYPE annotation [<!ENTITY x "7"><!ENTITY lol "Tree">]>', '<!DOCTYPE annotation SYSTEM "voc.dtd">', "<!-- -->",
    '<!DOCTYPE annotation [<!ENTITY x SYSTEM "file:///etc/hostname">]>', "<?xml-stylesheet?>", "\n", "\ufeff", "x",
    f'<!DOCTYPE annotation [<!ENTITY a "{"9" * 99}">'  # a text of 10 ** 9 letters
    + "".join(f'<!ENTITY {b} "{f"&{a};" * 10}">' for a, b in zip("abcdefg", "bcdefgx", strict=True)) + "]>",
]  # fmt: skip
TAGS = ["xmin", "xmax", "ymin", "ymax", "object", "bndbox", "name", "difficult", "width", "size"]


def change_xml(text: str, r: random.Random) -> str:
    """One random change of the text of an annotation file."""
    spans = [match.span(1) for match in re.finditer(r">([^<>]+)<", text)]
    kind = r.random()
    if kind < 0.55 and spans:
        start, end = r.choice(spans)
        return text[:start] + r.choice(STRANGE) + text[end:]
    if kind < 0.6:
        return r.choice(HEADS) + text
    if kind < 0.65:
        begin = r.choice(['<annotation xmlns="http://x"', '<annotation id="1"', "<v:annotation"])
        return text.replace("<annotation", begin, 1)
    if kind < 0.7:
        one, other = r.sample(TAGS, 2)
        text = text.replace(one, "\0" if r.random() < 0.5 else other)
        return text.replace(other, one).replace("\0", other) if "\0" in text else text
    if kind < 0.75:
        return text.replace("><", r.choice([">\n  <", ">\r\n\t<", "> \u00a0<"]))
    if kind < 0.8:
        return change_text(text, r)
    tags = [match.span() for match in re.finditer(r"</?\w+/?>", text)]
    if not tags:
        return text
    start, end = r.choice(tags)
    return text[:start] + r.choice([text[start:end] * 2, text[start:end].upper(), *PARTS]) + text[end:]


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
            for _ in range(r.choice([0, 1, 1, 2, 5])):
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
        file = annotations / f"p{damaged or 1}.xml"
        file.write_bytes(change_bytes(file.read_bytes(), r))
    if r.random() < 0.3:
        change_picture(images, r)
    if r.random() < 0.4:
        lines = r.choice(
            ["p0\np1\n", "p0  1\r\np1 -1\r\n", "p1.png\n", "JPEGImages/p2.png\n\n", "._p0\np1\n", "", "\0",
             "p0 p1 p2", "# p0\np1", "p0\np0\n", "../p0\n", "p9\n", "/\n", "p0," * 3000, "p\u2028p1\n"]
        )  # fmt: skip
        encoding = r.choice(ENCODINGS)
        (folder / "list.txt").write_bytes(lines.encode(encoding, "replace"))
        return folder / "list.txt", None
    return folder, None


def picture_case(folder: Path, r: random.Random) -> tuple[Path, Path]:
    """A sound COCO file whose pictures are of many kinds and damaged, with their sizes in the file or without."""
    (folder / "img").mkdir(parents=True)
    content, sized = sound_coco(), r.random() < 0.5
    for number, image in enumerate(content["images"]):
        found, suffix = picture(r, (60 * number + 20, 90, 30))
        if number == 0 or r.random() < 0.7:
            found = change_bytes(found, r)
        image["file_name"] = f"p{number}{suffix if r.random() < 0.9 else '.jpg'}"
        (folder / "img" / image["file_name"]).write_bytes(found)
        if not sized:
            del image["width"], image["height"]
    file = folder / "data.json"
    file.write_text(json.dumps(content))
    return file, folder / "img"


CASES: list[Callable[[Path, random.Random], tuple[Path, Path | None]]] = [
    *[coco_case] * 3,
    *[voc_case] * 2,
    picture_case,
]


def run(seed: int) -> tuple[str, str]:
    """The kind of the case of a seed, and the answer of all three: why the data is refused, or that it is taken.

    Raises:
        AssertionError: if they differ, or refuse the data in other than one sentence that names a file.
    """
    r = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        case = r.choice(CASES)
        answer, _ = agreed(*case(Path(folder) / "case", r))
        refused = answer.refused
        if refused:
            assert len(refused.splitlines()) == 1, refused
            assert len(refused) < 2000, refused
            assert folder in refused or "not one image" in refused, refused
        return case.__name__.removesuffix("_case"), refused.replace(folder, "") or "taken"


def main() -> None:
    """Runs COUNT cases from SEED on, prints each that fails and, in the end, how many were taken and refused."""
    first, count = map(int, sys.argv[1:])
    answers: Counter[str] = Counter()
    for seed in range(first, first + count):
        begin = time.monotonic()
        try:
            kind, answer = run(seed)
            answers[f"{kind} {'taken' if answer == 'taken' else 'refused'}"] += 1
            if time.monotonic() - begin > 30:
                raise TimeoutError("took longer than 30 seconds")
        except Exception:
            answers["failed"] += 1
            print(f"seed {seed}:", traceback.format_exc(limit=-4), flush=True)
    print(dict(answers))
    sys.exit(1 if answers["failed"] else 0)


if __name__ == "__main__":
    main()
