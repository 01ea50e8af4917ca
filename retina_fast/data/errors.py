"""Errors that a person can put right. The command line prints them in one sentence, without a traceback."""

import unicodedata
from numbers import Integral
from typing import Any

_ESCAPED = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # Unicode's categories of what changes lines, colours or directions
_JOINERS = "\u200c\u200d"  # which belong to the letters of some scripts
_LONGEST = 1500  # characters


def one_line(text: str) -> str:
    """The text with line breaks and characters that steer a terminal written as escapes, and not too long to read.

    Names in files may hold any characters, and thousands of them; printed as they are, they could look like other
    messages. Of more than 1500 characters the middle is left out.

    Example::

        >>> print(one_line("Tree" + chr(10) + "Bush"))
        Tree\\nBush
    """
    if len(text) > _LONGEST:
        text = f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}"
    if text.isprintable():
        return text
    escaped = (c.encode("unicode_escape").decode() if _steers(c) else c for c in text)
    return "".join(escaped)


def _steers(character: str) -> bool:
    return unicodedata.category(character) in _ESCAPED and character not in _JOINERS


def within(least: float, value: Any, most: float = float("inf")) -> bool:
    """Whether a value is a number between two others; what cannot be compared with numbers is none.

    Example::

        >>> within(0, 0.5, 1), within(0, float("nan"), 1), within(0, "0.5", 1), within(0, None)
        (True, False, False, False)
    """
    try:
        return bool(least <= value <= most)
    except (TypeError, ValueError, RuntimeError):  # the last two for arrays and tensors of several numbers
        return False


def whole(least: int, value: Any) -> bool:
    """Whether a value is a whole number of at least `least`, NumPy's among them. Truth values are none.

    Example::

        >>> whole(1, 2), whole(1, 0), whole(1, 2.0), whole(1, True)
        (True, False, False, False)
    """
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least


class UserError(ValueError):
    """Something is wrong with a file or an option. The message says what, where, and what to do, in one line."""

    def __str__(self) -> str:
        return one_line(super().__str__())


class ImageError(UserError):
    """An image file is missing or cannot be decoded. The message names it."""
