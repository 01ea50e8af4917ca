"""Random damage to values, texts and pictures, as tools, editors and archives do it and as no tool would."""

import io
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image, features

SIZE = (64, 48)
VALUES: list[Any] = [
    None, 0, -1, 1, 2, 7, 1.0, 1.5, -0.5, True, False, "", "0", "1", "01", " 1 ", "x", "Tree", "tree ", "Ba\u0308ume",
    "\u6811", "nan", "inf", "1e3", "1_0", "12,5", "true", "\ud800", "a" * 5000, "a\0b", "../p0.png", "[b]", "[/b]",
    float("nan"), float("inf"), float("-inf"), 10**20, 10**400, -(10**400), 1e308, 1e-30, 2**31, 2**63, -(2**63), [],
    {}, [1], {"a": 1}, [None], {"id": 1}, [[1, 2, 3, 4]], [1, 2, 3, 4], ["1", "2", "30", "40"], [0, 0, 0, 0],
    [-0.0] * 4, [5, 5, 1e308, 1e308], [-9, -9, 500, 500], [900, 900, 5, 5], [0.1, 0.2, 0.5, 0.5], {"x": 5, "w": 9},
    [1, 2, 3, float("nan")], [1, 2, 3, 10**400], {"counts": [9, 5, 3058], "size": [48, 64]}, "p1.png", "P0.PNG",
    {"counts": "PPYo1", "size": [48, 64]}, {"counts": None}, "\n", "a\nb", "\x1b[31mred", "\u202egnp.0p", "\ufeffTree",
    "3f2504e0-4f89-11d3-9a0c-0305e82c3301", "0x10", "\u0661", "-0", "+1", "1.", ".", "p0.png\n", "C:\\x\\p0.png", "/",
    "file:///p0.png", "~", ".", "a" * 255 + ".png", "__background__", "N/A", "\0", "\U0001f333", "e" + "\u0301" * 300,
]  # fmt: skip
ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1", "gb18030", "cp1252"]
DEEP = "deep"  # stands in a text for brackets that json.dumps cannot write


def change_text(text: str, r: random.Random) -> str:
    """One change of a text that is JSON or XML, of which it may not be any more."""
    at = r.randrange(len(text) + 1)
    kind = r.randrange(8)
    if kind == 0:
        return text[:at] + r.choice(list("\"',:[]{}<>&;\\/\n\t\0\x01-e.\ufeff\ufffe\u2028")) + text[at:]
    if kind == 1:
        return text[:at] + text[at + r.choice([1, 1, 1, 5, 40]) :]
    if kind == 2:
        return text + r.choice([text, "\0", "\n\n", "x", ",", "\x1a", "<!-- -->", "// end"])
    if kind == 3:
        return r.choice(["\n", " ", "\ufeff", "\0", "x", "<!-- -->", "// begin\n"]) + text
    if kind == 4:
        return text.replace("\n", "\r").replace('"', r.choice(["'", '"', "\u201c"]))
    if kind == 5:
        other = r.randrange(len(text) + 1)
        return text[:at] + text[other : other + r.choice([3, 30, 300])] + text[at:]
    if kind == 6:
        digits = [i for i, character in enumerate(text) if character.isdigit()]
        place = r.choice(digits) if digits else at
        swapped = r.choice(
            ["NaN", "Infinity", "-Infinity", "1e400", "00", "-0", "0x1", "1e-400", "9" * 5000, "+1", "1."]
        )
        return text[:place] + swapped + text[place + 1 :]
    return text.replace(r.choice(["64", "48", "Tree", "p0", "1", "id", "name", "bbox"]), r.choice(["", "0", "\\u0000"]))


def change_bytes(content: bytes, r: random.Random) -> bytes:
    """Cuts a file, changes, swaps or removes some of its bytes, or puts something else in its place."""
    found = bytearray(content)
    kind = r.random()
    if kind < 0.3:
        return bytes(found[: r.randrange(len(found) + 1)])
    if kind < 0.55 and found:  # in its head, where sizes and kinds stand
        for _ in range(r.choice([1, 1, 2, 4])):
            found[r.randrange(min(64, len(found)))] = r.choice([0, 1, 127, 128, 255, r.randrange(256)])
    elif kind < 0.8 and found:
        for _ in range(r.choice([1, 1, 8])):
            found[r.randrange(len(found))] = r.randrange(256)
    elif kind < 0.85:
        begin = r.randrange(len(found) + 1)
        found[begin : begin + r.choice([1, 2, 50])] = b""
    elif kind < 0.9:
        found += r.choice([bytes(found), b"\0" * 100, b"\xff\xd8\xff\xe0", b"PK\3\4"])
    else:
        strange = [b"", b"no image", b"[" * 100_000, b"\xff\xfe", b"\xef\xbb\xbf", b"{}", b"null", b"\0" * 4096, b"[]"]
        return r.choice([*strange, b"<!DOCTYPE html><html>", b"version https://git-lfs", b"\xff\xd8\xff", b"\x89PNG"])
    return bytes(found)


_MODES = [
    "1",
    "L",
    "LA",
    "P",
    "PA",
    "RGB",
    "RGBA",
    "CMYK",
    "YCbCr",
    "LAB",
    "I;16",
    "I",
    "F",
    "HSV",
    "RGBX",
    "La",
    "RGBa",
]
_SIZES = [SIZE] * 6 + [(48, 64), (1, 1), (1, 300), (300, 1), (1, 10_000), (10_000, 1), (2, 3), (65, 47)]
_KINDS = ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", *(["AVIF"] if features.check("avif") else [])]
_SUFFIXES = {
    "PNG": ".png",
    "JPEG": ".jpg",
    "WEBP": ".webp",
    "GIF": ".gif",
    "TIFF": ".tif",
    "BMP": ".bmp",
    "AVIF": ".avif",
}
_OTHERS = ["PPM", "ICO", "TGA", "PCX", "JPEG2000", "DDS", "SGI", "EPS", "PDF"]


def picture(r: random.Random, color: tuple[int, int, int]) -> tuple[bytes, str]:
    """A picture of a random kind, mode, size, orientation and number of frames; and the suffix of its kind."""
    kind = r.choice(_KINDS) if r.random() < 0.95 else r.choice(_OTHERS)
    image = Image.new("RGB", r.choice(_SIZES), color)
    image.putpixel((0, 0), (r.randrange(256), r.randrange(256), 7))
    options: dict[str, Any] = {}
    if r.random() < 0.4 and kind not in _OTHERS:
        exif = Image.Exif()
        exif[0x0112] = r.choice([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 300, "6", -1])
        options["exif"] = exif
    if r.random() < 0.2 and kind in ("GIF", "WEBP", "TIFF", "PNG"):
        options |= {"save_all": True, "append_images": [image.rotate(180), image.resize((9, 9))]}
    if r.random() < 0.3:
        options |= r.choice(
            [{"progressive": True}, {"lossless": True}, {"compression": "tiff_lzw"}, {"transparency": 0},
             {"quality": 1}, {"compression": "jpeg"}, {"interlace": 1}, {"dpi": (0, 0)},
             {"icc_profile": b"x" * 200}, {"bits": 1}]
        )  # fmt: skip
    for mode in (r.choice(_MODES), "RGB"):
        for these in (options, {}):
            file = io.BytesIO()
            try:
                turned = image if mode == "RGB" else _converted(image, mode)
                turned.save(file, format=kind, **these)
                return file.getvalue(), _SUFFIXES.get(kind, ".png")
            except Exception:  # This kind has no such mode or option, or cannot be written here.
                continue
    image.save(file := io.BytesIO(), format="PNG")
    return file.getvalue(), ".png"


def _converted(image: Image.Image, mode: str) -> Image.Image:
    if mode == "I;16":
        return image.convert("I").convert("I;16")
    if mode in ("La", "RGBa", "PA", "HSV", "LAB"):
        through = {"La": "LA", "RGBa": "RGBA", "PA": "P"}.get(mode, "RGB")
        return image.convert(through).convert(mode) if mode != "LAB" else image.convert("RGB")
    return image.convert(mode)


def change_picture(folder: Path, r: random.Random) -> None:
    """One change of a picture in the folder, or of its name."""
    pictures = sorted(path for path in folder.iterdir() if path.suffix == ".png" and path.is_file())
    if not pictures:
        return
    file = r.choice(pictures)
    changes: list[Callable[[], object]] = [
        lambda: file.write_bytes(change_bytes(file.read_bytes(), r)),
        lambda: file.write_bytes(picture(r, (9, 9, r.randrange(256)))[0]),  # under a name of another kind
        lambda: file.write_bytes(change_bytes(picture(r, (9, 9, 200))[0], r)),
        file.unlink,
        lambda: file.rename(file.with_suffix(r.choice([".PNG", ".jpg", ".Jpeg", ".bmp", "", ".png.jpg"]))),
        lambda: (folder / f"._{file.name}").write_bytes(b"\0\5\x16\7"),
        lambda: (folder / "Thumbs.db").write_bytes(b"\xd0\xcf"),
        lambda: _removed(file).mkdir(),
        lambda: _removed(file).symlink_to(r.choice([file.name, "none.png", "..", pictures[0].name])),
        lambda: file.rename(folder / r.choice(["P0.png", "p 0.png", "p0.png ", "p0\n.png", "x.png"])),
    ]
    r.choice(changes)()


def _removed(file: Path) -> Path:
    file.unlink()
    return file
