"""8-bit convs with float32 outputs as matrix products: the same values, and ONNX Runtime runs them in eight bits."""

import numpy as np
import pytest

from tests.deploy.eight_bits.test_quantize import noise

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

from retina_fast.deploy.eight_bits.products import convs_as_products  # noqa: E402

make, value = onnx.helper.make_node, onnx.helper.make_tensor_value_info
CHANNELS, OUTPUTS = 6, 8
KERNELS = {
    "3x3": ((3, 3), {"pads": [1, 1, 1, 1]}),
    "1x1": ((1, 1), {}),
    "1x1, every other cell": ((1, 1), {"strides": [2, 2]}),
    "no pads": ((3, 3), {}),
    "uneven": ((2, 5), {"pads": [0, 3, 1, 1]}),
    "strides": ((3, 3), {"pads": [1, 1, 1, 1], "strides": [2, 3]}),
    "dilations": ((3, 2), {"pads": [2, 0, 2, 3], "dilations": [2, 3], "strides": [1, 2]}),
}


def graph(kernel=(3, 3), bias=True, after="Relu", group=1, axis=0, dtype=np.uint8, **attributes):
    """x in eight bits -> conv -> ReLU, or something else."""
    shape = OUTPUTS, CHANNELS // group, *kernel
    weight = np.random.default_rng(1).integers(-64, 65, shape).astype(np.int8)  # see weight_scales
    values = {
        "step": np.float32(0.02), "zero": dtype(101), "weight": weight,
        "steps": np.abs(noise(weight.shape[axis])) / 100, "zeros": np.zeros(weight.shape[axis], np.int8),
        "bias": np.arange(-300, 500, 100, dtype=np.int32), "bias_steps": np.abs(noise(OUTPUTS)) * np.float32(2e-4),
        "bias_zeros": np.zeros(OUTPUTS, np.int32),
    }  # fmt: skip
    nodes = [
        make("QuantizeLinear", ["x", "step", "zero"], ["codes"], "quantize"),
        make("DequantizeLinear", ["codes", "step", "zero"], ["values"], "dequantize"),
        make("DequantizeLinear", ["weight", "steps", "zeros"], ["w"], "weights", axis=axis),
        make("DequantizeLinear", ["bias", "bias_steps", "bias_zeros"], ["b"], "biases", axis=0),
        make("Conv", ["values", "w", "b"][: 2 + bias], ["c"], "conv", group=group, **attributes),
        make(after, ["c", "step", "zero"] if after == "QuantizeLinear" else ["c"], ["y"], "after"),
    ]
    made = onnx.helper.make_graph(
        nodes,
        "graph",
        [value("x", 1, ["batch", CHANNELS, "height", "width"])],
        [value("y", 2 if after == "QuantizeLinear" else 1, [None] * 4)],
        [onnx.numpy_helper.from_array(np.asarray(number), name) for name, number in values.items()],
    )
    return onnx.helper.make_model(made, opset_imports=[onnx.helper.make_opsetid("", 19)], ir_version=10)


def run(proto, x, file=None):
    options = ort.SessionOptions()
    if file:
        options.optimized_model_filepath = str(file)
        options.log_severity_level = 3
    else:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"]).run(
        None, {"x": x}
    )[0]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", KERNELS)
def test_values_are_those_of_the_conv(name, bias, tmp_path):
    kernel, attributes = KERNELS[name]
    proto = graph(kernel, bias, **attributes)
    before = proto.SerializeToString()
    made = convs_as_products(proto)
    assert proto.SerializeToString() == before
    onnx.checker.check_model(made, full_check=True)
    assert not [node for node in made.graph.node if node.op_type == "Conv"]
    read = {name for node in made.graph.node for name in node.input} | {"y"}
    assert all(output in read for node in made.graph.node for output in node.output)
    assert {weight.name for weight in made.graph.initializer} <= read
    for shape in ((2, CHANNELS, 9, 14), (1, CHANNELS, 6, 7)):
        x = noise(*shape)
        expected = run(proto, x)
        np.testing.assert_allclose(run(made, x), expected, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(run(made, x, tmp_path / "optimised.onnx"), expected, rtol=1e-5, atol=1e-5)
    kinds = {node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node}
    assert "MatMulIntegerToFloat" in kinds
    assert not kinds & {"Conv", "FusedConv", "MatMul"}


def test_two_convs_share_weights():
    """As the levels of a head do."""
    proto = graph()
    for node in list(proto.graph.node):
        if node.op_type in ("Conv", "Relu"):
            second = onnx.helper.make_node(node.op_type, list(node.input), [f"{node.output[0]}2"], f"{node.name}2")
            second.attribute.extend(node.attribute)
            second.input[0] = "c2" if node.op_type == "Relu" else node.input[0]
            proto.graph.node.append(second)
    proto.graph.output.append(value("y2", 1, [None] * 4))
    made = convs_as_products(proto)
    onnx.checker.check_model(made, full_check=True)
    assert len([weight for weight in made.graph.initializer if weight.name.endswith("_matrix")]) == 1
    x = noise(1, CHANNELS, 8, 8)
    np.testing.assert_allclose(run(made, x), run(proto, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("attributes", "node", "i"),
    [
        ({"after": "QuantizeLinear"}, None, 0),  # it gives eight bits
        ({"auto_pad": "SAME_UPPER"}, None, 0),
        ({"group": 2}, None, 0),
        ({"axis": 1}, None, 0),  # a step for each input channel
        ({"dtype": np.int8}, None, 0),  # codes of which ONNX Runtime has no 8-bit product
        ({}, "weights", 0),  # that are computed
        ({}, "dequantize", 1),  # a step that is computed
        ({}, "conv", 0),  # of an input in float32
    ],
)
def test_other_convs_stay(attributes, node, i):
    proto = graph(**attributes)
    for changed in proto.graph.node:
        if changed.name == node:
            proto.graph.node.insert(0, make("Identity", [changed.input[i]], ["computed"], "computed"))
            changed.input[i] = "computed"
            break
    assert convs_as_products(proto).SerializeToString() == proto.SerializeToString()
