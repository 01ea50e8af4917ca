"""Convs in eight bits with float32 outputs as ONNX Runtime computes them in eight bits: as a matrix product.

The conv right before the last GroupNorm of a head reads eight bits and gives float32. ONNX Runtime's 8-bit conv gives
eight bits alone, so that it would compute this one in float32; but its 8-bit matrix product gives float32. So the
kernel's neighbourhood of each cell is laid out as a row, in eight bits (im2col; Chellapilla et al., "High Performance
Convolutional Neural Networks for Document Processing", 2006, section 3), and

    conv(x)  =  rows(x) M        rows: (B, H, W, N), M: (N, outputs), N = kernel height * kernel width * C.

The products and sums are of whole numbers, so that the values are those of the conv in eight bits. OpenVINO's 8-bit
conv gives float32 itself.
"""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np

from retina_fast.deploy.eight_bits.parts import Graph, attributes

_END = np.iinfo(np.int64).max


def convs_as_products(proto: Any) -> Any:
    """The graph with a matrix product in place of every conv in eight bits whose output is not, a new ModelProto.

    Args:
        proto: an ONNX ModelProto of opset 13 or more, in eight bits by QuantizeLinear and DequantizeLinear.

    Example::

        >>> faster = convs_as_products(onnx.load("quantized.onnx"))  # doctest: +SKIP
    """
    proto = copy.deepcopy(proto)
    graph = Graph(proto.graph)
    nodes: list[Any] = []
    for node in proto.graph.node:
        nodes += _Product(graph, node).nodes if _is_wanted(graph, node) else [node]
    nodes = [copy.deepcopy(node) for node in nodes]  # the old ones go with the list
    # What only the convs read goes, which ONNX Runtime would compute.
    read = {name for node in nodes for name in node.input} | {output.name for output in proto.graph.output}
    nodes = [node for node in nodes if node.op_type != "DequantizeLinear" or not read.isdisjoint(node.output)]
    read = {name for node in nodes for name in node.input}
    weights = [copy.deepcopy(weight) for weight in proto.graph.initializer if weight.name in read]
    for field, values in ((proto.graph.node, nodes), (proto.graph.initializer, weights)):
        del field[:]
        field.extend(values)
    return proto


def _is_wanted(graph: Graph, conv: Any) -> bool:
    """Whether it is a conv of uint8 inputs and constant int8 weights with a step a channel, whose output is read as it
    is."""
    if conv.op_type != "Conv" or all(
        node is not None and node.op_type == "QuantizeLinear" for node in graph.readers[conv.output[0]]
    ):
        return False
    x, weight = (graph.made_by.get(name) for name in conv.input[:2])
    if not x or not weight or any(node.op_type != "DequantizeLinear" or len(node.input) != 3 for node in (x, weight)):
        return False
    if not all(name in graph.weights for name in (*x.input[1:], *weight.input)):
        return False
    codes, steps, zero = (graph.array(name) for name in weight.input)
    axis = next((entry.i for entry in weight.attribute if entry.name == "axis"), 1)
    given = attributes(conv)
    return (
        graph.array(x.input[1]).ndim == 0
        and graph.array(x.input[2]).dtype == np.uint8  # with int8, too, ONNX Runtime has no 8-bit product
        and codes.dtype == zero.dtype == np.int8
        and codes.ndim == 4
        and steps.ndim == 1
        and axis in (0, -4)
        and given.get("group", [1]) == [1]
        and not any(entry.name == "auto_pad" and entry.s not in (b"", b"NOTSET") for entry in conv.attribute)
    )


class _Product:
    """The nodes that take the place of a conv."""

    def __init__(self, graph: Graph, conv: Any) -> None:
        self.graph, self.conv = graph, conv
        self.nodes: list[Any] = []
        x, weight = (graph.made_by[name] for name in conv.input[:2])
        codes, step, zero = x.input
        kernel = graph.array(weight.input[0])  # (O, C, height, width)
        rows = self._rows(self._add("Transpose", [codes], "cells", perm=[0, 2, 3, 1]), zero, kernel.shape[2:])
        matrix = kernel.transpose(2, 3, 1, 0).reshape(-1, len(kernel))
        right = graph.hold(f"{weight.input[0]}_matrix", np.ascontiguousarray(matrix))
        factors = [
            self._add("DequantizeLinear", [rows, step, zero], "left"),
            self._add("DequantizeLinear", [right, *weight.input[1:]], "right", axis=1),
        ]
        made = self._add("MatMul", factors, "product")
        if any(conv.input[2:]):
            made = self._add("Add", [made, conv.input[2]], "sum")
        self._add("Transpose", [made], "", perm=[0, 3, 1, 2])

    def _add(self, kind: str, inputs: Sequence[str], name: str, **attributes: Any) -> str:
        from onnx import helper

        output = f"{self.conv.output[0]}_{name}" if name else self.conv.output[0]
        self.nodes.append(helper.make_node(kind, inputs, [output], f"{output}_{kind}", **attributes))
        return output

    def _rows(self, cells: str, zero: str, sides: Sequence[int]) -> str:
        """What the kernel reads at each cell it stops at, of cells (B, H, W, C) in eight bits."""
        given, hold = attributes(self.conv), self.graph.hold
        strides, dilations = (given.get(name, [1, 1]) for name in ("strides", "dilations"))
        top, left, bottom, right = given.get("pads", [0, 0, 0, 0])
        if any((top, left, bottom, right)):
            pads = hold(f"{cells}_pads", np.array([0, top, left, 0, 0, bottom, right, 0]))
            cells = self._add("Pad", [cells, pads, zero], "padded")
        if [*sides, *strides] == [1, 1, 1, 1]:
            return cells
        axes, steps = hold("product_axes", np.array([1, 2])), hold(f"{cells}_steps", np.array(strides))
        shifted = []
        for place in np.ndindex(*sides):
            start = np.array(place) * dilations
            left_over = start - (np.array(sides) - 1) * dilations  # the rows and columns that come after, as -n
            end = np.where(left_over, left_over, _END)
            bounds = [
                hold(f"product_from_{'_'.join(map(str, start))}", start),
                hold(f"product_to_{'_'.join(map(str, end))}", end),
            ]
            shifted.append(self._add("Slice", [cells, *bounds, axes, steps], f"at_{'_'.join(map(str, place))}"))
        return self._add("Concat", shifted, "rows", axis=3) if len(shifted) > 1 else shifted[0]
