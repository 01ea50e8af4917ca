"""Other runtimes in `retina-fast bench`: the same detections, and what is not there is left out."""

import pytest
import torch

from retina_fast import retinanet_resnet18_fpn_lite
from retina_fast.deploy import bench_runtimes as runtimes
from retina_fast.deploy.bench_runtimes import other_runtimes

NAMES = {
    "_onnxruntime": "ONNX Runtime, float32",
    "_openvino": "OpenVINO, float32",
    "_compiled": "torch.compile, float32",
}


def photograph(*size):
    return torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def made(monkeypatch):
    """Stand-ins for the runtimes, and what each was made with."""
    calls: dict[str, tuple] = {}
    for function in NAMES:

        def make(*args, function=function):
            calls[function] = args
            return lambda images: f"{function} of {len(images)}"

        monkeypatch.setattr(runtimes, function, make)
    return calls


def test_each_takes_part(made):
    said: list[str] = []
    runs = other_runtimes("model", [photograph(8, 9)] * 2, said.append)
    assert {name: run([photograph(1, 1)] * 3) for name, run in runs.items()} == {
        name: f"{function} of 3" for function, name in NAMES.items()
    }
    assert made == {"_onnxruntime": ("model", (8, 9)), "_openvino": ("model", (8, 9)), "_compiled": ("model",)}
    assert not said


def test_files_have_one_size(made):
    said: list[str] = []
    runs = other_runtimes("model", [photograph(8, 9), photograph(9, 9)], said.append)
    assert [*runs] == ["torch.compile, float32"]
    assert said == ["ONNX Runtime and OpenVINO were left out: the images differ in size"]


def test_what_fails_is_named_and_left_out(made, monkeypatch):
    def missing(*_):
        raise ModuleNotFoundError("No module named 'openvino'")

    def fails_at_once(_):
        def run(images):
            raise RuntimeError("a compiler\n  that fails")

        return run

    monkeypatch.setattr(runtimes, "_openvino", missing)
    monkeypatch.setattr(runtimes, "_compiled", fails_at_once)
    said: list[str] = []
    assert [*other_runtimes("model", [photograph(8, 8)], said.append)] == ["ONNX Runtime, float32"]
    assert said == [
        "OpenVINO, float32 was left out: No module named 'openvino'",
        "torch.compile, float32 was left out: a compiler that fails",
    ]


@pytest.mark.slow
def test_they_find_what_the_model_finds():
    torch.manual_seed(0)
    model = retinanet_resnet18_fpn_lite(num_classes=2, weights_backbone=None, min_size=96, max_size=96).eval()
    model.score_thresh = 0.0099
    image = photograph(96, 96)
    with torch.no_grad():
        expected = model([image.float() / 255])[0]
    said: list[str] = []
    runs = other_runtimes(model, [image], said.append)
    assert len(runs) + len(said) == 3
    assert runs
    for run in runs.values():
        (found,) = run([image])
        torch.testing.assert_close(found["scores"].sort().values, expected["scores"].sort().values, rtol=0, atol=1e-5)
