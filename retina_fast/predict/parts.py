"""What the processes of `retina-fast detect` have found so far, in files from which a later run goes on.

Each process has a file for itself, detections.RUN.RANK.partial, whose first line says what the run depends on. A line
follows for each of its images, a JSON object, once the image's picture is written. A run that goes on numbers its files
anew: it copies the lines of the images that are as they were, and all files are deleted when it has come to its end.
A line that was not finished when a run was killed counts as not written. Rows of tiles of the image in work are in a
file beside them, see :class:`retina_fast.predict.tile_rows.TileRows`.
"""

import heapq
import json
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from stat import S_ISREG
from typing import IO, Any

from retina_fast.data.errors import UserError
from retina_fast.predict.pictures import Picture

_BEGIN = "detections of"  # the key of the first line
_NAME = re.compile(r"detections\.(\d+)\.\d+\.(kept\.)?partial")

FileStamp = list[int] | None
"""The size of a file in bytes, and when it was last changed, in nanoseconds; None for what is no file on disk."""


def file_stamp(picture: Picture) -> FileStamp:
    """The stamp of a picture's file, or of the video that it is a frame of, to be taken before it is read.

    Example::

        >>> file_stamp(Picture("a.jpg", read, "there/is/no/a.jpg")) is None  # doctest: +SKIP
        True
    """
    file = picture.file or Path((picture.path or "").rpartition("#")[0])
    try:
        status = file.stat()
    except (OSError, ValueError):  # ValueError for a zero byte in the name
        return None
    return [status.st_size, status.st_mtime_ns] if S_ISREG(status.st_mode) else None


class Parts:
    """The unfinished files of one process in the output folder of all.

    All processes make theirs before one of them writes.

    Args:
        output: the folder; it is there.
        about: what the lines depend on, by the name of the option; for JSON.
        resume: whether lines of an earlier run are taken over, and files stay if this one is cut short.
        rank: the number of this process.

    Raises:
        UserError: if an earlier run depends on something else, or its files are damaged.

    Example::

        >>> parts = Parts(Path("out"), {"score": 0.3}, resume=True, rank=0)  # doctest: +SKIP
    """

    def __init__(self, output: Path, about: dict[str, Any], resume: bool, rank: int) -> None:
        self._output, self._about, self._resume, self._rank = output, about, resume, rank
        files = output.glob("detections.*.partial")
        numbered = sorted((int(match[1]), file) for file in files if (match := _NAME.fullmatch(file.name)))
        self._number = 1 + max((number for number, _ in numbered), default=0)
        earlier = [file for _, file in numbered if _is_own(file)]
        self._earlier = earlier + [file for file in output.glob("tiles.*.partial") if _is_own(file)]
        self._rows: list[Path] = []
        self._places: dict[tuple[str, str], tuple[Path, int]] = {}
        if resume:
            for file in earlier:
                self._check(file)
                self._places |= {(entry["path"], entry["name"]): (file, place) for place, entry in _entries(file)}

    def _check(self, file: Path) -> None:
        """Raises a UserError if the file depends on something else than this run."""
        other = _about_of(file)
        for name, value in self._about.items():
            if other and other.get(name) != value:
                values = "" if name == "model" else f" ({other.get(name)}, not {value})"
                raise UserError(
                    f"{file}: is of a run with another {name}{values}; give the same, or leave out --resume"
                )

    @property
    def found_before(self) -> int:
        """In how many images an earlier run has found what this one may keep."""
        return len(self._places)

    def part(self, rank: int, kept: bool = False) -> Path:
        """The file of what a process finds; or of what it keeps of an earlier run."""
        return self._output / f"detections.{self._number}.{rank}.{'kept.' if kept else ''}partial"

    def rows(self, picture: Picture, name: str, stamp: FileStamp) -> Path | None:
        """The file of the finished rows of tiles of a picture; the arguments are those of :meth:`kept`. A picture that
        comes twice, perhaps to two processes at once, has two; what is no file on disk has none, since it may be
        another picture when the run goes on."""
        if stamp is None:
            return None
        code = sha256(f"{picture.path} {name} {stamp}".encode(errors="surrogatepass")).hexdigest()[:16]
        file = self._output / f"tiles.{code}.partial"
        self._rows.append(file)
        return file

    def delete_rows(self) -> None:
        """Deletes the rows of tiles of all pictures so far, since the lines of these pictures are written."""
        _delete(*self._rows)
        self._rows.clear()

    def discard_earlier(self) -> None:
        """Deletes what a run that was killed has left, unless this run goes on from it. One process does it for all."""
        if not self._resume:
            _delete(*self._earlier)

    @contextmanager
    def opened(self) -> Iterator[tuple[IO[str], IO[str]]]:
        """The two files of this process, opened. After an error, or Ctrl-C, they stay if the run is to go on."""
        files = self.part(self._rank), self.part(self._rank, kept=True)
        try:
            with files[0].open("w") as found, files[1].open("w") as kept:
                for file in (found, kept):
                    file.write(json.dumps({_BEGIN: self._about}) + "\n")
                    file.flush()
                yield found, kept
        except BaseException:
            _delete(self._output / f"picture.{self._rank}.partial")
            if not self._resume:
                _delete(*files, *self._rows)
            raise
        self.delete_rows()

    def kept(self, picture: Picture, name: str, stamp: FileStamp) -> dict[str, Any] | None:
        """What an earlier run has found in a picture; None if it did not get so far, or the picture has changed.

        Args:
            picture: whose drawn picture is there still.
            name: of its drawn picture.
            stamp: of the picture.
        """
        place = self._places.get((picture.path or "", name))
        if place is None or not (self._output / f"{name}.jpg").is_file():
            return None
        with place[0].open("rb") as file:
            file.seek(place[1])
            entry: dict[str, Any] = json.loads(file.readline())
        return entry if entry["stamp"] == stamp else None

    def merged(self, count: int) -> Iterator[dict[str, Any]]:
        """What `count` processes have found and kept, in the order of the images."""
        with ExitStack() as stack:
            lines = []
            for file in (self.part(rank, kept) for rank in range(count) for kept in (False, True)):
                opened = stack.enter_context(file.open())
                next(opened)
                lines.append(map(json.loads, opened))
            yield from heapq.merge(*lines, key=lambda entry: entry["id"])

    def delete(self, count: int) -> None:
        """Deletes the files of `count` processes, and those of earlier runs."""
        own = [self.part(rank, kept) for rank in range(count) for kept in (False, True)]
        _delete(*own, *self._earlier)


def _delete(*files: Path) -> None:
    for file in files:
        with suppress(OSError):
            file.unlink(missing_ok=True)


def _is_own(file: Path) -> bool:
    """Whether a file of such a name is one of a run, which may have been killed before it wrote into it."""
    try:
        with file.open("rb") as opened:
            begin = opened.read(64)
    except OSError:
        return False
    return not begin or begin.startswith((b'{"detections of"', b'{"tiles of"'))


def _about_of(file: Path) -> dict[str, Any]:
    """What a file of a run says in its first line; nothing if that line was not finished."""
    with file.open("rb") as opened:
        line = opened.readline()
    try:
        return dict(json.loads(line)[_BEGIN]) if line.endswith(b"\n") else {}
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(file) from error


def _damaged(file: Path) -> UserError:
    return UserError(f"{file}: is damaged; delete it, or leave out --resume")


def _entries(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The whole lines behind the first, each with its place in the file, but for images that could not be used."""
    with file.open("rb") as opened:
        place = len(opened.readline())
        for line in opened:
            if line.endswith(b"\n"):
                try:
                    entry = json.loads(line)
                    if "problem" not in entry:
                        yield place, {name: entry[name] for name in ("path", "name", "stamp", "boxes", "size")}
                except (ValueError, KeyError, TypeError) as error:
                    raise _damaged(file) from error
            place += len(line)
