"""How calls are timed, the same way for every benchmark."""

import contextlib
import functools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate
from typing import Any

import torch

from retina_fast.cuda_graph import CaptureStream

Call = Callable[[], Any]

WARM_UP = 3  # calls on a GPU before the first is timed
SPARE_MS = 1  # that the GPU idles longer than the host needs, in case the host is slower once
IDLE_MS = 20  # the longest that the GPU idles before a call; slower calls do not wait for their launches
CYCLES_A_MS = 2e6  # of an H200's or H100's clock


def in_turns(calls: Mapping[str, Call], device: torch.device, turns: int = 25, seconds: float = 2) -> dict[str, Any]:
    """Times several calls, which take turns, and returns their milliseconds.

    A turn is one call of each, so that a clock that changes under load changes for all of them. On a GPU the time is
    the device's own, between two events. Before each call an idle kernel occupies the GPU for as long as the host took
    to launch the call and wait for it. So the call's kernels are queued when they start, and the host's launches do not
    show, unless the call itself waits for the GPU. Before that, enough memory is read to empty the L2 cache.

    Args:
        calls: what to time, by name.
        device: where it runs.
        turns: how many there are. On a CPU slow calls have fewer, but at least three, within `seconds`.
        seconds: how long all turns on a CPU may take.

    Returns:
        For each name the `median` and `min` of its turns, and `wall`, the median time of a call that is waited for.
    """
    on_gpu = device.type == "cuda"
    for call in calls.values():
        for _ in range(WARM_UP if on_gpu else 1):
            call()
    walls: dict[str, list[float]] = {name: [] for name in calls}
    times: dict[str, list[float]] = {name: [] for name in calls} if on_gpu else walls
    for turn in range(turns):
        if not on_gpu and turn >= 3 and sum(map(sum, walls.values())) >= 1e3 * seconds:
            break
        for name, call in calls.items():
            if not on_gpu or turn < WARM_UP:
                walls[name].append(_wall_ms(call, device))
        if on_gpu:
            for name, ms in _queued(calls, {name: max(of) for name, of in walls.items()}, device).items():
                times[name].append(ms)
    return {
        name: {"median": statistics.median(of), "min": min(of), "wall": statistics.median(walls[name])}
        for name, of in times.items()
    }


def _wall_ms(call: Call, device: torch.device) -> float:
    """Returns the milliseconds of a call that is waited for."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return (time.perf_counter() - start) * 1e3


def _queued(calls: Mapping[str, Call], walls: Mapping[str, float], device: torch.device) -> dict[str, float]:
    """Returns the device's milliseconds of one call each, whose launches take the host no longer than `walls`."""
    marks = {name: [torch.cuda.Event(enable_timing=True) for _ in range(2)] for name in calls}
    for name, call in calls.items():
        beyond_l2(device).sum()
        torch.cuda._sleep(int(min(walls[name] + SPARE_MS, IDLE_MS) * CYCLES_A_MS))
        marks[name][0].record()
        call()
        marks[name][1].record()
    synchronize(device)
    return {name: begin.elapsed_time(end) for name, (begin, end) in marks.items()}


@functools.cache
def beyond_l2(device: torch.device) -> torch.Tensor:
    """Returns 256 MB of memory; an H200's L2 cache holds 60."""
    return torch.zeros(2**26, dtype=torch.int32, device=device)


@contextlib.contextmanager
def choosing_convs() -> Iterator[None]:
    """Has cuDNN time its algorithms and keep the fastest, for ours and for the baselines alike."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def ceilings(device: torch.device) -> dict[str, float]:
    """Measures what no kernel exceeds.

    Returns:
        `copy_gb_s`, the bytes that a copy far larger than the caches reads and writes in a second, and `bf16_tflop_s`,
        the rate of a large product in bfloat16.
    """
    source = torch.empty(2**30 if device.type == "cuda" else 2**26, dtype=torch.uint8, device=device).zero_()
    target = torch.empty_like(source)
    n = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(n, n, dtype=torch.bfloat16, device=device) for _ in range(2))
    times = in_turns({"copy": lambda: target.copy_(source), "product": lambda: a @ b}, device)
    return {
        "copy_gb_s": 2 * source.nbytes / (times["copy"]["median"] * 1e6),
        "bf16_tflop_s": 2 * n**3 / (times["product"]["median"] * 1e9),
    }


def graph_of(call: Call) -> Call:
    """Returns the replay of a call captured as a CUDA graph, which also proves that it never waits for the GPU."""
    stream = CaptureStream(torch.device("cuda", torch.cuda.current_device()))
    for _ in range(WARM_UP):
        stream.run(call)
    return stream.capture(call)[0].replay


def peak_mb(call: Call, device: torch.device) -> float:
    """Returns the megabytes (1e6 bytes) that a call allocates at its peak; on a CPU those of torch's allocator, as its
    profiler counts them."""
    if device.type != "cuda":
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            call()
        events = profile.profiler.kineto_results.events()
        changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
        return max(accumulate((size for _, size in changes), initial=0)) / 1e6
    synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 1e6


def synchronize(device: torch.device) -> None:
    """Waits for a GPU; on a CPU there is nothing to wait for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
