"""One image of a source: what messages call it, and how it is read from a file, the web, a video or memory."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from http.client import HTTPException
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock
from typing import Any, NamedTuple
from urllib.parse import quote, urlsplit
from urllib.request import Request, urlopen

from PIL import Image
from torch import Tensor

from retina_fast.data.errors import ImageError, UserError, one_line
from retina_fast.data.images import IMAGE_SUFFIXES, image_of_bytes, pixels_of, read_image
from retina_fast.predict.arrays import pixels_of_array, pixels_of_tensor
from retina_fast.predict.georeference import TIFF, Georeference, georeference, is_geotiff
from retina_fast.predict.geotiff import RasterFile, UnknownPixels, is_raster, is_turned
from retina_fast.predict.tiles import Window
from retina_fast.predict.video import frames

_TIMEOUT = 30  # s that a server may be silent
_UNQUOTED = "!#$%&'()*+,/:;=?@[]~"  # what a URL may hold beside letters and digits; the rest is escaped, as browsers do
_PILLOW = Lock()


class Read(NamedTuple):
    """A picture that was read: its pixels, RGB (3, H, W) uint8, and where on the earth they lie, if that is known."""

    image: Tensor
    georeference: Georeference | None = None


@dataclass(frozen=True)
class Picture:
    """One image of a source.

    Attributes:
        name: what messages call it: its path or URL, ``clip.mp4#17``, or ``image 2`` of a list.
        read: reads it; raises an ImageError that names it.
        path: its path or URL, with ``#17`` for a frame of a video; None for an array.
        file: the file on disk, if it holds just this image; it is found from other folders, too.
        stem: the name of the picture that may be drawn of it, without a suffix.
        read_again: the same as `read`, but holding no pixels of its own; by default `read`.
    """

    name: str
    read: Callable[[], Read]
    path: str | None = None
    file: Path | None = None
    stem: str = "image"
    read_again: Callable[[], Read] | None = None


def memory_picture(image: Any, bgr: bool, name: str) -> Picture:
    """An array, tensor or Pillow image, which may know its file.

    Args:
        image: see :func:`retina_fast.predict.arrays.pixels_of_array` and :func:`retina_fast.data.images.pixels_of`.
        bgr: whether arrays and tensors have their channels in OpenCV's order.
        name: what messages call it, if it knows no file.

    Example::

        >>> memory_picture(Image.new("L", (4, 2)), False, "image 0").read().image.shape
        torch.Size([3, 2, 4])
    """
    path = getattr(image, "filename", None) or None
    return Picture(path or name, partial(_convert, image, bgr, path or name), path)


def read_now(picture: Picture) -> Picture:
    """The same picture, already read: it no longer depends on what it was read from.

    Example::

        >>> read_now(memory_picture(Image.new("L", (4, 2)), False, "image 0")).read().image.shape
        torch.Size([3, 2, 4])
    """
    try:
        return replace(picture, read=partial(Read, *picture.read()))
    except ImageError as error:
        return replace(picture, read=partial(_fail, error))


def failed_picture(name: str, message: str, path: str | None) -> Picture:
    """What stands for a source that has no pictures, such as an empty folder: reading it raises an error.

    Args:
        name: what messages call it.
        message: of the error.
        path: its path or URL, if it has one.

    Example::

        >>> failed_picture("photos", "photos: holds no image", "photos").path
        'photos'
    """
    return Picture(name, partial(_fail, ImageError(message)), path, None, Path(name).stem)


def file_picture(path: Path, here: str = "") -> Picture:
    """An image file, which need not be there.

    Args:
        path: of the file, by which the picture is called.
        here: the folder that a relative path is of, by default the current one.

    Example::

        >>> file_picture(Path("photos/a.jpg")).stem
        'a'
    """
    file = Path(here, path)
    return Picture(str(path), partial(_read_file, file, str(path)), str(path), file, path.stem)


@contextmanager
def called(file: Path | None, name: str) -> Iterator[None]:
    """Errors in this block call a file by that name, and not by the whole path by which it is read.

    Example::

        >>> with called(Path("/home/me/a.jpg"), "a.jpg"): ...  # doctest: +SKIP
    """
    try:
        yield
    except UserError as error:
        if file is None or str(file) == name:
            raise
        raise type(error)(str(error).replace(one_line(str(file)), one_line(name), 1)) from error


def url_picture(url: str) -> Picture:
    """The image that a server gives for a URL.

    Example::

        >>> url_picture("https://example.org/a.jpg?size=full").stem
        'a'
    """
    return Picture(url, partial(_download, url), url, None, Path(urlsplit(url).path).stem or "image")


def frame_pictures(video: str | int, here: str = "") -> Iterator[Picture]:
    """The frames of a video or camera. What cannot be decoded is a picture that cannot be read, and ends it.

    Args:
        video: a path or URL, or the number of a camera.
        here: the folder that a relative path is of, by default the current one; empty for a URL.

    Example::

        >>> for picture in frame_pictures("clip.mp4"): ...  # doctest: +SKIP
    """
    place = video if isinstance(video, str) else f"camera {video}"
    file = os.path.join(here, video) if isinstance(video, str) else video
    stem = Path(urlsplit(place).path).stem or "frame"
    number = 0
    try:
        for frame in frames(file):
            name = f"{place}#{number}"
            again = partial(_frame, file, number) if isinstance(file, str) else None
            yield Picture(name, partial(Read, frame), name, None, f"{stem}_{number:06}", again)
            number += 1
    except ImageError as error:
        if isinstance(video, str):
            error = ImageError(str(error).replace(str(file), video, 1))
        yield Picture(f"{place}#{number}", partial(_fail, error), f"{place}#{number}", None, stem)


def _frame(video: str, number: int) -> Read:
    """One frame, which is decoded with all before it: their number, unlike a time, is exact."""
    for frame in islice(frames(video), number, None):
        return Read(frame)
    raise ImageError(f"{video}#{number}: there is no such frame any more")


def _fail(error: ImageError) -> Read:
    raise error


def _convert(image: Any, bgr: bool, name: str) -> Read:
    try:
        if isinstance(image, Image.Image):
            with _PILLOW:  # Two threads must not load one image.
                return Read(pixels_of(image, image.format))
        return Read(pixels_of_tensor(image, bgr) if isinstance(image, Tensor) else pixels_of_array(image, bgr))
    except Exception as error:  # Pillow reads a file when its pixels are asked for, and may then raise anything.
        raise ImageError(f"{name}: {str(error) or 'its pixels cannot be loaded'}") from error


def _read_file(file: Path, name: str) -> Read:
    if not os.path.isfile(file):  # a pipe would never open
        raise ImageError(f"{name}: no such image file")
    with called(file, name):
        return _read_path(file)


def _read_path(path: Path) -> Read:
    """An image file. GeoTIFFs are read by rasterio, if it is installed, as they are in tiles; all else by Pillow and
    torchvision; what they cannot read of rasters, rasterio may."""
    if is_geotiff(path) and not is_turned(path):
        with suppress(UserError):  # Pillow may read it, or says what is wrong.
            return _read_raster(path)
    try:
        return Read(read_image(path), georeference(path))
    except ImageError as error:
        if not is_raster(path):
            raise
        try:
            return _read_raster(path)
        except UnknownPixels:
            raise
        except ImageError:
            if path.suffix.lower() in IMAGE_SUFFIXES:
                raise error from None
            raise
        except UserError as missing:  # rasterio is not installed
            raise ImageError(f"{error}; rasterio may read it: pip install rasterio") from missing


def _read_raster(path: Path) -> Read:
    with RasterFile(path) as raster:
        return Read(raster.read(Window(0, 0, raster.width, raster.height)), raster.georeference)


def _download(url: str) -> Read:
    try:
        request = Request(quote(url, safe=_UNQUOTED), headers={"User-Agent": "retina_fast"})
        with urlopen(request, timeout=_TIMEOUT) as answer:
            content = answer.read()
    except (OSError, ValueError, HTTPException) as error:  # the last for an answer that is cut short
        raise ImageError(f"{url}: cannot be downloaded ({getattr(error, 'reason', None) or error})") from error
    if not content.startswith(TIFF):
        return Read(image_of_bytes(content, url))
    with TemporaryDirectory() as folder:  # It may have bands and a place that are read from files alone.
        file = Path(folder, "image.tif")
        file.write_bytes(content)
        return _read_file(file, url)
