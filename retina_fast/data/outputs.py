"""Outputs are looked at before the work that fills them: whether they can be written, and what they would replace."""

import errno
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from retina_fast.data.errors import UserError
from retina_fast.data.files import replacing

if TYPE_CHECKING:  # matplotlib is needed only where something is drawn
    from matplotlib.figure import Figure

_UNPLOTTED = ("pgf", "raw", "rgba")
"""Formats of matplotlib that need LaTeX, or that no viewer opens."""


def check_folder(folder: Path, files: Iterable[str] = ()) -> None:
    """Raise a UserError if a folder, the --output of a command, takes no file. One that is missing is not made.

    Args:
        folder: if it is missing, it must be possible to make it.
        files: names of files in it that must be possible to write; see :func:`check_file`.

    Raises:
        UserError: also if it is a file; the message names it.

    Example::

        >>> check_folder(Path("out"))  # doctest: +SKIP
    """
    try:
        with tempfile.TemporaryFile(dir=_first_there(folder)):
            pass
    except OSError as error:
        if os.path.isfile(folder):
            raise UserError(f"{folder}: is a file; give a folder as --output") from error
        raise UserError(
            f"{folder}: cannot be written into ({error.strerror}); give another folder as --output"
        ) from error
    if folder.is_dir():
        for name in files:
            check_file(folder / name)


def _first_there(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there. Raises an OSError for a name that no folder can have."""
    return next((place for place in (folder, *folder.parents) if _is_there(place)), Path())


def _is_there(place: Path) -> bool:
    """Whether there is a file, folder or link. Raises an OSError for a name that none can have."""
    try:
        place.lstat()
    except FileNotFoundError:
        return False
    except ValueError as error:  # a zero byte in the name
        raise OSError(errno.EINVAL, "Invalid name") from error
    return True


def check_file(file: Path, inputs: Iterable[Path] = ()) -> None:
    """Raise a UserError if the file cannot be written, or if it is one of the inputs by another or the same name.

    Args:
        file: it may be there already, and is then to be replaced.
        inputs: files, and folders of files, that stay as they are.

    Example::

        >>> check_file(Path("out/model.onnx"), inputs=[Path("model.pt")])  # doctest: +SKIP
    """
    if not os.path.isdir(file.parent):
        raise UserError(f"{file.parent}: no such folder")
    if os.path.isdir(file):
        raise UserError(f"{file}: is a folder; give the name of a file")
    if os.path.exists(file):
        if not os.path.isfile(file):
            raise UserError(f"{file}: is a device or a pipe; give the name of a file")
        for other in inputs:
            for read in (other, *other.rglob("*")) if other.is_dir() else (other,):
                if same_file(file, read):
                    raise UserError(f"{file}: would replace {read}, which is read; give another name")
        if not os.access(file, os.W_OK):
            raise UserError(f"{file}: is there already and read-only; give another name")
    try:
        _is_there(file)  # raises for a name that the file system does not allow
        with tempfile.TemporaryFile(dir=file.parent):
            pass
    except OSError as error:
        raise UserError(f"{file}: cannot be written ({error.strerror}); give another name") from error


def check_plot(file: Path, inputs: Iterable[Path] = ()) -> None:
    """The same for a picture that matplotlib draws, whose suffix names its format.

    Raises:
        UserError: also if matplotlib writes no such format; the message lists those that it writes.

    Example::

        >>> check_plot(Path("curves.png"))
    """
    from matplotlib.backend_bases import FigureCanvasBase

    formats = sorted(set(FigureCanvasBase.get_supported_filetypes()) - set(_UNPLOTTED))
    if file.suffix.lower().removeprefix(".") not in formats:
        raise UserError(f"{file}: the suffix of a plot must be one of .{', .'.join(formats)}, got {file.suffix!r}")
    check_file(file, inputs)


def save_plot(figure: "Figure", file: Path, dpi: int = 100) -> None:
    """Write a plot whole, in the format of its suffix. If `file` is a link, it is replaced, and not what it leads to.

    Args:
        figure: of matplotlib.
        file: see :func:`check_plot`.
        dpi: dots an inch.

    Raises:
        UserError: if it cannot be written.

    Example::

        >>> save_plot(figure, Path("curves.png"))  # doctest: +SKIP
    """
    with replacing(file) as partial:
        figure.savefig(partial, dpi=dpi, format=file.suffix.lower().removeprefix("."))


def same_file(one: Path, other: Path) -> bool:
    """Whether both names lead to one file, by links, by other spellings, and in folders that do not tell case apart.

    Example::

        >>> same_file(Path("a/../photo.jpg"), Path("photo.jpg"))
        False
    """
    try:
        return one.samefile(other)
    except OSError:  # One of them is not there.
        return False
