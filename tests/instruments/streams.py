"""Streams that are not there: work runs at once, on a CPU, while it is recorded which stream it was given to.

From who waited for whom it is known which work is sure to be done before which (vector clocks: Mattern, "Virtual Time
and Global States of Distributed Systems", 1988). An operation that may run too early raises RaceError, and so does one
that may be given memory which another stream still reads: the allocator gives freed memory out on its own stream again
at once.
"""

import contextlib
import weakref
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

Moment = tuple[int, int]  # a stream, and how many operations it had been given by then


class RaceError(AssertionError):
    """Two operations that touch the same memory are not in order."""


class FakeStream:
    """A stream of the CPU, which is given operations by :class:`Streams`."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.known: Counter[int] = Counter()  # of each stream: how many of its operations are done before the next here

    def wait_stream(self, other: "FakeStream") -> None:
        self.known |= other.known  # the greater of each


class Streams(TorchDispatchMode):
    """Within it, ``torch.cuda``'s current stream is a fake one, and every operation is checked.

    Attributes:
        given: how many operations each stream was given.

    Example::

        >>> side = FakeStream()
        >>> with Streams() as streams:
        ...     x = torch.ones(2)
        ...     with torch.cuda.stream(side):
        ...         x + 1  # the side stream did not wait for the first
        Traceback (most recent call last):
        ...
        tests.instruments.streams.RaceError: aten.add.Tensor reads what another stream may not have written
    """

    def __init__(self) -> None:
        super().__init__()
        self.stack = [FakeStream()]
        self.given: Counter[FakeStream] = Counter()
        self._writes: dict[int, Moment] = {}  # by storage, the last
        self._reads: dict[int, list[Moment]] = defaultdict(list)
        self._alive: Counter[int] = Counter()  # tensors of a storage
        self._makers: dict[int, int] = {}
        self._freed: dict[int, list[Moment]] = defaultdict(list)  # by stream, what must be done before memory is reused

    def __enter__(self) -> "Streams":
        self._patches = mock.patch.multiple(torch.cuda, current_stream=self._current, stream=self.entered)
        self._patches.start()
        super().__enter__()
        return self

    def __exit__(self, exc_type: Any, exc_val: Any, exc_tb: Any) -> None:
        super().__exit__(exc_type, exc_val, exc_tb)
        self._patches.stop()

    def _current(self, device: torch.device | None = None) -> FakeStream:
        return self.stack[-1]

    @contextlib.contextmanager
    def entered(self, stream: FakeStream) -> Iterator[None]:
        self.stack.append(stream)
        try:
            yield
        finally:
            self.stack.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        stream = self.stack[-1]
        inputs = {key for key, _ in _storages(args, kwargs)}
        written = {key for key, _ in _storages(_written(func, args, kwargs))}
        for key in inputs:
            if not self._is_done(self._writes.get(key)):
                raise RaceError(f"{func} reads what another stream may not have written")
            if key in written and not all(map(self._is_done, self._reads[key])):
                raise RaceError(f"{func} writes what another stream may not have read")
        made = [(key, tensor) for key, tensor in _storages(out) if key not in inputs]
        if made and not all(map(self._is_done, self._freed.pop(id(stream), []))):
            raise RaceError(f"{func} may be given memory that another stream still reads")
        stream.known[id(stream)] += 1
        self.given[stream] += 1
        moment = id(stream), stream.known[id(stream)]
        for key in inputs:
            self._reads[key].append(moment)
        for key, _ in made:
            self._makers[key], self._reads[key] = id(stream), []
        for key in written | {key for key, _ in made}:
            self._writes[key] = moment
        for key, tensor in _storages(out):
            self._alive[key] += 1
            weakref.finalize(tensor, self._dropped, key)
        return out

    def _is_done(self, moment: Moment | None) -> bool:
        return moment is None or self.stack[-1].known[moment[0]] >= moment[1]

    def _dropped(self, key: int) -> None:
        self._alive[key] -= 1
        if not self._alive[key] and key in self._makers:
            moments = [*self._reads.pop(key, []), self._writes.pop(key)]
            self._freed[self._makers.pop(key)] += moments


def _storages(*values: Any) -> list[tuple[int, torch.Tensor]]:
    tensors = [value for value in torch.utils._pytree.tree_leaves(values) if isinstance(value, torch.Tensor)]
    return [(t.untyped_storage()._cdata, t) for t in tensors if t.layout == torch.strided]


def _written(func: Any, args: Any, kwargs: Any) -> list[Any]:
    """The arguments that an operation writes."""
    arguments = func._schema.arguments
    given = {argument.name: value for argument, value in zip(arguments, args, strict=False)} | kwargs
    return [
        given[argument.name]
        for argument in arguments
        if argument.alias_info is not None and argument.alias_info.is_write and argument.name in given
    ]
