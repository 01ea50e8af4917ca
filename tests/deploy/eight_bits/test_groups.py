"""Groups before a GroupNorm are brought to one middle and like ranges, and nothing changes in float32."""

import numpy as np
import pytest

from tests.deploy.eight_bits.test_equalize import FEEDS, run
from tests.deploy.eight_bits.test_quantize import noise

GROUPS, CHANNELS = 4, 12
SIZES, MIDDLES = (np.array(values, np.float32).repeat(3) for values in ([1, 9, 0.8, 4], [0, 20, -3, 1]))


def graph(bias=True, groups=(GROUPS, GROUPS), others=None):
    """Two levels x and y of a conv c, its GroupNorm and a ReLU r; and other nodes."""
    onnx = pytest.importorskip("onnx")
    make, array = onnx.helper.make_node, onnx.numpy_helper.from_array
    weights = ["w", "b"] if bias else ["w"]
    nodes = [make("MaxPool", ["x"], ["y"], "pool", kernel_shape=[2, 2], strides=[2, 2])]
    for level, count in zip("xy", groups, strict=True):
        nodes += [
            make("Conv", [level, *weights], [f"c{level}"], f"conv{level}", pads=[1, 1, 1, 1]),
            make("Reshape", [f"c{level}", f"groups{count}"], [f"rows{level}"], f"rows{level}"),
            make(
                "InstanceNormalization", [f"rows{level}", f"ones{count}", f"zeros{count}"], [f"i{level}"], f"i{level}"
            ),
            make("Shape", [f"c{level}"], [f"shape{level}"], f"shape{level}"),
            make("Reshape", [f"i{level}", f"shape{level}"], [f"back{level}"], f"back{level}"),
            make("Mul", [f"back{level}", "factor"], [f"m{level}"], f"times{level}"),
            make("Add", [f"m{level}", "summand"], [f"n{level}"], f"plus{level}"),
            make("Relu", [f"n{level}"], [f"r{level}"], f"relu{level}"),
        ]
    nodes.append(make("Conv", ["x", "w_other", "b"], ["o"], "other", pads=[1, 1, 1, 1]))
    for node, i, name in others or ():
        next(made for made in nodes if made.name == node).input[i] = name
    values = {
        "w": noise(CHANNELS, 3, 3, 3) * SIZES[:, None, None, None], "b": noise(CHANNELS) + MIDDLES,
        "w_other": noise(CHANNELS, 3, 3, 3, seed=2), "factor": noise(CHANNELS, 1, 1), "summand": noise(CHANNELS, 1, 1),
    }  # fmt: skip
    for count in set(groups):
        values |= {f"groups{count}": np.array([0, count, -1])}
        values |= {f"ones{count}": np.ones(count, np.float32), f"zeros{count}": np.zeros(count, np.float32)}
    value = onnx.helper.make_tensor_value_info
    made = onnx.helper.make_graph(
        nodes,
        "graph",
        [value("x", 1, [1, 3, 16, 16])],
        [value(name, 1, None) for name in ("rx", "ry", "o")],
        [array(number, name) for name, number in values.items()],
    )
    return onnx.helper.make_model(made, opset_imports=[onnx.helper.make_opsetid("", 19)], ir_version=10)


def evened(proto, feeds=FEEDS, but=()):
    pytest.importorskip("onnxruntime")
    from retina_fast.deploy.eight_bits.groups import with_even_groups

    before = proto.SerializeToString()
    made = with_even_groups(proto, feeds, but)
    assert proto.SerializeToString() == before
    return made


def bounds(proto):
    """The least and the greatest value (L, groups) of what the conv gives."""
    of_levels = [np.stack([run(proto, [name], feed)[0].reshape(GROUPS, -1) for feed in FEEDS]) for name in ("cx", "cy")]
    return tuple(np.stack([kind(level, axis=(0, 2)) for level in of_levels]) for kind in (np.min, np.max))


@pytest.mark.parametrize("bias", [True, False])
def test_groups_have_like_ranges_and_outputs_are_the_same(bias):
    proto = graph(bias)
    made = evened(proto)
    for feed in FEEDS:
        names = ["rx", "ry", "o"]  # the last one reads the same bias
        for ours, right in zip(run(made, names, feed), run(proto, names, feed), strict=True):
            np.testing.assert_allclose(ours, right, rtol=1e-3, atol=1e-3)
    (least, greatest), new = bounds(proto), np.abs(bounds(made)).max(axis=0)  # (L, groups)
    middle = ((least + greatest) / 2).mean(axis=0)
    old = np.maximum(greatest - middle, middle - least)
    np.testing.assert_allclose(old / new, np.tile((old / new)[0], (2, 1)), rtol=1e-4)
    np.testing.assert_allclose((new / new.max(axis=1, keepdims=True)).max(axis=0), 1, rtol=1e-4)
    np.testing.assert_allclose(new.max(axis=1), old.max(axis=1), rtol=1e-4)
    assert old.max() / old.min() > 8 > 2 > new.max() / new.min()


def scaled(sizes):
    """The weights of the conv, with groups of these sizes, before and after."""
    onnx = pytest.importorskip("onnx")
    proto = graph(bias=False)
    weight = next(weight for weight in proto.graph.initializer if weight.name == "w")
    value = noise(CHANNELS, 3, 3, 3) * np.array(sizes, np.float32).repeat(3)[:, None, None, None]
    weight.CopyFrom(onnx.numpy_helper.from_array(value, "w"))
    made = evened(proto)
    for feed in FEEDS:
        np.testing.assert_allclose(run(made, ["rx"], feed)[0], run(proto, ["rx"], feed)[0], rtol=5e-3, atol=5e-3)
    return value, next(onnx.numpy_helper.to_array(weight) for weight in made.graph.initializer if weight.name == "w")


def test_a_quiet_group_may_speak_later():
    from retina_fast.deploy.eight_bits.parts import LEAST

    value, made = scaled([1, 1, 0.02, 0.02])
    np.testing.assert_allclose(made[6:], value[6:] / LEAST, rtol=1e-6)


def test_groups_so_small_that_epsilon_counts_keep_their_size():
    value, made = scaled([1, 1e-4, 0, 0.001])
    np.testing.assert_allclose(made[3:], value[3:])
    value, made = scaled([1e-3, 1e-4, 1e-3, 1e-4])
    np.testing.assert_allclose(made, value)


@pytest.mark.parametrize(
    ("changed", "but"),
    [
        ({"others": [("relux", 0, "cx")]}, ()),  # another one reads what the conv gives
        ({"others": [("other", 1, "w")]}, ()),  # or its weights
        ({"others": [("convx", 1, "computed")]}, ()),  # which are no constants
        ({"groups": (GROUPS, GROUPS // 2)}, ()),  # the norms of its levels have other groups
        ({}, ("cy",)),  # one level is to stay as it is
    ],
)
def test_what_cannot_be_is_left_alone(changed, but):
    onnx = pytest.importorskip("onnx")
    proto = graph(**changed)
    proto.graph.node.insert(0, onnx.helper.make_node("Identity", ["w"], ["computed"], "computed"))
    assert evened(proto, but=but).SerializeToString() == proto.SerializeToString()


def test_values_that_are_not_finite_and_no_images():
    proto = graph()
    for feeds in ([], [np.full((1, 3, 16, 16), np.nan, np.float32)]):
        assert evened(proto, feeds).SerializeToString() == proto.SerializeToString()
    proto, constant = graph(bias=False), [np.zeros((1, 3, 16, 16), np.float32)]  # no group has a range
    assert evened(proto, constant).SerializeToString() == proto.SerializeToString()
