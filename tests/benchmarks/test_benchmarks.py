"""The benchmarks' cases are those of the goals, and they compute what they time."""

import ast
import dataclasses
import importlib
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import goals
from benchmarks.gpu import run as gpu
from benchmarks.kernels import focal_loss, image_batch, postprocess
from benchmarks.models import spinenet, training_step
from retina_fast.kernels.dispatch import INTERPRETED

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]


def imports(folder):
    """Returns the modules that each file of a folder imports, by the file's path from the root."""
    found = {}
    for path in (ROOT / folder).rglob("*.py"):
        names = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        found[str(path.relative_to(ROOT))] = names
    return found


def test_who_imports_whom():
    """Tests of the product need no benchmark, benchmarks need its instruments alone, and nobody a prediction."""
    tests = {file: names for file, names in imports("tests").items() if not file.startswith("tests/benchmarks/")}
    rules = [(tests, "benchmarks")]
    for file, names in imports("benchmarks").items():
        instruments = ("tests.instruments.", "tests.ptx.")
        assert all(f"{name}.".startswith(instruments) for name in names if name.startswith("tests")), file
    own = {file: names for file, names in imports("benchmarks").items() if not file.startswith("benchmarks/predict/")}
    for files, banned in [*rules, (own, "benchmarks.predict")]:
        assert files
        assert not [file for file, names in files.items() if any(f"{name}.".startswith(f"{banned}.") for name in names)]


def test_every_operation_has_a_benchmark_of_its_name():
    operations = {path.stem for path in (ROOT / "kernels").glob("*.py") if "library.custom_op(" in path.read_text()}
    benchmarks = {path.stem for path in (ROOT / "benchmarks" / "kernels").glob("*.py")} - {"__init__"}
    assert operations - {"one_pass"} <= benchmarks  # which is a part of focal_loss and box_loss
    assert {f"kernels.{name}" for name in benchmarks} <= set(gpu.BENCHMARKS)


def test_every_case_has_a_small_twin():
    for name in gpu.BENCHMARKS:
        module = importlib.import_module(f"benchmarks.{name}")
        assert {case.goal for case in module.SMALL} == {case.goal for case in module.CASES}


def test_goals_come_first_and_are_those_of_the_report():
    found = [case.goal for case in gpu.cases_of(gpu.BENCHMARKS)]
    count = sum(goal is not None for goal in found)
    assert set(found[:count]) == set(goals.GOALS)
    assert set(found[count:]) == {None}


def test_goals_stand_on_their_cases_only():
    cases = [case for name in gpu.BENCHMARKS for case in importlib.import_module(f"benchmarks.{name}").CASES]
    v1 = "inference, retinanet_resnet50_fpn, batch {}, 800x800, 91 classes"
    assert {case.goal: (case.name, case.dtype) for case in cases if case.goal} == {
        "K1-fp32": ("focal loss, batch 8, 800x800, 91 classes", "float32"),
        "K1-bf16": ("focal loss, batch 8, 800x800, 91 classes", "bfloat16"),
        "K2": ("loss path with l1, batch 16, 800x800, 91 classes, 16 ground truths an image", "bfloat16"),
        "K3-g500": ("matching, batch 8, 800x800, 500 ground truths an image", "float32"),
        "K3-b16": ("matching, batch 16, 800x800, 16 ground truths an image", "float32"),
        "K5-all": ("ops.NMS, batch 1, 100000 none overlapping boxes in 1 classes, at most 100000 kept", "float32"),
        "E3-mlperf": ("training step, retinanet_resnext50_32x4d_fpn, batch 16, 800x800, 264 classes", "bfloat16"),
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


NIGHTLY = "models.inference", "models.training_step", "models.spinenet"


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in NIGHTLY else ()) for name in gpu.BENCHMARKS]
)
def test_cases_compute_what_they_time(name, one_thread, monkeypatch):
    """Each check runs on small shapes, and what torch.compile gets runs as it is."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *_, **__: None)
    for case in gpu.cases_of([name], small=True):
        built = case.build(CPU)
        built.check()
        for baseline in built.baselines.values() if name == "models.inference" else ():  # other checks call them
            assert len(baseline()) == len(built.ours().counts)


def test_the_least_an_image_batch_moves():
    setting = image_batch.Setting(2, 48, 64, 80, "bfloat16")
    built = image_batch.build(setting, CPU)
    assert built.min_bytes == 2 * 3 * (48 * 64 + 96 * 128 * built.ours().itemsize)


@pytest.mark.skipif(not INTERPRETED, reason="runs as a baseline where there is a GPU")
def test_the_apex_style_kernel():
    levels, labels, normalizers = focal_loss.inputs(focal_loss.Setting(1, 64, 64, 3), CPU)
    x = torch.cat(focal_loss.flatten_all(levels, 3), dim=1).detach().requires_grad_()
    loss = focal_loss.ApexStyle.apply(x, labels, normalizers[0].item())
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
    assert "models.spinenet" in gpu.BENCHMARKS
