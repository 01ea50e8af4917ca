"""Says whether everything is right on the GPU here: `make gpu-test`, or `python -m benchmarks.gpu.bring_up [step ...]`.

    tests       the test files of kernels, models, losses, captured step and engine, on cuda, several at a time
    checks      every case of `make gpu` at small shapes, against its reference
    memcheck    the kernels' checks under compute-sanitizer, if it is found: accesses out of bounds
    racecheck   the same for races in shared memory

Every step runs, whatever the ones before have found, and the last lines say which failed. A test that hangs fails, and
the others go on. Nothing is timed.
"""

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import time

import torch

from benchmarks.gpu.records import ROOT
from benchmarks.gpu.run import BENCHMARKS

_WHOLE = (
    *("losses", "loss_choices", "training_step", "step_on_gpu", "fused_training", "frozen_norm", "detections", "model"),
    *("engine", "engine_as_module", "engine_shapes", "tuned_engine"),
)
_KERNELS = [name for name in BENCHMARKS if name not in ("models.inference", "models.training_step", "models.spinenet")]
# torch asks for pointers' attributes and the like, and expects errors: those of the API are no faults of a kernel
_SANITIZER = ["--error-exitcode", "9", "--report-api-errors", "no"]
_PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "benchmarks.gpu.hung_tests", "-m", "not slow"]
_PYTEST += ["-k", "not test_compiled"]  # those emulate a GPU
_CHECKS = [sys.executable, "-m", "benchmarks.gpu", "--small", "--checks"]


def tested_files() -> list[str]:
    """Returns the test files of the kernels, and of what the kernels add up to."""
    tests = ROOT / "tests"
    whole = [path for name in _WHOLE for path in tests.glob(f"*/test_{name}.py")]
    return [str(path.relative_to(ROOT)) for path in (*sorted(tests.glob("kernels/test_*.py")), *whole)]


def steps(sanitizer: str | None) -> dict[str, list[str]]:
    """Returns the command of each step. Without compute-sanitizer the steps that need it are left out."""
    in_parallel = ["-n", "8", "--dist", "worksteal"] if importlib.util.find_spec("xdist") else []
    found = {
        "tests": [*_PYTEST, *in_parallel, *tested_files()],
        "checks": [*_CHECKS],
    }
    if sanitizer is not None:
        for tool in ("memcheck", "racecheck"):
            found[tool] = [sanitizer, "--tool", tool, *_SANITIZER, *_CHECKS, *_KERNELS]
    return found


def run(command: list[str], minutes: float) -> str:
    """Runs a step and returns how it went, in words."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    if "pytest" in command:
        environment["OMP_NUM_THREADS"] = "1"  # threads of several processes wait for each other
    else:
        environment["TORCH_COMPILE_DISABLE"] = "1"  # of the checks' baselines
    if "--tool" in command:
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # or a tensor's neighbours would be in bounds
    try:
        code = subprocess.run(command, cwd=ROOT, env=environment, timeout=60 * minutes).returncode
    except subprocess.TimeoutExpired:
        return f"not done after {minutes:.0f} minutes"
    return "right" if code == 0 else f"failed ({code})"


def main(arguments: list[str] | None = None) -> int:
    """Runs the command, and returns its exit status."""
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    commands = steps(sanitizer)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", nargs="*", help=f"among {', '.join(steps(''))}; all by default")
    parser.add_argument("--minutes", type=float, default=9.0, help="for all steps together")
    options = parser.parse_args(arguments)
    if unknown := set(options.steps) - set(steps("")):
        parser.error(f"unknown steps: {', '.join(sorted(unknown))}")
    if not torch.cuda.is_available():
        print("No CUDA GPU here: `make test` runs the same tests with the kernels interpreted.")
        return 2
    end = time.monotonic() + 60 * options.minutes
    outcomes = {}
    for name in options.steps or steps(""):
        left = max(0.1, (end - time.monotonic()) / 60)
        print(f"== {name}", flush=True)
        outcomes[name] = run(commands[name], left) if name in commands else "left out: no compute-sanitizer here"
    print("\n".join(f"{name:10} {outcome}" for name, outcome in outcomes.items()))
    return int(any(outcome.startswith(("failed", "not done")) for outcome in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
