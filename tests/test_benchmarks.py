"""What ``make gpu`` writes, and that its cases compute what they time, on a machine without a GPU."""

import dataclasses
import functools
import importlib
import json
import math
import subprocess
import sys
import time

import pytest
import torch

from benchmarks import (
    anchor_matching,
    batched_nms,
    box_loss,
    focal_loss,
    gpu,
    group_norm_relu,
    image_batch,
    loss_path,
    measure,
    model,
    postprocess,
    spinenet,
    training_step,
)
from benchmarks.measure import ROOT, Built, Case, Results, environment
from retina_fast.kernels.box_loss import LOSS_TYPES
from retina_fast.kernels.compiler import INTERPRETED

ENVIRONMENT_KEYS = "device driver torch triton torchvision commit dirty date copy_gb_s bf16_tflop_s"
RECORD_KEYS = "goal case dtype baseline baseline_ms ours_ms ratio ceiling_fraction peak_mb baseline_peak_mb raw_ms"
CPU = torch.device("cpu")


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
    return environment(CPU)


def test_a_file_has_exactly_the_agreed_fields(here, tmp_path):
    results = Results(tmp_path / "gpu.json", here)
    left = gpu.run_cases([stub("a", "K1-fp32"), stub("b")], results, CPU, math.inf)
    stored = json.loads((tmp_path / "gpu.json").read_text())
    assert left == []
    assert set(stored) == {"environment", "records"}
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


def test_a_run_is_taken_up_again_goals_first(here, tmp_path):
    calls: list[str] = []
    cases = [stub("a", calls=calls), stub("b", "K1-bf16", calls=calls), stub("c", calls=calls)]
    results = Results(tmp_path / "gpu.json", here)
    assert gpu.run_cases(cases, results, CPU, deadline=time.monotonic() - 1) == [cases[1], cases[0], cases[2]]
    assert gpu.run_cases(cases[:2], results, CPU, math.inf) == []
    assert calls.index("b") < calls.index("a")
    calls.clear()
    again = Results(tmp_path / "gpu.json", here)
    assert gpu.run_cases(cases, again, CPU, math.inf) == []
    assert set(calls) == {"c"}
    assert len(again.records) == 6
    other_commit = Results(tmp_path / "gpu.json", here | {"commit": "another"})
    assert other_commit.records == []


def test_a_wrong_result_is_not_timed_and_a_goal_is_claimed_once(here, tmp_path):
    results = Results(tmp_path / "gpu.json", here)
    with pytest.raises(AssertionError):
        gpu.run_cases([stub("a", wrong=True)], results, CPU, math.inf)
    assert not results.path.exists()
    with pytest.raises(AssertionError, match="twice"):
        gpu.run_cases([stub("a", "K1-fp32"), stub("b", "K1-fp32")], results, CPU, math.inf)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure on")
def test_without_a_gpu_it_says_so():
    result = subprocess.run([sys.executable, "-m", "benchmarks.gpu"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    assert "No CUDA GPU" in result.stdout


def test_parts():
    assert {f"tests/test_{name}.py" for name in ("focal_loss", "image_batch", "engine")} <= set(gpu.kernel_tests())
    assert gpu.file_name("NVIDIA H200") == "nvidia-h200.json"


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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_focal_loss_cases_agree_with_the_reference(dtype):
    setting = focal_loss.Setting(batch=2, height=128, width=96, num_classes=11, dtype=dtype)
    focal_loss.build(setting, CPU, with_compile=False).check()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_image_batch_cases_agree_with_torchvision(dtype):
    setting = image_batch.Setting(batch=2, height=48, width=64, min_size=80, dtype=dtype)
    built = image_batch.build(setting, CPU)
    built.check()
    assert built.min_bytes == 2 * 3 * (48 * 64 * (4 if dtype == "float32" else 1) + 96 * 128 * built.ours().itemsize)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_group_norm_relu_cases_agree_with_the_reference(dtype):
    setting = group_norm_relu.Setting(batch=2, height=64, width=64, dtype=dtype)
    built = group_norm_relu.build(setting, CPU, with_compile=False)
    built.check()
    exact = group_norm_relu.build(setting, CPU, with_compile=False).baselines["torch eager"]()
    torch.testing.assert_close(built.ours(), exact, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_model_cases_agree_with_torchvision(dtype, monkeypatch):
    """All that `make gpu` does with one, at a small size; torch.compile with its quickest backend."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    setting = model.Setting("retinanet_resnet18_fpn_v2", batch=2, size=96, num_classes=3, dtype=dtype)
    built = model.build(setting, CPU, with_compile=dtype == "bfloat16")
    built.check()
    counts = built.ours().counts
    assert counts.shape == (2,)
    for name, baseline in built.baselines.items():
        assert len(baseline()) == 2, name


@pytest.mark.parametrize("ground_truths", [1, 30])
def test_matching_cases_agree_with_torchvision(ground_truths):
    anchor_matching.build(anchor_matching.Setting(2, ground_truths, 128, 160), CPU).check()


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_box_loss_cases_agree_with_torchvision(loss_type):
    box_loss.build(box_loss.Setting(loss_type, 2, 4, 160, "float32"), CPU).check()


@pytest.mark.parametrize(("dtype", "loss_type"), [("float32", "giou"), ("bfloat16", "l1")])
def test_loss_path_cases_agree_with_torchvision(dtype, loss_type):
    loss_path.build(loss_path.Setting(2, 4, 160, 7, dtype, loss_type), CPU).check()


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
def test_training_steps_that_are_timed_agree(version, one_thread):
    setting = dataclasses.replace(training_step.CPU_SETTING, version=version)
    built = training_step.build(setting, CPU, ("torchvision eager AMP", "uncaptured"))
    built.check()
    trained = [name for name, p in training_step.network(setting).backbone.body.named_parameters() if p.requires_grad]
    assert {name.split(".")[0] for name in trained} == {"layer2", "layer3", "layer4"}


def test_the_peak_of_what_replays_is_that_of_its_uncaptured_work(monkeypatch):
    measured = []

    def peak_mb(call, device):
        measured.append(call())
        return 0.0

    monkeypatch.setattr(measure, "peak_mb", peak_mb)
    built = Built(lambda: "ours", {"theirs": lambda: "theirs"}, lambda: None, 1, uncaptured=lambda: "uncaptured")
    measure.compare(Case("a", "float32", lambda device: built), CPU, 1.0)
    assert measured == ["uncaptured", "theirs"]


@pytest.mark.parametrize("above", [0.0, 0.01, 1.0])
def test_postprocess_cases_agree_with_the_references(above):
    setting = postprocess.Setting(batch=2, height=128, width=96, num_classes=11, above=above)
    built = postprocess.build(setting, CPU)
    built.check()
    assert built.baselines["torchvision eager"]()
    share = torch.cat([level.flatten() for level in postprocess.inputs(setting, CPU)[0]["cls_logits"]])
    assert (torch.sigmoid(share.float()) > 0.05).float().mean().item() == pytest.approx(above, rel=0.2)


@pytest.mark.parametrize("kind", batched_nms.SETS)
def test_nms_cases_agree_with_the_reference(kind):
    for classes in (1, 11):
        batched_nms.build(batched_nms.Setting(batch=2, boxes=200, classes=classes, kind=kind, kept=250), CPU).check()
    batched_nms.build(batched_nms.Setting(boxes=0, kind=kind), CPU).check()


@pytest.mark.parametrize("setting", spinenet.CPU_SETTINGS, ids=str)
def test_spinenet_cases_compute_what_they_time(one_thread, setting):
    built = spinenet.build(setting, CPU)
    built.check()


def test_spinenet_cases_are_the_sizes_that_were_published():
    for setting in spinenet.SETTINGS:
        with torch.device("meta"):
            assert spinenet.MODELS[setting.model]().transform.max_size == setting.side
    assert len({case.name for case in spinenet.CASES}) == 9
    assert "spinenet" in gpu.BENCHMARKS
