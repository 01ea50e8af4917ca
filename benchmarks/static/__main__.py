"""Prints what the compiler makes of every kernel: `python -m benchmarks.static [target ...]`.

Without targets all of sm_80, sm_90, sm_100 and gfx942 are compiled for. The exit status is 1 if a compilation fails.
"""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence

from benchmarks.static.compiled import TARGETS, Row, compile_cases
from tests.instruments.kernel_calls import KERNEL_CALLS
from tests.ptx import counts


def table(rows: Sequence[Row]) -> str:
    """Returns the rows as lines of text."""
    lines = [
        f"{'case':32} {'kernel':26} {'target':7} {'registers':>9} {'spilled':>7} {'shared':>6} {'code':>5} "
        f"{'instr/el':>8} {'MUFU/el':>7} {'load':>4} {'store':>5}"
    ]
    for row in rows:
        per = [f"{value:.2f}" if value is not None else "" for value in (row.instructions, row.mufu)]
        lines.append(
            f"{row.case:32} {row.kernel:26} {row.target:7} {row.registers:9} {row.spilled:7} {row.shared:6} "
            f"{row.code:5} {per[0]:>8} {per[1]:>7} {row.load_bits:4} {row.store_bits:5}  {row.error}"
        )
    return "\n".join(lines)


def main() -> int:
    import triton

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", help=f"among {', '.join(TARGETS)}; all by default")
    parser.add_argument("--case", action="append", help="only these of tests.instruments.kernel_calls")
    parser.add_argument("--read", action="append", help="read the instructions of these kernels alone")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="how many compile at once")
    parser.add_argument("--json", action="store_true", help="print the rows as one line of JSON")
    parser.add_argument("--executed", action="store_true", help="also what an emulator executes of the sm_90 code")
    arguments = parser.parse_args()
    if unknown := (set(arguments.targets) - set(TARGETS)) | (set(arguments.case or ()) - set(KERNEL_CALLS)):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    cases, targets = arguments.case or KERNEL_CALLS, arguments.targets or TARGETS
    rows = compile_cases(cases, targets, arguments.processes, arguments.read)
    if arguments.json:
        print(json.dumps([dataclasses.asdict(row) for row in rows]))
        return 0
    print(f"triton {triton.__version__}\n{table(rows)}")
    if arguments.executed:
        print("\nExecuted on a CPU, PTX for sm_90, an element (see tests/ptx/counts.py):")
        for line in counts.table():
            print(line, flush=True)
    return int(any(row.error for row in rows))


if __name__ == "__main__":
    sys.exit(main())
