"""The graph that a sieve reads: its logits in eight bits, the weights of these, and the borders of features."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from retina_fast.deploy.eight_bits.sieve import MARGIN
from retina_fast.deploy.eight_bits.sieved_graph import sieved
from tests.deploy.eight_bits.everywhere import model_of, same_as_everywhere
from tests.deploy.eight_bits.pairs import INT16, largest_sums
from tests.deploy.eight_bits.test_quantize import noise


def graph(last="Conv", activation="Relu", pads=(1, 1, 1, 1), per_cell=2):
    """Two levels, of 16x16 and 8x8 cells, whose logits of three classes and box offsets are convs of one tower each, of
    these pads."""
    onnx = pytest.importorskip("onnx")
    make = onnx.helper.make_node
    nodes = [make("MaxPool", ["x"], ["x1"], "pool", kernel_shape=[2, 2], strides=[2, 2])]
    for i, level in enumerate(("x", "x1")):
        nodes += [
            make("Conv", [level, "w", "b"], [f"c{i}"], f"tower{i}", pads=(1, 1, 1, 1)),
            make(activation, [f"c{i}"], [f"r{i}"], f"relu{i}"),
            make("Conv", [f"r{i}", "w_logits", "b_logits"], [f"l{i}"], f"logits{i}", pads=pads),
            make("Conv", [f"r{i}", "w_deltas"], [f"d{i}"], f"deltas{i}", pads=pads),
        ]
    for i, name in enumerate(("l0", "l1", "d0", "d1")):
        nodes.append(make("Transpose", [name], [f"output{i}"], f"turn{i}", perm=[0, 2, 3, 1]))
    if last != "Conv":
        nodes[-1] = make("Tanh", ["d1"], ["output3"], "tanh")
    values = {
        "w": noise(4, 3, 3, 3), "b": noise(4), "w_logits": noise(3 * per_cell, 4, 3, 3, seed=1) / 3,
        "b_logits": noise(3 * per_cell) - 4, "w_deltas": noise(4 * per_cell, 4, 3, 3, seed=2),
    }  # fmt: skip
    return model_of(nodes, values)


def test_errors_of_rounded_weights_cancel_where_the_input_is_smooth():
    onnx = pytest.importorskip("onnx")
    proto = graph()
    ranges = {name: SimpleNamespace(range_value=np.array([-2.0, 2.0])) for name in ("r0", "r1", "l0", "l1")}
    made = sieved(proto, ranges)
    assert made
    held = {weight.name: onnx.numpy_helper.to_array(weight).astype(np.float64) for weight in made[0].graph.initializer}
    exact = made[1].logits.weight.double().numpy()
    step = held["sieve0_weight_scale"][:, None, None, None]
    error = held["sieve0_weight"] * step - exact
    assert np.abs(error / step).max() <= 1.0 + 1e-6
    assert np.abs((error / step).sum(axis=(2, 3))).max() <= 0.5 + 1e-6  # of single roundings up to 4.5
    assert largest_sums(held["sieve0_weight"]).max() <= INT16


def test_a_channel_without_weights_has_its_bias():
    onnx = pytest.importorskip("onnx")
    proto = graph()
    for weight in proto.graph.initializer:
        value = onnx.numpy_helper.to_array(weight).copy()
        if weight.name in ("w_logits", "b_logits"):
            value[2] = 0.0 if weight.name == "w_logits" else -4.6
            weight.CopyFrom(onnx.numpy_helper.from_array(value, weight.name))
    ranges = {name: SimpleNamespace(range_value=np.array([-2.0, 2.0])) for name in ("r0", "r1", "l0", "l1")}
    made = sieved(proto, ranges)
    assert made
    held = {weight.name: onnx.numpy_helper.to_array(weight).astype(np.float64) for weight in made[0].graph.initializer}
    np.testing.assert_allclose((held["sieve0_bias"] * held["sieve0_bias_scale"])[2], -4.6, rtol=1e-5)
    assert not held["sieve0_weight"][2].any()


@pytest.mark.parametrize(
    ("activation", "pads", "per_cell", "computed_logits"),
    [("Relu", (1, 1, 1, 1), 2, 6), ("LeakyRelu", (0, 2, 2, 0), 2, 6), ("Relu", (1, 1, 1, 1), 31, 96)],
)
def test_no_cell_above_the_threshold_is_missed(activation, pads, per_cell, computed_logits):
    """Also where 0 has another code than 0, the border is on two sides alone, and logits fill whole blocks."""
    onnx = pytest.importorskip("onnx")
    ort = pytest.importorskip("onnxruntime")
    from retina_fast.deploy.eight_bits.quantize import Quantizer

    def run(proto, x):
        session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
        return [torch.from_numpy(output) for output in session.run(None, {"x": x})]

    quantizer = Quantizer(graph("Conv", activation, pads, per_cell), (noise(1, 3, 16, 16, seed=i) for i in range(4)))
    quantized = quantizer.quantized()
    made = sieved(quantized, quantizer.ranges)
    assert made
    proto, sieve = made
    onnx.checker.check_model(proto, full_check=True)
    assert (sieve.logits.inputs[0].zero > 0) == (activation == "LeakyRelu")
    weights = {weight.name for weight in proto.graph.initializer}
    assert not {"w_logits", "b_logits", "w_deltas"} & weights  # the sieve has them
    samples = [run(proto, noise(1, 3, 16, 16, seed=i)) for i in range(4)]
    assert samples[0][0].shape == (1, 16, 16, computed_logits)
    sieve = sieve.measured(samples)
    for i, codes in enumerate(sieve.codes):
        levels = [outputs[i][..., : 3 * per_cell] for outputs in samples]
        errors = [
            sieve.logits.everywhere(outputs[2 + i], i) - codes.values(level)
            for level, outputs in zip(levels, samples, strict=True)
        ]
        too_low = max(float(error[level < 255].max()) for error, level in zip(errors, levels, strict=True))
        too_high = max(float(-error[level > 0].min()) for error, level in zip(errors, levels, strict=True))
        assert 0 < sieve.margins[i] < 1
        assert 0 < sieve.excesses[i] < 1
        assert (sieve.margins[i], sieve.excesses[i]) == pytest.approx((MARGIN * too_low, MARGIN * too_high))
    x = noise(2, 3, 24, 16, seed=9)
    exact, outputs = run(quantized, x), run(proto, x)  # the last convs of the first are in float32
    for i, features in enumerate(outputs[2:]):
        zero = (sieve.logits, sieve.deltas)[i // 2].inputs[i % 2].zero
        inside = (0, 0, -pads[1], -pads[3], -pads[0], -pads[2])
        height, width = outputs[i % 2].shape[1:3]
        assert F.pad(features, inside).shape == (2, height, width, 4)
        assert torch.equal(F.pad(F.pad(features, inside), [-side for side in inside], value=zero), features)
    logits, deltas = sieve.everywhere(outputs)
    if activation == "Relu":  # the other's output stays in float32 in the first graph
        for ours, theirs in zip(logits + deltas, exact, strict=True):
            torch.testing.assert_close(ours.permute(0, 2, 3, 1), theirs, rtol=1e-4, atol=1e-4)
    found = [same_as_everywhere(sieve, outputs, 3, threshold, 10**9) for threshold in (0.02, 0.05, 0.3, 0.9)]
    assert (found[0].counts > found[1].counts).all()
    assert (found[2].counts > 0).all()


def test_other_outputs_than_those_of_two_convs_are_left_alone():
    pytest.importorskip("onnxruntime")
    assert sieved(graph("Tanh"), {}) is None
    apart = graph()
    apart.graph.node[-5].input[1] = "w_other"  # the box offsets of the second level by another weight
    other = apart.graph.initializer[-1]
    apart.graph.initializer.add().CopyFrom(other)
    apart.graph.initializer[-1].name = "w_other"
    assert sieved(apart, {}) is None
