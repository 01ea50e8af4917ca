"""What was found in rows of tiles: in memory, and in a file from which a run that was killed goes on."""

import json
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import torch
from torch import Tensor

from retina_fast.data.errors import UserError
from retina_fast.data.outputs import check_file

_FIELDS = {"boxes": torch.float32, "scores": torch.float32, "labels": torch.int64, "shared": torch.bool}


class TileRows:
    """The finished rows of tiles of one raster, added one after another.

    Args:
        file: each row becomes a line of it, written before the next row begins; None keeps them in memory alone.
        header: what the rows depend on, for JSON.
        keep: whether the file stays; by default it is deleted at the end of a ``with`` block without an error.

    Raises:
        UserError: if the file cannot be written, or holds something else than rows of the same header.

    Example::

        >>> with TileRows(None, {}) as rows:
        ...     rows.add({"boxes": torch.ones(1, 4), "scores": torch.ones(1), "labels": torch.zeros(1).long(),
        ...               "shared": torch.ones(1).bool()})
        ...     rows.finished, rows.found()["boxes"].shape
        (1, torch.Size([1, 4]))
    """

    def __init__(self, file: Path | None, header: dict[str, Any], keep: bool = False) -> None:
        self.file, self._keep = file, keep
        self._rows: list[dict[str, Tensor]] = []
        self._opened: IO[str] | None = None
        if file is None:
            return
        check_file(file)
        line = json.dumps({"tiles of": header}) + "\n"
        whole = self._read(file, line) if file.exists() and file.stat().st_size else ""
        self._opened = file.open("r+" if whole else "w", encoding="utf-8")
        self._opened.truncate(len(whole.encode()))  # a line that was not finished when the run was killed
        self._opened.seek(0, 2)
        if not whole:
            self._write(line)

    def _read(self, file: Path, line: str) -> str:
        """The whole lines of the file, of which the rows are taken over; the first must be the given one."""
        try:
            text = file.read_text(encoding="utf-8")
            whole = text[: text.rfind("\n") + 1]
            if not line.startswith(whole) and not whole.startswith(line):
                raise ValueError
            for row in whole.splitlines()[1:]:
                found = json.loads(row)
                tensors = {
                    name: torch.tensor(found[name], dtype=dtype, device="cpu") for name, dtype in _FIELDS.items()
                }
                self._rows.append(tensors | {"boxes": tensors["boxes"].reshape(-1, 4)})
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise UserError(
                f"{file}: holds no rows of tiles of this image, model, tile and overlap; give another file as resume"
            ) from error
        return whole

    @property
    def finished(self) -> int:
        """How many rows there are."""
        return len(self._rows)

    def add(self, found: dict[str, Tensor]) -> None:
        """Add a row: ``boxes`` (N, 4), ``scores`` (N,), ``labels`` (N,) and ``shared`` (N,)."""
        self._rows.append(found)
        if self._opened:
            self._write(json.dumps({name: found[name].tolist() for name in _FIELDS}) + "\n")

    def _write(self, line: str) -> None:
        assert self._opened
        try:
            self._opened.write(line)
            self._opened.flush()
        except OSError as error:
            raise UserError(f"{self.file}: cannot be written ({error.strerror})") from error

    def found(self) -> dict[str, Tensor]:
        """All rows as one."""
        return {name: torch.cat([row[name] for row in self._rows]) for name in _FIELDS}

    def __enter__(self) -> "TileRows":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._opened:
            self._opened.close()
            if kind is None and self.file and not self._keep:
                self.file.unlink(missing_ok=True)
