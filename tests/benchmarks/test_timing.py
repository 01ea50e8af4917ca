"""How calls are timed and compared, on a stand-in of a GPU."""

import contextlib
import functools
import time
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from benchmarks import timing
from benchmarks.case import Built, Case, run_benchmark
from benchmarks.gpu import compare
from benchmarks.models import inference, training_step

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LIMITS = {"copy_gb_s": 1.0, "bf16_tflop_s": 1.0}


class Gpu:
    """Stands in for torch.cuda and notes what is asked of it. A call takes as many milliseconds as it notes."""

    def __init__(self, monkeypatch):
        self.noted: list[str] = []
        gpu = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = len(gpu.noted)

            def elapsed_time(self, end):
                return float(end.at - self.at)

        class Cold:
            def sum(self):
                gpu.noted.append("cold")

        class Graph:
            def replay(self):
                gpu.noted.append("replay")

        for name, stand_in in {
            "Event": Event,
            "CUDAGraph": Graph,
            "device": lambda device: contextlib.nullcontext(),
            "current_device": lambda: 0,
            "Stream": lambda device: SimpleNamespace(wait_stream=lambda other: None),
            "current_stream": lambda device: SimpleNamespace(wait_stream=lambda other: None),
            "stream": lambda stream: contextlib.nullcontext(),
            "graph": lambda graph, **how: contextlib.nullcontext(),
            "synchronize": lambda device: self.noted.append("wait"),
            "_sleep": lambda cycles: self.noted.append("sleep"),
            "reset_peak_memory_stats": lambda device: None,
            "memory_allocated": lambda device: 1_000_000,
            "max_memory_allocated": lambda device: 4_000_000,
        }.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)
        monkeypatch.setattr(timing, "beyond_l2", lambda device: Cold())


def test_on_a_gpu_calls_take_turns_behind_an_idle_kernel_and_find_nothing_in_the_cache(monkeypatch):
    cuda = Gpu(monkeypatch)
    times = timing.in_turns({name: functools.partial(cuda.noted.append, name) for name in "ab"}, CUDA, turns=5)
    waited_for = ["wait", "a", "wait", "wait", "b", "wait"]
    queued = ["cold", "sleep", "a", "cold", "sleep", "b", "wait"]
    assert cuda.noted == ["a"] * 3 + ["b"] * 3 + [*waited_for, *queued] * 3 + queued * 2
    assert times["a"]["median"] == times["b"]["min"] == 1  # the reading and the idling between them do not count


def test_the_gpu_idles_as_long_as_the_host_launches(monkeypatch):
    """A call of many short kernels, which the host takes 6 ms to launch, is all queued when the first one starts."""
    Gpu(monkeypatch)
    slept: list[int] = []
    monkeypatch.setattr(torch.cuda, "_sleep", slept.append)
    timing.in_turns({"launches": lambda: time.sleep(6e-3), "long": lambda: time.sleep(30e-3)}, CUDA, turns=1)
    assert slept[0] >= (6 + timing.SPARE_MS) * timing.CYCLES_A_MS
    assert slept[1] == timing.IDLE_MS * timing.CYCLES_A_MS


def test_on_a_cpu_slow_calls_have_three_turns_and_quick_ones_as_many_as_asked_for():
    for seconds, expected in ((0.0, 3), (60.0, 7)):
        calls: list[int] = []
        timing.in_turns({"it": functools.partial(calls.append, 1)}, CPU, turns=7, seconds=seconds)
        assert len(calls) == expected + 1  # and one to warm up


def test_on_a_gpu_ours_is_captured_too(monkeypatch):
    cuda = Gpu(monkeypatch)
    built = Built(lambda: cuda.noted.append("ours"), {"theirs": lambda: cuda.noted.append("theirs")}, lambda: None, 9)
    (record,), failures = compare.compare(Case("a", "float32", lambda device: built), CUDA, LIMITS)
    assert failures == []
    assert record.raw_ms["ours_graph"] == 1
    assert cuda.noted.count("replay") == 3 + 3 + 25
    assert (record.peak_mb, record.baseline_peak_mb) == (3, 3)
    monkeypatch.setattr(torch.cuda, "graph", mock.Mock(side_effect=ZeroDivisionError))
    (record,), (failed,) = compare.compare(Case("a", "float32", lambda device: built), CUDA, LIMITS)
    assert "ours_graph" not in record.raw_ms
    assert (failed.baseline, failed.error.split(":")[0]) == ("our graph", "ZeroDivisionError")


def test_the_peak_of_what_replays_is_that_of_its_uncaptured_work(monkeypatch):
    measured = []

    def peak_mb(call, device):
        measured.append(call())
        return 0.0

    monkeypatch.setattr(compare, "peak_mb", peak_mb)
    built = Built(lambda: "ours", {"theirs": lambda: "theirs"}, lambda: None, 1, uncaptured=lambda: "uncaptured")
    compare.compare(Case("a", "float32", lambda device: built), CPU, LIMITS)
    assert measured == ["uncaptured", "theirs"]


def test_cudnn_chooses_for_ours_and_for_the_baselines_alike():
    seen: dict[str, set[bool]] = {}

    def noting(name):
        return lambda: seen.setdefault(name, set()).add(torch.backends.cudnn.benchmark)

    def build(device):
        noting("build")()
        return Built(noting("ours"), {"theirs": noting("theirs")}, noting("check"), 1)

    compare.compare(Case("a", "float32", build), CPU, LIMITS)
    assert seen == {name: {True} for name in ("build", "check", "ours", "theirs")}
    assert not torch.backends.cudnn.benchmark


def test_what_was_compiled_for_one_case_is_forgotten_for_the_next(monkeypatch):
    noted = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: noted.append("reset"))

    def build(device):
        noted.append("build")
        return Built(lambda: None, {"theirs": lambda: None}, lambda: None, 1)

    for _ in range(2):
        compare.compare(Case("a", "float32", build), CPU, LIMITS)
    assert noted == ["reset", "build"] * 2


@pytest.mark.parametrize("module", [inference, training_step])
def test_the_compiled_baseline_has_a_static_batch(module, monkeypatch):
    """With dynamic shapes the second batch size would be compiled for any size, and be slower."""
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: compiled.append(options))
    setting = training_step.CPU_SETTING
    module._compiled(training_step.torchvision_copy(training_step.network(setting), setting))
    assert compiled == [{"dynamic": False}] * 3


def test_pytest_benchmark_is_told_what_was_measured(monkeypatch):
    monkeypatch.setattr("benchmarks.case._ceilings", lambda device: {"copy_gb_s": 2.0})
    benchmark = SimpleNamespace(extra_info={}, pedantic=lambda call, **_: call())
    built = Built(lambda: None, {"theirs": lambda: time.sleep(1e-3)}, lambda: None, min_bytes=10**6)
    setting = SimpleNamespace(name="a case", batch=4)
    run_benchmark(lambda setting, device: built, setting, "float32", "theirs", benchmark)
    assert benchmark.group == "a case, float32"
    info = benchmark.extra_info
    assert info["ms"] >= 1
    assert info["images_a_second"] == pytest.approx(4e3 / info["ms"])
    assert info["ceiling_fraction"] == pytest.approx(info["gb_s"] / 2)


def test_the_peak_on_a_cpu_is_that_of_what_lives_at_once():
    x = torch.zeros(1000, 250)

    def call():
        for _ in range(3):
            y = (x + 1) * 2
        return y

    assert timing.peak_mb(call, CPU) == pytest.approx(3, rel=0.01)  # the y before, a sum and a product
