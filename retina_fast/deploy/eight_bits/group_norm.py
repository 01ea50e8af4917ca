"""GroupNorm as OpenVINO computes it fastest beside 8-bit convs: from the sums of each channel.

An ONNX graph has GroupNorm as InstanceNormalization over (B, groups, the rest), for which OpenVINO turns the feature
maps of convs, which are in channels_last memory, to contiguous memory and back. Here the means of x and of its square
are taken for each channel and then for each group, and give the norm as one product and one sum for each channel:

    scale_c = weight_c / sqrt(E[x^2] - E[x]^2 + epsilon)        x * scale_c + (bias_c - E[x] * scale_c)

which OpenVINO does in channels_last memory, in one pass with the ReLU and the quantisation that follow. ONNX Runtime
takes longer for it than for InstanceNormalization. E[x^2] - E[x]^2 loses digits in a group whose mean is many times its
deviation: at 40 times, the norm has a relative error of up to 0.5%, at 3 times of 1e-5.

An 8-bit conv before a norm then gives x best in float32, and not in eight bits: the passes over x take as long, and
nothing is rounded. Where it has no bias it gets one that is next to nothing. Without it, OpenVINO 2026.4.1 multiplies
by the scale of the conv's weights in a pass of its own.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from retina_fast.deploy.eight_bits.parts import Graph

_LEAST_BIAS = 1e-12  # not 0, which OpenVINO would leave out


@dataclass(frozen=True)
class GroupNorm:
    """A GroupNorm in a graph: the tensor it reads, what it does to it, and the nodes of which it is made."""

    x: str
    weight: Any  # (C,)
    bias: Any  # (C,)
    groups: int
    epsilon: float
    nodes: tuple[Any, ...]  # the last one gives the output


def norms_by_sums(proto: Any) -> Any:
    """The graph with every GroupNorm by sums, a new ModelProto.

    Args:
        proto: an ONNX ModelProto of opset 18 or more.

    Example::

        >>> faster = norms_by_sums(onnx.load("quantized.onnx"))  # doctest: +SKIP
    """
    proto = copy.deepcopy(proto)
    graph = Graph(proto.graph)
    norms = group_norms(graph)
    last = {norm.nodes[-1].output[0]: norm for norm in norms}
    replaced = {output for norm in norms for node in norm.nodes for output in node.output}
    nodes: list[Any] = []
    for node in proto.graph.node:
        if node.output[0] in last:
            nodes += _by_sums(graph, last[node.output[0]])
        elif node.output[0] not in replaced:
            nodes.append(node)
    nodes = [copy.deepcopy(node) for node in nodes]  # the old ones go with the list
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    return proto


def norms_in_float32(proto: Any) -> Any:
    """The graph whose norms read what convs give before it is rounded to eight bits, a new ModelProto."""
    proto = copy.deepcopy(proto)
    graph = Graph(proto.graph)
    for norm in group_norms(graph):
        back = graph.made_by.get(norm.x)
        rounded = back and graph.made_by.get(back.input[0])
        if back and rounded and [back.op_type, rounded.op_type] == ["DequantizeLinear", "QuantizeLinear"]:
            for node in graph.readers[norm.x]:
                if node and node.op_type == "Reshape":
                    node.input[0] = rounded.input[0]
    return proto


def group_norms(graph: Graph) -> list[GroupNorm]:
    """Those of a graph: Reshape, InstanceNormalization, Reshape, Mul and Add, each read by the next one alone."""
    weights = {name: graph.array(name) for name in graph.weights}

    def next_after(node: Any, kind: str) -> Any:
        following = graph.readers.get(node.output[0], [])
        return following[0] if len(following) == 1 and following[0] and following[0].op_type == kind else None

    def constant(node: Any) -> Any:
        """The one factor or summand (C, 1, 1) that is a weight, as (C,)."""
        held = [weights[name] for name in node.input if name in weights]
        return held[0].flatten() if len(held) == 1 and held[0].shape[1:] == (1, 1) else None

    norms = []
    for node in graph.graph.node:
        if node.op_type != "InstanceNormalization" or not all(name in weights for name in node.input[1:]):
            continue
        first = graph.made_by.get(node.input[0])
        groups, ones, zeros = len(weights[node.input[1]]), *(weights[name] for name in node.input[1:])
        if first is None or first.op_type != "Reshape" or next_after(first, node.op_type) is None:
            continue
        if list(weights.get(first.input[1], ())) != [0, groups, -1] or not ((ones == 1).all() and not zeros.any()):
            continue
        back = next_after(node, "Reshape")
        product = back and next_after(back, "Mul")
        total = product and next_after(product, "Add")
        if not total or constant(product) is None or constant(total) is None:
            continue
        epsilon = next((entry.f for entry in node.attribute if entry.name == "epsilon"), 1e-5)
        chain = (first, node, back, product, total)
        norms.append(GroupNorm(first.input[0], constant(product), constant(total), groups, epsilon, chain))
    return norms


def _by_sums(graph: Graph, norm: GroupNorm) -> list[Any]:
    """The nodes that take the place of a norm's; their constants are added to the graph."""
    from onnx import TensorProto, helper

    output, groups = norm.nodes[-1].output[0], norm.groups
    nodes: list[Any] = []

    def held(name: str, value: Any) -> str:
        return graph.hold(f"{output}_{name}", value)

    def add(kind: str, inputs: Sequence[str], name: str, **attributes: Any) -> str:
        made = f"{output}_{name}" if name else output
        nodes.append(helper.make_node(kind, inputs, [made], f"{made}_{kind}", **attributes))
        return made

    weight, bias = (value.reshape(1, groups, -1).astype(np.float32) for value in (norm.weight, norm.bias))
    x, conv = norm.x, graph.made_by.get(norm.x)
    if conv and conv.op_type == "Conv" and len(conv.input) == 2:
        conv.input.append(graph.hold(f"{x}_least_bias", np.full(weight.size, _LEAST_BIAS, np.float32)))
    cells, places = held("cells", np.array([2, 3])), held("places", np.array([2]))
    grouped, apart = held("grouped", np.array([0, groups, -1])), held("apart", np.array([0, -1, 1, 1]))

    def mean_of_groups(of_channels: str, name: str) -> str:
        return add(
            "ReduceMean", [add("Reshape", [of_channels, grouped], f"{name}_in_groups"), places], name, keepdims=1
        )

    mean = mean_of_groups(add("ReduceMean", [x, cells], "mean_of_channels", keepdims=1), "mean")  # (B, groups, 1)
    length = add("ReduceL2", [x, cells], "length", keepdims=1)  # so that no feature map of squares is written
    sides = add("Shape", [x], "sides", start=2)
    count = add("Cast", [add("ReduceProd", [sides], "area", keepdims=1)], "count", to=TensorProto.FLOAT)
    square_of_channels = add("Div", [add("Mul", [length, length], "sum_of_squares"), count], "square_of_channels")
    square = mean_of_groups(square_of_channels, "square")
    variance = add("Sub", [square, add("Mul", [mean, mean], "square_of_mean")], "variance")
    variance = add("Max", [variance, held("least", np.float32(0))], "not_negative")  # as rounding may make it
    deviation = add("Sqrt", [add("Add", [variance, held("epsilon", np.float32(norm.epsilon))], "more")], "deviation")
    scale = add("Div", [held("weight", weight), deviation], "scale")  # (B, groups, C / groups)
    shift = add("Sub", [held("bias", bias), add("Mul", [mean, scale], "mean_scaled")], "shift")
    scale, shift = add("Reshape", [scale, apart], "scales"), add("Reshape", [shift, apart], "shifts")
    add("Add", [add("Mul", [x, scale], "product"), shift], "")
    return nodes
