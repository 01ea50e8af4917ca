"""Exported files in eight bits: they find what the model finds, in runtimes that know nothing of this package."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.io import ImageReadMode, decode_image, write_png

import retina_fast
from retina_fast import load_exported
from retina_fast.data.errors import UserError
from retina_fast.deploy.eight_bits.agreement import compare
from retina_fast.deploy.eight_bits.onnx_graph import eight_bits
from retina_fast.deploy.export import write
from retina_fast.deploy.export.onnx_file import KEY, OUTPUTS, QUANTIZED_OPSET, onnx_session
from retina_fast.detections import Detections
from retina_fast.predict.load import TREES, load_model
from tests.deploy.export.test_export import PHOTO, SIZE, invoke, small, spread
from tests.instruments.exported import crops, eager


@pytest.fixture(scope="module", autouse=True)
def _one_thread(one_thread):
    pass


@pytest.fixture(scope="module")
def images():
    return crops([decode_image(str(PHOTO), ImageReadMode.RGB)], 8, *SIZE)


@pytest.fixture(scope="module")
def model(images):
    model = spread(small(), images)
    model.classes, model.category_ids = ["cat", "dog", "cow"], [3, 7, 9]
    return model


@pytest.fixture(scope="module")
def in_float32():
    """The graph that ``written`` quantises, when it is written."""
    return []


@pytest.fixture(scope="module")
def written(model, images, in_float32, tmp_path_factory):
    def noted(proto, *arguments):
        in_float32.append(proto)
        return eight_bits(proto, *arguments)

    path = tmp_path_factory.mktemp("quantized") / "model.onnx"
    with warnings.catch_warnings(record=True) as said, pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("always", UserWarning)
        patch.setattr(write, "eight_bits", noted)
        described = retina_fast.export(model, path, "onnx", SIZE, quantize=(image for image in images))
    return path, described, [str(warning.message) for warning in said]


def as_far_as_the_heads(path: Path) -> Any:
    """The part of a file that ends with the outputs of the heads' last convs."""
    import onnx

    proto = onnx.shape_inference.infer_shapes(onnx.load(path))
    last = [f"model.head.{name}.weight" for name in ("classification_head.cls_logits", "regression_head.bbox_reg")]
    convs = [node for node in proto.graph.node if node.op_type == "Conv"]
    outputs = [node.output[0] for weight in last for node in convs if node.input[1] == weight]
    return onnx.utils.Extractor(proto).extract_model(["images"], outputs)


def test_it_finds_what_the_model_finds(written, model, images):
    path, described, said = written
    exported = load_exported(path)
    quantized = exported.metadata["quantized"]
    assert quantized == described["quantized"]
    assert quantized["calibrated_with"] == quantized["images"] == len(images)
    assert quantized["layers"] == 2 + 8  # the backbone's, and two towers of four; not the last ones
    assert quantized["summary"].startswith("10 layers in eight bits, 0 left in float32, calibrated with 9 images: ")
    kept = compare(zip(eager(model)(images).to_list(), exported(images).to_list(), strict=True))
    assert (kept.found, kept.kept, kept.new) == (quantized["found"], quantized["kept"], quantized["new"])
    assert kept.found > 20
    assert kept.kept > 0.9 * kept.found  # random weights have more detections at the thresholds than trained ones
    changed = kept.kept < 0.95 * kept.found or kept.new > 0.05 * kept.found
    assert any(f"detects differently in eight bits: {kept}" in message for message in said) == changed


def test_names_are_the_models_own_where_none_are_given(written):
    exported, described = load_exported(written[0]), written[1]
    assert exported.classes == described["classes"] == ["cat", "dog", "cow"]
    assert exported.metadata["category_ids"] == described["category_ids"] == [3, 7, 9]


def test_the_file_holds_standard_operators_alone(written):
    import onnx

    proto = onnx.load(written[0])
    onnx.checker.check_model(proto, full_check=True)
    assert [(entry.domain, entry.version) for entry in proto.opset_import] == [("", QUANTIZED_OPSET)]
    assert {node.domain for node in proto.graph.node} == {""}
    assert [entry.key for entry in proto.metadata_props] == [KEY, "sha256"]
    weights = {weight.name: weight.data_type for weight in proto.graph.initializer}
    floats = {name for name, kind in weights.items() if kind == onnx.TensorProto.FLOAT and name.endswith("weight")}
    assert floats == {"model.head.classification_head.cls_logits.weight", "model.head.regression_head.bbox_reg.weight"}


def test_the_reference_evaluator_computes_the_same(written, images):
    """The heads' outputs, and the detections. A sum that is rounded otherwise may be a neighbouring code of 8 bits."""
    from onnx.reference import ReferenceEvaluator

    heads = as_far_as_the_heads(written[0])
    batch = {"images": images[3:5].numpy()}
    reference: Any = ReferenceEvaluator(heads).run(None, batch)
    assert len(reference) == 4
    for ours, theirs in zip(onnx_session(heads.SerializeToString()).run(None, batch), reference, strict=True):
        assert np.linalg.norm(ours - theirs) < 1e-2 * np.linalg.norm(theirs - theirs.mean())
    files = load_exported(written[0])(images[3:5])
    found: Any = ReferenceEvaluator(str(written[0])).run(None, batch)
    evaluated = Detections(*map(torch.from_numpy, found))
    kept = compare(zip(files.to_list(), evaluated.to_list(), strict=True))
    assert kept.found > 100
    assert kept.kept > 0.95 * kept.found
    assert kept.new < 0.05 * kept.found


def test_symmetric_as_tensorrt_takes_it(model, images, written, in_float32, tmp_path, monkeypatch):
    """Its ONNX parser refuses other zero points than 0, and biases in 32 bits."""
    import onnx
    from onnx import numpy_helper

    monkeypatch.setattr(torch.export, "export", lambda *arguments, **kwargs: None)  # it is the same graph
    monkeypatch.setattr(write, "translate", lambda *arguments, **kwargs: in_float32[0])
    described = retina_fast.export(model, tmp_path / "m.onnx", "onnx", SIZE, quantize=images, symmetric=True)
    quantized = described["quantized"]
    assert quantized["kept"] > 0.85 * quantized["found"]
    proto = onnx.load(tmp_path / "m.onnx")
    constants = {weight.name: numpy_helper.to_array(weight) for weight in proto.graph.initializer}
    made: dict[str, Any] = {output: node for node in proto.graph.node for output in node.output}
    pairs = [node for node in proto.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    for node in pairs:
        zero_point = constants[node.input[2]]
        assert zero_point.dtype == np.int8
        assert not zero_point.any()
    convs = [node for node in proto.graph.node if node.op_type == "Conv"]
    in_eight_bits = [conv for conv in convs if conv.input[1] in made]  # weights behind a DequantizeLinear
    assert 0 < len(in_eight_bits) < len(convs)
    assert any(len(conv.input) == 3 for conv in in_eight_bits)
    for conv in in_eight_bits:
        weight = made[conv.input[1]]
        assert (weight.op_type, constants[weight.input[0]].dtype) == ("DequantizeLinear", np.int8)
        assert constants[weight.input[1]].shape == constants[weight.input[0]].shape[:1]
        assert made[conv.input[0]].op_type == "DequantizeLinear"
        assert all(constants[bias].dtype == np.float32 for bias in conv.input[2:])


def test_bad_calibration_is_refused_before_anything_is_traced(model, images, tmp_path, monkeypatch):
    path = tmp_path / "model.onnx"
    monkeypatch.setattr(torch.export, "export", lambda *arguments, **kwargs: pytest.fail("traced"))
    with pytest.raises(UserError, match="quantize serves the format onnx alone, got 'torch-export'"):
        retina_fast.export(model, path, "torch-export", SIZE, quantize=images)
    with pytest.raises(UserError, match=r"float32_share must lie in \[0, 1\], got 1.5"):
        retina_fast.export(model, path, "onnx", SIZE, quantize=images, float32_share=1.5)
    with pytest.raises(UserError, match="symmetric=True is of a model in eight bits: give quantize, too"):
        retina_fast.export(model, path, "onnx", SIZE, symmetric=True)
    with pytest.raises(UserError, match="absent: no such folder of images"):
        retina_fast.export(model, path, "onnx", SIZE, quantize=tmp_path / "absent")
    with pytest.raises(UserError, match="must be at least one, got none"):
        retina_fast.export(model, path, "onnx", SIZE, quantize=[])
    with pytest.raises(UserError, match="calibration image 0 must be 96x128 pixels, height and width, got 96x127"):
        retina_fast.export(model, path, "onnx", SIZE, quantize=images[:, :, :, 1:])
    with pytest.raises(UserError, match=r"calibration image 0 must be floating .*, got values from 0 to 255"):
        retina_fast.compile_inference(model, list(images.float()), dtype=torch.int8)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_what_stays_in_float32_is_said_and_brings_the_file_nearer(model, images, written, tmp_path):
    described = retina_fast.export(model, tmp_path / "m.onnx", "onnx", SIZE, quantize=images, float32_share=0.5)
    left = described["quantized"]["float32_layers"]
    assert 0 < len(left) < 10
    assert described["quantized"]["layers"] == 10 - len(left)
    retina_fast.export(model, tmp_path / "exact.onnx", "onnx", SIZE)
    files = [as_far_as_the_heads(path) for path in (tmp_path / "exact.onnx", tmp_path / "m.onnx", written[0])]
    exact, *others = (onnx_session(file.SerializeToString()).run(None, {"images": images.numpy()}) for file in files)
    near, far = (
        [np.linalg.norm(a - b) / np.linalg.norm(a - a.mean()) for a, b in zip(exact, other, strict=True)]
        for other in others
    )
    assert np.linalg.norm(near) < 0.9 * np.linalg.norm(far)
    assert any(name in layer for layer in left for name in ("classification_head", "regression_head"))


@pytest.mark.slow
def test_images_of_another_domain_are_warned_of(images, tmp_path):
    model = load_model(TREES)[0].cpu()
    noise = torch.randint(0, 256, (8, 3, *SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with pytest.warns(UserWarning, match="the model finds nothing in the images for calibration"):
        retina_fast.export(model, tmp_path / "model.onnx", "onnx", SIZE, quantize=noise)


def test_command_line(tmp_path, monkeypatch):
    seen: list[Any] = []

    def export(*arguments):
        seen.extend(arguments)
        return {"quantized": {"summary": "9 layers in eight bits"}}

    assert "absent: no such folder" in " ".join(
        invoke("export", "--size", "96x128", "--output", tmp_path / "a.onnx", "--quantize", tmp_path / "absent")
        .stderr.split()
    )  # fmt: skip
    monkeypatch.setattr("retina_fast.deploy.export.write.export", export)
    result = invoke("export", "--size", "96x128", "--output", tmp_path / "a.onnx", "--quantize", tmp_path)
    assert result.exit_code == 0, result.output
    assert "9 layers in eight bits" in result.output
    assert seen[1:5] == [tmp_path / "a.onnx", "onnx", (96, 128), True]
    assert seen[-3:] == [tmp_path, 0, False]


@pytest.mark.slow
def test_the_embedded_detector_in_three_runtimes(images, tmp_path):
    """From a folder of pictures, as a user would."""
    openvino = pytest.importorskip("openvino")
    for i, image in enumerate(images):
        write_png(image, str(tmp_path / f"{i}.png"))
    path = tmp_path / "trees.onnx"
    result = invoke("export", "--size", "96x128", "--output", path, "--quantize", tmp_path)
    assert result.exit_code == 0, result.output
    assert load_exported(path).metadata["quantized"]["summary"] in " ".join(result.output.split())
    expected = eager(load_model(TREES)[0].cpu())(images).to_list()
    compiled = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    outputs = compiled({"images": images.numpy()})
    theirs = Detections(*(torch.from_numpy(outputs[name]) for name in OUTPUTS))
    for ours in (load_exported(path)(images), theirs):
        kept = compare(zip(expected, ours.to_list(), strict=True))
        assert kept.found > 20
        assert kept.kept >= 0.95 * kept.found
