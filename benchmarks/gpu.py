"""The kernels tested, then timed, on the GPU at hand: ``python -m benchmarks.gpu [part ...]``, or ``make gpu``.

Writes benchmarks/results/<gpu>.json after each case. A run that is cut short, or stops at its time limit, is taken up
again by the same command, part by part if asked for; records of another commit or machine are dropped. Runs from an
uninstalled checkout with torch, triton, torchvision, pytest and pytest-benchmark.
"""

import argparse
import importlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import torch

from benchmarks.measure import RESULTS, ROOT, Case, Results, compare, environment

# modules of this folder with a list CASES, in the order they run
BENCHMARKS = (
    "focal_loss",
    "anchor_matching",
    "loss_path",
    "box_loss",
    "image_batch",
    "group_norm_relu",
    "training_step",
    "postprocess",
    "batched_nms",
    "model",
    "spinenet",
)


def kernel_tests() -> list[str]:
    """The test files that mirror a kernel, and those of the loss path, the captured step and the engine."""
    names = [*sorted(path.stem for path in (ROOT / "kernels").glob("*.py")), "training", "training_step", "engine"]
    return [f"tests/test_{name}.py" for name in names if (ROOT / "tests" / f"test_{name}.py").exists()]


def run_cases(cases: Iterable[Case], results: Results, device: torch.device, deadline: float) -> list[Case]:
    """Measures what the results lack, goals first, until the deadline; returns what is left."""
    left = []
    for case in sorted(cases, key=lambda case: case.goal is None):
        done = [record for record in results.records if (record.case, record.dtype) == (case.name, case.dtype)]
        if done:
            continue
        if time.monotonic() > deadline:
            left.append(case)
            continue
        records = compare(case, device, results.environment["copy_gb_s"])
        results.add(records)
        for record in records:
            print(
                f"{record.goal or '':8} {record.case}, {record.dtype}: {record.ours_ms:.3f} ms, {record.ratio:.1f}x "
                f"{record.baseline}, {record.ceiling_fraction:.0%} of the copy bandwidth",
                flush=True,
            )
    return left


def file_name(device_name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-") + ".json"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"among tests, {', '.join(BENCHMARKS)}; all by default")
    parser.add_argument("--minutes", type=float, default=7.5, help="start no case after this long")
    parser.add_argument("--output", type=Path, default=RESULTS, help="the folder of the result file")
    parser.add_argument("--commit", help="what is measured, where the checkout lacks its .git")
    arguments = parser.parse_args()
    parts = arguments.parts or ["tests", *BENCHMARKS]
    if unknown := set(parts) - {"tests", *BENCHMARKS}:
        parser.error(f"unknown parts: {', '.join(sorted(unknown))}")
    deadline = time.monotonic() + 60 * arguments.minutes
    if not torch.cuda.is_available():
        print("No CUDA GPU here, so there is nothing to measure. `make test` runs the kernels interpreted on a CPU,")
        print("`python -m benchmarks.static` compiles them for GPUs that are not there.")
        return 2

    if "tests" in parts:
        environ = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        tests = subprocess.run([sys.executable, "-m", "pytest", "-q", *kernel_tests()], cwd=ROOT, env=environ)
        if tests.returncode:
            print("The kernel tests fail on this GPU: nothing is timed.")
            return 1
    device = torch.device("cuda", torch.cuda.current_device())
    benchmarks = [name for name in BENCHMARKS if name in parts]
    if not benchmarks:
        return 0
    here = environment(device, arguments.commit)
    print(", ".join(f"{key} {value}" for key, value in here.items()))
    results = Results(arguments.output / file_name(here["device"]), here)
    cases = [case for name in benchmarks for case in importlib.import_module(f"benchmarks.{name}").CASES]
    left = run_cases(cases, results, device, deadline)
    print(f"{len(results.records)} records in {results.path}")
    if left:
        print(f"Time is up with {len(left)} cases left: run `python -m benchmarks.gpu {' '.join(benchmarks)}` again.")
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
