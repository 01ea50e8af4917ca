"""A model of an H200: how long a kernel takes.

A kernel takes as long as the slowest of memory, issue slots, special-function unit (MUFU) and its longest program, and
what a launch costs by itself:

    seconds = START + max(bytes / bandwidth, instructions / issue rate, MUFU / its rate, longest program * waves)

What a kernel has to do says `work.py`, and what the GPU can do `hardware.py`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.predict.hardware import (
    BANDWIDTH,
    CLOCK,
    CONV,
    GRAPH_GAP,
    ISSUE,
    MATMUL,
    MUFU,
    SMS,
    SORT,
    START,
    STREAM_GAP,
    held,
)
from benchmarks.predict.loss_work import LOSS_WORK
from benchmarks.predict.work import WORK, Scene, Work
from benchmarks.static.compiled import Row
from tests.instruments.fake_gpu import Launch, TorchOp

MODELS = WORK | LOSS_WORK
"""The work of a launch by its kernel."""


@dataclass(frozen=True)
class Step:
    """The time of one kernel, without the gap before it, and what bounds it."""

    name: str
    seconds: float
    bound: str


def kernel_step(launch: Launch, row: Row, scene: Scene) -> Step:
    """Returns the time of one of our kernels."""
    work = MODELS[row.kernel](launch, row, scene)
    return Step(row.kernel, *_slowest(bounds(work, row, math.prod(launch.grid))))


def bounds(work: Work, row: Row, programs: int) -> dict[str, float]:
    """Returns the seconds that each limit allows. Programs go to SMs as a whole, so the fullest SM counts."""
    fullest = math.ceil(programs / SMS) * SMS / programs
    at_once = SMS * held(row.registers, row.warps, row.shared)
    waves, usual = math.ceil(programs / at_once), work.longest if work.usual is None else work.usual
    return {
        "memory": work.bytes / BANDWIDTH,
        "issue": fullest * work.instructions * row.warps / ISSUE,
        "MUFU": fullest * work.mufu * row.warps / MUFU,
        "dependent chain": (work.longest + (waves - 1) * usual) / CLOCK,
    }


def torch_step(op: TorchOp) -> Step:
    """Returns the time of an operation of torch: by memory, and for convs by the tensor cores in waves of tiles. A sort
    goes over keys and int64 indices once for each byte of a key."""
    if op.name == "sort":
        numel = math.prod(op.shape)
        passes = (op.bytes - 8 * numel) // (2 * numel)
        moved = passes * (op.bytes + 8 * numel) / BANDWIDTH
        return Step(op.name, moved + (SORT + passes) * (START + GRAPH_GAP) - GRAPH_GAP, "launch")
    limits = {"memory": op.bytes / BANDWIDTH}
    if op.flop:
        batch, channels, *sides = op.shape
        work = op.flop / (batch * math.prod(sides) * channels)  # an output
        limits["tensor cores"] = min(
            work * SMS * rows * columns * _waves(batch * math.prod(sides), rows, channels, columns) / (share * MATMUL)
            for (rows, columns), share in CONV.items()
        )
    return Step(op.name, *_slowest(limits))


def _waves(height: int, rows: int, width: int, columns: int) -> int:
    return math.ceil(math.ceil(height / rows) * math.ceil(width / columns) / SMS)


def _slowest(limits: dict[str, float]) -> tuple[float, str]:
    bound = max(limits, key=lambda name: limits[name])
    return START + limits[bound], bound if limits[bound] > START else "launch"


def total(steps: Sequence[Step], graph: bool) -> float:
    """Returns the seconds of the kernels one after another, as a CUDA graph or launched one by one."""
    return sum(step.seconds + (GRAPH_GAP if graph else STREAM_GAP) for step in steps)
