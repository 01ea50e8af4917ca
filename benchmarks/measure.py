"""How a case is timed and what a record of it holds, the same for every benchmark file."""

import datetime
import functools
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


@dataclass
class Built:
    """A case with its tensors made.

    Args:
        ours, baselines: what is timed; each call does the whole work and returns its result.
        check: raises AssertionError unless the results agree with the reference; runs before anything is timed.
        min_bytes: the least that any implementation must move, for the share of the copy bandwidth.
        uncaptured: where ``ours`` replays a graph of its own, the same work without it: its peak memory is measured,
            since a replay allocates nothing, and ``ours`` is not captured once more.
    """

    ours: Callable[[], Any]
    baselines: dict[str, Callable[[], Any]]
    check: Callable[[], None]
    min_bytes: int
    uncaptured: Callable[[], Any] | None = None


@dataclass
class Case:
    """One comparison. ``goal`` is set only where performance.md's goals name this very case."""

    name: str
    dtype: str
    build: Callable[[torch.device], Built]
    goal: str | None = None


@dataclass
class Record:
    goal: str | None
    case: str
    dtype: str
    baseline: str
    baseline_ms: float
    ours_ms: float
    ratio: float
    ceiling_fraction: float
    peak_mb: float
    baseline_peak_mb: float
    raw_ms: dict[str, float]

    @property
    def key(self) -> tuple[str, str, str]:
        return self.case, self.dtype, self.baseline


class Results:
    """A file of records, written after each one so that a run that is cut short can be taken up again.

    Records of another commit, device or version of torch or triton are dropped: every ratio in a file comes from one
    state of the code on one machine.
    """

    SAME = ("device", "driver", "torch", "triton", "torchvision", "commit", "dirty")

    def __init__(self, path: Path, environment: dict[str, Any]) -> None:
        self.path, self.environment = path, environment
        self.records: list[Record] = []
        if path.exists():
            stored = json.loads(path.read_text())
            if all(stored["environment"].get(key) == environment[key] for key in self.SAME):
                self.records = [Record(**record) for record in stored["records"]]

    def add(self, records: list[Record]) -> None:
        new = {record.key for record in records}
        self.records = [record for record in self.records if record.key not in new] + records
        goals = [(record.goal, record.baseline) for record in self.records if record.goal]
        assert len(goals) == len(set(goals)), f"a goal is claimed twice: {goals}"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        stored = {"environment": self.environment, "records": [asdict(record) for record in self.records]}
        partial.write_text(json.dumps(stored, indent=1) + "\n")
        partial.replace(self.path)


def environment(device: torch.device, commit: str | None = None) -> dict[str, Any]:
    """What a figure depends on, with the two ceilings measured now. ``commit`` is for a copy without its .git."""

    def git(*arguments: str) -> str | None:
        try:
            return subprocess.check_output(["git", *arguments], cwd=ROOT, text=True, stderr=subprocess.DEVNULL).strip()
        except (OSError, subprocess.CalledProcessError):
            return None

    import triton

    changes = git("status", "--porcelain", "--", ".", ":!benchmarks/results")
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "driver": _driver(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "torchvision": torchvision.__version__,
        "commit": git("rev-parse", "HEAD") or commit,
        "dirty": None if changes is None else bool(changes),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "copy_gb_s": float(f"{copy_gb_s(device):.4g}"),
        "bf16_tflop_s": float(f"{bf16_tflop_s(device):.4g}"),
    }


def _driver() -> str | None:
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.check_output(query, text=True).splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def copy_gb_s(device: torch.device) -> float:
    """Bytes read and written a second by a copy far larger than the caches."""
    source = torch.empty(2**30 if device.type == "cuda" else 2**26, dtype=torch.uint8, device=device).zero_()
    target = torch.empty_like(source)
    return 2 * source.nbytes / (call_ms(lambda: target.copy_(source), device)["median"] * 1e6)


def bf16_tflop_s(device: torch.device) -> float:
    n = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(n, n, dtype=torch.bfloat16, device=device) for _ in range(2))
    return 2 * n**3 / (call_ms(lambda: a @ b, device)["median"] * 1e9)


def call_ms(call: Callable[[], Any], device: torch.device, repeats: int = 20) -> dict[str, float]:
    """Milliseconds of a call: the median, the minimum, and the wall time of one call that is waited for.

    On a GPU the first two are the device's own time. The host first queues all calls behind an idle kernel, so what it
    takes to launch them does not show; the wall time says what it takes.
    """
    for _ in range(3):
        call()
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    wall = (time.perf_counter() - start) * 1e3
    if device.type == "cuda":
        marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        torch.cuda._sleep(int(min(wall * repeats, 100) * 2e6))  # cycles, at about 2 GHz
        for begin, end in marks:
            begin.record()
            call()
            end.record()
        synchronize(device)
        times = [begin.elapsed_time(end) for begin, end in marks]
    else:
        times = []
        while len(times) < 3 or (len(times) < repeats and sum(times) < 2000):
            start = time.perf_counter()
            call()
            times.append((time.perf_counter() - start) * 1e3)
    return {"median": statistics.median(times), "min": min(times), "wall": wall}


def graph_ms(call: Callable[[], Any], device: torch.device) -> float:
    """Median milliseconds of the call replayed as a CUDA graph, which also proves that it never waits for the host."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return call_ms(graph.replay, device)["median"]


def peak_mb(call: Callable[[], Any], device: torch.device) -> float:
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


def compare(case: Case, device: torch.device, ceiling_gb_s: float) -> list[Record]:
    """Checks the case, then times it against each of its baselines."""
    built = case.build(device)
    built.check()
    ours = call_ms(built.ours, device)
    raw = {f"ours_{name}": value for name, value in ours.items()}
    if device.type == "cuda" and built.uncaptured is None:
        raw["ours_graph"] = graph_ms(built.ours, device)
    peak = peak_mb(built.uncaptured or built.ours, device)
    records = []
    for name, baseline in built.baselines.items():
        theirs = call_ms(baseline, device)
        records.append(
            Record(
                goal=case.goal,
                case=case.name,
                dtype=case.dtype,
                baseline=name,
                baseline_ms=theirs["median"],
                ours_ms=ours["median"],
                ratio=theirs["median"] / ours["median"],
                ceiling_fraction=built.min_bytes / (ours["median"] * 1e6) / ceiling_gb_s,
                peak_mb=peak,
                baseline_peak_mb=peak_mb(baseline, device),
                raw_ms=raw | {f"baseline_{key}": value for key, value in theirs.items()},
            )
        )
    return records


@functools.cache
def _ceiling(device: torch.device) -> float:
    return copy_gb_s(device)


def run_benchmark(
    build: Callable[[Any, torch.device], Built], setting: Any, dtype: str, implementation: str, benchmark: Any
) -> None:
    """A case under pytest-benchmark, on the GPU if there is one: checked, timed, and its bandwidth noted."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    built = build(setting, device)
    built.check()
    call = built.ours if implementation == "ours" else built.baselines[implementation]
    times = call_ms(call, device)
    gb_s = built.min_bytes / (times["median"] * 1e6)
    benchmark.group = f"{setting.name}, {dtype}"
    benchmark.extra_info.update(
        ms=times["median"], gb_s=gb_s, ceiling_fraction=gb_s / _ceiling(device), peak_mb=peak_mb(call, device)
    )

    def waited_for() -> None:
        call()
        synchronize(device)

    benchmark.pedantic(waited_for, rounds=5, warmup_rounds=1)
