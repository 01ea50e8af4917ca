"""A font that has the letters of class names in any script; where there is none, the names are transliterated."""

import functools
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import ImageFont

_SIZE = 10  # px, that of Pillow's own font
_NONE = "\U0010ffff"  # is no character, so that a font draws for it what it draws for every one that it lacks


def lettering(texts: Iterable[str]) -> tuple[str | None, int, dict[str, str]]:
    """The font for some texts, and how each of them is written with it.

    Args:
        texts: to be drawn, in any script; line breaks and other control characters become spaces.

    Returns:
        The font's file, or None for Pillow's own; its size in pixels; and the texts as they are to be drawn.

    Example::

        >>> lettering(["tree"])
        (None, 10, {'tree': 'tree'})
    """
    clean = {text: " ".join("".join(c if c.isprintable() else " " for c in text).split()) for text in texts}
    letters = "".join(sorted(set("".join(clean.values()))))
    font = _font_for(letters)
    return font, _SIZE, {text: transliterated(shown, font) for text, shown in clean.items()}


@functools.lru_cache(maxsize=64)
def _font_for(letters: str) -> str | None:
    """The first font that has all the letters, or else the one that has most of them."""
    best, most = None, -1
    for file in (None, *_others()) if set(letters) - _covered(None, letters) else (None,):
        covered = len(_covered(file, letters))
        if covered > most:
            best, most = file, covered
        if most == len(set(letters)):
            break
    return best


@functools.cache
def _others() -> list[str]:
    """The upright fonts that matplotlib brings or finds on the machine; none without matplotlib."""
    try:
        from matplotlib import font_manager
    except ModuleNotFoundError:
        return []
    plain = [font for font in font_manager.fontManager.ttflist if font.style == "normal" and font.variant == "normal"]
    plain = [
        font for font in plain if not font.name.startswith(("Last Resort", "STIX", "cm")) and Path(font.fname).exists()
    ]
    return [font.fname for font in sorted(plain, key=lambda font: (font.name != "DejaVu Sans", font.weight != 400))]


@functools.lru_cache(maxsize=256)
def _covered(file: str | None, letters: str) -> set[str]:
    """Those of the letters that a font has."""
    try:
        font = load(file, _SIZE)
        lacking = _shape(font, _NONE)
        return {letter for letter in letters if letter == " " or _shape(font, letter) != lacking}
    except (OSError, ValueError):  # a font that Pillow cannot read
        return set()


@functools.cache
def load(file: str | None, size: int) -> Any:
    """The font of :func:`lettering`, to measure texts with.

    Example::

        >>> load(None, 10).getlength("tree") > 10
        True
    """
    return ImageFont.load_default() if file is None else ImageFont.truetype(file, size)


def _shape(font: Any, letter: str) -> bytes:
    mask = font.getmask(letter)
    return bytes(mask) + repr(mask.size).encode()


def transliterated(text: str, font: str | None) -> str:
    """The text with letters that the font has: others lose their accents, or are spelt by their names in Unicode.

    Example::

        >>> transliterated("\\u30ad", None), transliterated("\\u6728", None)
        ('ki', 'u6728')
    """
    covered = _covered(font, "".join(sorted(set(text))))
    return "".join(letter if letter in covered else _spelt(letter) for letter in text)


def _spelt(letter: str) -> str:
    """A letter in ASCII: without its accents, by the last word of its name, or by its number."""
    plain = unicodedata.normalize("NFKD", letter).encode("ascii", "ignore").decode()
    if plain:
        return plain
    if unicodedata.combining(letter):
        return ""
    *kind, last = unicodedata.name(letter, "-").split(" ")
    if not kind or not last.isalpha() or not letter.isalpha():
        return f"u{ord(letter):04x}"
    return last.capitalize() if letter.isupper() else last.lower()
