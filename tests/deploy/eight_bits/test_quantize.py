"""Eight bits: what is quantised and what is not, that runtimes agree, and what is said of bad calibration."""

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.io import write_png

from retina_fast.data.errors import UserError
from retina_fast.deploy.eight_bits.agreement import compare
from retina_fast.deploy.eight_bits.calibration import MOST_FILES, calibration_images
from retina_fast.deploy.export.onnx_file import onnx_session
from tests.deploy.eight_bits.pairs import INT16, largest_sums
from tests.deploy.pictures import images as pictures


def noise(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def graph():
    """x - mean -> conv -> relu -> pool -> conv + itself -> conv -> relu -> conv -> times 2."""
    onnx = pytest.importorskip("onnx")
    make, array = onnx.helper.make_node, onnx.numpy_helper.from_array
    pads = {"pads": [1, 1, 1, 1]}
    nodes = [
        make("Sub", ["x", "mean"], ["centred"], "sub"),
        make("Conv", ["centred", "w1", "b1"], ["c1"], "first", **pads),
        make("Relu", ["c1"], ["r1"], "relu"),
        make("MaxPool", ["r1"], ["p1"], "pool", kernel_shape=[2, 2], strides=[2, 2]),
        make("Conv", ["p1", "w2", "b2"], ["c2"], "second", **pads),
        make("Add", ["c2", "p1"], ["a2"], "sum"),
        make("Conv", ["a2", "w2", "b2"], ["c3"], "third", **pads),
        make("Relu", ["c3"], ["r3"], "relu after it"),
        make("Conv", ["r3", "w3", "b3"], ["l1"], "last", **pads),
        make("Mul", ["l1", "two"], ["y"], "mul"),
    ]
    channels = np.array([1, 10, 0.1, 3], np.float32)[:, None, None, None]  # a scale a channel is worth its while
    values = {
        "w1": noise(4, 3, 3, 3) * channels, "b1": noise(4), "w2": noise(4, 4, 3, 3, seed=1), "b2": noise(4, seed=1),
        "w3": noise(2, 4, 3, 3, seed=2), "b3": noise(2, seed=2), "mean": np.float32(0.5), "two": np.float32(2),
    }  # fmt: skip
    value = onnx.helper.make_tensor_value_info
    made = onnx.helper.make_graph(
        nodes,
        "graph",
        [value("x", 1, ["batch", 3, 16, 16])],
        [value("y", 1, ["batch", 2, 8, 8])],
        [array(np.asarray(number), name) for name, number in values.items()],
    )
    model = onnx.helper.make_model(made, opset_imports=[onnx.helper.make_opsetid("", 19)], ir_version=10)
    model.metadata_props.add(key="ours", value="stays")
    return onnx.shape_inference.infer_shapes(model)


@pytest.fixture(scope="module")
def quantizer():
    pytest.importorskip("onnxruntime")
    from retina_fast.deploy.eight_bits.quantize import Quantizer

    return Quantizer(graph(), (noise(1, 3, 16, 16, seed=i) for i in range(4)))


def run(model, x, plainly=False):
    """``plainly``: each node by itself, so that convs of codes compute in float32."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    if plainly:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


def test_convs_and_what_lies_between_are_quantised(quantizer):
    import onnx

    made = quantizer.quantized()
    onnx.checker.check_model(made, full_check=True)
    weights = {weight.name: onnx.numpy_helper.to_array(weight) for weight in made.graph.initializer}
    assert [layer.name for layer in quantizer.layers] == ["w1", "w2"]
    assert [layer.nodes for layer in quantizer.layers] == [("first",), ("third", "second")]
    for name in ("w1", "w2"):
        assert weights[f"{name}_quantized"].dtype == np.int8
        assert weights[f"{name}_scale"].shape == (4,)
        assert not weights[f"{name}_zero_point"].any()
        assert largest_sums(weights[f"{name}_quantized"]).max() <= INT16
    assert {weights[f"b{i}_quantized"].dtype for i in (1, 2)} == {np.dtype(np.int32)}
    assert weights["w3"].dtype == weights["b3"].dtype == np.float32
    assert {node.domain for node in made.graph.node} == {""}
    assert [(entry.domain, entry.version) for entry in made.opset_import] == [("", 19)]
    assert "Relu" not in {node.op_type for node in made.graph.node}  # in 8 bits it is the least value's clamp
    quantised = {name for node in made.graph.node if node.op_type == "QuantizeLinear" for name in node.input[:1]}
    assert {"centred", "c2", "a2", "r3"} <= quantised
    assert not {"x", "c3", "l1", "y"} & quantised
    assert {entry.key: entry.value for entry in made.metadata_props} == {"ours": "stays"}


def test_a_shape_is_read_of_the_codes():
    """ONNX Runtime gives each reader of the values a DequantizeLinear of its own, and so would a Shape take a pass."""
    import onnx

    from retina_fast.deploy.eight_bits.quantize import Quantizer

    proto = graph()
    proto.graph.node.append(onnx.helper.make_node("Shape", ["a2"], ["sides"], "shape"))
    proto.graph.output.append(onnx.helper.make_tensor_value_info("sides", onnx.TensorProto.INT64, [4]))
    made = Quantizer(proto, [noise(1, 3, 16, 16)]).quantized()
    made_by = {output: node.op_type for node in made.graph.node for output in node.output}
    shape = next(node for node in made.graph.node if node.op_type == "Shape")
    assert made_by[shape.input[0]] == "QuantizeLinear"
    session = onnx_session(made.SerializeToString())
    assert session.run(["sides"], {"x": noise(2, 3, 16, 16)})[0].tolist() == [2, 4, 8, 8]


def test_eight_bits_are_near_float32_in_two_runtimes(quantizer):
    from onnx.reference import ReferenceEvaluator

    made, x = quantizer.quantized(), noise(2, 3, 16, 16, seed=9)
    expected, ours = run(graph(), x), run(made, x)
    change = np.linalg.norm(ours - expected) / np.linalg.norm(expected)
    assert 1e-4 < change < 0.05, change
    reference: Any = ReferenceEvaluator(made).run(None, {"x": x})
    np.testing.assert_allclose(ours, reference[0], atol=0.02 * np.abs(expected).max())


@pytest.mark.parametrize("symmetric", [False, True])
def test_no_product_is_lost_on_this_processor(symmetric):
    """With weights of one sign, whose pairs would exceed 16 bits if they had all 256 steps."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from retina_fast.deploy.eight_bits.quantize import Quantizer

    proto = graph()
    for weight in proto.graph.initializer:
        if weight.name in ("w1", "w2"):
            value = np.abs(onnx.numpy_helper.to_array(weight)) + 3
            weight.CopyFrom(onnx.numpy_helper.from_array(value.astype(np.float32), weight.name))
    feeds = [np.abs(noise(1, 3, 16, 16, seed=i)) for i in range(4)]
    made = Quantizer(proto, feeds, symmetric).quantized()
    plain = run(made, feeds[0], plainly=True)
    np.testing.assert_allclose(run(made, feeds[0]), plain, atol=0.01 * np.abs(plain).max())


def test_a_layer_is_tried_with_the_activations_that_bound_its_outputs(quantizer, monkeypatch):
    made, tried = quantizer._made, []

    def noted(proto, nodes):
        tried.append(set(nodes))
        return made(proto, nodes)

    monkeypatch.setattr(quantizer, "_made", noted)
    quantizer.most_changing(0.5, [noise(1, 3, 16, 16)])
    assert tried == [{"first", "relu"}, {"third", "second", "relu after it"}]


def test_layers_that_stay_in_float32(quantizer):
    import onnx

    x = noise(2, 3, 16, 16, seed=9)
    expected = run(graph(), x)

    def change(model):
        return np.linalg.norm(run(model, x) - expected) / np.linalg.norm(expected)

    made = quantizer.quantized(but=["w2"])
    weights = {weight.name: onnx.numpy_helper.to_array(weight) for weight in made.graph.initializer}
    assert weights["w2"].dtype == np.float32
    assert weights["w1_quantized"].dtype == np.int8
    assert "c2" not in {node.input[0] for node in made.graph.node if node.op_type == "QuantizeLinear"}
    assert 0 < change(made) < change(quantizer.quantized())
    assert change(quantizer.quantized(but=["w1", "w2"])) == 0

    feeds = [noise(1, 3, 16, 16, seed=i) for i in range(2)]
    alone = {name: change(quantizer.quantized(but={"w1", "w2"} - {name})) for name in ("w1", "w2")}
    products = {"w1": 16 * 16 * 4 * 3 * 9, "w2": 2 * 8 * 8 * 4 * 4 * 9}  # 27,648 and 18,432
    first = max(products, key=lambda name: alone[name] ** 2 / products[name])
    assert quantizer.most_changing(0, feeds) == []
    assert quantizer.most_changing(1, feeds)[0] == first
    assert sorted(quantizer.most_changing(1, feeds)) == ["w1", "w2"]
    assert quantizer.most_changing(0.41, feeds) == ["w2"]  # 40% of them
    assert quantizer.most_changing(0.39, feeds) == []


@pytest.mark.filterwarnings("ignore:All-NaN")
def test_no_conv_to_quantise_and_values_that_are_not_finite():
    pytest.importorskip("onnxruntime")
    from retina_fast.deploy.eight_bits.quantize import Quantizer

    model = graph()
    del model.graph.node[1:8]
    model.graph.node[1].input[0] = "centred"
    with pytest.raises(UserError, match="has no conv that could compute in eight bits"):
        Quantizer(model, [])
    with pytest.raises(UserError, match="values that are not finite for the calibration images"):
        Quantizer(graph(), [np.full((1, 3, 16, 16), np.nan, np.float32)])


def test_calibration_images_of_folders_and_lists(tmp_path):
    for i in range(9):
        write_png(pictures((8, 12))[0], str(tmp_path / f"{i}.png"))
    (tmp_path / "notes.txt").write_text("no image")
    given = pictures((8, 12))[0]
    assert len(list(calibration_images(tmp_path, (8, 12)))) == 9
    assert all(torch.equal(image, given) for image in calibration_images(str(tmp_path)))
    drawn = []

    def lazily():
        for i in range(10):
            drawn.append(i)
            yield given

    images = calibration_images(lazily())
    next(images)
    assert drawn == [0]
    prepared = torch.randn(8, 3, 4, 4)
    assert len(list(calibration_images(prepared, (4, 4), prepared=True))) == 8


def test_of_a_large_folder_some_images_are_read(tmp_path, monkeypatch):
    for i in range(2 * MOST_FILES):
        (tmp_path / f"{i:04}.png").touch()
    seen: list[str] = []

    def read(path):
        seen.append(path.stem)
        return pictures((8, 12))[0]

    monkeypatch.setattr("retina_fast.deploy.eight_bits.calibration.read_image", read)
    assert len(list(calibration_images(tmp_path))) == MOST_FILES
    assert seen == [f"{2 * i:04}" for i in range(MOST_FILES)]


def test_bad_calibration_images_are_named(tmp_path):
    good = pictures((8, 12))[0]
    (tmp_path / "broken.png").write_bytes(b"not an image")
    (tmp_path / "empty").mkdir()
    wrong: dict[str, Any] = {
        "at least one, got none": [],
        "the image for calibration must show something": [torch.zeros(3, 8, 12)],
        "the 9 images for calibration must show something": [torch.full((3, 8, 12), i / 9) for i in range(9)],
        "calibration image 1 must be 8x12 pixels, height and width, got 8x13: crop": [good, pictures((8, 13))[0]],
        r"calibration image 0 must be \(3, H, W\), got \(1, 8, 12\)": [good[:1]],
        "calibration image 1 must be a Tensor": [good, "a.png"],
        "calibration image 0 must be floating .*, got values from 0 to 255": [good.float().clamp(0, 1) * 255],
        "calibration image 0 must be uint8 in .0, 255. or floating point in .0, 1., got torch.int64": [good.long()],
        "broken.png: not a readable image": tmp_path,
        "empty: holds no image": tmp_path / "empty",
        "absent: no such folder of images": str(tmp_path / "absent"),
        "must be a list or another iterable of images, or a folder, got <class 'int'>": 3,
    }  # fmt: skip
    for message, images in wrong.items():
        with pytest.raises(UserError, match=message):
            list(calibration_images(images, (8, 12)))
    with pytest.raises(UserError, match="calibration image 0 must be float32, as the model's transform makes it"):
        list(calibration_images([good], (8, 12), prepared=True))
    with pytest.raises(UserError, match="prepared images cannot be read from image files"):
        calibration_images(tmp_path, prepared=True)
    with pytest.warns(UserWarning, match="calibrated with 2 images alone, so"):
        list(calibration_images([good, good]))
    black = torch.zeros_like(good)
    with pytest.warns(UserWarning, match=r"calibrated with 1 images alone \(7 more have a single colour each\)"):
        list(calibration_images([good] + [black] * 7))


def found(*boxes, scores, labels=None):
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "scores": torch.tensor(scores),
        "labels": torch.tensor(labels or [1] * len(boxes)),
    }


def test_detections_that_are_kept():
    a, b, c = (0, 0, 10, 10), (20, 20, 30, 30), (50, 50, 60, 60)
    theirs = found(a, b, c, scores=[0.9, 0.5, 0.1])  # the last one does not count
    moved = found((0, 0, 10, 12), b, scores=[0.85, 0.5])
    kept = compare([(theirs, moved)])
    assert (kept.found, kept.kept, kept.new, kept.boxes) == (2, 2, 0, 2.0)
    assert kept.scores == pytest.approx(0.05)
    other_label = found(a, b, scores=[0.9, 0.5], labels=[1, 2])
    lower = found(a, b, scores=[0.9, 0.35])
    for changed in (other_label, lower, found(a, c, scores=[0.9, 0.5])):
        kept = compare([(theirs, changed), (theirs, theirs)])
        assert (kept.images, kept.found, kept.kept, kept.new) == (2, 4, 3, 1)
        with pytest.warns(UserWarning, match="the file detects differently in eight bits: 3 of 4 detections kept"):
            kept.warn("the file")
    nothing = found(scores=[])
    kept = compare([(nothing, nothing)])
    with pytest.warns(UserWarning, match="the model finds nothing in the images for calibration"):
        kept.warn("the file")
    with pytest.warns(UserWarning, match="the model finds 8 objects in 4 images for calibration, which is too few"):
        compare([(theirs, theirs)] * 4).warn("the file")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compare([(theirs, theirs)] * 5).warn("the file")
