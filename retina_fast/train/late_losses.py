"""Reading the losses of a step on the host while the next step is already queued on the device."""

from collections.abc import Callable

import torch
from torch import Tensor

from retina_fast.device import LateRead

Note = Callable[[dict[str, float]], None]


class LateLosses:
    """Calls a function with each step's losses as numbers: at once on a CPU, and one step later on a CUDA device.

    By then the next step is queued, so that the device has work while the host waits for the losses.

    Example::

        >>> LateLosses().add({"classification": torch.tensor(0.5)}, note=print)
        {'classification': 0.5}
    """

    def __init__(self) -> None:
        self._pending: tuple[list[str], LateRead, Note] | None = None

    def add(self, losses: dict[str, Tensor], note: Note) -> None:
        """Call `note` with the losses, now or later. What the `note` of an earlier step raises is raised here."""
        values = torch.stack(list(losses.values()))
        late = LateRead(values)
        self.read()
        self._pending = list(losses), late, note
        if values.device.type != "cuda":
            self.read()

    def read(self) -> None:
        """Wait for the losses that are still to be read, and call their function."""
        if self._pending is not None:
            names, late, note = self._pending
            self._pending = None
            note(dict(zip(names, late.wait().tolist(), strict=True)))
