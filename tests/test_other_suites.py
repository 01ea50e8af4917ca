"""Running another project's tests with this package in torchvision's place, on a project of four tests."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests import other_suites

THEIRS = """
import urllib.request

import pytest
import torch
import torchvision
from torchvision.models import detection, get_model_builder, list_models


@pytest.mark.parametrize("name", [name for name in list_models(detection) if "retinanet" in name])
def test_of_a_model(name):
    _check_jit_scriptable(None)
    model = get_model_builder(name)(weights=None, weights_backbone=None)
    assert isinstance(model, detection.RetinaNet)
    boxes = torch.tensor([[0.0, 0, 9, 9], [0, 0, 9, 8]])
    assert torchvision.ops.nms(boxes, torch.tensor([0.5, 0.9]), 0.5).tolist() == [1]


def _check_jit_scriptable(model):
    raise AssertionError("cannot be scripted")


def test_that_holds_for_torchvisions_class_alone():
    assert detection.retinanet.RetinaNet.__module__ == "torchvision.models.detection.retinanet"


def test_that_needs_the_network():
    urllib.request.urlopen("http://example.com")
"""


@pytest.mark.slow
def test_the_runs_are_compared(tmp_path):
    (tmp_path / "test_theirs.py").write_text(THEIRS)
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text("raise ImportError('this one is not built')")
    line = [sys.executable, "-m", "tests.other_suites", "torchvision", str(tmp_path), "test_theirs.py"]
    done = subprocess.run(line, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert "torchvision: {'passed': 3, 'failure': 1}" in done.stdout, done.stdout
    assert "retina_fast: {'passed': 2, 'failure': 2}" in done.stdout
    assert "fetch nothing, not from 'example.com'" in done.stdout
    changed = [row for row in done.stdout.splitlines() if row.startswith("test_theirs::")]
    assert changed == ["test_theirs::test_that_holds_for_torchvisions_class_alone"]
    assert done.returncode == 1


@pytest.mark.parametrize("arguments", [[], ["detectron"], ["torchvision"], ["torchvision", "no-such-folder"]])
def test_wrong_arguments_are_named(arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["other_suites", *arguments])
    with pytest.raises(SystemExit, match="2"):
        other_suites.main()
    assert "error: " in capsys.readouterr().err
