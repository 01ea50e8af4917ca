"""Parts of a network that do not depend on each other, side by side on a GPU.

At a small batch most convs of a pyramid and its heads are too small to occupy a GPU, and each waits for the one before.
A branch runs on a stream of its own: it starts when the current stream has done what it was given so far (fork), and
the current stream waits for it when its result is needed (join). A capture records these dependencies in its graph.

Memory that the allocator gave out on one stream goes back to that stream, and is given out on it again without waiting
for what other streams have yet to do. That is right here, since

- what a branch reads is held until the join, after which the current stream has waited for its last read;
- what a branch makes may be read by the current stream after the join. Its memory can only be given out again to a
  branch of the same stream, which starts by waiting for all that the current stream was given until then.
"""

from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from retina_fast.heads import HEAD_PARTS, LevelNormTower, head_runs_by_level, level_outputs, run_head

STREAMS = 10
"""On how many streams a graph with branches runs: one for each of two heads at five levels."""
MOST_PIXELS = 2**25
"""Of a batch that branches may serve. In larger ones convs leave little of a GPU idle, and branches take memory."""

Result = TypeVar("Result")
Join = Callable[[], Result]

_active: ContextVar["Branches | None"] = ContextVar("branches", default=None)


class Branches:
    """Runs trunk and heads as :func:`retina_fast.forward.run_convs` does, with branches on side streams.

    What convs prepare at their first call, such as padded weights, must be there: one stream must have run them before.

    Args:
        streams: the side streams; they belong to the model's device.
    """

    def __init__(self, streams: Sequence[Any]) -> None:
        self._streams, self._next = list(streams), 0

    def __call__(self, model: Any, pixels: Tensor) -> tuple[list[Tensor], Mapping[str, Any]]:
        self._next = 0
        token = _active.set(self)
        try:
            features = model.backbone(pixels)
        finally:
            _active.reset(token)
        levels = [features] if isinstance(features, Tensor) else list(features.values())
        if not head_runs_by_level(model.head):
            return levels, run_head(model.head, levels)
        return levels, self._heads(model.head, levels)

    def start_next(self, work: Callable[[], Result]) -> Join[Result]:
        """Start work on the streams in turn."""
        self._next += 1
        return self.start(work, self._streams[(self._next - 1) % len(self._streams)])

    def start(self, work: Callable[[], Result], stream: Any) -> Join[Result]:
        """Start work on a side stream, and return what waits for it and gives its result."""
        current = torch.cuda.current_stream(stream.device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            result = work()

        def join(work: object = work) -> Result:  # which holds what the branch reads
            torch.cuda.current_stream(stream.device).wait_stream(stream)
            return result

        return join

    def _heads(self, head: Any, levels: list[Tensor]) -> dict[str, list[Tensor]]:
        """The outputs of both heads, dealt to the streams, of which the current is one: level by level, or head by head
        where a tower takes all levels at once."""
        parts = {name: getattr(head, part) for name, part in HEAD_PARTS.items()}
        together = any(isinstance(part.conv, LevelNormTower) for part in parts.values())
        groups = [[*range(len(levels))]] if together else [[i] for i in range(len(levels))]
        works = [(name, group) for group in groups for name in parts]
        outputs: dict[str, list[Any]] = {name: [None] * len(levels) for name in parts}

        def run(dealt: list[tuple[str, list[int]]]) -> None:
            for name, part in parts.items():
                chosen = [i for other, group in dealt if other == name for i in group]
                results = level_outputs(part, [levels[i] for i in chosen]) if chosen else []
                for i, result in zip(chosen, results, strict=True):
                    outputs[name][i] = result

        sides = self._streams[: len(works) - 1]
        lanes = len(sides) + 1
        joins = [self.start(partial(run, works[lane::lanes]), side) for lane, side in enumerate(sides, 1)]
        run(works[::lanes])
        for join in joins:
            join()
        return outputs


def branch(work: Callable[[], Result]) -> Join[Result]:
    """Start a part of a trunk on a side stream where :class:`Branches` runs it; else it is done at once.

    Example::

        >>> branch(lambda: "done")()
        'done'
    """
    branches = None if torch.compiler.is_compiling() else _active.get()
    if branches is not None:
        return branches.start_next(work)
    result = work()
    return lambda: result
