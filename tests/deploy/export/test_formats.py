"""The formats of exported files: requests that cannot succeed are refused at once, and OpenVINO's two files are one."""

import shutil
from importlib.util import find_spec
from typing import Any

import pytest
import torch

import retina_fast
from retina_fast.data.errors import UserError
from retina_fast.deploy.export import formats
from retina_fast.deploy.export.openvino_files import weights_file

SIZE = (64, 96)


@pytest.fixture
def model() -> Any:
    return retina_fast.retinanet_resnet18_fpn_lite(num_classes=2, weights_backbone=None, score_thresh=0.0).eval()


def test_doomed_requests_are_refused_before_the_work(model, tmp_path, monkeypatch):
    def traced(*arguments, **options):
        raise AssertionError("the work has begun")

    monkeypatch.setattr(torch.export, "export", traced)
    path = tmp_path / "m.xml"

    def refused(message: str, format: str = "openvino", path: Any = path, model: Any = model) -> None:
        with pytest.raises(UserError, match=message):
            retina_fast.export(model, path, format, SIZE)

    monkeypatch.setattr(formats, "find_spec", lambda name: None if name in ("openvino", "onnxscript") else True)
    refused(r"openvino needs onnxscript, openvino: pip install onnxscript openvino$")
    refused(r"onnx needs onnxscript: pip install onnxscript$", "onnx")
    monkeypatch.setattr(formats, "find_spec", lambda name: True)
    refused(r"m\.ir: a file of the format openvino must end in \.xml", path=tmp_path / "m.ir")
    refused("for openvino the model's weights must be float32", model=model.bfloat16())
    (tmp_path / "m.bin").write_text("the user's own")
    refused(r"m\.bin: is there already, without m\.xml", model=model.float())
    assert (tmp_path / "m.bin").read_text() == "the user's own"
    assert [file.name for file in tmp_path.iterdir()] == ["m.bin"]


@pytest.mark.skipif(find_spec("openvino") is None, reason="openvino")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_openvinos_two_files(model, tmp_path):
    path = tmp_path / "m.xml"
    retina_fast.export(model, path, "openvino", SIZE, classes=["cat", "dog"])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m.bin", "m.xml"]
    found = retina_fast.load(path)
    assert (found.format, found.classes) == ("openvino", ["cat", "dog"])
    images = torch.randint(0, 255, (3, 3, *SIZE), dtype=torch.uint8)
    with torch.no_grad():
        expected = model.detect(images.float() / 255)
    ours = found(images)
    assert torch.equal(ours.counts, expected.counts)
    torch.testing.assert_close(ours.scores, expected.scores, rtol=1e-4, atol=1e-5)
    for damaged in (path, weights_file(path)):
        shutil.copytree(tmp_path, tmp_path / "copy", dirs_exist_ok=True, ignore=lambda *_: ["copy"])
        content = bytearray((tmp_path / "copy" / damaged.name).read_bytes())
        content[len(content) // 2] ^= 1
        (tmp_path / "copy" / damaged.name).write_bytes(content)
        with pytest.raises(UserError, match=r"m\.xml: damaged"):
            retina_fast.load_exported(tmp_path / "copy" / "m.xml")
    weights_file(path).unlink()
    with pytest.raises(UserError, match=r"m\.xml: damaged"):
        retina_fast.load_exported(path)
