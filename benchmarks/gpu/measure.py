"""How a case is timed, the same for every benchmark file."""

import functools
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu.records import Failure, Record

Call = Callable[[], Any]


@dataclass
class Built:
    """A case with its tensors made.

    Args:
        ours, baselines: what is timed; each call does the whole work and returns its result.
        check: raises AssertionError unless the results agree with the reference; runs before anything is timed.
        min_bytes: the least that any implementation must move, for the share of the copy bandwidth.
        uncaptured: where ``ours`` replays a graph of its own, the same work without it: its peak memory is measured,
            since a replay allocates nothing, and ``ours`` is not captured once more.
        captured: what is timed as a CUDA graph, where that is not ``ours`` itself: an upload within it would be
            repeated from host memory that is long in use for something else.
    """

    ours: Call
    baselines: dict[str, Call]
    check: Callable[[], None]
    min_bytes: int
    uncaptured: Call | None = None
    captured: Call | None = None


@dataclass
class Case:
    """One comparison. ``goal`` is set only where performance.md's goals name this very case, and on its small twin."""

    name: str
    dtype: str
    build: Callable[[torch.device], Built]
    goal: str | None = None


def ceilings(device: torch.device) -> dict[str, float]:
    """What no kernel exceeds: bytes read and written a second by a copy far larger than the caches, and the rate of a
    large product in bfloat16."""
    source = torch.empty(2**30 if device.type == "cuda" else 2**26, dtype=torch.uint8, device=device).zero_()
    target = torch.empty_like(source)
    n = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(n, n, dtype=torch.bfloat16, device=device) for _ in range(2))
    times = in_turns({"copy": lambda: target.copy_(source), "product": lambda: a @ b}, device)
    return {
        "copy_gb_s": 2 * source.nbytes / (times["copy"]["median"] * 1e6),
        "bf16_tflop_s": 2 * n**3 / (times["product"]["median"] * 1e9),
    }


def in_turns(
    calls: dict[str, Call], device: torch.device, rounds: int = 5, repeats: int = 5, seconds: float = 2
) -> dict[str, Any]:
    """Milliseconds of each call, by name: the median, the minimum, and the wall time of one call that is waited for.

    The calls take turns. On a GPU a turn is several calls, and the first two figures are the device's own time: the
    host first queues the turn behind an idle kernel, so what it takes to launch them does not show; the wall time says
    what it takes. Before each call as much memory is read as leaves nothing else in the L2 cache, as inputs that rotate
    would. On a CPU a turn is one call, and slow calls have fewer turns, but three at least, within so many seconds.
    """
    for call in calls.values():
        for _ in range(3 if device.type == "cuda" else 1):
            call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    walls: dict[str, list[float]] = {name: [] for name in calls}
    turn = 0
    while turn < (rounds if device.type == "cuda" else 3) or (
        device.type == "cpu" and turn < rounds * repeats and sum(map(sum, times.values())) < 1e3 * seconds
    ):
        for name, call in calls.items():
            synchronize(device)
            start = time.perf_counter()
            call()
            synchronize(device)
            walls[name].append((time.perf_counter() - start) * 1e3)
            times[name] += (
                _queued(call, device, repeats, walls[name][-1]) if device.type == "cuda" else walls[name][-1:]
            )
        turn += 1
    return {
        name: {"median": statistics.median(of), "min": min(of), "wall": statistics.median(walls[name])}
        for name, of in times.items()
    }


def _queued(call: Call, device: torch.device, repeats: int, wall: float) -> list[float]:
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    torch.cuda._sleep(int(min(wall * repeats, 100) * 2e6))  # cycles, at about 2 GHz
    for begin, end in marks:
        _beyond_l2(device).sum()
        begin.record()
        call()
        end.record()
    synchronize(device)
    return [begin.elapsed_time(end) for begin, end in marks]


@functools.cache
def _beyond_l2(device: torch.device) -> torch.Tensor:
    return torch.zeros(2**26, dtype=torch.int32, device=device)  # 256 MB; an H200's L2 holds 60


def graph_of(call: Call) -> Call:
    """The call as a CUDA graph, which also proves that it never waits for the host."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def peak_mb(call: Call, device: torch.device) -> float:
    """Megabytes (1e6 bytes) allocated at a call's peak, beyond what was there; 0 on a CPU, which keeps no count."""
    if device.type != "cuda":
        return 0.0
    synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 1e6


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def compare(case: Case, device: torch.device, limits: dict[str, float]) -> tuple[list[Record], list[Failure]]:
    """Checks the case, then times it and its baselines in turns. A baseline, or a capture, that fails is left out, and
    said."""
    built = case.build(device)
    built.check()
    failures, calls = [], {"ours": built.ours}
    others: dict[str, Callable[[], Call]] = {
        name: functools.partial(_tried, of) for name, of in built.baselines.items()
    }
    if device.type == "cuda" and built.uncaptured is None:
        others["our graph"] = functools.partial(graph_of, built.captured or built.ours)
    for name, ready in others.items():
        try:
            calls[name] = ready()
        except Exception as error:
            failures.append(Failure(case.goal, case.name, case.dtype, name, _said(error)))
    with FlopCounterMode(display=False) as counter:
        (built.uncaptured or built.ours)()
    times = in_turns(calls, device)
    ours, graph = times.pop("ours"), times.pop("our graph", None)
    raw = {f"ours_{name}": value for name, value in ours.items()}
    if graph is not None:
        raw["ours_graph"] = graph["median"]
    floor_ms = max(
        built.min_bytes / (limits["copy_gb_s"] * 1e6), counter.get_total_flops() / (limits["bf16_tflop_s"] * 1e9)
    )
    peak = peak_mb(built.uncaptured or built.ours, device)
    records = [
        Record(
            goal=case.goal,
            case=case.name,
            dtype=case.dtype,
            baseline=name,
            baseline_ms=theirs["median"],
            ours_ms=ours["median"],
            ratio=theirs["median"] / ours["median"],
            ceiling_fraction=floor_ms / ours["median"],
            peak_mb=peak,
            baseline_peak_mb=peak_mb(built.baselines[name], device),
            raw_ms=raw | {f"baseline_{key}": value for key, value in theirs.items()},
        )
        for name, theirs in times.items()
    ]
    return records, failures


def _tried(call: Call) -> Call:
    call()
    return call


def failure(case: Case, error: BaseException | str) -> Failure:
    return Failure(case.goal, case.name, case.dtype, None, error if isinstance(error, str) else _said(error))


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:2000]


_ceilings = functools.cache(ceilings)


def run_benchmark(
    build: Callable[[Any, torch.device], Built], setting: Any, dtype: str, implementation: str, benchmark: Any
) -> None:
    """A case under pytest-benchmark, on the GPU if there is one: checked, timed, and its bandwidth noted."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
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


def print_in_turns(built: Built, repetitions: int) -> None:
    """The medians of ours and of the one baseline on a CPU."""
    built.check()
    ((name, baseline),) = built.baselines.items()
    times = in_turns({name: baseline, "retina_fast": built.ours}, torch.device("cpu"), repetitions, 1, math.inf)
    slow, fast = (of["median"] for of in times.values())
    print(f"{torch.get_num_threads()} CPU threads, torch {torch.__version__}, medians of {repetitions} runs in turns")
    print(f"{name} {slow:.1f} ms, retina_fast {fast:.1f} ms, ratio {slow / fast:.2f}")
