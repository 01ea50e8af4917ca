"""Stopping a training run by Ctrl-C or SIGTERM, after the step under way."""

import signal
from collections.abc import Callable
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(Exception):
    """A person asked the run to stop, and its state is saved."""


class StopRequest:
    """Notes that a person asks the run to stop. A second signal ends the process at once.

    At the end of the `with` block, signals have the handlers that they had before.

    Args:
        say: called with what the person should read.

    Example::

        >>> with StopRequest(print) as stop:
        ...     stop.listen()
        ...     stop.asked
        False
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say, self.asked = say, False

    def __enter__(self) -> "StopRequest":
        self._before = {number: signal.getsignal(number) for number in _SIGNALS}
        return self

    def listen(self) -> None:
        """Begins to take the signals; Lightning's Trainer, which sets handlers of its own, has begun before."""
        for number in _SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: Any) -> None:
        self.asked = True
        self.say("Stopping after this step")
        signal.signal(number, signal.SIG_DFL)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def ignore_signals(worker: int) -> None:
    """Has a process that loads images ignore the signals, which reach every process: the run decides when it ends.

    Args:
        worker: its number, as a DataLoader passes it to `worker_init_fn`.

    Example::

        >>> DataLoader(data, num_workers=2, worker_init_fn=ignore_signals)  # doctest: +SKIP
    """
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
