"""Prints whether each kernel, compiled, gives what its reference gives: python -m tests.ptx.table [CASE ...] [--all].

CASE selects the cases whose names contain it. With --all, every case also runs in other orders and for sm_80.
"""

import argparse
from collections import Counter
from typing import Any

import torch

from tests.ptx.cases import CASES, OTHER_ORDERS, run_case


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("cases", nargs="*")
    parser.add_argument("--all", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    orders: dict[str, dict[str, Any]] = {"sm_90": {}, **(OTHER_ORDERS if arguments.all else {})}
    total, notes = 0.0, Counter[str]()
    print("| case | order | equal | largest error, of its limit | launches | seconds |\n|---|---|---|---|---|---|")
    for name, case in CASES.items():
        if arguments.cases and not any(part in name for part in arguments.cases):
            continue
        for order, options in orders.items():
            outcome = run_case(case, **options)
            total += outcome.seconds
            for result in outcome.log.results:
                notes.update({f"{result.name}: {note}": times for note, times in result.notes.items()})
            worst = max((c.error / c.limit if c.limit else c.error for c in outcome.comparisons), default=0.0)
            verdict = "no: " + "; ".join(outcome.failures) if outcome.failures else "yes"
            row = name, order, verdict, f"{worst:.2f}", str(len(outcome.log.results)), f"{outcome.seconds:.1f}"
            print("|", " | ".join(row), "|", flush=True)
    print(f"\n{total:.0f} seconds in all. Of note, with the number of times:")
    print(*(f"{times} {note}" for note, times in notes.items()), sep="\n")


if __name__ == "__main__":
    main()
