"""What ``make gpu`` writes, and that its cases compute what they time, on a machine without a GPU."""

import contextlib
import dataclasses
import functools
import importlib
import json
import math
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from benchmarks.gpu import bring_up, goals, measure
from benchmarks.gpu import run as gpu
from benchmarks.gpu.measure import Built, Case, ceilings
from benchmarks.gpu.records import ROOT, Results, environment
from benchmarks.kernels import focal_loss, image_batch
from benchmarks.models import postprocess, spinenet, training_step
from retina_fast.kernels.compiler import INTERPRETED

ENVIRONMENT_KEYS = "device driver torch triton torchvision commit dirty small date copy_gb_s bf16_tflop_s"
RECORD_KEYS = "goal case dtype baseline baseline_ms ours_ms ratio ceiling_fraction peak_mb baseline_peak_mb raw_ms"
CPU = torch.device("cpu")
LIMITS = {"copy_gb_s": 1.0, "bf16_tflop_s": 1.0}


def stub(name, goal=None, wrong=False, calls=None):
    def build(device):
        def check():
            assert not wrong

        def call():
            if calls is not None:
                calls.append(name)

        return Built(call, {"torchvision eager": lambda: time.sleep(1e-3), "torch.compile": lambda: None}, check, 10)

    return Case(name, "float32", build, goal)


@pytest.fixture(scope="module")
def here():
    return environment(CPU, ceilings(CPU))


def test_a_file_has_exactly_the_agreed_fields(here, tmp_path):
    results = Results(tmp_path / "gpu.json", here)
    left = gpu.run_cases([stub("a", "K1-fp32"), stub("b")], results, CPU, math.inf)
    stored = json.loads((tmp_path / "gpu.json").read_text())
    assert left == []
    assert set(stored) == {"environment", "records", "failures"}
    assert stored["failures"] == []
    assert set(stored["environment"]) == set(ENVIRONMENT_KEYS.split())
    assert here["copy_gb_s"] > 0
    assert here["bf16_tflop_s"] > 0
    assert [(record["goal"], record["case"], record["baseline"]) for record in stored["records"]] == [
        ("K1-fp32", "a", "torchvision eager"),
        ("K1-fp32", "a", "torch.compile"),
        (None, "b", "torchvision eager"),
        (None, "b", "torch.compile"),
    ]
    for record in stored["records"]:
        assert set(record) == set(RECORD_KEYS.split())
        assert record["ratio"] == pytest.approx(record["baseline_ms"] / record["ours_ms"])
        assert all(isinstance(value, float) for value in record["raw_ms"].values())


def test_a_run_is_taken_up_again(here, tmp_path):
    calls: list[str] = []
    cases = [stub("a", calls=calls), stub("b", "K1-bf16", calls=calls), stub("c", calls=calls)]
    results = Results(tmp_path / "gpu.json", here)
    assert gpu.run_cases(cases, results, CPU, deadline=time.monotonic() - 1) == cases
    assert gpu.run_cases(cases[:2], results, CPU, math.inf) == []
    calls.clear()
    again = Results(tmp_path / "gpu.json", here)
    assert gpu.run_cases(cases, again, CPU, math.inf) == []
    assert set(calls) == {"c"}
    assert len(again.records) == 6
    other_commit = Results(tmp_path / "gpu.json", here | {"commit": "another"})
    assert other_commit.records == []


def test_what_is_wrong_is_written_down_and_the_rest_goes_on(here, tmp_path):
    results = Results(tmp_path / "gpu.json", here)
    assert gpu.run_cases([stub("a", "K1-fp32", wrong=True), stub("b")], results, CPU, math.inf) == []
    (failed,) = json.loads(results.path.read_text())["failures"]
    assert (failed["goal"], failed["case"], failed["baseline"]) == ("K1-fp32", "a", None)
    assert failed["error"].startswith("AssertionError")
    assert {record.case for record in results.records} == {"b"}


def test_a_baseline_that_fails_takes_nothing_with_it(here, tmp_path):
    def build(device):
        return Built(lambda: None, {"theirs": lambda: None, "broken": lambda: 1 // 0}, lambda: None, 1)

    results = Results(tmp_path / "gpu.json", here)
    gpu.run_cases([Case("a", "float32", build)], results, CPU, math.inf)
    assert [record.baseline for record in results.records] == ["theirs"]
    assert [(failed.baseline, failed.error.split(":")[0]) for failed in results.failures] == [
        ("broken", "ZeroDivisionError")
    ]


class Gpu:
    """What measure asks of torch.cuda, noted in order; a call takes as many milliseconds as were noted in it."""

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
            "Stream": lambda: SimpleNamespace(wait_stream=lambda other: None),
            "current_stream": lambda: SimpleNamespace(wait_stream=lambda other: None),
            "stream": lambda stream: contextlib.nullcontext(),
            "graph": lambda graph: contextlib.nullcontext(),
            "synchronize": lambda device: self.noted.append("wait"),
            "_sleep": lambda cycles: self.noted.append("sleep"),
            "reset_peak_memory_stats": lambda device: None,
            "memory_allocated": lambda device: 1_000_000,
            "max_memory_allocated": lambda device: 4_000_000,
        }.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)
        monkeypatch.setattr(measure, "_beyond_l2", lambda device: Cold())


def test_on_a_gpu_versions_take_turns_and_find_nothing_in_the_cache(monkeypatch):
    cuda = Gpu(monkeypatch)
    times = measure.in_turns({name: functools.partial(cuda.noted.append, name) for name in "ab"}, torch.device("cuda"))
    turn = ["wait", "a", "wait", "sleep", *["cold", "a"] * 5, "wait"]
    other = ["b" if note == "a" else note for note in turn]
    assert cuda.noted == ["a"] * 3 + ["b"] * 3 + [*turn, *other] * 5
    assert times["a"]["median"] == times["b"]["min"] == 1  # of 25 calls; the reading between them does not count


def test_on_a_gpu_ours_is_captured_too(monkeypatch):
    cuda = Gpu(monkeypatch)
    built = Built(lambda: cuda.noted.append("ours"), {"theirs": lambda: cuda.noted.append("theirs")}, lambda: None, 9)
    (record,), failures = measure.compare(Case("a", "float32", lambda device: built), torch.device("cuda"), LIMITS)
    assert failures == []
    assert record.raw_ms["ours_graph"] == 1
    assert cuda.noted.count("replay") == 3 + 5 * 6
    assert (record.peak_mb, record.baseline_peak_mb) == (3, 3)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: 1 // 0)
    (record,), (failed,) = measure.compare(Case("a", "float32", lambda device: built), torch.device("cuda"), LIMITS)
    assert "ours_graph" not in record.raw_ms
    assert (failed.baseline, failed.error.split(":")[0]) == ("our graph", "ZeroDivisionError")


def test_a_goal_is_claimed_once(here, tmp_path):
    results = Results(tmp_path / "gpu.json", here)
    results.add(*measure.compare(stub("a", "K1-fp32"), CPU, LIMITS))
    again = measure.compare(stub("b", "K1-fp32"), CPU, LIMITS)
    with pytest.raises(AssertionError, match="twice"):
        results.add(*again)


DEADLY = """
import json, math, os, sys, time, torch
from pathlib import Path
from benchmarks.gpu import run as gpu
from benchmarks.gpu.measure import Built, Case
from benchmarks.gpu.records import Results

def case(name, build):
    return Case(name, "float32", lambda device: build())

fine = Built(lambda: 0, {"theirs": lambda: 0}, lambda: None, 1)
cases = [case("crash", lambda: os._exit(7)), case("hang", lambda: time.sleep(1e6)), case("fine", lambda: fine)]
here = dict.fromkeys(Results.SAME) | {"copy_gb_s": 1.0, "bf16_tflop_s": 1.0}
gpu.CASE_LIMIT = float(sys.argv[2])
gpu.run_cases(cases, Results(Path(sys.argv[1]), here), torch.device("cpu"), math.inf)
"""


def test_a_case_that_takes_the_process_with_it_is_passed_by_next_time(tmp_path):
    path = tmp_path / "gpu.json"
    for limit, failed, measured in (
        ("600", ["crash"], []),
        ("0.5", ["crash", "hang"], []),  # which never ends by itself
        ("600", ["crash", "hang"], ["fine"]),
    ):
        done = subprocess.run([sys.executable, "-c", DEADLY, path, limit], cwd=ROOT, capture_output=True, text=True)
        assert (done.returncode == 0) == bool(measured), done.stderr
        stored = json.loads(path.read_text())
        assert [entry["case"] for entry in stored["failures"]] == failed
        assert [entry["case"] for entry in stored["records"]] == measured


def test_a_process_that_dies_is_followed_by_another(monkeypatch, tmp_path):
    started = []

    def call(command, cwd):
        started.append(command)
        return [-11, 7, gpu.FAILURES][len(started) - 1]

    monkeypatch.setattr(subprocess, "call", call)
    monkeypatch.setattr(sys, "argv", ["gpu", "kernels.focal_loss", "--small", "--output", str(tmp_path)])
    assert gpu.main() == gpu.FAILURES
    assert [command[-1] for command in started] == ["--worker=0", "--worker=1", "--worker=2"]
    assert all(command[3:7] == ["kernels.focal_loss", "--small", "--output", str(tmp_path)] for command in started)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure on")
def test_without_a_gpu_it_says_so():
    result = subprocess.run([sys.executable, "-m", "benchmarks.gpu"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    assert "No CUDA GPU" in result.stdout


def test_small_twins_by_the_same_command(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu", "kernels.anchor_matching", "--small", "--output", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("small-*.json")
    stored = json.loads(path.read_text())
    assert stored["environment"]["small"]
    assert [record["goal"] for record in stored["records"]] == ["K3-g500", "K3-b16", None]


def test_every_case_has_a_small_twin():
    for name in gpu.BENCHMARKS:
        module = importlib.import_module(f"benchmarks.{name}")
        assert {case.goal for case in module.SMALL} == {case.goal for case in module.CASES}
    assert gpu.file_name("NVIDIA H200") == "nvidia-h200.json"
    assert gpu.file_name("cpu", small=True) == "small-cpu.json"


def test_goals_come_first_and_are_those_of_the_report():
    found = [case.goal for case in gpu.cases_of(gpu.BENCHMARKS)]
    count = sum(goal is not None for goal in found)
    assert set(found[:count]) == set(goals.GOALS)
    assert set(found[count:]) == {None}


def test_bringing_up_runs_every_step_whatever_fails(monkeypatch, capsys):
    assert {
        f"tests/{name}.py"
        for name in ("kernels/test_focal_loss", "kernels/test_image_batch", "deploy/test_engine", "model/test_model")
    } <= set(bring_up.tested_files())
    ran = []

    def run(command, env, **_):
        ran.append((command, env))
        return subprocess.CompletedProcess(command, int("pytest" in command))

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("shutil.which", lambda name, path=None: "/bin/compute-sanitizer")
    assert bring_up.main([]) == 1
    assert "tests      failed (1)\nchecks     right\nmemcheck   right\nracecheck  right" in capsys.readouterr().out
    (_, tested), (checks, _), (memcheck, watched), (racecheck, _) = ran
    assert "TRITON_INTERPRET" not in tested
    assert memcheck[:5] == ["/bin/compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9"]
    assert racecheck[2] == "racecheck"
    assert memcheck[5 : 5 + len(checks)] == checks
    assert watched["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"


def test_goals_stand_on_their_cases_only():
    cases = [case for name in gpu.BENCHMARKS for case in importlib.import_module(f"benchmarks.{name}").CASES]
    v1 = "inference, retinanet_resnet50_fpn, batch {}, 800x800, 91 classes"
    assert {case.goal: (case.name, case.dtype) for case in cases if case.goal} == {
        "K1-fp32": ("focal loss, batch 8, 800x800, 91 classes", "float32"),
        "K1-bf16": ("focal loss, batch 8, 800x800, 91 classes", "bfloat16"),
        "K2": ("loss path with l1, batch 16, 800x800, 91 classes, 16 ground truths an image", "bfloat16"),
        "K3-g500": ("matching, batch 8, 800x800, 500 ground truths an image", "float32"),
        "K3-b16": ("matching, batch 16, 800x800, 16 ground truths an image", "float32"),
        "K6": ("image batch, batch 8, 480x640 to 800", "float32"),
        "E1": (v1.format(1), "bfloat16"),
        "E2": (v1.format(32), "bfloat16"),
        **{
            f"K4-b{b}": (f"postprocess, batch {b}, 800x800, 91 classes, 1.0% above the threshold", "bfloat16")
            for b in (1, 8, 32)
        },
        **{
            f"K5-b{b}": (f"NMS, batch {b}, 5000 clustered boxes in 91 classes, at most 300 kept", "float32")
            for b in (1, 32)
        },
        "E3": ("training step, retinanet_resnet50_fpn, batch 16, 800x800, 91 classes", "bfloat16"),
        "E4": ("training step, retinanet_resnet50_fpn, batch 16, 800x800, 91 classes, captured", "bfloat16"),
    }
    assert training_step.BASE.image_sizes == (800, 1333)  # nothing is resized
    keys = [(case.name, case.dtype) for case in cases]
    assert len(keys) == len(set(keys))
    assert {"inference, retinanet_resnet50_fpn_v2, batch 32, 800x800, 91 classes"} <= {name for name, _ in keys}


@pytest.mark.parametrize("name", gpu.BENCHMARKS)
def test_cases_compute_what_they_time(name, one_thread, monkeypatch):
    """torch.compile with its quickest backend."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *_, **__: None)
    for case in gpu.cases_of([name], small=True):
        built = case.build(CPU)
        built.check()
        for baseline in built.baselines.values() if name == "model" else ():  # other checks call them
            assert len(baseline()) == len(built.ours().counts)


def test_the_least_an_image_batch_moves():
    setting = image_batch.Setting(2, 48, 64, 80, "bfloat16")
    built = image_batch.build(setting, CPU)
    assert built.min_bytes == 2 * 3 * (48 * 64 + 96 * 128 * built.ours().itemsize)


@pytest.mark.skipif(not INTERPRETED, reason="runs as a baseline where there is a GPU")
def test_the_apex_style_kernel():
    levels, labels, normalizers = focal_loss.inputs(focal_loss.Setting(1, 64, 64, 3), CPU)
    x = torch.cat(focal_loss.flatten_all(levels, 3), dim=1).detach().requires_grad_()
    loss = focal_loss._ApexStyle.apply(x, labels, normalizers[0].item())
    expected = focal_loss.focal_loss_reference([x], labels, normalizers, 3)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, x), torch.autograd.grad(expected, x), rtol=1e-4, atol=1e-9)


def test_settings_vary_one_factor_at_a_time():
    for setting in focal_loss.SETTINGS:
        base = focal_loss.Setting(dtype=setting.dtype)
        changed = [f.name for f in dataclasses.fields(setting) if getattr(setting, f.name) != getattr(base, f.name)]
        assert len(changed) <= 1


@pytest.mark.parametrize("version", [1, 2])
def test_three_stages_are_trained(version):
    setting = dataclasses.replace(training_step.CPU_SETTING, version=version)
    trained = [name for name, p in training_step.network(setting).backbone.body.named_parameters() if p.requires_grad]
    assert {name.split(".")[0] for name in trained} == {"layer2", "layer3", "layer4"}


def test_the_peak_of_what_replays_is_that_of_its_uncaptured_work(monkeypatch):
    measured = []

    def peak_mb(call, device):
        measured.append(call())
        return 0.0

    monkeypatch.setattr(measure, "peak_mb", peak_mb)
    built = Built(lambda: "ours", {"theirs": lambda: "theirs"}, lambda: None, 1, uncaptured=lambda: "uncaptured")
    measure.compare(Case("a", "float32", lambda device: built), CPU, LIMITS)
    assert measured == ["uncaptured", "theirs"]


@pytest.mark.parametrize("above", [0.0, 0.01, 1.0])
def test_as_many_scores_as_said_exceed_the_threshold(above):
    setting = postprocess.Setting(batch=2, height=128, width=96, num_classes=11, above=above)
    share = torch.cat([level.flatten() for level in postprocess.inputs(setting, CPU)[0]["cls_logits"]])
    assert (torch.sigmoid(share.float()) > 0.05).float().mean().item() == pytest.approx(above, rel=0.2)


def test_spinenet_cases_are_the_sizes_that_were_published():
    for setting in spinenet.SETTINGS:
        with torch.device("meta"):
            assert spinenet.MODELS[setting.model]().transform.max_size == setting.side
    assert len({case.name for case in spinenet.CASES}) == 9
    assert "spinenet" in gpu.BENCHMARKS
