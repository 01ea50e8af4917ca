"""Replacing a file as a whole: if the process ends early or the disk is full, the old content is still there."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from retina_fast.data.errors import UserError


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a file beside `path` to write into; at the end of the block it takes the place of `path`.

    Before that, its content is flushed to the disk.

    Raises:
        UserError: if it cannot be written, for example on a full disk. `path` then has its old content, as it has after
            any other error, or Ctrl-C, in the block.

    Example::

        >>> with replacing(Path("model.pt")) as partial:  # doctest: +SKIP
        ...     torch.save(content, partial)
    """
    partial = path.with_name(path.name + ".partial")
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
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise UserError(f"{path}: cannot be written ({reason}); what it held before is unharmed") from error
