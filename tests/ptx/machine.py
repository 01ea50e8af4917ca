"""Runs a launch: several CTAs at a time, each thread with its own place in the program.

A step takes threads that wait at one block, which ``schedule`` chooses, and runs it for them. A block with a warp-wide
instruction runs for whole warps only. Where nothing runs, barriers open; where none opens, that is a hang.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

from tests.ptx.accesses import GlobalMemory, LocalMemory, SharedMemory
from tests.ptx.clocks import Clocks
from tests.ptx.code import Code
from tests.ptx.emit_memory import space_of
from tests.ptx.matrices import AsyncCopies
from tests.ptx.memory import Fault, Memory
from tests.ptx.program import Block
from tests.ptx.scalars import Scalars
from tests.ptx.schedule import Schedule
from tests.ptx.traffic import Result, Traffic
from tests.ptx.warps import Warps
from tests.ptx.writer import PARAM_BASE

Array = Any

MAX_STEPS = 10_000_000  # of one group of CTAs; a program that takes more does not end


@dataclass(frozen=True)
class Options:
    """How a launch runs.

    Args:
        seed: chooses the order of the CTAs, of lanes that store to one address, and of atomics; 0 is their own order.
        shuffle: whether warps run in random order, and some are held at random accesses (see schedule).
        perturb: approximate functions are moved by up to so many times their documented error.
        together: CTAs that run at once.
        count: whether instructions and memory traffic are counted, which takes time.
    """

    seed: int = 0
    shuffle: bool = False
    perturb: float = 0
    together: int = 16
    count: bool = False


class Machine:
    """The threads that run, as arrays of one entry a thread; it is the ``X`` of the functions of ``code``.

    Args:
        params: the kernel's parameters, numpy scalars.
        shared: bytes of shared memory of a CTA.
    """

    def __init__(self, code: Code, memory: Memory, params: Sequence[Any], grid: tuple[int, int, int], shared: int,
                 options: Options) -> None:  # fmt: skip
        self.code, self.program, self.memory, self.params = code, code.program, memory, params
        self.options, self.perturb = options, options.perturb
        self.random = np.random.default_rng(options.seed)
        self.warps_per_cta = self.program.threads // 32
        self.result = Result(self.program.name, int(np.prod(grid)), self.program.threads)
        self.global_memory, self.warps = GlobalMemory(self), Warps(self)
        self._grid, self._shared = grid, shared
        self.clocks = Clocks(self.result.ctas, self.warps_per_cta)
        barriers = [block.number for block in self.program.blocks if block.barrier]
        self._barrier_numbers = {block: number for number, block in enumerate(barriers)}
        self._traffic: dict[int, Traffic] = {}
        for param, (name, size) in zip(params, self.program.params, strict=True):
            if param.nbytes != size:
                raise TypeError(f"parameter {name} has {size} bytes, got {param.nbytes}")

    def run(self) -> Result:
        """Runs all CTAs.

        Raises:
            Fault: on the first access or wait that would be undefined, crash or hang on a GPU.
        """
        ctas = self.random.permutation(self.result.ctas) if self.options.seed else np.arange(self.result.ctas)
        self.memory.begin_launch()
        with np.errstate(all="ignore"):
            for first in range(0, len(ctas), self.options.together):
                self._start(ctas[first : first + self.options.together])
                self._run_group()
        for number, traffic in self._traffic.items():
            i = self.code.sites[number]
            self.result.traffic[f"{space_of(i)} {i.name} {i.source} {i.text}"] = traffic
        return self.result

    def _start(self, ctas: np.ndarray) -> None:
        """The threads of these CTAs at the beginning; registers hold what nobody wrote."""
        threads, number = self.program.threads, len(ctas)
        self.count = number * threads
        self.zero = np.zeros(self.count, np.uint32)
        self.tid = np.tile(np.arange(threads, dtype=np.uint32), number)
        self.ntid = np.full(self.count, threads, np.uint32)
        self.laneid, self.warpid = self.tid & np.uint32(31), self.tid >> np.uint32(5)
        self.local_cta = np.repeat(np.arange(number), threads)
        x, y, _ = self._grid
        cta = np.repeat(ctas, threads)
        self.ctaid = [place.astype(np.uint32) for place in (cta % x, cta // x % y, cta // (x * y))]
        self.nctaid = [np.full(self.count, n, np.uint32) for n in self._grid]
        self.warp = (cta * self.warps_per_cta + self.warpid + 1).astype(np.int32)  # counted over all CTAs
        self.epoch = np.zeros(self.count, np.int32)
        self.shared_memory = SharedMemory(self, number, self._shared)
        self.local_memory, self.async_copies = LocalMemory(self), AsyncCopies(self)
        self.scalars = Scalars(self)
        garbage = {1: 0xEF, 2: 0xBEEF, 4: 0xDEADBEEF, 8: 0xDEADBEEFDEADBEEF}
        unwritten: dict[str, Array] = {}  # one for all registers of a type: a write makes a new array
        self._registers: list[Array] = [None] * len(self.program.registers)
        for index, kind in self.program.registers.values():
            if kind not in unwritten:
                value = np.bool_(False) if kind == "b1" else np.dtype(kind).type(garbage[int(kind[1])])
                unwritten[kind] = np.full(self.count, value)
                unwritten[kind].setflags(write=False)
            self._registers[index] = unwritten[kind]

    def _run_group(self) -> None:
        schedule = Schedule(self.program, self.count // self.program.threads, self.random, self.options.shuffle)
        for _ in range(MAX_STEPS):
            if schedule.ended:
                return
            chosen = schedule.choose()
            if chosen is None:
                self._open_barriers(schedule)
                continue
            block, mask = chosen
            schedule.leave(block.number, mask)
            everybody = bool(mask.all())
            went = self.code.function(block, not everybody)(self, self._registers, None if everybody else mask)
            if self.options.count:
                self._count_block(block, mask)
            if isinstance(went, int):
                schedule.arrive(went, mask)
            elif len(went) == 3:
                schedule.arrive(went[1], went[0] & mask)
                schedule.arrive(went[2], ~went[0] & mask)
            else:
                index, targets = went
                if (mask & (index >= len(targets))).any():
                    raise Fault(f"{self.program.name}: brx.idx beyond its table")
                for n, target in enumerate(targets):
                    schedule.arrive(target, mask & (index == n))
        raise Fault(f"{self.program.name} does not end")

    def _open_barriers(self, schedule: Schedule) -> None:
        for number, mask in schedule.open_barriers():
            rows = mask.reshape(-1, self.program.threads)
            latest = self.epoch.reshape(rows.shape).max(1, keepdims=True)
            self.epoch = np.where(rows, latest + 1, self.epoch.reshape(rows.shape)).ravel()
            self.result.barriers += int(rows.any(1).sum())
            for first in np.nonzero(rows.any(1))[0] * self.program.threads:
                self.clocks.meet((int(self.warp[first]) - 1) // self.warps_per_cta + 1)
            self.result.passed.add(self._barrier_numbers[number])
            if self.options.count:
                self._count_block(self.program.blocks[number], mask)

    def _count_block(self, block: Block, mask: np.ndarray) -> None:
        warps = int(mask.reshape(-1, 32).any(1).sum())
        self.result.warp_instructions += warps * len(block.instructions)
        self.result.thread_instructions += int(mask.sum()) * len(block.instructions)
        for i in block.instructions:
            self.result.opcodes[i.opcode] += warps

    # What the functions and the accesses call.

    def traffic_of(self, site: int) -> Traffic:
        return self._traffic.setdefault(site, Traffic())

    def any_order(self, count: int) -> Array:
        """An index of the lanes of one access, in the order in which they take their turns."""
        return self.random.permutation(count) if self.options.seed else slice(None)

    def fault(self, what: str, site: int, lane: int) -> NoReturn:
        i = self.code.sites[site]
        place = tuple(int(axis[lane]) for axis in self.ctaid)
        raise Fault(f"{self.program.name}: {what}, thread {self.tid[lane]} of CTA {place}, {i.source}: {i.text}")

    def full(self, value: Any) -> np.ndarray:
        return value if np.ndim(value) else np.full(self.count, value)

    def param(self, number: int, offset: int, width: int) -> np.ndarray:
        data = self.params[number].tobytes()[offset : offset + width]
        return np.full(self.count, np.frombuffer(data, f"u{width}")[0])

    def param_at(self, address: np.ndarray, offset: int, width: int, mask: np.ndarray | None) -> np.ndarray:
        """The parameter at a computed address, as of a tuple that a kernel indexes."""
        index = (address - np.uint64(PARAM_BASE)).astype(np.int64) // 8
        outside = (index < 0) | (index >= len(self.params))
        if offset or (outside if mask is None else outside & mask).any():
            raise Fault(f"{self.program.name}: a parameter beyond the last")
        table = np.array([np.frombuffer(p.tobytes().ljust(8, b"\0"), np.uint64)[0] for p in self.params])
        return table[np.where(outside, 0, index)].astype(f"u{width}")
