"""Turns whatever a user calls a source into an iterator of pictures, each read when it is needed."""

import glob
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple
from urllib.error import URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import numpy as np
from PIL import Image
from torch import Tensor

from retina_fast.data.errors import ImageError, UserError
from retina_fast.data.images import image_of_bytes, pixels_of, read_image
from retina_fast.predict.arrays import pixels_of_array, pixels_of_tensor
from retina_fast.predict.georeference import Georeference, georeference
from retina_fast.predict.geotiff import RasterFile, UnknownPixels, is_raster
from retina_fast.predict.image_files import counts_as_image, image_files, silent
from retina_fast.predict.tiles import Window
from retina_fast.predict.video import VIDEO_SUFFIXES, frame_count, frames, is_video

_WEB = ("http", "https")
_STREAMS = ("rtsp", "rtsps", "rtmp", "rtmps", "srt", "udp", "tcp", "rtp")
_NO_WORD = "source is an empty word: give a path, or . for the folder that you are in"
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://.")
_TIMEOUT = 30  # s that a server may be silent
_IN_MEMORY = (np.ndarray, Tensor, Image.Image)
_PILLOW = Lock()
Say = Callable[[str], object]


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
        file: the file on disk, if it holds just this image.
        stem: the name of the picture that may be drawn of it, without a suffix.
        read_again: the same as `read`, but holding no pixels of its own; by default `read`.
    """

    name: str
    read: Callable[[], Read]
    path: str | None = None
    file: Path | None = None
    stem: str = "image"
    read_again: Callable[[], Read] | None = None


@dataclass(frozen=True)
class Source:
    """A source as a line of pictures.

    Attributes:
        pictures: gives them, each time anew except where the user's own iterator or a camera is used up.
        one: whether the source is one image, and not a collection that may hold one.
        count: gives how many pictures there are; None if that is not known before.
        endless: whether it is a camera or a stream, which does not end by itself.
    """

    pictures: Callable[[], Iterator[Picture]]
    one: bool = False
    count: Callable[[], int | None] = lambda: None
    endless: bool = False


def open_source(source: Any, bgr: bool = False, say: Say = warnings.warn) -> Source:
    """Say what a source is; nothing of it is read yet.

    Args:
        source: see :func:`retina_fast.predict.predict.predict`.
        bgr: whether arrays and tensors have their channels in OpenCV's order.
        say: called with a sentence about files that are passed over.

    Raises:
        UserError: for a URL of an unknown kind; and, when its turn comes, for a folder or list that cannot be read.
        TypeError: for what is no source.

    Example::

        >>> open_source(["a.jpg", "b.jpg"]).count()
        2
    """
    if isinstance(source, str | Path):
        return _named(source, say)
    if isinstance(source, int) and not isinstance(source, bool):
        return Source(partial(_frames, source), endless=True)
    if isinstance(source, np.ndarray | Tensor) and source.ndim == 4:
        return _several(list(source), bgr, say)
    if isinstance(source, _IN_MEMORY):
        return _one(_in_memory(source, bgr, "the image"))
    if isinstance(source, Iterable) and not isinstance(source, bytes | dict):
        return _several(source, bgr, say)
    raise TypeError(
        "source must be a path, URL, folder, glob, video, camera number, Pillow image, array, tensor, or a list of "
        f"these, got {type(source).__module__}.{type(source).__qualname__}"
    )


def open_files(inputs: Sequence[str | Path], say: Say = silent, drawn_in: Path | None = None) -> Source:
    """The pictures of several paths, URLs, globs and cameras, as a command line gives them: a file comes once.

    Args:
        inputs: as words; one of digits alone, of which there is no file, is the number of a camera.
        say: called with a sentence about files that are passed over, when the pictures are counted.
        drawn_in: a folder in which drawn pictures are passed over, since they are written there.

    Raises:
        UserError: see :func:`open_source`.

    Example::

        >>> open_files(["photos/", "clip.mp4", "https://example.org/a.jpg"]).endless
        False
    """
    places: list[str | Path | int] = []
    for word in map(str, inputs):
        if not word:
            raise UserError(_NO_WORD)
        if _URL.match(word) or Path(word).is_char_device():
            places.append(word)
        elif word.isdigit() and not Path(word).exists():
            places.append(int(word))
        else:
            places += _matches(word, say)

    def files(say: Say) -> Iterator[Any]:
        seen: set[str] = set()
        for place in places:
            yield from image_files([place], say, drawn_in, seen) if isinstance(place, Path) else [place]

    def pictures() -> Iterator[Picture]:
        for place in files(silent):
            yield from _listed(place, silent).pictures()

    def count() -> int | None:
        return _total(_listed(place, say) for place in files(say))

    endless = any(_listed(place, silent).endless for place in places if not isinstance(place, Path))
    return Source(pictures, count=count, endless=endless)


def _named(source: str | Path, say: Say) -> Source:
    """A path, URL or glob."""
    word = str(source)
    if source == "":
        raise UserError(_NO_WORD)
    scheme = _URL.match(word)
    if scheme and scheme[1].lower() in _STREAMS:
        return Source(partial(_frames, word), endless=True)
    if scheme and scheme[1].lower() in _WEB:
        if urlsplit(word).path.lower().endswith(VIDEO_SUFFIXES):
            return Source(partial(_frames, word), count=partial(frame_count, word))
        return _one(Picture(word, partial(_download, word), word, None, Path(urlsplit(word).path).stem or "image"))
    if scheme:
        raise UserError(f"{word}: is of no kind that is known: {', '.join((*_WEB, *_STREAMS))}, or a path")
    path = Path(source)
    if path.is_char_device():
        return Source(partial(_frames, word), endless=True)
    if path.is_dir() or path.suffix.lower() == ".txt":

        def pictures() -> Iterator[Picture]:
            for place in image_files([path], say):
                yield from _listed(place, say).pictures()

        return Source(pictures, count=lambda: _total(_listed(place, silent) for place in image_files([path])))
    if not path.exists() and glob.has_magic(word):
        found = _matches(word, say)
        return _several(found, False, say) if found != [path] else _file(path)
    return _file(path)


def _listed(place: str | Path | int, say: Say) -> Source:
    """A file of a folder, list or glob; or another place, such as a URL of a list."""
    return _file(place) if isinstance(place, Path) else open_source(place, say=say)


def _file(path: Path) -> Source:
    """A video, or else an image, even if it is missing."""
    if is_video(path):
        return Source(partial(_frames, str(path)), count=partial(frame_count, str(path)))
    return _one(Picture(str(path), partial(_read_file, path), str(path), path, path.stem))


def _total(sources: Iterable[Source]) -> int | None:
    """How many pictures all of them have."""
    counts = [source.count() for source in sources]
    return None if None in counts else sum(filter(None, counts))


def _one(picture: Picture) -> Source:
    return Source(lambda: iter([picture]), one=True, count=lambda: 1)


def _matches(word: str, say: Say) -> list[Path]:
    """The images and videos that a glob matches; the path that the word is, if it is none or matches nothing."""
    if Path(word).exists() or not glob.has_magic(word):
        return [Path(word)]
    found = sorted(path for path in map(Path, glob.iglob(word, recursive=True)) if path.is_file())
    fitting = [path for path in found if is_video(path) or counts_as_image(path)]
    if len(fitting) < len(found):
        say(f"{word}: {len(found) - len(fitting)} other files that it matches are passed over")
    return fitting or [Path(word)]


def _several(items: Iterable[Any], bgr: bool, say: Say) -> Source:
    """The pictures of several sources, one after another."""
    places = [item for item in items if isinstance(item, int | str | Path)] if isinstance(items, Sequence) else []

    def pictures() -> Iterator[Picture]:
        for number, item in enumerate(items):
            if isinstance(item, _IN_MEMORY):
                yield _in_memory(item, bgr, f"image {number}")
            else:
                yield from open_source(item, bgr, say).pictures()

    def count() -> int | None:
        if not isinstance(items, Sequence):
            return None
        return _total(open_source(item, bgr, silent) for item in items)

    endless = any(isinstance(x, int) or (_URL.match(str(x)) and open_source(x).endless) for x in places)
    return Source(pictures, count=count, endless=endless)


def _in_memory(image: Any, bgr: bool, name: str) -> Picture:
    """An array, tensor or Pillow image, which may know its file."""
    path = getattr(image, "filename", None) or None
    return Picture(path or name, partial(_convert, image, bgr, path or name), path)


def _convert(image: Any, bgr: bool, name: str) -> Read:
    try:
        if isinstance(image, Image.Image):
            with _PILLOW:  # Two threads must not load one image.
                return Read(pixels_of(image, image.format))
        return Read(pixels_of_tensor(image, bgr) if isinstance(image, Tensor) else pixels_of_array(image, bgr))
    except (ValueError, OSError) as error:  # Pillow reads a file when its pixels are asked for.
        raise ImageError(f"{name}: {error}") from error


def _read_file(path: Path) -> Read:
    """An image file, by Pillow and torchvision; what they cannot read of rasters, rasterio may."""
    try:
        return Read(read_image(path), georeference(path))
    except ImageError as error:
        if not is_raster(path) or not path.is_file():
            raise
        try:
            with RasterFile(path) as raster:
                return Read(raster.read(Window(0, 0, raster.width, raster.height)), raster.georeference)
        except UnknownPixels:
            raise
        except ImageError:
            raise error from None
        except UserError as missing:  # rasterio is not installed
            raise ImageError(f"{error}; rasterio may read it: pip install rasterio") from missing


def _download(url: str) -> Read:
    try:
        with urlopen(Request(url, headers={"User-Agent": "retina_fast"}), timeout=_TIMEOUT) as answer:
            content = answer.read()
    except (URLError, OSError, ValueError) as error:
        raise ImageError(f"{url}: cannot be downloaded ({getattr(error, 'reason', None) or error})") from error
    return Read(image_of_bytes(content, url))


def _frames(video: str | int) -> Iterator[Picture]:
    """The frames of a video or camera. What cannot be decoded is a picture that cannot be read, and ends it."""
    place = video if isinstance(video, str) else f"camera {video}"
    stem = Path(urlsplit(place).path).stem or "frame"
    number = 0
    try:
        for frame in frames(video):
            name = f"{place}#{number}"
            again = partial(_frame, video, number) if isinstance(video, str) else None
            yield Picture(name, partial(Read, frame), name, None, f"{stem}_{number:06}", again)
            number += 1
    except ImageError as error:
        yield Picture(f"{place}#{number}", partial(_fail, error), f"{place}#{number}", None, stem)


def _frame(video: str, number: int) -> Read:
    """One frame, which is decoded with all before it: their number, unlike a time, is exact."""
    for frame in islice(frames(video), number, None):
        return Read(frame)
    raise ImageError(f"{video}#{number}: there is no such frame any more")


def _fail(error: ImageError) -> Read:
    raise error
