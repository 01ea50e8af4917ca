"""Losses read on the host without making it wait for the step that computes them."""

from collections.abc import Callable

import torch
from torch import Tensor

Note = Callable[[dict[str, float]], None]


class LateLosses:
    """Hands each step's losses on as numbers: at once, but from a CUDA device when the next step's are added.

    By then the next step is queued, so that the device has work while the host waits for the one before it.

    Example::

        >>> LateLosses().add({"classification": torch.tensor(0.5)}, note=print)
        {'classification': 0.5}
    """

    def __init__(self) -> None:
        self._pending: tuple[list[str], Tensor, torch.cuda.Event, Note] | None = None

    def add(self, losses: dict[str, Tensor], note: Note) -> None:
        """Call ``note`` with the losses, now or later; what an earlier ``note`` raises is raised now."""
        names, values = list(losses), torch.stack(list(losses.values()))
        if values.device.type != "cuda":
            note(dict(zip(names, values.tolist(), strict=True)))
            return
        numbers = torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(values.device))
        self.read()
        self._pending = names, numbers, event, note

    def read(self) -> None:
        """Hand on what is pending; waits for it."""
        if self._pending is not None:
            names, numbers, event, note = self._pending
            self._pending = None
            event.synchronize()
            note(dict(zip(names, numbers.tolist(), strict=True)))
