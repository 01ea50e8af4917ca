"""The graph of a network in eight bits, whose last convs are left to a :mod:`retina_fast.deploy.eight_bits.sieve`.

It gives the logits in eight bits, by which the sieve decides where to compute them in float32, and the features that
the last convs read, in eight bits, too.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from retina_fast.deploy.eight_bits.box_tower import box_tower
from retina_fast.deploy.eight_bits.last_conv import Codes, LastConv
from retina_fast.deploy.eight_bits.parts import attributes
from retina_fast.deploy.eight_bits.sieve import Sieve
from retina_fast.deploy.eight_bits.weight_scales import weight_scales

LOWEST = -10.0
"""Logits below this need not be told apart: their scores are below 5e-5."""

BLOCK = 16
"""OpenVINO's 8-bit convs on AVX2 compute outputs in groups of 8, and are slower with an odd number of groups. Of 256
channels and 100x100 cells, 57 to 60 billion products a second with 819, 824 and 840 outputs, and 69 to 73 with 720,
768, 800, 816, 832, 848, 864 and 896 (one thread of an AMD EPYC, OpenVINO 2026.4.1, by no command of the repository).
ResNets of 91 classes have 819 logits a cell."""


def with_blocks(count: int) -> int:
    """How many outputs are computed in place of ``count``: whole blocks, if these are at most a sixteenth more.

    Example::

        >>> with_blocks(819), with_blocks(720), with_blocks(9)
        (832, 720, 9)
    """
    whole = -(-count // BLOCK) * BLOCK
    return whole if 16 * (whole - count) <= count else count


def sieved(proto: Any, ranges: Mapping[str, Any], by_cells: bool = False) -> tuple[Any, Sieve] | None:
    """A graph whose outputs are those that a :class:`Sieve` reads, and that sieve, without margins.

    Args:
        proto: of :func:`retina_fast.deploy.onnx_network.trace`, whose outputs are L levels of logits, then L of box
            offsets; quantised but for the convs that give them.
        ranges: the least and greatest value of what these convs read and give, by name.
        by_cells: whether the sieve also computes the tower of the box head, at the cells where that matters.

    Returns:
        None where the outputs are something else, as those of a head of the user's own may be, or where a tower is
        asked for and cannot be computed so.
    """
    proto = copy.deepcopy(proto)
    graph = proto.graph
    made_by = {output: node for node in graph.node for output in node.output}
    weights = {weight.name: weight for weight in graph.initializer}
    pairs = [(made_by[out.name], made_by.get(made_by[out.name].input[0])) for out in graph.output]
    if len(pairs) % 2 or not all(_is_last_conv(transpose, conv, weights) for transpose, conv in pairs):
        return None
    half = len(pairs) // 2
    sides: list[list[Any]] = [[conv for _, conv in side] for side in (pairs[:half], pairs[half:])]
    if not all(_same_conv(convs, weights) for convs in sides):
        return None
    found = box_tower(proto, sides[1]) if by_cells else None
    if by_cells and not found:
        return None
    tower, firsts = found or (None, sides[1])
    features = _Features(graph, made_by, weights, ranges)
    logits, deltas = (_last_conv(convs, weights, tuple(features.of(conv).codes for conv in convs)) for convs in sides)
    codes = tuple(
        _in_eight_bits(graph, i, logits, features.of(conv), conv, ranges[conv.output[0]])
        for i, conv in enumerate(sides[0])
    )
    for transpose, conv in pairs:
        graph.node.remove(transpose)
        graph.node.remove(conv)
    _replace_outputs(
        graph,
        half,
        with_blocks(len(logits.bias)),
        [(features.of(conv), _pads(conv)) for convs in (sides[0], firsts) for conv in convs],
    )
    _remove_unused(graph)
    return proto, Sieve(logits, deltas, codes, (0.0,) * half, (0.0,) * half, tower)


def _remove_unused(graph: Any) -> None:
    """Take out the nodes and weights on which no output depends."""
    used = {output.name for output in graph.output}
    for node in reversed(list(graph.node)):
        if used.isdisjoint(node.output):
            graph.node.remove(node)
        else:
            used.update(node.input)
    for weight in [weight for weight in graph.initializer if weight.name not in used]:
        graph.initializer.remove(weight)


def _is_last_conv(transpose: Any, conv: Any, weights: Mapping[str, Any]) -> bool:
    if transpose.op_type != "Transpose" or conv is None or conv.op_type != "Conv":
        return False
    return all(name in weights for name in conv.input[1:])


def _same_conv(convs: Sequence[Any], weights: Mapping[str, Any]) -> bool:
    """Whether all levels share one conv that skips no cells or channels, and gives as many cells as it reads."""
    first, kernel = attributes(convs[0]), list(weights[convs[0].input[1]].dims[2:])
    if any(conv.input[1:] != convs[0].input[1:] or attributes(conv) != first for conv in convs):
        return False
    ones = [*first.get("group", [1]), *first.get("strides", [1]), *first.get("dilations", [1])]
    if len(kernel) != 2 or set(ones) != {1}:
        return False
    top, left, bottom, right = _pads(convs[0])
    return [top + bottom, left + right] == [side - 1 for side in kernel]


def _pads(conv: Any) -> list[int]:
    """Rows above, columns to the left, rows below, columns to the right."""
    return list(attributes(conv).get("pads", [0, 0, 0, 0]))


def _last_conv(convs: Sequence[Any], weights: Mapping[str, Any], inputs: tuple[Codes, ...]) -> LastConv:
    from onnx import numpy_helper

    weight, *bias = (torch.from_numpy(numpy_helper.to_array(weights[name]).copy()) for name in convs[0].input[1:])
    weight = weight.contiguous(memory_format=torch.channels_last)
    return LastConv(weight, bias[0] if bias else weight.new_zeros(len(weight)), inputs)


@dataclass(frozen=True)
class _Quantized:
    """A tensor in uint8, by its name, and the names of its scale and zero point."""

    name: str
    scale: str
    zero: str
    codes: Codes


class _Features:
    """What the last convs read, in uint8: as the graph has it already, or by a new QuantizeLinear."""

    def __init__(
        self, graph: Any, made_by: Mapping[str, Any], weights: Mapping[str, Any], ranges: Mapping[str, Any]
    ) -> None:
        self.graph, self.made_by, self.weights, self.ranges = graph, made_by, weights, ranges
        self.made: dict[str, _Quantized] = {}

    def of(self, conv: Any) -> _Quantized:
        """That which a conv reads."""
        from onnx import numpy_helper

        name = conv.input[0]
        before = self.made_by.get(name)
        if before is not None and before.op_type == "DequantizeLinear" and before.input[2] in self.weights:
            scale, zero = (numpy_helper.to_array(self.weights[value]) for value in before.input[1:])
            if zero.dtype == "uint8" and zero.size == 1:
                codes, its_scale, its_zero = before.input
                return _Quantized(codes, its_scale, its_zero, Codes(float(scale), int(zero)))
        if name not in self.made:
            self.made[name] = self._quantized(name)
        return self.made[name]

    def _quantized(self, name: str) -> _Quantized:
        from onnx import helper

        codes = _codes(*(value.item() for value in self.ranges[name].range_value))
        feature = _Quantized(f"{name}_sieve_codes", f"{name}_sieve_scale", f"{name}_sieve_zero", codes)
        _hold(self.graph, {feature.scale: np.float32(codes.scale), feature.zero: np.uint8(codes.zero)})
        inputs = [name, feature.scale, feature.zero]
        self.graph.node.append(helper.make_node("QuantizeLinear", inputs, [feature.name], f"{feature.name}_quantize"))
        return feature


def _hold(graph: Any, values: Mapping[str, Any]) -> None:
    """Add constants to a graph."""
    from onnx import numpy_helper

    graph.initializer.extend(numpy_helper.from_array(np.asarray(value), name) for name, value in values.items())


def _codes(least: float, greatest: float) -> Codes:
    """uint8 for a range, which is widened to hold 0."""
    least, greatest = min(least, 0.0), max(greatest, 0.0)
    scale = float(np.float32(max((greatest - least) / 255, 1e-12)))
    return Codes(scale, round(-least / scale))


def _rounded(weight: Any) -> Any:
    """(O, C, kernel height, kernel width) as int8, of values in [-127, 127]; each takes on the error of the one before.

    A channel is much alike in neighbouring cells, and the errors of its weights then cancel. They are taken row by row,
    every other row backwards, so that each is a neighbour of the one before.
    """
    rounded, error = np.empty(weight.shape, np.int8), np.zeros(weight.shape[:2], weight.dtype)
    height, width = weight.shape[2:]
    for row in range(height):
        for column in range(width)[:: -1 if row % 2 else 1]:
            value = weight[:, :, row, column] + error
            rounded[:, :, row, column] = np.clip(np.rint(value), -127, 127)
            error = value - rounded[:, :, row, column]
    return rounded


def _in_eight_bits(graph: Any, level: int, last: LastConv, feature: _Quantized, conv: Any, found: Any) -> Codes:
    """Append the conv with 8-bit inputs, weights and outputs; what the codes of its outputs stand for."""
    from onnx import helper

    least, greatest = (value.item() for value in found.range_value)
    codes = _codes(max(least, LOWEST), greatest)
    weight, bias = last.weight.numpy(), last.bias.numpy()
    more = with_blocks(len(bias)) - len(bias)  # copies of the last one
    weight, bias = np.pad(weight, [(0, more), (0, 0), (0, 0), (0, 0)], "edge"), np.pad(bias, (0, more), "edge")
    # (O,): with it the bias, too, is a whole number of 31 bits, as of a channel whose weights are 0.
    least_scale = np.abs(bias) / (2**30 * feature.codes.scale)
    # Each weight is moved by half a step at most, and by half a step at most for the one before.
    weight_scale = np.maximum(weight_scales(weight, moved=1), least_scale).astype(np.float32)
    bias_scale = (weight_scale * np.float32(feature.codes.scale)).astype(np.float32)
    held = {
        "out_scale": np.float32(codes.scale),
        "out_zero": np.uint8(codes.zero),
        "weight": _rounded(weight / weight_scale[:, None, None, None]),
        "weight_scale": weight_scale,
        "bias": np.rint(bias / bias_scale).astype(np.int32),
        "bias_scale": bias_scale,
    }
    name = {key: f"sieve{level}_{key}" for key in (*held, "codes", "x", "w", "b", "y", "out")}
    _hold(graph, {name[key]: value for key, value in held.items()})

    def add(kind: str, inputs: Sequence[str], output: str, **attributes: Any) -> None:
        node = helper.make_node(kind, [name.get(key, key) for key in inputs], [name[output]], **attributes)
        node.name = f"{name[output]}_{kind}"
        graph.node.append(node)

    add("DequantizeLinear", [feature.name, feature.scale, feature.zero], "x")
    add("DequantizeLinear", ["weight", "weight_scale"], "w", axis=0)
    add("DequantizeLinear", ["bias", "bias_scale"], "b", axis=0)
    add("Conv", ["x", "w", "b"], "y", pads=_pads(conv), kernel_shape=list(last.weight.shape[2:]))
    add("QuantizeLinear", ["y", "out_scale", "out_zero"], "out")
    add("Transpose", ["out"], "codes", perm=[0, 2, 3, 1])
    return codes


def _replace_outputs(graph: Any, levels: int, logits: int, features: Sequence[tuple[_Quantized, list[int]]]) -> None:
    """Let the graph give the codes of a cell's logits, and all that the last convs read, in (B, H, W, C), with the
    border that a conv's pads add."""
    from onnx import TensorProto, helper

    old = list(graph.output)
    del graph.output[:]
    for i in range(levels):
        shape = old[i].type.tensor_type.shape
        output = helper.make_tensor_value_info(f"sieve{i}_codes", TensorProto.UINT8, None)
        output.type.tensor_type.shape.CopyFrom(shape)
        output.type.tensor_type.shape.dim[3].dim_value = logits
        graph.output.append(output)
    for i, (feature, (top, left, bottom, right)) in enumerate(features):
        name, codes = f"features{i}", feature.name
        if top or left or bottom or right:  # before the Transpose, where OpenVINO takes no time for it
            pads, zero, padded = f"{name}_pads", f"{name}_zero", f"{name}_padded"
            _hold(graph, {pads: np.array([0, 0, top, left, 0, 0, bottom, right]), zero: np.uint8(feature.codes.zero)})
            graph.node.append(helper.make_node("Pad", [codes, pads, zero], [padded], padded))
            codes = padded
        graph.node.append(helper.make_node("Transpose", [codes], [name], f"{name}_transpose", perm=[0, 2, 3, 1]))
        graph.output.append(helper.make_tensor_value_info(name, TensorProto.UINT8, [None] * 4))
