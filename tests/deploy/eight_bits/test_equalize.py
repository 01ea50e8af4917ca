"""Channels before a last conv are brought to like ranges, and nothing changes in float32."""

import numpy as np
import pytest

from tests.deploy.eight_bits.test_quantize import noise

CHANNELS = np.array([1, 4, 0.5, 2], np.float32)
OUTPUTS = ["lx", "ly", "o", "twice"]


def affine(make, level):
    """The last two nodes of a GroupNorm."""
    return [
        make("Mul", [f"c{level}", "factor"], [f"m{level}"], f"times{level}"),
        make("Add", ["summand", f"m{level}"], [f"n{level}"], f"plus{level}"),
    ]


def batch_norm(make, level):
    """Each level has its own."""
    names = [f"{name}{level}" for name in ("weight", "bias", "mean", "var")]
    return [make("BatchNormalization", [f"c{level}", *names], [f"n{level}"], f"norm{level}")]


def none(make, level):
    return []


def graph(between=none, relu="Relu", others=None):
    """Two levels x and y, each of a tower conv, what lies ``between``, a ReLU r and a last conv; and other nodes, of
    which one reads a constant of the norms."""
    onnx = pytest.importorskip("onnx")
    make, array = onnx.helper.make_node, onnx.numpy_helper.from_array
    pads = {"pads": [1, 1, 1, 1]}
    nodes = [make("MaxPool", ["x"], ["y"], "pool", kernel_shape=[2, 2], strides=[2, 2])]
    for level in "xy":
        made = between(make, level)
        nodes += [
            make("Conv", [level, "w", "b"], [f"c{level}"], f"tower{level}", **pads),
            *made,
            *([make(relu, [f"n{level}" if made else f"c{level}"], [f"r{level}"], f"relu{level}")] if relu else ()),
            make("Conv", [f"r{level}" if relu else f"c{level}", "last", "lb"], [f"l{level}"], f"last{level}", **pads),
        ]
    nodes.append(make("Conv", ["x", "w_other"], ["o"], "other", **pads))
    nodes.append(make("Add", ["factor", "factor"], ["twice"], "twice"))
    for node, i, name in others or ():
        next(made for made in nodes if made.name == node).input[i] = name
    values = {
        "w": noise(4, 3, 3, 3) * (CHANNELS[:, None, None, None] if between is none else 1), "b": noise(4),
        "last": noise(2, 4, 3, 3, seed=1), "lb": noise(2), "w_other": noise(4, 3, 3, 3, seed=2),
        "factor": CHANNELS[:, None, None], "summand": noise(4, 1, 1),
    }  # fmt: skip
    for level in "xy":
        values |= {f"weight{level}": CHANNELS, f"bias{level}": noise(4), f"mean{level}": noise(4, seed=3)}
        values[f"var{level}"] = noise(4, seed=4) ** 2 + 1
    used = {name for node in nodes for name in node.input}
    value = onnx.helper.make_tensor_value_info
    made = onnx.helper.make_graph(
        nodes,
        "graph",
        [value("x", 1, [1, 3, 16, 16])],
        [value(name, 1, None) for name in OUTPUTS],
        [array(number, name) for name, number in values.items() if name in used],
    )
    return onnx.helper.make_model(made, opset_imports=[onnx.helper.make_opsetid("", 19)], ir_version=10)


FEEDS = [noise(1, 3, 16, 16, seed=i) for i in range(3)]


def run(proto, names, feed):
    ort = pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    proto = onnx.ModelProto.FromString(proto.SerializeToString())
    del proto.graph.output[:]
    proto.graph.output.extend(onnx.helper.make_tensor_value_info(name, 1, None) for name in names)
    return ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"]).run(names, {"x": feed})


def maxima(proto):
    """(L, C): the largest feature that the last conv reads in each channel."""
    read = [next(node for node in proto.graph.node if node.name == f"last{level}").input[0] for level in "xy"]
    of_feeds = [[np.abs(features).max(axis=(0, 2, 3)) for features in run(proto, read, feed)] for feed in FEEDS]
    return np.max(of_feeds, axis=0)


def equalized(proto, feeds=FEEDS):
    pytest.importorskip("onnxruntime")
    from retina_fast.deploy.eight_bits.equalize import equalized

    return equalized(proto, feeds)


@pytest.mark.parametrize("between", [none, affine, batch_norm])
def test_channels_have_like_ranges_and_outputs_are_the_same(between):
    proto = graph(between)
    before = proto.SerializeToString()
    made = equalized(proto)
    assert proto.SerializeToString() == before
    for feed in FEEDS:
        for ours, right in zip(run(made, OUTPUTS, feed), run(proto, OUTPUTS, feed), strict=True):
            np.testing.assert_allclose(ours, right, rtol=1e-5, atol=1e-4)
    old, new = maxima(proto), maxima(made)
    scale = (old / new)[0]
    np.testing.assert_allclose(old / new, np.tile(scale, (2, 1)), rtol=1e-5)
    np.testing.assert_allclose(scale, (old / old.max(axis=1, keepdims=True)).max(axis=0), rtol=1e-5)
    assert old.max() / old.min() > 4
    np.testing.assert_allclose((new / new.max(axis=1, keepdims=True)).max(axis=0), 1, rtol=1e-5)
    assert (new.max(axis=1) <= old.max(axis=1) * (1 + 1e-6)).all()  # the step of a channel, times its c, is no larger


def test_a_conv_without_a_relu():
    proto = graph(relu=None)
    made = equalized(proto)
    np.testing.assert_allclose(run(made, ["lx"], FEEDS[0]), run(proto, ["lx"], FEEDS[0]), rtol=1e-5, atol=1e-4)
    assert maxima(made).max() / maxima(made).min() < 2 < maxima(proto).max() / maxima(proto).min()


def test_a_silent_channel_may_speak_later():
    from retina_fast.deploy.eight_bits.parts import LEAST

    onnx = pytest.importorskip("onnx")
    proto = graph()
    weight = next(weight for weight in proto.graph.initializer if weight.name == "w")
    value = onnx.numpy_helper.to_array(weight).copy()
    value[2] *= 1e-6
    weight.CopyFrom(onnx.numpy_helper.from_array(value, "w"))
    bias = next(bias for bias in proto.graph.initializer if bias.name == "b")
    bias.CopyFrom(onnx.numpy_helper.from_array(np.array([0, 0, -1, 0], np.float32), "b"))
    (ours,) = (onnx.numpy_helper.to_array(each) for each in equalized(proto).graph.initializer if each.name == "w")
    np.testing.assert_allclose(ours[2], value[2] / LEAST, rtol=1e-6)


@pytest.mark.parametrize(
    ("relu", "others"),
    [
        ("Sigmoid", []),  # sigmoid(x / c) is something else
        ("Relu", [("other", 0, "rx"), ("other", 1, "w_of_features")]),  # another one reads the features
        ("Relu", [("other", 1, "w")]),  # or the weights that make them
    ],
)
def test_what_cannot_be_is_left_alone(relu, others):
    onnx = pytest.importorskip("onnx")
    proto = graph(relu=relu, others=others)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(noise(4, 4, 3, 3), "w_of_features"))
    assert equalized(proto).SerializeToString() == proto.SerializeToString()


def test_values_that_are_not_finite_and_no_images():
    proto = graph()
    for feeds in ([], [np.full((1, 3, 16, 16), np.nan, np.float32)], [np.zeros((1, 3, 16, 16), np.float32)]):
        made = equalized(proto, feeds)
        if not feeds or np.isnan(feeds[0]).any():
            assert made.SerializeToString() == proto.SerializeToString()
        np.testing.assert_allclose(run(made, ["lx"], FEEDS[0]), run(proto, ["lx"], FEEDS[0]), rtol=1e-5, atol=1e-4)
