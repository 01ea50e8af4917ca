"""What a benchmark is made of: a case, and what it builds to be timed."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.timing import Call, ceilings, choosing_convs, in_turns, peak_mb, synchronize

SECONDS, COMPILED_SECONDS = 240, 600  # that a case may take; torch.compile needs minutes for a whole model


@dataclass
class Built:
    """A case with its tensors made.

    Args:
        ours, baselines: what is timed. Each call does the whole work and returns its result.
        check: raises AssertionError unless the results agree with the reference. It runs before anything is timed.
        min_bytes: the least that any implementation must move, from which the share of the copy bandwidth follows.
        uncaptured: the same work as `ours` without a CUDA graph, where `ours` replays a graph of its own. Its peak
            memory is measured, since a replay allocates nothing, and `ours` is not captured once more.
        captured: what is timed as a CUDA graph, where that is not `ours` itself: an upload within a graph would be
            repeated from host memory that has long been reused.
    """

    ours: Call
    baselines: dict[str, Call]
    check: Callable[[], None]
    min_bytes: int
    uncaptured: Call | None = None
    captured: Call | None = None


@dataclass
class Case:
    """One comparison.

    Args:
        name, dtype: identify it in a record.
        build: makes the tensors on a device.
        goal: the name of the goal in `benchmarks.gpu.goals` that this case decides; its small twin has it, too.
        seconds: how long the case may take before it counts as hung.
    """

    name: str
    dtype: str
    build: Callable[[torch.device], Built]
    goal: str | None = None
    seconds: float = SECONDS


def run_benchmark(
    build: Callable[[Any, torch.device], Built], setting: Any, dtype: str, implementation: str, benchmark: Any
) -> None:
    """Runs a case under pytest-benchmark: checks it, times it, and notes its bandwidth and peak memory.

    Args:
        build: makes the case of a setting, on the GPU if there is one.
        setting: has a `name` and a `batch`.
        dtype: names the group of results together with the setting.
        implementation: "ours" or the name of a baseline.
        benchmark: pytest-benchmark's fixture.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with choosing_convs():
        built = build(setting, device)
        built.check()
        call = built.ours if implementation == "ours" else built.baselines[implementation]
        ms = in_turns({"it": call}, device)["it"]["median"]
        gb_s = built.min_bytes / (ms * 1e6)
        benchmark.group = f"{setting.name}, {dtype}"
        benchmark.extra_info.update(
            ms=ms,
            images_a_second=1e3 * setting.batch / ms,
            gb_s=gb_s,
            ceiling_fraction=gb_s / _ceilings(device)["copy_gb_s"],
            peak_mb=peak_mb((built.uncaptured if implementation == "ours" else None) or call, device),
        )

        def waited_for() -> None:
            call()
            synchronize(device)

        benchmark.pedantic(waited_for, rounds=5, warmup_rounds=1)


_ceilings = functools.cache(ceilings)


def print_in_turns(built: Built, repetitions: int) -> None:
    """Prints the medians of ours and of the one baseline on a CPU."""
    built.check()
    ((name, baseline),) = built.baselines.items()
    times = in_turns({name: baseline, "retina_fast": built.ours}, torch.device("cpu"), repetitions, math.inf)
    slow, fast = (of["median"] for of in times.values())
    print(f"{torch.get_num_threads()} CPU threads, torch {torch.__version__}, medians of {repetitions} runs in turns")
    print(f"{name} {slow:.1f} ms, retina_fast {fast:.1f} ms, ratio {slow / fast:.2f}")
