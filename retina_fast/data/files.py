"""Files that are replaced whole: whatever ends the process or fills the disk, the old content or the new is there."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from retina_fast.data.errors import UserError


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside `path` to write into; at the end it is brought to the disk and takes the place of `path`.

    Raises:
        UserError: if it cannot be written, for want of room, say; what `path` held is still there.

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
            os.fsync(folder)  # the new name, too
        finally:
            os.close(folder)
    except (OSError, RuntimeError) as error:  # a RuntimeError is torch.save's
        with contextlib.suppress(OSError):
            partial.unlink()
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise UserError(f"{path}: cannot be written ({reason}); what it held before is unharmed") from error
