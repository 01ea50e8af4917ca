"""What `docs/faults.md` says of Pascal VOC files, by the answers of check, of the loader of train, and of evaluate."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.data.faults_page import outcome, rows
from tests.data.fuzz import BOX, HEADS, SIZE, XML, write_pictures

ROWS = rows("Pascal VOC and lists of images")


def declared(encoding: str, written: str, name: str = "Tree") -> Callable[[Path], None]:
    """The first file says one encoding and is in another."""

    def change(root: Path) -> None:
        text = f'<?xml version="1.0" encoding="{encoding}"?>' + XML.format(file="p0.png").replace("Tree", name)
        (root / "Annotations" / "p0.xml").write_bytes(text.encode(written))

    return change


def edited(old: str, new: str) -> Callable[[Path], None]:
    """The first file with other words."""

    def change(root: Path) -> None:
        file = root / "Annotations" / "p0.xml"
        assert old in file.read_text()
        file.write_text(file.read_text().replace(old, new, 1))

    return change


def several(*changes: Callable[[Path], None]) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        for one in changes:
            one(root)

    return change


def listed(text: str, encoding: str = "utf-8") -> Callable[[Path], Path]:
    """A list of the images, which is what is opened."""

    def change(root: Path) -> Path:
        (root / "ImageSets" / "Main").mkdir(parents=True)
        (root / "ImageSets" / "Main" / "train.txt").write_bytes(text.encode(encoding))
        return root / "ImageSets" / "Main" / "train.txt"

    return change


def without_objects(root: Path) -> None:
    for file in (root / "Annotations").iterdir():
        file.write_text(re.sub("<object>.*</object>", "", file.read_text(), flags=re.DOTALL))


def turned(root: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 8
    Image.new("RGB", SIZE, (9, 9, 200)).save(root / "JPEGImages" / "p0.png", exif=exif)


def decomposed(root: Path) -> Path:
    """Names as macOS spells them, and a list that spells them otherwise."""
    for folder, suffix in (("Annotations", "xml"), ("JPEGImages", "png")):
        (root / folder / f"p0.{suffix}").rename(root / folder / f"Ba\u0308ume.{suffix}")
    return listed("B\xe4ume\np1\np2.png")(root)


def litter(root: Path) -> None:
    for folder in (root / "Annotations", root / "JPEGImages", root / "__MACOSX" / "Annotations"):
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("._p0.xml", "._p0.png", ".DS_Store", "Thumbs.db", "desktop.ini"):
            (folder / name).write_bytes(b"\0\5\x16\7")


def listed_litter(root: Path) -> Path:
    litter(root)
    return listed("p0\n._p0\np1\nThumbs.db\np2\n__MACOSX\n")(root)


def capitals(root: Path) -> None:
    (root / "Annotations" / "p0.xml").rename(root / "Annotations" / "p0.XML")
    (root / "JPEGImages" / "p0.png").rename(root / "JPEGImages" / "p0.PnG")


SIZE_XML = "<size><width>64</width><height>48</height></size>"

VOC: dict[str, list[Callable[[Path], Any]]] = {
    "declared gb2312, also with characters beyond it": [
        declared("gb2312", "ascii"),
        declared("gb2312", "gb2312", "\u6811"),
        declared("GB2312", "gb18030", "\u9555\u9f98"),
        declared("gbk", "gbk", "\u6811\u6728"),
    ],
    "declared ISO-8859-1": [
        declared("ISO-8859-1", "latin-1", "Bl\xe4tter"),
        declared("latin-1", "latin-1", "B\xe4ume"),
        declared("windows-1252", "cp1252", "\u20ac"),
        declared("Shift_JIS", "shift_jis", "\u6728"),
    ],
    "declared in an encoding that is not known": [
        declared(encoding, "utf-8", "B\xe4ume") for encoding in ("x-own", "rot13", "hex", "unicode", "undefined")
    ],
    "declared UTF-16, but in UTF-8": [declared("utf-16", "utf-8", "B\xe4ume"), declared("UTF-32", "utf-8-sig")],
    "in UTF-16 with a byte order mark": [
        declared("utf-16", "utf-16", "\u6811"), declared("utf-8", "utf-16"), declared("utf-8", "utf-8-sig", "\u6811")
    ],
    "in another encoding than declared, and not in UTF-8": [
        declared("utf-8", "latin-1", "Bl\xe4tter"), declared("ascii", "latin-1", "Bl\xe4tter")
    ],
    "no size, or a size of 0": [
        edited(SIZE_XML, size)
        for size in ("", "<size/>", "<size><width>0</width><height>0</height></size>", "<size><width/><height/></size>",
                     "<size><width>64.0</width><height> 48 </height></size>")
    ],
    "a size that is no number": [edited("<width>64<", f"<width>{value}<") for value in ("wide", "64px", "6 4", "63.5")],
    "a size that is not the image's, or from before EXIF turned it": [edited("<width>64<", "<width>65<"), turned],
    "`<difficult>` empty, false or 0.0": [
        edited("<difficult>0<", f"<difficult>{value}<") for value in ("", "false", "False", "0.0", " 0 ")
    ],
    "`<difficult>` that is neither 0 nor 1": [
        edited("<difficult>0<", f"<difficult>{value}<") for value in ("Unspecified", "2", "-1", "nan")
    ],
    "a stale `<filename>` that is another image's": [
        edited("p0.png", "p1.png"), edited("p0.png", "none.jpg"), edited("p0.png", ""), edited("p0.png", "p0"),
    ],
    "a `<filename>` with a path of another system": [
        edited("p0.png", "C:\\Users\\x\\p0.png"), edited("p0.png", "/home/x/p0.png"), edited("p0.png", "..\\p1.png"),
    ],
    "suffixes in capitals: `.XML`, `.JPG`": [capitals],
    "`._a.xml`, `desktop.ini`, `Thumbs.db`, `__MACOSX`": [
        litter, listed_litter
    ],
    "`<part>` with boxes of its own": [
        edited("<part>", "<part>"), edited("<difficult>0</difficult>", "<part><bndbox/></part>")
    ],
    "coordinates that are no whole numbers": [
        edited("<xmin>5<", "<xmin>5.75<"), edited("<xmax>30<", "<xmax>3.05e1<"), edited("<ymin>6<", "<ymin> 6.0\n<")
    ],
    "an object with two `<bndbox>`, two names or two of a corner": [
        edited("<bndbox>", "<bndbox><xmin>1</xmin></bndbox><bndbox>"),
        edited("<xmin>5</xmin>", "<xmin>5</xmin><xmin>6</xmin>"),
        edited("<difficult>0<", "<name>Tree</name><difficult>0<"),
    ],
    "swapped corners": [
        edited("<xmin>5<", "<xmin>31<"), edited("<xmin>5<", "<xmin>30.5<"), edited("<ymax>40<", "<ymax>-40<"),
        edited("<ymax>40<", "<ymax>nan<"),
    ],
    "a corner that is no number": [
        edited("<xmin>5<", f"<xmin>{value}<") for value in ("", "x", "5,5", "5 6", "0x5", "1_0")
    ] + [edited("<xmin>5</xmin>", "")],
    "no object at all": [without_objects],
    "an object without a name": [edited("<name>Tree</name>", ""), edited("<name>Tree<", "<name> <")],
    "a box in another tag than `<object>` and `<part>`, as `<Object>`": [
        several(edited("<object>", "<Object>"), edited("</object>", "</Object>")),
        several(edited("<object>", "<objects>"), edited("</object>", "</objects>")),
    ],
    "an .xml file of another kind": [
        lambda root: (root / "Annotations" / "x.xml").write_text("<annotations><image/></annotations>"),
        lambda root: (root / "Annotations" / "x.xml").write_text("<html/>"),
        lambda root: (root / "Annotations" / "x.xml").write_text(""),
        lambda root: (root / "Annotations" / "x.xml").mkdir(),
    ],
    "a DOCTYPE, entities of its own, CDATA, comments": [
        edited("<annotation>", '<!DOCTYPE annotation SYSTEM "voc.dtd"><annotation>'),
        several(edited("<annotation>", f"{HEADS[0]}<annotation>"), edited("Tree", "&lol;"), edited(">5<", ">&x;<")),
        several(edited("<name>Tree<", "<name><![CDATA[Tree]]><"), edited(">5<", "><![CDATA[5]]><")),
        several(edited("Tree", "Tr<!-- a -->ee"), edited(">5<", "><!-- b -->5<")),
        edited("<annotation>", "<!-- c --><annotation>"),
    ],
    "an entity that is not known, or that grows without end": [
        edited("Tree", "&unknown;"),
        edited("Tree", "Tree & Co"),
        several(edited("<annotation>", f"{HEADS[3]}<annotation>"), edited("Tree", "&x;")),
        several(edited("<annotation>", f"{HEADS[-1]}<annotation>"), edited("Tree", "&x;")),
    ],
    "a namespace": [edited("<annotation>", '<annotation xmlns="http://x">'), edited("<annotation>", "<v:annotation>")],
    "objects within objects": [edited("</object>", f"<object><name>Bush</name>{BOX}</object></object>")],
    "a list in UTF-16 or with a byte order mark": [
        listed("p0\r\np1\r\np2\r\n", encoding)
        for encoding in ("utf-16", "utf-8-sig", "utf-16-le", "utf-16-be", "utf-32")
    ],
    "a list of file names or paths of images": [
        listed("p0.png\np1.PNG\np2.xml"), listed("JPEGImages/p0.png\n/data/p1.jpg 1\nx\\p2.png\n\n"),
    ],
    "names with accents in Unicode's other spelling": [decomposed],
    "a list that names what is not there": [listed("p0\np9\n"), listed("\0"), listed(""), listed("\xe4", "latin-1")],
}  # fmt: skip

VOC_CASES = [(row, number) for row, cases in VOC.items() for number in range(len(cases))]


@pytest.mark.parametrize(("row", "number"), VOC_CASES, ids=lambda value: str(value))
def test_voc(row, number, tmp_path):
    write_pictures(tmp_path / "JPEGImages", 3)
    (tmp_path / "Annotations").mkdir()
    for image in range(3):
        (tmp_path / "Annotations" / f"p{image}.xml").write_text(XML.format(file=f"p{image}.png"))
    opened = VOC[row][number](tmp_path)
    assert outcome(opened if isinstance(opened, Path) else tmp_path) == ROWS[row]


def test_every_row_of_the_page_is_tested():
    assert set(ROWS) == set(VOC)
