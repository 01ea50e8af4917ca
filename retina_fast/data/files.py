"""Replacing a file as a whole, so that its old content outlives a full disk; and the encoding of a text file."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from retina_fast.data.errors import UserError


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a file beside `path` to write into; at the end of the block it takes the place of `path`.

    Before that, its content is flushed to the disk.

    Raises:
        UserError: if it cannot be written, for example on a full disk. `path` then has its old content.

    Example::

        >>> with replacing(Path("model.pt")) as partial:  # doctest: +SKIP
        ...     torch.save(content, partial)
    """
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
        with partial.open("rb") as written:
            os.fsync(written.fileno())
        partial.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # The new name is flushed to the disk, too.
        finally:
            os.close(folder)
    except (OSError, RuntimeError) as error:  # torch.save raises a RuntimeError.
        with contextlib.suppress(OSError):
            partial.unlink()
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise UserError(f"{path}: cannot be written ({reason}); what it held before is unharmed") from error


def encoding_of(path: Path) -> str:
    """The encoding of a text file by its first bytes: UTF-8, UTF-16 or UTF-32, with a byte order mark or without.

    Editors on Windows write such marks; text that is read in the encoding given here begins without one.

    Raises:
        OSError: if the file cannot be read.

    Example::

        >>> Path("list.txt").read_text(encoding=encoding_of(Path("list.txt")))  # doctest: +SKIP
    """
    with path.open("rb") as file:
        return json.detect_encoding(file.read(4))
