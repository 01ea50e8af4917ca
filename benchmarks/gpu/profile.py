"""Says which GPU kernels the time of a goal goes to: `python -m benchmarks.gpu.profile E3 K4-b1 ...`.

It prints, for one call of ours, each kernel's launches and microseconds as the GPU's own counters saw them, the longest
first, and writes all of them to <output>/<goal>.json. Kernels of a CUDA graph are named one by one. What the kernels
leave of the call's time is gaps between them.
"""

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.case import Case
from benchmarks.gpu.run import BENCHMARKS, cases_of
from benchmarks.timing import choosing_convs, graph_of, in_turns

CALLS = 5  # that are profiled, after those that warm up


def kernels_of(case: Case, device: torch.device) -> dict[str, Any]:
    """Returns the median milliseconds of a call, and its kernels by name: launches, and microseconds in all."""
    with choosing_convs():
        built = case.build(device)
        for _ in range(6):  # a training step is captured at its fourth repeat
            built.ours()
        call = built.ours if built.uncaptured else graph_of(built.captured or built.ours)
        ms = in_turns({"ours": call}, device)["ours"]["median"]
        torch.cuda.synchronize(device)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            for _ in range(CALLS):
                call()
            torch.cuda.synchronize(device)
    launches: dict[str, int] = defaultdict(int)
    microseconds: dict[str, float] = defaultdict(float)
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            launches[event.name] += 1
            microseconds[event.name] += event.time_range.elapsed_us()
    names = sorted(launches, key=lambda name: -microseconds[name])
    kernels = {name: [launches[name] / CALLS, microseconds[name] / CALLS] for name in names}
    return {"case": case.name, "ms": ms, "kernels": kernels}


def main() -> int:
    """Runs the command, and returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("goals", nargs="+", help="of benchmarks.gpu.goals")
    parser.add_argument("--output", type=Path, required=True, help="the folder to write to")
    parser.add_argument("--most", type=int, default=25, help="how many kernels of a goal are printed")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("No CUDA GPU here, so there is nothing to profile.")
        return 2
    cases = {case.goal: case for case in cases_of(BENCHMARKS) if case.goal}
    if unknown := set(options.goals) - set(cases):
        parser.error(f"unknown goals: {', '.join(sorted(unknown))}")
    options.output.mkdir(parents=True, exist_ok=True)
    for goal in options.goals:
        found = kernels_of(cases[goal], torch.device("cuda", torch.cuda.current_device()))
        (options.output / f"{goal}.json").write_text(json.dumps(found, indent=1))
        busy = sum(us for _, us in found["kernels"].values())
        print(f"== {goal}: {found['ms']:.4f} ms a call, its kernels {busy / 1e3:.4f} ms", flush=True)
        for name, (count, us) in list(found["kernels"].items())[: options.most]:
            print(f"{us:10.1f} us {count:6.0f} x  {name[:150]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
