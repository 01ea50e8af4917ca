"""Files as a whole: they are replaced whole, and what is wrong with one that arrived damaged is said.

If the process ends early or the disk is full while a file is replaced, the old content is still there.
"""

import contextlib
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path

from retina_fast.data.errors import UserError

_BLOWN = 100  # times the size of a file; PyTorch does not compress, and weights hardly can be


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a file beside `path` to write into; at the end of the block it takes the place of `path`.

    Before that, its content is flushed to the disk. Each process has a file of its own, so that several may write
    `path` at once.

    Raises:
        UserError: if it cannot be written, for example on a full disk. `path` then has its old content, as it has after
            any other error, or Ctrl-C, in the block.

    Example::

        >>> with replacing(Path("model.pt")) as partial:  # doctest: +SKIP
        ...     torch.save(content, partial)
    """
    if os.path.exists(path) and not os.path.isfile(path):
        raise UserError(f"{path}: is a folder, a device or a pipe; give the name of a file")
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        with partial.open("rb") as written:
            os.fsync(written.fileno())
        partial.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # The new name is flushed to the disk, too.
        finally:
            os.close(folder)
    except BaseException as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        if not isinstance(error, (OSError, RuntimeError)):  # torch.save raises a RuntimeError.
            raise
        reason = getattr(error, "strerror", None) or f"{error}\n".splitlines()[0]
        raise UserError(f"{path}: cannot be written ({reason}); what it held before is unharmed") from error


def damage(path: Path) -> str | None:
    """What is wrong with a file of weights, in words, as far as it shows without reading the weights.

    PyTorch's files are zip archives with a checksum for each entry, at which PyTorch does not look. None of the file's
    content is run.

    Returns:
        The words, or None for a whole archive, and for a file of another kind of which nothing shows.

    Example::

        >>> damage(Path("there_is_none.pt"))
        'it cannot be read (No such file or directory)'
    """
    try:
        with path.open("rb") as file:
            begin = file.read(1024)
        if begin.startswith(b"PK"):
            with zipfile.ZipFile(path) as archive:
                if not archive.namelist():
                    return "it is an archive with nothing in it"
                if sum(entry.file_size for entry in archive.infolist()) > _BLOWN * os.path.getsize(path):
                    return f"it would unpack to more than {_BLOWN} times its size"
                return "its content does not agree with its checksum" if archive.testzip() else None
    except OSError as error:
        return f"it cannot be read ({error.strerror})"
    except Exception:  # zipfile raises anything, from struct.error to NotImplementedError, for what it does not know.
        return "it is cut short, or changed in the middle"
    if not begin.strip(b"\0"):
        return "it holds nothing but zeros" if begin else "it is empty"
    if begin.lstrip(b"\xef\xbb\xbf \t\r\n").startswith((b"<", b"{")):
        return "it is a web page or a server's answer, not weights"
    if begin.startswith(b"version https://git-lfs"):
        return "it is a pointer of Git LFS, not the weights: git lfs pull"
    return "it is a text, not weights" if begin.isascii() and b"\0" not in begin else None
