"""The channels that a last conv reads, brought to ranges of like size, so that each gets most of the 256 steps.

The values of channel k are divided by c_k, and the conv's weights for it multiplied by c_k, so that in float32 the
network gives what it gave. ReLU(x / c) is ReLU(x) / c, so the division goes into the weights and biases that make x: a
conv's, or a norm's. (Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV 2019,
section 4.1, where the ranges are those of weights.) With M_lk for the largest value of channel k in level l,

    c_k = max over l of  M_lk / max over j of M_lj,

the smallest c_k with which no level's largest value grows. So no step grows, and the error of channel k shrinks to c_k
of what it was.
"""

import copy
from collections import defaultdict
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np

from retina_fast.deploy.eight_bits.parts import last_convs, part_before
from retina_fast.deploy.export.onnx_file import onnx_session

LEAST = 1 / 16
"""The least c: a channel that is silent in these images may speak in others."""

_Inputs = list[tuple[Any, int]]  # nodes, and which of their inputs


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
    graph = _Graph(proto.graph)
    sides: dict[str, list[Any]] = defaultdict(list)  # the levels of each last conv
    for conv in last_convs(proto):
        sides[conv.input[1]].append(conv)
    made_by = [(convs, [graph.makers(conv) for conv in convs]) for convs in sides.values()]
    of_sides = [(convs, list(chain.from_iterable(makers))) for convs, makers in made_by if all(makers)]
    found = [(convs, makers) for convs, makers in of_sides if graph.are_read_by_no_other(makers)]
    if not found or not feeds:
        return proto
    maxima = _maxima(proto, [conv.input[0] for convs, _ in found for conv in convs], feeds)
    for convs, makers in found:
        of_levels = np.stack([maxima[conv.input[0]] for conv in convs])  # (L, C)
        greatest = of_levels.max(axis=1, keepdims=True)
        if np.isfinite(of_levels).all() and greatest.all():  # no level is all zeros
            scale = np.clip((of_levels / greatest).max(axis=0), LEAST, 1)  # (C,)
            graph.multiply(makers, 1 / scale, axis=0)
            graph.multiply([(conv, 1) for conv in convs], scale, axis=1)
    return proto


def _maxima(proto: Any, tensors: Sequence[str], feeds: Sequence[Any]) -> dict[str, Any]:
    """The largest magnitude in each channel of tensors (B, C, H, W)."""
    part = part_before(proto, tensors)
    session = onnx_session(part.SerializeToString())
    found = [np.zeros(1, np.float32)] * len(tensors)
    for feed in feeds:
        outputs = session.run(list(tensors), {part.graph.input[0].name: feed})
        found = [np.maximum(old, np.abs(new).max(axis=(0, 2, 3))) for old, new in zip(found, outputs, strict=True)]
    return dict(zip(tensors, found, strict=True))


class _Graph:
    """A graph's weights by name, and who makes and who reads each tensor."""

    def __init__(self, graph: Any) -> None:
        self.graph = graph
        self.weights = {weight.name: weight for weight in graph.initializer}
        self.made_by = {output: node for node in graph.node for output in node.output}
        self.readers: dict[str, list[Any]] = defaultdict(list)
        for node in graph.node:
            for name in node.input:
                self.readers[name].append(node)
        for output in graph.output:
            self.readers[output.name].append(None)

    def makers(self, conv: Any) -> _Inputs:
        """The weights and biases (channels first) to divide so that a conv's features are; none if others make them."""
        if conv.input[1] not in self.weights or any(entry.name == "group" and entry.i > 1 for entry in conv.attribute):
            return []
        node = self._maker(conv, 0)
        if node is not None and node.op_type == "Relu":
            node = self._maker(node, 0)
        if node is None:
            return []
        if node.op_type == "Conv":
            return self._all_weights([(node, i) for i in range(1, len(node.input))])
        if node.op_type == "BatchNormalization":
            return self._all_weights([(node, 1), (node, 2)])
        if node.op_type != "Add" or (summand := self._constant(node)) is None:
            return []
        product = self._maker(node, 1 - summand)
        if product is None or product.op_type != "Mul" or (factor := self._constant(product)) is None:
            return []
        return [(node, summand), (product, factor)]

    def _maker(self, node: Any, i: int) -> Any:
        """The node that makes an input of a node; None if something else reads that tensor, too."""
        return self.made_by.get(node.input[i]) if len(self.readers[node.input[i]]) == 1 else None

    def _all_weights(self, inputs: _Inputs) -> _Inputs:
        return inputs if all(node.input[i] in self.weights for node, i in inputs) else []

    def _constant(self, node: Any) -> int | None:
        """Which input of a node is (C, 1, 1), a weight."""
        for i, name in enumerate(node.input):
            if name in self.weights and (dims := self.weights[name].dims)[1:] == [1, 1] and len(dims) == 3:
                return i
        return None

    def are_read_by_no_other(self, inputs: _Inputs) -> bool:
        """Whether nothing else reads those of these weights that are a conv's."""
        names = [node.input[i] for node, i in inputs if node.op_type == "Conv"]
        return all(names.count(name) == len(self.readers[name]) for name in set(names))

    def multiply(self, inputs: _Inputs, factor: Any, axis: int) -> None:
        """Multiply weights along an axis, those that other nodes read as copies."""
        from onnx import numpy_helper

        places: dict[str, _Inputs] = defaultdict(list)
        for node, i in inputs:
            places[node.input[i]].append((node, i))
        for name, readers in places.items():
            value = numpy_helper.to_array(self.weights[name])
            shape = [-1 if side == axis else 1 for side in range(value.ndim)]
            value = (value * factor.reshape(shape)).astype(value.dtype)
            if len(readers) == len(self.readers[name]):
                self.weights[name].CopyFrom(numpy_helper.from_array(value, name))
                continue
            own = f"{name}_of_{readers[0][0].name}"
            self.graph.initializer.append(numpy_helper.from_array(value, own))
            for node, i in readers:
                node.input[i] = own
