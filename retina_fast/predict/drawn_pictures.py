"""Writes drawn pictures with a mark in their metadata: only pictures with this mark are ever replaced."""

import os
from pathlib import Path

from PIL import Image
from torch import Tensor
from torchvision.io import encode_jpeg

_LARGEST = (
    65500  # px: the longest side of a JPEG that libjpeg writes; of a longer one, only every second pixel is drawn
)
_KINDS: list[str] = ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "AVIF"]
"""Those that `retina_fast.data.images.read_image` reads, by Pillow's names."""

_MARK = b"drawn by retina-fast detect"


def write_picture(image: Tensor, file: Path, partial: Path) -> None:
    """Write a drawn picture as a JPEG with a comment that says where it comes from.

    It takes the place of an earlier file as a whole: a file that this name is a link to stays as it is.

    Args:
        image: (3, H, W) uint8.
        file: the picture.
        partial: a file in the same folder that is written first.

    Example::

        >>> write_picture(picture, Path("out/photo.jpg"), Path("out/picture.partial"))  # doctest: +SKIP
    """
    step = -(-max(image.shape[1:]) // _LARGEST)
    jpeg = encode_jpeg(image[:, ::step, ::step].contiguous(), quality=90).numpy().tobytes()
    begin = 4 + int.from_bytes(jpeg[4:6], "big")  # behind the start and the first segment, which must come first
    comment = b"\xff\xfe" + (2 + len(_MARK)).to_bytes(2, "big") + _MARK
    partial.write_bytes(jpeg[:begin] + comment + jpeg[begin:])
    partial.replace(file)


def must_stay(file: Path) -> bool:
    """Whether there is something of that name that a picture must not replace: anything but an earlier run's picture.

    An empty file, or a plain text, is no picture of anybody's, and is replaced.

    Example::

        >>> must_stay(Path("there/is/none.jpg"))
        False
    """
    if not os.path.lexists(file):
        return False
    if not file.is_file():  # a pipe would never open
        return True
    try:
        with file.open("rb") as opened:
            begin = opened.read(1024)
    except OSError:  # another person's file
        return True
    return _MARK not in begin and (not begin.isascii() or b"\0" in begin)


def is_drawn(file: Path) -> bool:
    """Whether a file is a picture that :func:`write_picture` wrote.

    Example::

        >>> is_drawn(Path("there/is/none.jpg"))
        False
    """
    if not file.is_file():
        return False
    try:
        with file.open("rb") as begin:
            return _MARK in begin.read(1024)
    except OSError:
        return False


def is_image(file: Path) -> bool:
    """Whether a file's first bytes are those of an image; it may be damaged all the same.

    Example::

        >>> is_image(Path("a_list_of_images.txt"))
        False
    """
    Image.init()
    try:
        with Image.open(file, formats=[kind for kind in _KINDS if kind in Image.OPEN]):
            return True
    except Exception:  # What is no image may make its parser raise anything.
        return False
