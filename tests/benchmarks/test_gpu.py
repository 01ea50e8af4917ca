"""What `make gpu` and `make gpu-test` write and print, on a machine without a GPU."""

import json
import math
import multiprocessing
import os
import subprocess
import sys
import time
from typing import Any
from unittest import mock

import pytest
import torch

from benchmarks.case import Built, Case
from benchmarks.gpu import bring_up, compare
from benchmarks.gpu import run as gpu
from benchmarks.gpu.records import ROOT, Results, environment

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
    return environment(CPU, {"copy_gb_s": 9.0, "bf16_tflop_s": 0.5})


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
        return Built(
            lambda: None, {"theirs": lambda: None, "broken": mock.Mock(side_effect=ZeroDivisionError)}, lambda: None, 1
        )

    results = Results(tmp_path / "gpu.json", here)
    gpu.run_cases([Case("a", "float32", build)], results, CPU, math.inf)
    assert [record.baseline for record in results.records] == ["theirs"]
    assert [(failed.baseline, failed.error.split(":")[0]) for failed in results.failures] == [
        ("broken", "ZeroDivisionError")
    ]


def test_a_goal_is_claimed_once(here, tmp_path):
    results = Results(tmp_path / "gpu.json", here)
    results.add(*compare.compare(stub("a", "K1-fp32"), CPU, LIMITS))
    again = compare.compare(stub("b", "K1-fp32"), CPU, LIMITS)
    with pytest.raises(AssertionError, match="twice"):
        results.add(*again)


def deadly(path, limit):
    """Runs a case that ends its process, one that never ends, and one that is measured."""
    fine = Built(lambda: 0, {"theirs": lambda: 0}, lambda: None, 1)
    builds: dict[str, Any] = {"crash": lambda _: os._exit(7), "hang": lambda _: time.sleep(1e6), "fine": lambda _: fine}
    cases = [Case(name, "float32", build, seconds=limit) for name, build in builds.items()]
    here = dict.fromkeys(Results.SAME) | {"copy_gb_s": 1.0, "bf16_tflop_s": 1.0}
    gpu.run_cases(cases, Results(path, here), CPU, math.inf)


@pytest.mark.slow
def test_a_case_that_takes_the_process_with_it_is_passed_by_next_time(tmp_path):
    path = tmp_path / "gpu.json"
    for limit, failed, measured in (
        (600, ["crash"], []),
        (0.5, ["crash", "hang"], []),  # which never ends by itself
        (600, ["crash", "hang"], ["fine"]),
    ):
        process = multiprocessing.get_context("fork").Process(target=deadly, args=(path, limit))
        process.start()
        process.join()
        assert (process.exitcode == 0) == bool(measured)
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
def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu"])
    assert gpu.main() == 2
    assert "No CUDA GPU" in capsys.readouterr().out
    assert bring_up.main([]) == 2
    assert "No CUDA GPU" in capsys.readouterr().out


def test_the_file_is_named_after_the_device():
    assert gpu.file_name("NVIDIA H200") == "nvidia-h200.json"
    assert gpu.file_name("cpu", small=True) == "small-cpu.json"


@pytest.mark.slow
def test_small_twins_by_the_same_command(monkeypatch, tmp_path):
    command = ["gpu", "kernels.anchor_matching", "--small", "--output", str(tmp_path), "--worker=0"]
    monkeypatch.setattr(sys, "argv", command)
    assert gpu.main() == 0
    (path,) = tmp_path.glob("small-*.json")
    stored = json.loads(path.read_text())
    assert stored["environment"]["small"]
    assert [record["goal"] for record in stored["records"]] == ["K3-g500", "K3-b16", None]


def test_bringing_up_runs_every_step_whatever_fails(monkeypatch, capsys):
    whole = {path.rpartition("test_")[2][:-3]: path for path in bring_up.tested_files() if "/kernels/" not in path}
    assert sorted(whole) == sorted(bring_up._WHOLE)
    assert whole["step_on_gpu"] == "tests/model/test_step_on_gpu.py"
    assert {f"tests/kernels/test_{name}.py" for name in ("focal_loss", "image_batch")} < set(bring_up.tested_files())
    ran = []

    def run(command, env, **_):
        ran.append((command, env))
        return subprocess.CompletedProcess(command, int("pytest" in command))

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("shutil.which", lambda name, path=None: "/bin/compute-sanitizer")
    assert bring_up.main([]) == 1
    assert "tests      failed (1)\nchecks     right\nmemcheck   right\nracecheck  right" in capsys.readouterr().out
    (tests, tested), (checks, _), (memcheck, watched), (racecheck, _) = ran
    assert "TRITON_INTERPRET" not in tested
    assert tests[tests.index("-p") + 1] == "benchmarks.gpu.hung_tests"
    assert memcheck[:3] == ["/bin/compute-sanitizer", "--tool", "memcheck"]
    assert memcheck[3:7] == ["--error-exitcode", "9", "--report-api-errors", "no"]
    assert racecheck[2] == "racecheck"
    assert memcheck[7 : 7 + len(checks)] == checks
    assert watched["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"


def test_a_check_that_fails_hides_no_other(capsys):
    def broken(device):
        raise ValueError("no such shape")

    cases = [stub("a", wrong=True), Case("b", "float32", broken), stub("c")]
    assert gpu.check(cases, CPU) == gpu.FAILURES
    printed = capsys.readouterr().out
    assert "WRONG: a, float32: AssertionError" in printed
    assert "WRONG: b, float32: ValueError: no such shape" in printed
    assert "right: c, float32" in printed
    assert printed.endswith("2 wrong:\na, float32\nb, float32\n")
    assert gpu.check(cases[2:], CPU) == 0


HANGING = """
import time
from typing import Any
from benchmarks.gpu import hung_tests

hung_tests.SECONDS = 1

def test_hangs():
    time.sleep(600)

def test_fine():
    pass
"""


@pytest.mark.slow
def test_a_test_that_hangs_fails_and_the_others_go_on(tmp_path):
    pytest.importorskip("xdist")
    (tmp_path / "test_hanging.py").write_text(HANGING)
    plugins = ["-p", "no:cacheprovider", "-p", "benchmarks.gpu.hung_tests"]
    command = [sys.executable, "-m", "pytest", "-q", *plugins, "-n", "1", "--rootdir", tmp_path, tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert "1 failed, 1 passed" in done.stdout, done.stdout + done.stderr
    assert "in test_hangs" in done.stderr  # where it hung
