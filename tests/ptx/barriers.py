"""Takes each barrier of each kernel out in turn and tells how that is seen: python -m tests.ptx.barriers [CASE ...].

A barrier is needed if its kernel then races, hangs or gives another result. Otherwise it is redundant on these inputs:
two accesses race wherever no barrier lies between them, in whatever order they ran, so between the barriers before and
after it no two warps touch the same bytes with at least one of them writing. Triton puts such barriers where its
analysis does not see that two accesses go to different bytes, or that a warp reads back only what it wrote itself.

The table has a row for each line of a kernel that has barriers, with all variants of the kernel together.
"""

import re
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import torch

from tests.ptx.cases import CASES, run_case
from tests.ptx.launch import Launch
from tests.ptx.machine import Options
from tests.ptx.memory import Buffer, Fault

_Contents = dict[Buffer, np.ndarray]

_BARRIER = re.compile(r"bar(?:rier)?\.sync\s+0;")
_ORDERS = (Options(), *(Options(seed=seed, shuffle=True) for seed in (1, 2, 3, 4)))
_UNDECIDED = ("redundant", "never reached")


def without_barrier(ptx: str, number: int) -> str:
    """The kernel without one of its barriers, counted from 0 as they stand in the text."""
    first, last = [found.span() for found in _BARRIER.finditer(ptx)][number]
    return ptx[:first] + ptx[last:]


def places_of_barriers(ptx: str) -> list[str]:
    """Of each barrier as they stand in the text: the line of the project's code that it comes from, as "file.py:9".

    Where that is a call of Triton's library, such as a sum, it is the line of the call.
    """
    files = re.findall(r'\.file\s+(\d+)\s+"([^"]+)"', ptx)
    own = {number: Path(path).name for number, path in files if "triton/language" not in path}
    place, found = "", []
    for line in ptx.splitlines():
        if re.match(r"\s*\.loc\s", line):
            lines = re.findall(r"(?:\.loc|inlined_at)\s+(\d+)\s+(\d+)", line)
            place = next((f"{own[file]}:{n}" for file, n in lines if file in own and n != "0"), place)
        found += [place] * len(_BARRIER.findall(line))
    return found


class Study:
    """Called with each launch, runs it without each barrier whose need no launch before has shown.

    ``seen_as`` holds, by kernel and number of the barrier: "race", "hang", "other result", "redundant" or
    "never reached". A kernel is its PTX, so a name may have several.
    """

    def __init__(self) -> None:
        self.seen_as: dict[tuple[str, int], str] = {}

    def __call__(self, launch: Launch) -> None:
        keys = [(launch.ptx, number) for number in range(len(_BARRIER.findall(launch.ptx)))]
        open_ones = [key for key in keys if self.seen_as.setdefault(key, "never reached") in _UNDECIDED]
        if not open_ones:
            return
        before = launch.memory.contents()
        passed = launch.run(launch.ptx, _ORDERS[0]).passed
        expected = launch.memory.contents()
        for key in open_ones:
            if key[1] in passed:
                self.seen_as[key] = self._look_at(launch, key[1], before, expected)
        _restore(before)

    def _look_at(self, launch: Launch, number: int, before: _Contents, expected: _Contents) -> str:
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

    def table(self) -> dict[tuple[str, str], Counter[str]]:
        """How often each verdict was given, by kernel and line."""
        found: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
        for ptx in {ptx: None for ptx, _ in self.seen_as}:
            name = re.findall(r"\.entry\s+(\w+)", ptx)[0]
            for number, place in enumerate(places_of_barriers(ptx)):
                found[name, place][self.seen_as[ptx, number]] += 1
        return found


def _restore(contents: _Contents) -> None:
    for buffer, data in contents.items():
        buffer.data[:] = data


def main() -> None:
    torch.set_num_threads(1)
    study = Study()
    for name, case in CASES.items():
        if not sys.argv[1:] or any(part in name for part in sys.argv[1:]):
            run_case(case, before=study)
            print(f"{name}: {len(study.seen_as)} barriers so far", file=sys.stderr, flush=True)
    columns = sorted({*study.seen_as.values()})
    print("| kernel | line |", " | ".join(columns), "|\n|---|---|" + "---|" * len(columns))
    total: Counter[str] = Counter()
    for (kernel, place), counts in sorted(study.table().items()):
        total += counts
        print(f"| {kernel} | {place} |", " | ".join(str(counts[column]) for column in columns), "|")
    print("| all | |", " | ".join(str(total[column]) for column in columns), "|")


if __name__ == "__main__":
    main()
