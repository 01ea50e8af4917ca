"""Takes each barrier of each kernel out in turn and tells how that is seen: python -m tests.ptx.barriers [CASE ...].

A barrier is needed if its kernel then races, hangs or gives another result. Otherwise it is redundant on these inputs:
two accesses race wherever no barrier lies between them, in whatever order they ran, so between the barriers before and
after it no two warps touch the same bytes with at least one of them writing.
"""

import re
import sys
from collections import Counter, defaultdict
from typing import NamedTuple

import numpy as np
import torch

from tests.ptx.cases import CASES, run_case
from tests.ptx.launch import Launch
from tests.ptx.machine import Options
from tests.ptx.memory import Fault

_BARRIER = re.compile(r"bar(?:rier)?\.sync\s+0;")
_ORDERS = (Options(), Options(seed=1, shuffle=True), Options(seed=2, shuffle=True))


def without_barrier(ptx: str, number: int) -> str:
    """The kernel without one of its barriers, counted from 0 as they stand in the text."""
    first, last = [found.span() for found in _BARRIER.finditer(ptx)][number]
    return ptx[:first] + ptx[last:]


class Removal(NamedTuple):
    """What became of a kernel without one barrier: "race", "hang", "other result" or "redundant"."""

    kernel: str
    number: int
    seen_as: str


class Study:
    """Called with each launch, looks at those kernels that it has not seen."""

    def __init__(self) -> None:
        self.removals: list[Removal] = []
        self._seen: set[str] = set()

    def __call__(self, launch: Launch) -> None:
        count = len(_BARRIER.findall(launch.ptx))
        if launch.ptx in self._seen or not count:
            return
        self._seen.add(launch.ptx)
        before = launch.memory.contents()
        expected = self._run(launch, launch.ptx, _ORDERS[0])
        name = re.search(r"\.entry\s+(\w+)", launch.ptx)
        for number in range(count):
            seen_as = "redundant"
            for options in _ORDERS:
                self._restore(before)
                seen_as = self._seen_as(launch, without_barrier(launch.ptx, number), options, expected)
                if seen_as != "redundant":
                    break
            self.removals.append(Removal(name[1] if name else "?", number, seen_as))
        self._restore(before)

    def _run(self, launch: Launch, ptx: str, options: Options) -> dict:
        launch.run(ptx, options)
        return launch.memory.contents()

    def _restore(self, contents: dict) -> None:
        for buffer, data in contents.items():
            buffer.data[:] = data

    def _seen_as(self, launch: Launch, ptx: str, options: Options, expected: dict) -> str:
        try:
            after = self._run(launch, ptx, options)
        except Fault as fault:
            return "race" if "race" in str(fault) else "hang" if "wait" in str(fault) else str(fault)
        same_order = options == _ORDERS[0]
        same = all(np.array_equal(data, after[buffer]) for buffer, data in expected.items())
        return "redundant" if same or not same_order else "other result"


def main() -> None:
    torch.set_num_threads(1)
    study = Study()
    for name, case in CASES.items():
        if not sys.argv[1:] or any(part in name for part in sys.argv[1:]):
            run_case(case, before=study)
    table: dict[str, Counter[str]] = defaultdict(Counter)
    for removal in study.removals:
        table[removal.kernel][removal.seen_as] += 1
    columns = sorted({removal.seen_as for removal in study.removals})
    print("| kernel |", " | ".join(columns), "|\n|---|" + "---|" * len(columns))
    for kernel, counts in sorted(table.items()):
        print(f"| {kernel} |", " | ".join(str(counts[column]) for column in columns), "|")
    for removal in study.removals:
        if removal.seen_as == "redundant":
            print(f"redundant: barrier {removal.number} of {removal.kernel}")


if __name__ == "__main__":
    main()
