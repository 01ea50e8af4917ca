"""Decoding images: files and bytes of every kind that Pillow or torchvision reads well, to RGB."""

import io
import os
import re
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngImageFile
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.v2 import functional as F

from retina_fast.data.errors import ImageError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".tif", ".tiff", ".bmp", ".avif")
"""What the names of image files usually end in. Which kind a file is of, its content decides."""

_JPEG = b"\xff\xd8\xff"  # how it begins
# torchvision decodes JPEG alone. Its decoder of PNG (0.29) ends the process on most damaged files. That of GIF decodes
# every picture of an animation, takes memory for whatever size the file says, and gives what was in memory for pixels
# that are missing. It ignores the orientation of a WebP, and reads none of the others.
_BY_PILLOW = ("GIF", "WEBP", "TIFF", "BMP", "AVIF")


def read_image(path: Path) -> Tensor:
    """Decode an image file to RGB, (3, H, W) uint8, turned upright by its EXIF orientation.

    The content decides which kind it is, not the name. It reads JPEG (grey, RGB, CMYK), PNG (grey, palette, RGB, with
    or without alpha, 1 to 16 bits), WebP, GIF, TIFF, BMP, and AVIF where Pillow does. Of several pictures in a file it
    reads the first. Alpha is dropped; of 16 bits the upper 8 are kept.

    Raises:
        ImageError: if the file is missing or cannot be decoded; the message names it.

    Example::

        >>> read_image(Path("photo.jpg")).shape  # doctest: +SKIP
        torch.Size([3, 480, 640])
    """
    if not os.path.isfile(path):
        raise ImageError(f"{path}: no such image file")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ImageError(f"{path}: not a readable image ({error.strerror})") from error
    return image_of_bytes(content, str(path))


def image_of_bytes(content: bytes, name: str) -> Tensor:
    """Decode the content of an image file, as :func:`read_image` does.

    Args:
        content: of the file.
        name: what the error calls it.

    Raises:
        ImageError: if it cannot be decoded; the message names it.

    Example::

        >>> image_of_bytes(Path("photo.jpg").read_bytes(), "photo.jpg").shape  # doctest: +SKIP
        torch.Size([3, 480, 640])
    """
    try:
        if not content:
            raise ValueError("an image file must be non empty")
        if not content.startswith(_JPEG):
            with _opened(content) as opened:
                return pixels_of(ImageOps.exif_transpose(opened), opened.format)
        encoded = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        return decode_image(encoded, ImageReadMode.RGB, apply_exif_orientation=True)
    except Exception as error:  # A damaged file may make a decoder raise anything.
        words = str(error) or type(error).__name__  # MemoryError has none, for example
        reason = getattr(error, "strerror", None) or re.sub(r"^.*\.cpp:\d+, ", "", words.splitlines()[0])
        raise ImageError(f"{name}: not a readable image ({reason})") from error


def pixels_of(picture: Image.Image, format: str | None = None) -> Tensor:
    """The pixels of a Pillow image as RGB, (3, H, W) uint8; alpha is dropped, and of 16 bits the upper 8 are kept.

    Args:
        picture: of any mode.
        format: of the file that it comes from: Pillow opens a PNG of 16 bits as numbers of 32.

    Raises:
        ValueError: for pixels of 32 bits, whose range is unknown, or for none at all.

    Example::

        >>> pixels_of(Image.new("L", (4, 2), 7))[:, 0, 0].tolist()
        [7, 7, 7]
    """
    if not all(picture.size):
        raise ValueError(f"it has no pixels: its size is {picture.width}x{picture.height}")
    if picture.mode.startswith("I;16") or (picture.mode == "I" and format == "PNG"):
        return torch.from_numpy((np.asarray(picture) >> 8).astype(np.uint8)).expand(3, -1, -1).contiguous()
    if picture.mode in ("I", "F"):
        raise ValueError("its pixels are numbers of 32 bits, whose range is unknown: convert it to 8 bits")
    return F.pil_to_tensor(picture.convert("RGB"))


def _opened(content: bytes) -> Image.Image:
    """A picture whose head alone is read. `Image.open` would refuse a PNG of more than 179 million pixels."""
    if content.startswith(b"\x89PNG"):
        return PngImageFile(io.BytesIO(content))
    Image.init()
    try:
        return Image.open(io.BytesIO(content), formats=[kind for kind in _BY_PILLOW if kind in Image.OPEN])
    except UnidentifiedImageError:
        raise ValueError("cannot identify image file: no JPEG, PNG, WebP, GIF, TIFF, BMP or AVIF") from None
