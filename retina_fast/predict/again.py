"""Pixels that are read again when they are asked for, provided that their file is still the one that was looked at."""

from collections.abc import Callable
from dataclasses import dataclass
from hashlib import file_digest
from pathlib import Path
from stat import S_ISREG

from torch import Tensor

from retina_fast.data.errors import ImageError
from retina_fast.predict.pictures import Picture, Read

_COMPARED = 1 << 26  # bytes: the content of larger files, such as rasters, is not looked at

Stamp = tuple[int, int | bytes] | None
"""The size of a file in bytes, and a hash of its content, or for more than 64 MiB, when it was last changed, in
nanoseconds. None for what is no file."""


def stamp_of(file: Path | None) -> Stamp:
    """The stamp of a file, to be taken before it is read. A file that is merely touched, or copied, keeps it, unless it
    has more than 64 MiB.

    Example::

        >>> stamp_of(Path("there/is/none.jpg")) is None
        True
    """
    try:
        status = None if file is None else file.stat()
        if file is None or status is None or not S_ISREG(status.st_mode):
            return None
        if status.st_size > _COMPARED:
            return status.st_size, status.st_mtime_ns
        with file.open("rb") as content:
            return status.st_size, file_digest(content, "sha256").digest()
    except (OSError, ValueError):  # ValueError for a zero byte in the name
        return None


def check_unchanged(file: Path | None, stamp: Stamp) -> None:
    """Raise an ImageError if a file is not the one of that stamp: its boxes would be drawn into another picture.

    A file that is missing passes: whoever reads it will say so.

    Example::

        >>> check_unchanged(None, None)
    """
    now = stamp_of(file)
    if stamp and now and now != stamp:
        raise ImageError(f"{file}: has changed since objects were found in it; detect in it again")


@dataclass(frozen=True)
class Again:
    """The pixels of a picture, read each time that they are asked for.

    Attributes:
        read: reads them.
        file: the file on disk, if it holds just this image.
        stamp: of the file when it was looked at.
    """

    read: Callable[[], Read]
    file: Path | None
    stamp: Stamp

    @classmethod
    def of(cls, picture: Picture, stamp: Stamp) -> "Again":
        """Those of a picture of a source.

        Example::

            >>> Again.of(picture, stamp_of(picture.file))  # doctest: +SKIP
        """
        return cls(picture.read_again or picture.read, picture.file, stamp)

    def __call__(self) -> Tensor:
        check_unchanged(self.file, self.stamp)
        return self.read().image
