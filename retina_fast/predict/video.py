"""Frames of videos and cameras, decoded by PyAV (https://pyav.basswood-io.com), which brings FFmpeg with it."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from retina_fast.data.errors import ImageError, UserError
from retina_fast.data.images import IMAGE_SUFFIXES

VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".ts", ".mts", ".wmv", ".flv")
"""What the names of videos usually end in."""

_BEGINNINGS = (b"\x1aE\xdf\xa3", b"\0\0\1\xba", b"FLV\1", b"\x30\x26\xb2\x75")  # Matroska, MPEG, Flash, Windows Media
_WITH_LENGTH = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")
"""FFmpeg's names of the formats that hold their length. FFmpeg ends without an error where such a file is cut short."""
_MISSING = (0.5, 0.1)  # seconds, and part of the length, that a whole video may lack, since its last frame has no end
_STILLS = (b"heic", b"heix", b"mif1", b"msf1", b"avif", b"avis")  # brands of images in the container of MP4


def is_video(path: Path) -> bool:
    """Whether a file is a video: by its suffix, or else by its content.

    Example::

        >>> is_video(Path("clip.mp4")), is_video(Path("photo.jpg"))
        (True, False)
    """
    suffix = path.suffix.lower()
    if suffix in (*VIDEO_SUFFIXES, *IMAGE_SUFFIXES):
        return suffix in VIDEO_SUFFIXES
    if not os.path.isfile(path):  # a pipe would never open
        return False
    try:
        with path.open("rb") as file:
            begin = file.read(12)
    except OSError:
        return False
    mp4 = begin[4:8] == b"ftyp" and begin[8:12] not in _STILLS
    return mp4 or begin.startswith(_BEGINNINGS) or (begin[:4] == b"RIFF" and begin[8:] == b"AVI ")


def frames(video: str | int) -> Iterator[Tensor]:
    """The frames of a video, RGB (3, H, W) uint8, turned upright.

    Args:
        video: a file, a URL, or the number of a camera.

    Raises:
        UserError: without PyAV.
        ImageError: if it cannot be opened, a frame cannot be decoded, or it ends before its time.

    Example::

        >>> for frame in frames("clip.mp4"): ...  # doctest: +SKIP
    """
    av = _pyav()
    try:
        with _opened(av, video) as container:
            if not container.streams.video:
                raise ImageError(f"{_name(video)}: not a readable video (it holds no pictures)")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            reached = 0.0
            for packet in container.demux():
                if packet.pts is not None:
                    reached = max(reached, float((packet.pts + (packet.duration or 0)) * packet.time_base))
                if packet.stream.index != stream.index:
                    continue
                for frame in packet.decode():
                    turns = round(frame.rotation / 90)  # counterclockwise
                    yield torch.from_numpy(np.rot90(frame.to_ndarray(format="rgb24"), turns).copy()).permute(2, 0, 1)
            length = (container.duration or 0) / av.time_base if container.format.name in _WITH_LENGTH else 0
            if length - reached > max(_MISSING[0], _MISSING[1] * length):
                raise ImageError(f"{_name(video)}: is cut short: it ends after {reached:.1f} of {length:.1f} seconds")
    except (av.FFmpegError, OSError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ImageError(f"{_name(video)}: not a readable video ({reason})") from error


def frame_count(video: str) -> int | None:
    """How many frames a video says it has; None if it does not say.

    Example::

        >>> frame_count("clip.mp4")  # doctest: +SKIP
        250
    """
    av = _pyav()
    try:
        with av.open(video) as container:
            return container.streams.video[0].frames or None
    except (av.FFmpegError, OSError, IndexError):
        return None


def _opened(av: Any, video: str | int) -> Any:
    """A camera is opened by what its system calls it."""
    if isinstance(video, str) and not video.startswith("/dev/"):
        return av.open(video)
    if sys.platform == "darwin":
        return av.open(str(video), format="avfoundation", options={"framerate": "30"})
    return av.open(_name(video), format="v4l2")


def _name(video: str | int) -> str:
    return video if isinstance(video, str) else f"/dev/video{video}"


def _pyav() -> Any:
    try:
        import av
    except ModuleNotFoundError as error:
        raise UserError("videos and cameras need PyAV: pip install av") from error
    return av
