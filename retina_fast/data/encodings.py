"""The encoding of a text file by its first bytes."""

import json
from pathlib import Path


def encoding_of(path: Path) -> str:
    """The encoding of a text file: UTF-8, UTF-16 or UTF-32, with a byte order mark or without.

    Editors on Windows write such marks; text that is read in the encoding given here begins without one.

    Raises:
        OSError: if the file cannot be read.

    Example::

        >>> Path("list.txt").read_text(encoding=encoding_of(Path("list.txt")))  # doctest: +SKIP
    """
    with path.open("rb") as file:
        return json.detect_encoding(file.read(4))
