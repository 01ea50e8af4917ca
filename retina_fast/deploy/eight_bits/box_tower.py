"""The convs of a box head before its last one, in eight bits, at the cells on which chosen cells depend.

Box offsets are wanted at the candidates' cells alone. An offset depends on the 3x3 cells that the last conv reads, they
on the 5x5 cells around it, and so on. With few candidates that is a small part of the pyramid, while the tower of a
RetinaNet's box head takes a fifth of all multiplications. So each conv is computed where the next one reads: what it
reads there is gathered, a row for each cell, and multiplied by its weights (im2col; Chellapilla et al., "High
Performance Convolutional Neural Networks for Document Processing", 2006, section 3). Products and sums are of whole
numbers, so that the codes are those of the conv at all cells, but for the rounding of the bias.

A norm reads all cells, so that towers with norms have to be computed everywhere.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from retina_fast.deploy.eight_bits.parts import Graph, attributes

Run = Callable[[Sequence[NDArray[Any]]], Sequence[NDArray[Any]]]
"""Runs a graph on arrays for its inputs, in their order."""


@dataclass(frozen=True)
class BoxTower:
    """Convs of 3x3 cells one after another, on several levels.

    Attributes:
        content: an ONNX file. For each level it takes the codes (T, C) of all cells and of the border, and for each
            conv the 9 rows that this reads for each of the N cells where it is computed, (N, 9) int32. It gives the
            codes (N, O) of the last conv. The first conv reads rows of the cells. Each other one reads rows of what the
            conv before it gave, after which comes a row of 0.
        depth: how many convs a level has.
        outputs: O.
    """

    content: bytes
    depth: int
    outputs: int

    def features(self, run: Run, inputs: Sequence[Tensor], chosen: Sequence[Tensor]) -> list[Tensor]:
        """What the last conv of the head reads at chosen cells: the tower's outputs there and beside them. Values of
        other cells have no meaning.

        Args:
            run: runs the file.
            inputs: the levels (B, H + 2, W + 2, C) uint8 of what the tower reads, with a border of the
                code that stands for 0.
            chosen: (B, H, W) bool, likewise.

        Returns:
            The levels (B, H + 2, W + 2, O) uint8, with a border of 0.
        """
        features = [level.new_zeros(*level.shape[:3], self.outputs) for level in inputs]
        for b in range(len(inputs[0])):
            places, arrays = [], []
            for level, mask in zip(inputs, chosen, strict=True):
                cells, rows = self._reads(mask[b].numpy())
                places.append(cells)
                arrays += [level[b].flatten(0, 1).numpy(), *rows]
            for level, cells, codes in zip(features, places, run(arrays), strict=True):
                level[b].flatten(0, 1).numpy()[cells] = codes
        return features

    def _reads(self, chosen: NDArray[np.bool_]) -> tuple[NDArray[Any], list[NDArray[Any]]]:
        """The cells of the tower's last conv, counted with the border, and the rows (N, 9) that each conv reads."""
        mask = np.pad(chosen, 1)
        mask[1, 1] |= not chosen.any()  # a runtime need not take arrays without rows
        places = []
        for _ in range(self.depth):
            mask = _with_neighbours(mask)
            places.append(mask.ravel().nonzero()[0])
        places.reverse()
        width = mask.shape[1]
        beside = np.array([y * width + x for y in (-1, 0, 1) for x in (-1, 0, 1)])
        rows = [(places[0][:, None] + beside).astype(np.int32)]
        for before, cells in pairwise(places):
            row_of = np.full(mask.size, len(before), np.int32)  # of the border: the row of 0
            row_of[before] = np.arange(len(before))
            rows.append(row_of[cells[:, None] + beside])
        return places[-1], rows


def _with_neighbours(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The cells (H + 2, W + 2) of a mask and all beside them, but for the border."""
    wide = mask.copy()
    wide[:, 1:] |= mask[:, :-1]
    wide[:, :-1] |= mask[:, 1:]
    both = np.zeros_like(mask)
    both[1:-1, 1:-1] = (wide[1:-1] | wide[:-2] | wide[2:])[:, 1:-1]
    return both


class _Layer(NamedTuple):
    """A conv in eight bits, and what brings its outputs to eight bits."""

    conv: Any
    quantize: Any


def box_tower(proto: Any, last: Sequence[Any]) -> tuple[BoxTower, list[Any]] | None:
    """The tower before the last convs of a box head, and its first Conv node on each level.

    Args:
        proto: an ONNX ModelProto in eight bits by QuantizeLinear and DequantizeLinear.
        last: the head's last Conv nodes, one for each level.

    Returns:
        None where no conv of 3x3 in eight bits leads to all of them, or something else reads what it gives, too.
    """
    from onnx import GraphProto, helper

    given = Graph(proto.graph)
    levels = [_layers(given, conv) for conv in last]
    depth = min(map(len, levels))
    if not depth or any(
        attributes(conv).get("pads") != [1] * 4 or not _is_of_3x3(given, conv.input[1]) for conv in last
    ):
        return None
    levels = [layers[-depth:] for layers in levels]
    graph = Graph(GraphProto(name="box_tower"))
    for level, layers in enumerate(levels):
        _append(graph, given, level, layers)
    model = helper.make_model(graph.graph, opset_imports=proto.opset_import, ir_version=proto.ir_version)
    outputs = given.weights[last[0].input[1]].dims[1]
    return BoxTower(model.SerializeToString(), depth, outputs), [layers[0].conv for layers in levels]


def _is_of_3x3(graph: Graph, weight: str) -> bool:
    return weight in graph.weights and list(graph.weights[weight].dims[2:]) == [3, 3]


def _layers(graph: Graph, last: Any) -> list[_Layer]:
    """The convs that lead to the last one, each alone, in the order in which they run."""
    layers: list[_Layer] = []
    reader = last
    while True:
        values = graph.maker(reader, 0)
        quantize = graph.maker(values, 0) if values and values.op_type == "DequantizeLinear" else None
        conv = graph.maker(quantize, 0) if quantize and quantize.op_type == "QuantizeLinear" else None
        if conv and conv.op_type == "Relu":  # codes that begin at 0 do the same
            conv = graph.maker(conv, 0)
        if not conv or not _can_be_gathered(graph, conv, quantize):
            return layers[::-1]
        layers.append(_Layer(conv, quantize))
        reader = conv


def _can_be_gathered(graph: Graph, conv: Any, quantize: Any) -> bool:
    """Whether it is a conv of 3x3 cells, stride 1 and pads of 1, of inputs, weights and outputs in eight bits."""
    if conv.op_type != "Conv" or attributes(conv).get("pads") != [1] * 4:
        return False
    given, factors = attributes(conv), [graph.made_by.get(name) for name in conv.input]
    if {*given.get("group", [1]), *given.get("strides", [1]), *given.get("dilations", [1])} != {1}:
        return False
    if any(node is None or node.op_type != "DequantizeLinear" or len(node.input) != 3 for node in factors):
        return False
    x, weight, *bias = (node.input for node in factors if node)
    held = (*x[1:], *weight, *(name for inputs in bias for name in inputs), *quantize.input[1:])
    if not all(name in graph.weights for name in held) or not _is_of_3x3(graph, weight[0]):
        return False
    codes = [graph.array(name) for name in (x[2], quantize.input[2])]
    return all(zero.dtype == np.uint8 and zero.ndim == 0 for zero in codes) and codes[1] == 0


def _append(graph: Graph, given: Graph, level: int, layers: Sequence[_Layer]) -> None:
    """Let the graph compute a level."""
    from onnx import TensorProto, helper

    def add(kind: str, inputs: Sequence[str], **attributes: Any) -> str:
        name = f"{kind}{len(graph.graph.node)}"
        graph.graph.node.append(helper.make_node(kind, inputs, [name], name, **attributes))
        return name

    def take(kind: int, name: str, shape: Sequence[int | None]) -> str:
        graph.graph.input.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    codes = ""
    for i, (conv, quantize) in enumerate(layers):
        x, weight, *bias = (given.made_by[name] for name in conv.input)
        kernel, steps, zero = (given.array(name) for name in weight.input)
        channels, outputs = kernel.shape[1], kernel.shape[0]
        codes = codes or take(TensorProto.UINT8, f"cells{level}", [None, channels])
        rows = add("Gather", [codes, take(TensorProto.INT32, f"rows{level}_{i}", [None, 9])], axis=0)
        rows = add("Reshape", [rows, graph.hold(f"shape_of_{channels}", np.array([-1, 9 * channels]))])
        step, x_zero = (graph.hold(name, given.array(name)) for name in x.input[1:])
        matrix = graph.hold(weight.input[0], kernel.transpose(2, 3, 1, 0).reshape(-1, outputs))
        scale = graph.hold(weight.input[1], np.broadcast_to(steps, outputs))
        right = add(
            "DequantizeLinear", [matrix, scale, graph.hold(weight.input[2], np.broadcast_to(zero, outputs))], axis=1
        )
        made = add("MatMul", [add("DequantizeLinear", [rows, step, x_zero]), right])
        if bias:
            values, bias_step, bias_zero = (given.array(name) for name in bias[0].input)
            made = add(
                "Add", [made, graph.hold(f"bias{level}_{i}", ((values - bias_zero) * bias_step).astype(np.float32))]
            )
        codes = add("QuantizeLinear", [made, *(graph.hold(name, given.array(name)) for name in quantize.input[1:])])
        if i + 1 < len(layers):
            none = graph.hold(f"row_of_{outputs}", np.zeros((1, outputs), np.uint8))
            codes = add("Concat", [codes, none], axis=0)
    graph.graph.output.append(helper.make_tensor_value_info(codes, TensorProto.UINT8, [None, None]))
