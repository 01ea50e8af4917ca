"""Measures every goal on the GPU at hand: `python -m benchmarks.gpu [part ...]`, or `make gpu`.

It writes <gpu>.json after each case, the goals first. A case that fails, hangs or ends the process is written down as a
failure, and the rest goes on. A run that is cut short, or stops at its time limit, is taken up again by the same
command, part by part if asked for; then failures are tried again, and records of another commit or machine are dropped.
It runs from an uninstalled checkout that has torch, triton and torchvision. --small does the same at sizes that a CPU
can bear, which is how it is tested, and claims nothing. --checks compares results with their references and times
nothing.
"""

import argparse
import faulthandler
import gc
import importlib
import re
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import torch

from benchmarks.case import Case
from benchmarks.gpu.compare import compare, failure
from benchmarks.gpu.records import RESULTS, ROOT, Results, environment
from benchmarks.timing import ceilings, choosing_convs, synchronize

# the modules that have CASES and SMALL, in the order they run; those that compile most come last
BENCHMARKS = (
    "kernels.focal_loss",
    "kernels.anchor_matching",
    "models.loss_path",
    "kernels.postprocess",
    "kernels.batched_nms",
    "kernels.image_batch",
    "kernels.atss_matching",
    "kernels.task_aligned_matching",
    "kernels.soft_focal_loss",
    "kernels.box_loss",
    "kernels.box_quality",
    "kernels.distribution_loss",
    "kernels.group_norm_relu",
    "kernels.conv_epilogue",
    "kernels.fused_conv",
    "kernels.stem_conv",
    "kernels.max_pool_relu",
    "kernels.conv_pointwise",
    "kernels.conv_chain",
    "kernels.first_channels",
    "kernels.sigmoid_focal_loss",
    "kernels.candidate_selection",
    "kernels.box_decode",
    "kernels.take_kept",
    "kernels.soft_nms",
    "kernels.box_voting",
    "kernels.greedy_nmm",
    "kernels.key_sort",
    "models.inference",
    "models.training_step",
    "models.spinenet",
)
TIME_IS_UP, FAILURES = 3, 4
GRACE = 120  # seconds that the last case may take beyond the time limit
MOST_DEATHS = 5  # of processes that measure


def cases_of(parts: Iterable[str], small: bool = False) -> list[Case]:
    """Returns the cases of these parts, those with a goal first."""
    modules = [importlib.import_module(f"benchmarks.{name}") for name in parts]
    cases = [case for module in modules for case in (module.SMALL if small else module.CASES)]
    return sorted(cases, key=lambda case: case.goal is None)


def run_cases(cases: Iterable[Case], results: Results, device: torch.device, deadline: float) -> list[Case]:
    """Measures the cases that the results lack, until the deadline, and returns those that are left.

    Raises:
        RuntimeError: if a case has left the device unusable.
    """
    left = []
    for case in cases:
        if results.knows(case.name, case.dtype):
            continue
        now = time.monotonic()
        if now > deadline:
            left.append(case)
            continue
        results.add([], [failure(case, "the process ended")])  # which stays if it does
        faulthandler.dump_traceback_later(min(case.seconds, deadline - now + GRACE), exit=True)
        try:
            results.add(*compare(case, device, results.environment))
            gc.collect()  # graphs and tensors of the case, before the next one makes its own
        except Exception as error:
            results.add([], [failure(case, error)])
            synchronize(device)
        finally:
            faulthandler.cancel_dump_traceback_later()
        report(results, case)
    return left


def report(results: Results, case: Case) -> None:
    """Prints what is known of a case."""
    for record in results.records:
        if (record.case, record.dtype) == (case.name, case.dtype):
            print(
                f"{record.goal or '':8} {record.case}, {record.dtype}: {record.ours_ms:.3f} ms, {record.ratio:.1f}x "
                f"{record.baseline}, {record.ceiling_fraction:.0%} of the limit",
                flush=True,
            )
    for failed in results.failures:
        if (failed.case, failed.dtype) == (case.name, case.dtype):
            print(f"FAILED   {failed.case}, {failed.dtype}, {failed.baseline or 'ours'}: {failed.error}", flush=True)


def file_name(device_name: str, small: bool = False) -> str:
    """Returns the name of a device's file of records."""
    return "small-" * small + re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-") + ".json"


def measure(arguments: argparse.Namespace, device: torch.device, deadline: float) -> int:
    """Measures in this process, which a case may end, and returns its exit status."""
    here = environment(device, ceilings(device), arguments.commit, arguments.small)
    print(", ".join(f"{key} {value}" for key, value in here.items()), flush=True)
    if here["dirty"]:
        print("The checkout has uncommitted changes: what is measured now is no record for README.md.")
    name = file_name(here["device"], arguments.small)
    results = Results(arguments.output / name, here, earlier=RESULTS / name)
    if not arguments.worker:
        results.failures = []
    results.write()
    left = run_cases(cases_of(arguments.parts, arguments.small), results, device, deadline)
    print(f"{len(results.records)} records and {len(results.failures)} failures in {results.path}")
    if left:
        print(f"Time is up with {len(left)} cases left: run the same command again.")
        return TIME_IS_UP
    return FAILURES if results.failures else 0


def check(cases: Iterable[Case], device: torch.device) -> int:
    """Checks every case, whatever comes of the others, and returns the exit status.

    Raises:
        RuntimeError: if a case has left the device unusable, since no check after it could be right.
    """
    wrong = []
    for case in cases:
        name = f"{case.name}, {case.dtype}"
        torch.compiler.reset()
        try:
            with choosing_convs():
                case.build(device).check()
            synchronize(device)
            print(f"right: {name}", flush=True)
        except Exception as error:
            wrong.append(name)
            print(f"WRONG: {name}: {failure(case, error).error}", flush=True)
            synchronize(device)
    print("\n".join(["all right"] if not wrong else [f"{len(wrong)} wrong:", *wrong]))
    return FAILURES if wrong else 0


def main() -> int:
    """Runs the command, and returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=list(BENCHMARKS), help=f"among {', '.join(BENCHMARKS)}; or all")
    parser.add_argument("--minutes", type=float, default=7.5, help="start no case after this long, and end 2 later")
    parser.add_argument("--output", type=Path, default=RESULTS, help="the folder of the result file")
    parser.add_argument("--commit", help="what is measured, where the checkout lacks its .git")
    parser.add_argument("--small", action="store_true", help="small shapes, on a CPU where there is no GPU")
    parser.add_argument("--checks", action="store_true", help="compare results with their references, time nothing")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)  # how many processes have died before this one
    arguments = parser.parse_args()
    if unknown := set(arguments.parts) - set(BENCHMARKS):
        parser.error(f"unknown parts: {', '.join(sorted(unknown))}")
    if not torch.cuda.is_available() and not arguments.small:
        print("No CUDA GPU here, so there is nothing to measure. `make test` runs the kernels interpreted on a CPU,")
        print("`python -m benchmarks.static` compiles them for GPUs that are not there, and --small does what would be")
        print("measured at small sizes.")
        return 2
    if arguments.checks:
        return check(cases_of(arguments.parts, arguments.small), _device())
    deadline = time.monotonic() + 60 * arguments.minutes
    if arguments.worker is not None:
        return measure(arguments, _device(), deadline)
    for deaths in range(MOST_DEATHS):
        options = f"--minutes={(deadline - time.monotonic()) / 60}", f"--worker={deaths}"
        code = subprocess.call([sys.executable, "-m", "benchmarks.gpu", *sys.argv[1:], *options], cwd=ROOT)
        if code in (0, TIME_IS_UP, FAILURES):
            break
        print(f"The process that measures has died ({code}); another one goes on after the case it was at.", flush=True)
    return code


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


if __name__ == "__main__":
    sys.exit(main())
