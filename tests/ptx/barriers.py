"""Takes each barrier of each kernel out in turn and tells how that is seen: python -m tests.ptx.barriers [CASE ...].

A barrier is needed if its kernel then races, hangs or gives another result. Otherwise it is redundant on these inputs:
two accesses race wherever no barrier lies between them, in whatever order they ran, so between the barriers before and
after it no two warps touch the same bytes with at least one of them writing.
"""

import re
import sys
from collections import Counter, defaultdict

import numpy as np
import torch

from tests.ptx.cases import CASES, run_case
from tests.ptx.launch import Launch
from tests.ptx.machine import Options
from tests.ptx.memory import Buffer, Fault
from tests.ptx.program import Unsupported

_Contents = dict[Buffer, np.ndarray]

_BARRIER = re.compile(r"bar(?:rier)?\.sync\s+0;")
_ORDERS = (Options(), Options(seed=1, shuffle=True), Options(seed=2, shuffle=True))
_UNDECIDED = ("redundant", "never reached")


def without_barrier(ptx: str, number: int, instead: str = "") -> str:
    """The kernel without one of its barriers, counted from 0 as they stand in the text."""
    first, last = [found.span() for found in _BARRIER.finditer(ptx)][number]
    return ptx[:first] + instead + ptx[last:]


class Study:
    """Called with each launch, runs it without each barrier whose need no launch before has shown.

    ``seen_as`` holds, by kernel and number of the barrier: "race", "hang", "other result", "redundant" or
    "never reached". A kernel is its PTX, so a name may have several.
    """

    def __init__(self) -> None:
        self.seen_as: dict[tuple[str, int], str] = {}

    def __call__(self, launch: Launch) -> None:
        keys = [(launch.ptx, number) for number in range(len(_BARRIER.findall(launch.ptx)))]
        open_ones = [key for key in keys if self.seen_as.get(key, "never reached") in _UNDECIDED]
        if not open_ones:
            return
        before = launch.memory.contents()
        launch.run(launch.ptx, _ORDERS[0])
        expected = launch.memory.contents()
        for key in open_ones:
            seen_as = self._look_at(launch, key[1], before, expected)
            if seen_as != "never reached" or key not in self.seen_as:
                self.seen_as[key] = seen_as
        _restore(before)

    def _look_at(self, launch: Launch, number: int, before: _Contents, expected: _Contents) -> str:
        _restore(before)
        try:
            launch.run(without_barrier(launch.ptx, number, "brkpt;"), _ORDERS[0])
        except Unsupported:  # which a block raises when it is entered
            pass
        else:
            return "never reached"
        for options in _ORDERS:
            _restore(before)
            try:
                launch.run(without_barrier(launch.ptx, number), options)
            except Fault as fault:
                return "race" if "race" in str(fault) else "hang" if "wait" in str(fault) else str(fault)
            same = all(np.array_equal(buffer.data, data) for buffer, data in expected.items())
            if not same and options == _ORDERS[0]:  # other orders may give another result with all barriers
                return "other result"
        return "redundant"


def _restore(contents: _Contents) -> None:
    for buffer, data in contents.items():
        buffer.data[:] = data


def main() -> None:
    torch.set_num_threads(1)
    study = Study()
    for name, case in CASES.items():
        if not sys.argv[1:] or any(part in name for part in sys.argv[1:]):
            run_case(case, before=study)
    table: dict[str, Counter[str]] = defaultdict(Counter)
    undecided: Counter[str] = Counter()
    for (ptx, number), seen_as in study.seen_as.items():
        name = re.findall(r"\.entry\s+(\w+)", ptx)[0]
        table[name][seen_as] += 1
        if seen_as in _UNDECIDED:
            place = without_barrier(ptx, number, "BARRIER").partition("BARRIER")[0].rfind("// ")
            undecided[f"{seen_as}: {name}, {ptx[place + 3 :].partition(chr(10))[0]}"] += 1
    columns = sorted({*study.seen_as.values()})
    print("| kernel |", " | ".join(columns), "|\n|---|" + "---|" * len(columns))
    for kernel, counts in sorted(table.items()):
        print(f"| {kernel} |", " | ".join(str(counts[column]) for column in columns), "|")
    for line, count in undecided.items():
        print(f"{line} ({count})")


if __name__ == "__main__":
    main()
