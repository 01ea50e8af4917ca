"""GroupNorm by sums in a graph: the same values, and nothing else in the graph changes."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from retina_fast.deploy.eight_bits.group_norm import norms_by_sums, norms_in_float32  # noqa: E402
from retina_fast.deploy.export.onnx_file import QUANTIZED_OPSET, onnx_session, translate  # noqa: E402

make, array, value = onnx.helper.make_node, onnx.numpy_helper.from_array, onnx.helper.make_tensor_value_info
STEP, ZERO = np.float32(0.3), np.uint8(171)


def graph(eight_bits, groups=4, channels=12, epsilon=1e-5, ones=1.0, twice=False):
    """GroupNorm as the exporter writes it, of the input or of its codes, and the ReLU of it."""
    nodes = [
        make("Reshape", ["x", "groups"], ["rows"]),
        make("InstanceNormalization", ["rows", "ones", "zeros"], ["normed"], epsilon=epsilon),
        make("Shape", ["x"], ["shape"]),
        make("Reshape", ["normed", "shape"], ["back"]),
        make("Mul", ["back", "weight"], ["product"]),
        make("Add", ["product", "bias"], ["norm"]),
        make("Relu", ["norm"], ["y"]),
    ]
    given, kind = ("codes", 2) if eight_bits else ("x", 1)
    if eight_bits:
        nodes.insert(0, make("DequantizeLinear", ["codes", "step", "zero"], ["x"]))
    torch.manual_seed(0)
    held = {
        "groups": np.array([0, groups, -1]), "ones": np.full(groups, ones, np.float32),
        "zeros": np.zeros(groups, np.float32), "step": STEP, "zero": ZERO,
        "weight": torch.randn(channels, 1, 1).numpy(), "bias": torch.randn(channels, 1, 1).numpy(),
    }  # fmt: skip
    outputs = ["y", "product"] if twice else ["y"]
    made = onnx.helper.make_graph(
        nodes,
        "graph",
        [value(given, kind, ["batch", channels, "height", "width"])],
        [value(name, 1, [None] * 4) for name in outputs],
        [array(np.asarray(number), name) for name, number in held.items()],
    )
    return onnx.helper.make_model(made, opset_imports=[onnx.helper.make_opsetid("", 19)], ir_version=10), held


def run(proto, x):
    onnx.checker.check_model(proto, full_check=True)
    session = onnx_session(proto.SerializeToString())
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x})[0])


def kinds(proto):
    return [node.op_type for node in proto.graph.node]


@pytest.mark.parametrize("eight_bits", [False, True])
@pytest.mark.parametrize("groups", [1, 4, 12])
def test_the_values_are_those_of_group_norm(eight_bits, groups):
    proto, held = graph(eight_bits, groups, epsilon=1e-3)
    before = proto.SerializeToString()
    made = norms_by_sums(proto)
    assert proto.SerializeToString() == before
    assert "InstanceNormalization" not in kinds(made)
    x = (torch.randn(2, 12, 7, 9) * 20 + 140).clamp(0, 255).round()
    x[1, :4] = 140  # a group without variance, where there are four
    x[0, 4:8] = 165 + 5 * (torch.rand(4, 7, 9) < 0.3).float()
    given = x.to(torch.uint8).numpy() if eight_bits else (x - 140).numpy()
    values = (x.double() - int(ZERO)) * float(STEP) if eight_bits else x.double() - 140
    weight, bias = (torch.from_numpy(held[name]).flatten().double() for name in ("weight", "bias"))
    expected = F.group_norm(values, groups, weight, bias, 1e-3).relu()
    torch.testing.assert_close(run(made, given).double(), expected, rtol=1e-4, atol=2e-4)


def test_a_large_map_far_from_the_zero_point_keeps_its_variance():
    proto, held = graph(True)
    codes = (torch.randn(1, 12, 160, 200) * 1.5 + 171).round().clamp(0, 255)
    weight, bias = (torch.from_numpy(held[name]).flatten().double() for name in ("weight", "bias"))
    expected = F.group_norm((codes.double() - int(ZERO)) * float(STEP), 4, weight, bias).relu()
    given = run(norms_by_sums(proto), codes.to(torch.uint8).numpy()).double()
    assert float((given - expected).norm() / expected.norm()) < 1e-3  # ONNX Runtime adds up float32


@pytest.mark.parametrize("other_reader", [False, True])
def test_a_norm_reads_what_a_conv_gives_before_it_is_rounded(other_reader):
    proto, held = graph(True)
    del proto.graph.node[0]  # what dequantises the input
    before = [
        make("Conv", ["codes", "kernel"], ["given"]),
        make("QuantizeLinear", ["given", "step", "zero"], ["rounded"]),
        make("DequantizeLinear", ["rounded", "step", "zero"], ["x"]),
    ]
    nodes = [*before, *proto.graph.node, *([make("Neg", ["x"], ["other"])] if other_reader else [])]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    kernel = torch.randn(12, 12, 1, 1)
    proto.graph.initializer.append(array(kernel.numpy(), "kernel"))
    proto.graph.input[0].type.tensor_type.elem_type = 1
    if other_reader:
        proto.graph.output.append(value("other", 1, [None] * 4))
    x = torch.randn(2, 12, 7, 9)
    weight, bias = (torch.from_numpy(held[name]).flatten() for name in ("weight", "bias"))
    conv = F.conv2d(x, kernel)
    expected = F.group_norm(conv, 4, weight, bias).relu()
    assert not torch.allclose(run(proto, x.numpy()), expected, atol=1e-2)  # the codes have steps of 0.3
    made = norms_in_float32(proto)
    for found in (made, norms_by_sums(made)):
        torch.testing.assert_close(run(found, x.numpy()), expected, rtol=1e-4, atol=1e-4)
    if other_reader:
        session = onnx_session(norms_by_sums(made).SerializeToString())
        rounded = ((conv / float(STEP)).round() + int(ZERO)).clamp(0, 255) - int(ZERO)
        other = torch.from_numpy(session.run(["other"], {"codes": x.numpy()})[0])
        torch.testing.assert_close(other, -rounded * float(STEP))


@pytest.mark.parametrize("other", [{"ones": 2.0}, {"twice": True}])
def test_what_is_no_group_norm_stays(other):
    proto, _ = graph(False, **other)  # a scale of its own; a product that is an output, too
    assert norms_by_sums(proto).SerializeToString() == proto.SerializeToString()


@pytest.mark.slow
def test_the_norms_that_the_exporter_writes_are_found():
    torch.manual_seed(0)
    norm = nn.GroupNorm(2, 8)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    module = nn.Sequential(nn.Conv2d(3, 8, 1), norm, nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    sides = {0: torch.export.Dim("batch"), 2: torch.export.Dim("height"), 3: torch.export.Dim("width")}
    shapes = {"input": sides}
    with torch.no_grad():
        program = torch.export.export(module, (torch.rand(2, 3, 12, 16),), dynamic_shapes=shapes)
        proto = translate(program, shapes, ["y"], QUANTIZED_OPSET)
        assert kinds(proto).count("InstanceNormalization") == 1
        made = norms_by_sums(proto)
        assert kinds(made).count("InstanceNormalization") == 0
        x = torch.randn(3, 3, 9, 20)
        torch.testing.assert_close(run(made, x.numpy()), module(x), rtol=1e-4, atol=1e-5)
