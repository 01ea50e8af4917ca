"""Prints whether each kernel, compiled, gives what its reference gives: python -m tests.ptx.table [CASE ...] [--all].

CASE selects the cases whose names contain it. With --all, every case also runs in other orders and for sm_80. A cell
gives the seconds of processor time that it took, compilation included where no case before has compiled the kernel.
"""

import argparse
from collections import Counter
from typing import Any

import torch
import triton

from tests.ptx.cases import CASES, OTHER_ORDERS, run_case


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("cases", nargs="*")
    parser.add_argument("--all", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    orders: dict[str, dict[str, Any]] = {"sm_90": {}, **(OTHER_ORDERS if arguments.all else {})}
    total, runs, wrong = 0.0, 0, 0
    notes, failures = Counter[str](), []
    print(f"| case | launches | error, of its limit | {' | '.join(orders)} |\n|" + "---|" * (3 + len(orders)))
    for name, case in CASES.items():
        if arguments.cases and not any(part in name for part in arguments.cases):
            continue
        cells, worst, launches = [], 0.0, 0
        for order, options in orders.items():
            outcome = run_case(case, **options)
            launches = len(outcome.log.results)
            total, runs, wrong = total + outcome.seconds, runs + 1, wrong + bool(outcome.failures)
            for result in outcome.log.results:
                notes.update({f"{result.name}: {note}": times for note, times in result.notes.items()})
            worst = max([worst, *(c.error / c.limit if c.limit else c.error for c in outcome.comparisons)])
            failures += [f"{name}, {order}: {failure}" for failure in outcome.failures]
            cells.append(f"{'WRONG' if outcome.failures else 'equal'}, {outcome.seconds:.1f}")
        print("|", " | ".join([name, str(launches), f"{worst:.2f}", *cells]), "|", flush=True)
    print(f"\n{runs - wrong} of {runs} equal, {total:.0f} seconds, Triton {triton.__version__}", *failures, sep="\n")
    print("\nOf note, with the number of times:", *(f"{times} {note}" for note, times in notes.items()), sep="\n")
    raise SystemExit(bool(failures))


if __name__ == "__main__":
    main()
