"""One case measured: checked, then timed beside its baselines."""

import functools
from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.case import Case
from benchmarks.gpu.records import Failure, Record
from benchmarks.timing import Call, choosing_convs, graph_of, in_turns, peak_mb


def compare(case: Case, device: torch.device, limits: dict[str, float]) -> tuple[list[Record], list[Failure]]:
    """Checks a case, then times it and its baselines in turns.

    What torch.compile remembers of earlier cases is dropped first, or it would compile for a batch of any size. A
    baseline that fails is left out and becomes a failure, and so is a capture.

    Args:
        case: the case.
        device: where it runs.
        limits: what :func:`benchmarks.timing.ceilings` returns.

    Raises:
        AssertionError: from the case's check.
    """
    torch.compiler.reset()
    with choosing_convs():
        return _compare(case, device, limits)


def _compare(case: Case, device: torch.device, limits: dict[str, float]) -> tuple[list[Record], list[Failure]]:
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
    """Returns the failure of a whole case."""
    return Failure(case.goal, case.name, case.dtype, None, error if isinstance(error, str) else _said(error))


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:2000]
