"""Pixels that are read again when they are asked for, provided that their file is still the one that was looked at."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from retina_fast.data.errors import ImageError
from retina_fast.predict.sources import Picture, Read

Stamp = tuple[int, int] | None
"""When a file was last changed, in nanoseconds, and its size in bytes; None for what is no file."""


def stamp_of(file: Path | None) -> Stamp:
    """The stamp of a file, to be taken before it is read.

    Example::

        >>> stamp_of(Path("there/is/none.jpg")) is None
        True
    """
    try:
        status = None if file is None else file.stat()
    except OSError:
        return None
    return status and (status.st_mtime_ns, status.st_size)


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
