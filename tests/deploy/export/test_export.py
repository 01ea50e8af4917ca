"""Files that run without the package: the same detections as the model's, and clear refusals."""

import functools
import json
import math
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.io import ImageReadMode, decode_image, write_png
from torchvision.models.detection.anchor_utils import AnchorGenerator
from typer.testing import CliRunner

import retina_fast
from retina_fast import cli, load_exported
from retina_fast.data.errors import UserError
from retina_fast.deploy import engine
from retina_fast.deploy.export.formats import FORMATS
from retina_fast.deploy.export.onnx_file import KEY, OPSET, OUTPUTS
from retina_fast.forward import run_network
from retina_fast.kernels.candidate_selection import logit
from retina_fast.predict.load import TREES, load_model
from retina_fast.transform import resize_batch
from tests.instruments import exported as comparison

SIZE = (96, 128)
PHOTO = Path(__file__).parents[3] / "demo" / "heldout.jpg"

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module", autouse=True)
def _one_thread(one_thread):
    pass


class TwoLevels(nn.Module):
    """A user's own small backbone, at strides 8 and 16."""

    out_channels = 8

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 8, stride=8)
        self.second = nn.Conv2d(8, 8, 3, stride=2, padding=1)

    def forward(self, x):
        x = self.first(x).relu()
        return {"0": x, "1": self.second(x)}


def small(cls=retina_fast.RetinaNet, **kwargs: Any):
    generator = AnchorGenerator(((24, 32), (48, 64)), ((0.5, 1.0),) * 2)
    torch.manual_seed(0)
    kwargs = {"min_size": 112, "max_size": 160, "anchor_generator": generator, "topk_candidates": 200, **kwargs}
    return cls(TwoLevels(), 3, **kwargs).eval()


@torch.no_grad()
def spread(model, images):
    """The model with scores far apart, as a trained one's are, and none above the threshold on the grey image."""

    def outputs(batch, key):
        levels = run_network(model, resize_batch(model.transform, batch / 255)[0]).levels[key]
        return torch.cat([level.transpose(0, 1).flatten(1) for level in levels], dim=1)  # (channels, cells)

    head, boxes = model.head.classification_head.cls_logits, model.head.regression_head.bbox_reg
    head.weight *= (2 / outputs(images[3:7], "cls_logits").std(dim=1))[:, None, None, None]
    head.bias += logit(model.score_thresh) - 0.1 - outputs(images[2:3], "cls_logits").amax(dim=1)
    boxes.weight *= 0.3 / outputs(images[3:7], "bbox_regression").std()  # anchors themselves have IoUs of just 1/2
    return model


@pytest.fixture(scope="module")
def images():
    """Eight crops of a photograph and a grey image, (9, 3, 96, 128) uint8."""
    return comparison.crops([decode_image(str(PHOTO), ImageReadMode.RGB)], 8, *SIZE)


@pytest.fixture(scope="module")
def models(images):
    trees = comparison.quiet(load_model(TREES)[0].cpu(), images[2])
    return {"trees": trees, "small": spread(small(), images)}


AOTINDUCTOR = pytest.param("small", "aotinductor", marks=pytest.mark.slow)  # its compiler of C++ takes half a minute
OPENVINO = pytest.param("small", "openvino", marks=pytest.mark.skipif(find_spec("openvino") is None, reason="openvino"))
TORCH = pytest.param("small", "torch-export", marks=pytest.mark.slow)  # where PyTorch loads a file once more
ONE_EACH = [("small", "torch-export"), ("small", "onnx"), OPENVINO, AOTINDUCTOR]
CASES = [*ONE_EACH, *(pytest.param("trees", format, marks=pytest.mark.slow) for format in ("torch-export", "onnx"))]


@pytest.fixture(scope="module")
def expected(models, images):
    return {name: comparison.expectations(model, images[:5]) for name, model in models.items()}


@pytest.fixture(scope="module")
def files(models, tmp_path_factory):
    """The file of a case, written once."""
    folder, written = tmp_path_factory.mktemp("exported"), {}

    def file(name, format):
        if (name, format) not in written:
            path = folder / f"{name}-{format}{FORMATS[format].suffix}"
            classes = [f"{name} {i}" for i in range(models[name].head.classification_head.num_classes)]
            retina_fast.export(models[name], path, format, SIZE, classes=classes)
            written[name, format] = path
        return written[name, format]

    return file


@pytest.fixture(scope="module")
def opened(files):
    """The exported detector of a case, read once."""
    return functools.cache(lambda name, format: load_exported(files(name, format)))


@pytest.mark.parametrize(("name", "format"), CASES)
def test_detections_equal_the_models(name, format, models, opened, images, expected):
    exported = opened(name, format)
    assert exported.format == format
    result = comparison.compare(expected[name], exported)
    assert result["lost"] <= 4, result
    assert not result["lost"] or result["margin"] < 1e-6, result  # rounding at the threshold of an IoU
    assert result["detections"] >= 20
    assert exported.metadata["image_size"] == list(SIZE)
    assert exported.metadata["input"] == "uint8"
    assert exported.classes[0] == f"{name} 0"
    for key in ("score_thresh", "nms_thresh", "detections_per_img", "topk_candidates"):
        assert exported.metadata[key] == getattr(models[name], key)
    assert exported.metadata["version"]
    padded = exported(images[1:3])
    for ours, theirs in zip(padded, comparison.eager(models[name])(images[1:3]), strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
    assert padded.counts[1] == 0
    assert (padded.labels[1] == -1).all()
    assert not padded.boxes[1].any()
    assert not padded.scores[1].any()


RUN = """
import sys
import numpy as np
sys.modules["retina_fast"] = sys.modules["triton" if sys.argv[1] == "aotinductor" else "torchvision"] = None
images = np.load("images.npy")
if sys.argv[1] == "onnx":
    sys.modules["torch"] = None
    import onnxruntime
    session = onnxruntime.InferenceSession(sys.argv[2], providers=["CPUExecutionProvider"])
    outputs = session.run(None, {"images": images})
    assert "classes" in session.get_modelmeta().custom_metadata_map["retina_fast"]
elif sys.argv[1] == "openvino":
    sys.modules["torch"] = None
    import openvino
    model = openvino.Core().read_model(sys.argv[2])
    assert "classes" in model.get_rt_info("retina_fast").astype(str)
    options = {"INFERENCE_PRECISION_HINT": "f32"}
    outputs = [*openvino.compile_model(model, "CPU", options)(images).values()]
else:
    import torch
    images = torch.from_numpy(images)
    if sys.argv[1] == "torch-export":
        run = torch.export.load(sys.argv[2]).module()
    else:
        run = torch._inductor.aoti_load_package(sys.argv[2])
    with torch.no_grad():
        outputs = [output.numpy() for output in run(images)]
np.savez("outputs.npz", *outputs)
"""


@pytest.mark.parametrize(("name", "format"), [TORCH, *ONE_EACH[1:]])
def test_runs_where_the_package_is_not(name, format, files, opened, images, tmp_path):
    np.save(tmp_path / "images.npy", images[:4].numpy())
    command = [sys.executable, "-P", "-c", RUN, format, files(name, format)]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    outputs = np.load(tmp_path / "outputs.npz")
    for ours, theirs in zip(opened(name, format)(images[:4]), outputs.values(), strict=True):
        np.testing.assert_allclose(ours.numpy(), theirs, atol=1e-4)


def test_the_reference_evaluator_of_onnx_detects_the_same(files, opened, images):
    reference = pytest.importorskip("onnx.reference")
    found = reference.ReferenceEvaluator(str(files("small", "onnx"))).run(None, {"images": images[:2].numpy()})
    for ours, theirs in zip(opened("small", "onnx")(images[:2]), found, strict=True):
        np.testing.assert_allclose(ours.numpy(), theirs, atol=1e-3)


SEVERAL_CLASSES_AND_ONE = ["small", pytest.param("trees", marks=pytest.mark.slow)]


@pytest.mark.parametrize("name", SEVERAL_CLASSES_AND_ONE)
def test_onnx_file_holds_standard_operators_alone(name, files):
    import onnx

    model = onnx.load(files(name, "onnx"))
    onnx.checker.check_model(model, full_check=True)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", OPSET)]
    assert not model.functions
    assert {node.domain for node in model.graph.node} == {""}
    assert {"TopK", "NonMaxSuppression"} <= {node.op_type for node in model.graph.node}
    assert json.loads({entry.key: entry.value for entry in model.metadata_props}[KEY])["classes"]
    assert [output.name for output in model.graph.output] == list(OUTPUTS)
    for value in (*model.graph.input, *model.graph.output):
        assert value.type.tensor_type.shape.dim[0].dim_param == "batch"


@pytest.mark.parametrize("name", SEVERAL_CLASSES_AND_ONE)
def test_torch_file_holds_no_operators_of_ours(name, files):
    program = torch.export.load(files(name, "torch-export"))
    graphs = [module for module in program.graph_module.modules() if isinstance(module, torch.fx.GraphModule)]
    targets = {node.target for graph in graphs for node in graph.graph.nodes if node.op == "call_function"}
    kinds = {target.namespace for target in targets if isinstance(target, torch._ops.OpOverload)}
    assert kinds == {"aten"}
    assert torch.ops.higher_order.while_loop in targets


@pytest.mark.slow
def test_torchvisions_model_and_prepared_images(images, tmp_path):
    """Without preprocessing a file takes what the model's transform would make of the images."""
    model = spread(small(min_size=96), images)
    batch = model.transform([image.float() / 255 for image in images[:3]])[0].tensors
    theirs = retina_fast.convert.to_torchvision(model)
    retina_fast.export(theirs, tmp_path / "file", "torch-export", SIZE, preprocess=False)
    exported = load_exported(tmp_path / "file")
    assert exported.metadata["input"] == "float32"
    expected = comparison.eager(model)(images[:3])
    result = comparison.compare([(batch, expected)], exported)
    assert not result["lost"] or result["margin"] < 1e-6, result
    assert expected.counts.sum() > 10


@pytest.mark.parametrize(("name", "format"), ONE_EACH)
def test_wrong_inputs_and_damaged_files_are_refused(name, format, files, opened, images, tmp_path):
    exported = opened(name, format)
    with pytest.raises(UserError, match=r"images must be \(B, 3, 96, 128\), got \(9, 3, 96, 127\)"):
        exported(images[..., :-1])
    with pytest.raises(UserError, match=r"images must be \(B, 3, 96, 128\), got \(0, 3, 96, 128\)"):
        exported(images[:0])
    with pytest.raises(UserError, match=r"images must be torch.uint8, got torch.float32"):
        exported(images.float())
    content = bytearray(files(name, format).read_bytes())
    file = tmp_path / "damaged"
    content[len(content) // 2] ^= 255
    for damaged in (content, content[: len(content) // 2], b"", b"some text of no meaning" * 99):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match="damaged: damaged, or not a file that retina-fast export wrote"):
            load_exported(file)
    with pytest.raises(UserError, match="none: no such exported file"):
        load_exported(tmp_path / "none")
    with pytest.raises(UserError, match="damaged, or not a file"):
        load_exported(TREES)


def test_what_cannot_be_exported(tmp_path, monkeypatch):
    defaults: dict[str, Any] = {"format": "torch-export", "image_size": SIZE}
    path = tmp_path / "file"
    wrong: dict[str, dict[str, Any]] = {
        "format must be one of torch-export, onnx, openvino, aotinductor, got 'tflite'": {"format": "tflite"},
        r"image_size must be .*, got \(0, 64\)": {"image_size": (0, 64)},
        r"image_size must be .*, got \(64.0, 64\)": {"image_size": (64.0, 64)},
        "image_size must be .*, got 64": {"image_size": 64},
        "classes must be a list of names, got 'abc'": {"classes": "abc"},
        "would be resized to": {"image_size": (1, 999)},
        "classes must be 3, one a class, got 1": {"classes": ["tree"]},
        "category_ids must be 3, one a class, got 2": {"category_ids": [1, 2]},
    }
    for message, options in wrong.items():
        with pytest.raises(UserError, match=message):
            retina_fast.export(small(), path, **(defaults | options))
    limits = ("nms_thresh", 1.5), ("score_thresh", math.nan), ("topk_candidates", 0)
    for name, value in (*limits, ("detections_per_img", 0), ("detections_per_img", 100.0)):
        with pytest.raises(UserError, match=rf"{name} must .*, got {value}"):
            retina_fast.export(small(**{name: value}), path, "torch-export", SIZE)
    with pytest.raises(UserError, match="is a folder; give the name of a file"):
        retina_fast.export(small(), tmp_path, "torch-export", SIZE)

    with pytest.raises(UserError, match=r"weights must be float32, got torch.bfloat16: call model.float\(\)"):
        retina_fast.export(small().bfloat16(), path, "onnx", SIZE)
    with pytest.raises(UserError, match="absent: no such folder"):
        retina_fast.export(small(), tmp_path / "absent" / "file", "onnx", SIZE)

    class Own(retina_fast.RetinaNet):
        def postprocess_detections(self, head_outputs, anchors, image_shapes):
            return []

    with pytest.raises(TypeError, match="postprocessing, of its own, which an exported file would not run"):
        retina_fast.export(small(Own), path, "torch-export", SIZE)
    with pytest.raises(TypeError, match="must be a torchvision RetinaNet"):
        retina_fast.export(nn.Identity(), path, "torch-export", SIZE)
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("there-is-none",))
    with pytest.raises(UserError, match="aotinductor needs a C\\+\\+ compiler"):
        retina_fast.export(small(), path, "aotinductor", SIZE)
    assert not list(tmp_path.iterdir())


def invoke(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


@pytest.mark.slow
def test_command_line(images, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "best_dtype", lambda device: torch.float32)  # that of the file
    inputs = tmp_path / "images"
    inputs.mkdir()
    for i, image in enumerate(images[:2]):
        write_png(image, str(inputs / f"{i}.png"))
    file = tmp_path / "trees.pt2"
    result = invoke("export", "--size", "96x128", "--format", "torch-export", "--output", file)
    assert result.exit_code == 0, result.output
    found = []
    for options in ((), ("--model", file)):
        result = invoke("detect", inputs, "--output", tmp_path / "out", "--workers", 0, *options)
        assert result.exit_code == 0, result.output
        found.append(json.loads((tmp_path / "out" / "detections.json").read_text()))
    assert found[0]["categories"] == found[1]["categories"]
    assert len(found[0]["annotations"]) == len(found[1]["annotations"]) > 5
    for ours, theirs in zip(*(content["annotations"] for content in found), strict=True):
        assert ours["bbox"] == pytest.approx(theirs["bbox"], abs=1e-3)

    write_png(images[0, :, :90].contiguous(), str(inputs / "small.png"))
    result = invoke("detect", inputs, "--output", tmp_path / "out", "--workers", 0, "--model", file)
    assert result.exit_code == 0, result.output
    assert "small.png: images must be (B, 3, 96, 128), got (1, 3, 90, 128)" in " ".join(result.output.split())
    assert "it is 128x90 pixels, but the model was exported for 128x96; resize it" in " ".join(result.output.split())
    assert "1 of 3 images do not fit the model" in result.output
    assert "could not be read" not in result.output
    result = invoke("detect", inputs, "--output", tmp_path / "out", "--score", 0.01, "--model", file)
    assert result.exit_code == 1
    assert "score 0.01: the exported model gives no score under 0.05; give at least that" in result.stderr
    for arguments, message in (
        (("detect", inputs, "--model", file, "--checkpoint", TREES), "exclude each other"),
        (("detect", inputs, "--model", TREES), "damaged, or not a file"),
        (("export", "--size", "512"), "such as 512x640, got '512'"),
        (("export", "--size", "96x128", "--format", "tflite", "--output", file), "format must be one of"),
    ):
        result = invoke(*arguments)
        assert result.exit_code == 1
        assert message in " ".join(result.stderr.split())
