"""The channels that a last conv reads, brought to ranges of like size, so that each gets most of the 256 steps.

The values of channel k are divided by c_k, and the conv's weights for it multiplied by c_k, so that in float32 the
network gives what it gave. ReLU(x / c) is ReLU(x) / c, so the division goes into the weights and biases that make x: a
conv's, or a norm's. (Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV 2019,
section 4.1, where the ranges are those of weights.) With M_lk for the largest magnitude of channel k in level l,

    c_k = max over l of  M_lk / max over j of M_lj,

the smallest c_k with which no level's largest magnitude grows, but no less than 1/16, since what is small in these
images may be large in others. So no step grows, and the error of channel k shrinks to c_k of what it was.
"""

import copy
from collections import defaultdict
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np

from retina_fast.deploy.eight_bits.parts import Graph, Inputs, channel_ranges, last_convs, like_ranges


def equalized(proto: Any, feeds: Sequence[Any]) -> Any:
    """The graph with like ranges of all channels before its last convs, a new ModelProto.

    A last conv stays as it is if something else reads its features, if they come from other nodes than a conv,
    GroupNorm or BatchNorm, with or without a ReLU, or if that conv's weights serve another one, too.

    Args:
        proto: an ONNX ModelProto in float32 with one input.
        feeds: arrays for the input, on which the ranges are taken.

    Example::

        >>> like = equalized(onnx.load("model.onnx"), [pixels])  # doctest: +SKIP
    """
    proto = copy.deepcopy(proto)
    graph = Graph(proto.graph)
    sides: dict[str, list[Any]] = defaultdict(list)  # the levels of each last conv
    for conv in last_convs(proto):
        sides[conv.input[1]].append(conv)
    made_by = [(convs, [_makers(graph, conv) for conv in convs]) for convs in sides.values()]
    of_sides = [(convs, list(chain.from_iterable(makers))) for convs, makers in made_by if all(makers)]
    found = [(convs, makers) for convs, makers in of_sides if graph.are_read_by_no_other(makers)]
    if not found or not feeds:
        return proto
    ranges = channel_ranges(proto, [conv.input[0] for convs, _ in found for conv in convs], feeds)
    for convs, makers in found:
        of_levels = np.stack([np.abs(ranges[conv.input[0]]).max(axis=0) for conv in convs])  # (L, C)
        scale = like_ranges(of_levels)
        if scale is not None:
            graph.scale(makers, 1 / scale, axis=0)
            graph.scale([(conv, 1) for conv in convs], scale, axis=1)
    return proto


def _makers(graph: Graph, conv: Any) -> Inputs:
    """The weights and biases (channels first) to divide so that a conv's features are; none if others make them."""
    if conv.input[1] not in graph.weights or any(entry.name == "group" and entry.i > 1 for entry in conv.attribute):
        return []
    node = graph.maker(conv, 0)
    if node is not None and node.op_type == "Relu":
        node = graph.maker(node, 0)
    if node is None:
        return []
    if node.op_type in ("Conv", "BatchNormalization"):
        inputs = [(node, i) for i in (range(1, len(node.input)) if node.op_type == "Conv" else (1, 2))]
        return inputs if all(node.input[i] in graph.weights for node, i in inputs) else []
    if node.op_type != "Add" or (summand := _constant(graph, node)) is None:
        return []
    product = graph.maker(node, 1 - summand)
    if product is None or product.op_type != "Mul" or (factor := _constant(graph, product)) is None:
        return []
    return [(node, summand), (product, factor)]


def _constant(graph: Graph, node: Any) -> int | None:
    """Which input of a node is (C, 1, 1), a weight."""
    for i, name in enumerate(node.input):
        if name in graph.weights and (dims := graph.weights[name].dims)[1:] == [1, 1] and len(dims) == 3:
            return i
    return None
