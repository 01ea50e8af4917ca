"""Turns whatever a user calls a source into an iterator of pictures, each read when it is needed."""

import glob
import os
import re
import stat
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from io import IOBase
from numbers import Integral
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from PIL import Image
from torch import Tensor

from retina_fast.data.errors import UserError
from retina_fast.predict.geotiff import is_raster
from retina_fast.predict.image_files import counts_as_image, image_files, silent
from retina_fast.predict.pictures import (
    Picture,
    failed_picture,
    file_picture,
    frame_pictures,
    memory_picture,
    read_now,
    url_picture,
)
from retina_fast.predict.video import VIDEO_SUFFIXES, frame_count, is_video

_WEB = ("http", "https")
_STREAMS = ("rtsp", "rtsps", "rtmp", "rtmps", "srt", "udp", "tcp", "rtp")
_NO_WORD = "source is an empty word: give a path, or . for the folder that you are in"
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://.")
_IN_MEMORY = (np.ndarray, Tensor, Image.Image)
_NO_SOURCES = (bytes, bytearray, memoryview, dict, IOBase)  # which could be iterated over
Say = Callable[[str], object]


class NoSource(TypeError):
    """Something that holds no images, such as None."""


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


def open_source(source: Any, bgr: bool = False, say: Say = warnings.warn, here: str | None = None) -> Source:
    """Say what a source is; nothing of it is read yet.

    Args:
        source: see :func:`retina_fast.predict.predict.predict`.
        bgr: whether arrays and tensors have their channels in OpenCV's order.
        say: called with a sentence about files that are passed over.
        here: the folder that relative paths are of; by default the current one, also if that changes afterwards.

    Raises:
        UserError: for a URL of an unknown kind; and, when its turn comes, for a folder or list that cannot be read.
        TypeError: for what is no source.

    Example::

        >>> open_source(["a.jpg", "b.jpg"]).count()
        2
    """
    here = _current_folder() if here is None else here
    if isinstance(source, str | os.PathLike):
        return _named(source if isinstance(source, str) else Path(os.fsdecode(source)), say, here)
    if _is_camera(source):
        return Source(partial(frame_pictures, int(source)), endless=True)
    if _holds_paths(source):
        return _several(source.ravel().tolist(), bgr, say, here)
    if _is_batch(source):
        return _several(list(source), bgr, say, here)
    if isinstance(source, _IN_MEMORY):
        return _one(memory_picture(source, bgr, "the image"))
    if isinstance(source, Iterable) and not isinstance(source, _NO_SOURCES):
        return _several(source, bgr, say, here)
    raise NoSource(
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
        if _URL.match(word) or _is_device(word):
            places.append(word)
        elif word.isdigit() and not os.path.exists(word):
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

    endless = any(open_source(place).endless for place in places if not isinstance(place, Path))
    return Source(pictures, count=count, endless=endless)


def _named(source: str | Path, say: Say, here: str) -> Source:
    """A path, URL or glob."""
    word = str(source)
    if source == "":
        raise UserError(_NO_WORD)
    if scheme := _URL.match(word):
        return _at_url(word, scheme[1].lower())
    path = Path(source)
    if _is_device(path):
        return Source(partial(frame_pictures, word), endless=True)
    if os.path.isdir(Path(here, path)) or path.suffix.lower() == ".txt":

        def files(say: Say) -> Iterator[Source]:
            return (_listed(place, say, here) for place in image_files([path], say, here=here))

        def pictures() -> Iterator[Picture]:
            for file in files(say):
                yield from file.pictures()

        return Source(pictures, count=lambda: _total(files(silent)))
    found = _matches(word, say, here)
    return _several(found, False, say, here) if found != [path] else _file(path, here)


def _at_url(url: str, scheme: str) -> Source:
    """An image or a video on the web, or a stream."""
    if scheme not in (*_WEB, *_STREAMS):
        raise UserError(f"{url}: is of no kind that is known: {', '.join((*_WEB, *_STREAMS))}, or a path")
    try:
        path = urlsplit(url).path.lower()
    except ValueError as error:
        raise UserError(f"{url}: is no address ({error})") from error
    if scheme in _STREAMS:
        return Source(partial(frame_pictures, url), endless=True)
    if path.endswith(VIDEO_SUFFIXES):
        return Source(partial(frame_pictures, url), count=partial(frame_count, url))
    return _one(url_picture(url))


def _listed(place: str | Path | int, say: Say, here: str = "") -> Source:
    """A file of a folder, list or glob; or another place, such as a URL of a list."""
    if isinstance(place, Path):
        return _file(place, here)
    try:
        return open_source(place, say=say, here=here)
    except UserError as error:
        return _one(failed_picture(str(place), error.args[0], str(place)))


def _file(path: Path, here: str) -> Source:
    """A video, or else an image, even if it is missing."""
    file = Path(here, path)
    if is_video(file):
        return Source(partial(frame_pictures, str(path), here), count=partial(frame_count, str(file)))
    return _one(file_picture(path, here))


def _total(sources: Iterable[Source]) -> int | None:
    """How many pictures all of them have."""
    counts = [source.count() for source in sources]
    return None if None in counts else sum(filter(None, counts))


def _one(picture: Picture) -> Source:
    return Source(lambda: iter([picture]), one=True, count=lambda: 1)


def _matches(word: str, say: Say, here: str = "") -> list[Path]:
    """The images and videos that a glob matches; the path that the word is, if it is none or matches nothing.

    Where a link leads back to a folder above it, `**` finds each file again and again; once is kept."""
    if not glob.has_magic(word) or os.path.exists(Path(here, word)):
        return [Path(word)]
    matched = glob.iglob(word, root_dir=here or None, recursive=True)
    files = sorted((Path(path) for path in matched if os.path.isfile(Path(here, path))), key=_length)
    folders = {folder: os.path.realpath(Path(here, folder)) for folder in {path.parent for path in files}}
    found = sorted({(folders[path.parent], path.name): path for path in reversed(files)}.values())
    suffix = Path(word).suffix.lower()  # a glob of *.jp2 means rasters, which one of * passes over
    asked = [path for path in found if is_raster(path) and path.suffix.lower() == suffix]
    fitting = asked or [path for path in found if is_video(Path(here, path)) or counts_as_image(Path(here, path))]
    if len(fitting) < len(found):
        say(f"{word}: {len(found) - len(fitting)} other files that it matches are passed over")
    return fitting or [Path(word)]


def _length(path: Path) -> int:
    return len(path.parts)


def _several(items: Iterable[Any], bgr: bool, say: Say, here: str, at_once: bool = False) -> Source:
    """The pictures of several sources, one after another. What one of them lacks does not end the others.

    Args:
        items: the sources.
        bgr, say, here: see :func:`open_source`.
        at_once: whether images in memory are converted when their turn comes, and not when they are read, in another
            thread: those of an iterator always are, since it may fill one buffer again and again.
    """
    at_once = at_once or not isinstance(items, Sequence)

    def pictures() -> Iterator[Picture]:
        for number, item in enumerate(items):
            if _is_batch(item):
                yield from _several(list(item), bgr, say, here, at_once).pictures()
            elif isinstance(item, _IN_MEMORY) and not _holds_paths(item):
                picture = memory_picture(item, bgr, f"image {number}")
                yield read_now(picture) if at_once else picture
            else:
                try:
                    yield from open_source(item, bgr, say, here).pictures()
                except UserError as error:
                    yield failed_picture(str(item), error.args[0], str(item))
                except NoSource as error:
                    yield failed_picture(f"image {number}", f"image {number}: {error}", None)

    def count() -> int | None:
        try:
            opened = (open_source(item, bgr, silent, here) for item in items)
            return _total(opened) if isinstance(items, Sequence) else None
        except (UserError, NoSource):
            return None

    return Source(pictures, count=count, endless=_is_endless(items))


def _is_endless(item: Any) -> bool:
    """Whether there is a camera or a stream among a source, as far as that is known before it is iterated over."""
    if isinstance(item, str | os.PathLike):
        word = os.fsdecode(item)
        scheme = _URL.match(word)
        return scheme[1].lower() in _STREAMS if scheme else word.startswith("/dev/") and _is_device(word)
    several = isinstance(item, Sequence) and not isinstance(item, _NO_SOURCES)
    return _is_camera(item) or (several and any(map(_is_endless, item)))


def _is_camera(item: Any) -> bool:
    return isinstance(item, Integral) and not isinstance(item, bool)


def _is_batch(item: Any) -> bool:
    return isinstance(item, np.ndarray | Tensor) and not getattr(item, "is_nested", False) and item.ndim == 4


def _holds_paths(item: Any) -> bool:
    """Whether it is an array of words or objects, as columns of tables are."""
    return isinstance(item, np.ndarray) and item.ndim == 1 and item.dtype.kind in "OUT"


def _is_device(path: str | Path) -> bool:
    """Whether there is a device of that name, such as a camera."""
    try:
        return stat.S_ISCHR(os.stat(path).st_mode)
    except (OSError, ValueError):  # ValueError for a zero byte in the name
        return False


def _current_folder() -> str:
    try:
        return os.getcwd()
    except OSError:  # it was deleted
        return ""
