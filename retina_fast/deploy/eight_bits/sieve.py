"""The last convs of a graph in eight bits, computed in float32 where a detection can be, and nowhere else.

Logits and box offsets are to be those of float32 convs. But nearly all cells of the pyramid are background, and these
two convs, left in float32, would take as long as all the others in eight bits. So the graph computes the logits in
eight bits, which serve to decide: a cell is a candidate if one of them, plus a margin, exceeds the score threshold. For
candidates both convs are computed in float32 here, as products with the 3x3 neighbourhoods of what the convs read. All
other cells get logits of minus infinity. The margin is twice the largest amount by which an 8-bit logit was too low on
the calibration images.
"""

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

MARGIN = 2.0
"""In units of the largest error on the calibration images."""
LOWEST = -10.0
"""Logits below this need not be told apart: their scores are below 5e-5."""
MOST_CELLS = 0.5
"""If a larger share of a level's cells are candidates, the convs are computed at all of its cells."""


@dataclass(frozen=True)
class LastConv:
    """A conv of stride 1 on features in channels_last memory.

    Attributes:
        weight: (O, C, kernel height, kernel width).
        bias: (O,).
        pads: rows above, columns to the left, rows below, columns to the right.
    """

    weight: Tensor
    bias: Tensor
    pads: tuple[int, int, int, int]

    def everywhere(self, features: Tensor) -> Tensor:
        """(B, H, W, O) of features (B, H, W, C)."""
        top, left, bottom, right = self.pads
        padded = F.pad(features, (0, 0, left, right, top, bottom)).permute(0, 3, 1, 2)
        return F.conv2d(padded, self.weight, self.bias).permute(0, 2, 3, 1)

    def at(self, features: Tensor, cells: tuple[Tensor, ...]) -> Tensor:
        """(N, O) at N cells: their images, rows and columns, (N,) each."""
        height, width = features.shape[1:3]
        images, rows, columns = (index[:, None, None] for index in cells)
        rows = rows + torch.arange(self.weight.shape[2])[:, None] - self.pads[0]  # (N, kernel height, 1)
        columns = columns + torch.arange(self.weight.shape[3]) - self.pads[1]  # (N, 1, kernel width)
        patches = features[images, rows.clamp(0, height - 1), columns.clamp(0, width - 1)]
        patches[(rows < 0) | (rows >= height) | (columns < 0) | (columns >= width)] = 0  # (N, kernel, kernel, C)
        weight = self.weight.permute(0, 2, 3, 1).flatten(1)  # a view: the weight is in channels_last memory
        return torch.addmm(self.bias, patches.flatten(1), weight.T)


@dataclass(frozen=True)
class Sieve:
    """What decides which cells are candidates, and the convs that are computed there.

    Attributes:
        logits: the conv that gives the logits.
        deltas: the one that gives the box offsets.
        codes: the scale and the zero point of each level's logits in eight bits.
        margin: what is added to them before they are compared with the threshold.
    """

    logits: LastConv
    deltas: LastConv
    codes: tuple[tuple[float, int], ...]
    margin: float = 0.0

    def __call__(self, outputs: Sequence[Tensor], threshold: float) -> tuple[list[Tensor], list[Tensor]]:
        """The levels (B, O, H, W) of logits and of box offsets, in channels_last memory.

        Args:
            outputs: of the graph: L levels of codes (B, H, W, O) uint8, then L of the features that the logits' conv
                reads, then L of those that the other reads, (B, H, W, C) float32 each.
            threshold: the score that a detection must exceed; 0 or less makes every cell a candidate.
        """
        levels = len(self.codes)
        logit = math.log(threshold / (1 - threshold)) if 0 < threshold < 1 else math.inf * (threshold - 0.5)
        logits, deltas = [], []
        for i, (scale, zero) in enumerate(self.codes):
            codes, for_logits, for_deltas = outputs[i::levels]
            least = max(0.0, min(255.0, (logit - self.margin) / scale + zero))  # 255 may stand for any greater value
            cells = (codes.amax(dim=3) >= math.ceil(least)).nonzero(as_tuple=True)
            if len(cells[0]) > MOST_CELLS * codes[..., 0].numel():
                level = self.logits.everywhere(for_logits), self.deltas.everywhere(for_deltas)
            else:
                level = (
                    for_logits.new_full(codes.shape, -math.inf),
                    for_deltas.new_zeros(*codes.shape[:3], len(self.deltas.bias)),
                )
                if len(cells[0]):
                    level[0][cells] = self.logits.at(for_logits, cells)
                    level[1][cells] = self.deltas.at(for_deltas, cells)
            logits.append(level[0].permute(0, 3, 1, 2))
            deltas.append(level[1].permute(0, 3, 1, 2))
        return logits, deltas

    def measured(self, outputs: Iterable[Sequence[Tensor]]) -> "Sieve":
        """The same with the margin that the graph's outputs for some images ask for."""
        levels, largest = len(self.codes), 0.0
        for levels_of_image in outputs:
            for i, (scale, zero) in enumerate(self.codes):
                codes, features = levels_of_image[i], levels_of_image[levels + i]
                exact = self.logits.everywhere(features)
                too_low = exact - scale * (codes.float() - zero)
                largest = max(largest, float(too_low[codes < 255].amax()) if (codes < 255).any() else 0.0)
        return replace(self, margin=MARGIN * largest)


def sieved(proto: Any, ranges: Mapping[str, Any]) -> tuple[Any, Sieve] | None:
    """A graph whose outputs are those that a :class:`Sieve` reads, and that sieve, without a margin.

    Args:
        proto: of :func:`retina_fast.deploy.onnx_network.trace`, whose outputs are L levels of logits, then L of box
            offsets; quantised but for the convs that give them.
        ranges: the least and greatest value of what these convs read and give, by name.

    Returns:
        None where the outputs are something else, as those of a head of the user's own may be.
    """
    proto = copy.deepcopy(proto)
    graph = proto.graph
    made_by = {output: node for node in graph.node for output in node.output}
    weights = {weight.name: weight for weight in graph.initializer}
    pairs = [(made_by[out.name], made_by.get(made_by[out.name].input[0])) for out in graph.output]
    if len(pairs) % 2 or not all(_is_last_conv(transpose, conv, weights) for transpose, conv in pairs):
        return None
    half = len(pairs) // 2
    logits, deltas = (_last_conv([conv for _, conv in side], weights) for side in (pairs[:half], pairs[half:]))
    if logits is None or deltas is None:
        return None
    codes = tuple(_in_eight_bits(graph, conv, i, logits, ranges) for i, (_, conv) in enumerate(pairs[:half]))
    for transpose, conv in pairs:
        graph.node.remove(transpose)
        graph.node.remove(conv)
    _replace_outputs(graph, [conv for _, conv in pairs], half)
    used = {name for node in graph.node for name in node.input}
    for weight in [weight for weight in graph.initializer if weight.name not in used]:
        graph.initializer.remove(weight)
    return proto, Sieve(logits, deltas, codes)


def _is_last_conv(transpose: Any, conv: Any, weights: Mapping[str, Any]) -> bool:
    if transpose.op_type != "Transpose" or conv is None or conv.op_type != "Conv":
        return False
    return all(name in weights for name in conv.input[1:])


def _last_conv(convs: Sequence[Any], weights: Mapping[str, Any]) -> LastConv | None:
    """The conv that all levels share; None if they do not, or if it skips cells or channels."""
    from onnx import numpy_helper

    def attributes(conv: Any) -> dict[str, list[int]]:
        return {entry.name: list(entry.ints) or [entry.i] for entry in conv.attribute}

    first = attributes(convs[0])
    if any(conv.input[1:] != convs[0].input[1:] or attributes(conv) != first for conv in convs):
        return None
    ones = [*first.get("group", [1]), *first.get("strides", [1]), *first.get("dilations", [1])]
    weight, *bias = (torch.from_numpy(numpy_helper.to_array(weights[name]).copy()) for name in convs[0].input[1:])
    if weight.dim() != 4 or set(ones) != {1}:
        return None
    top, left, bottom, right = first.get("pads", [0, 0, 0, 0])
    if (top + bottom, left + right) != (weight.shape[2] - 1, weight.shape[3] - 1):
        return None
    weight = weight.contiguous(memory_format=torch.channels_last)
    return LastConv(weight, bias[0] if bias else weight.new_zeros(len(weight)), (top, left, bottom, right))


def _scale(least: float, greatest: float) -> tuple[float, int]:
    """The scale and zero point of uint8 for a range, which is widened to hold 0."""
    least, greatest = min(float(least), 0.0), max(float(greatest), 0.0)
    scale = max((greatest - least) / 255, 1e-12)
    return scale, round(-least / scale)


def _in_eight_bits(graph: Any, conv: Any, level: int, last: LastConv, ranges: Mapping[str, Any]) -> tuple[float, int]:
    """Append the conv with 8-bit inputs, weights and outputs; returns the scale and zero point of the outputs."""
    import numpy as np
    from onnx import helper, numpy_helper

    (least, greatest), (least_out, greatest_out) = (
        [value.item() for value in ranges[name].range_value] for name in (conv.input[0], conv.output[0])
    )
    scale, zero = _scale(least, greatest)
    out_scale, out_zero = _scale(max(least_out, LOWEST), greatest_out)
    weight = last.weight.numpy()
    of_weight = np.maximum(np.abs(weight).max(axis=(1, 2, 3)) / 127, 1e-12).astype(np.float32)  # (O,)
    of_bias = (of_weight * np.float32(scale)).astype(np.float32)
    limit = 2**31 - 1
    held = {
        "scale": np.float32(scale),
        "zero": np.uint8(zero),
        "out_scale": np.float32(out_scale),
        "out_zero": np.uint8(out_zero),
        "weight": np.clip(np.rint(weight / of_weight[:, None, None, None]), -127, 127).astype(np.int8),
        "of_weight": of_weight,
        "bias": np.clip(np.rint(last.bias.numpy() / of_bias), -limit, limit).astype(np.int32),
        "of_bias": of_bias,
    }
    name = {key: f"sieve{level}_{key}" for key in (*held, "codes", "in", "x", "w", "b", "y", "out")}
    graph.initializer.extend(numpy_helper.from_array(np.asarray(value), name[key]) for key, value in held.items())

    def add(kind: str, inputs: Sequence[str], output: str, **attributes: Any) -> None:
        node = helper.make_node(kind, [name.get(key, key) for key in inputs], [name[output]], **attributes)
        node.name = f"{name[output]}_{kind}"
        graph.node.append(node)

    add("QuantizeLinear", [conv.input[0], "scale", "zero"], "in")
    add("DequantizeLinear", ["in", "scale", "zero"], "x")
    add("DequantizeLinear", ["weight", "of_weight"], "w", axis=0)
    add("DequantizeLinear", ["bias", "of_bias"], "b", axis=0)
    add("Conv", ["x", "w", "b"], "y", pads=list(last.pads), kernel_shape=list(last.weight.shape[2:]))
    add("QuantizeLinear", ["y", "out_scale", "out_zero"], "out")
    add("Transpose", ["out"], "codes", perm=[0, 2, 3, 1])
    return out_scale, out_zero


def _replace_outputs(graph: Any, convs: Sequence[Any], levels: int) -> None:
    """Let the graph give the codes of the logits, and all that the last convs read, in (B, H, W, C)."""
    from onnx import TensorProto, helper

    old = list(graph.output)
    del graph.output[:]
    for i in range(levels):
        shape = old[i].type.tensor_type.shape
        output = helper.make_tensor_value_info(f"sieve{i}_codes", TensorProto.UINT8, None)
        output.type.tensor_type.shape.CopyFrom(shape)
        graph.output.append(output)
    for i, conv in enumerate(convs):
        name = f"features{i}"
        graph.node.append(
            helper.make_node("Transpose", [conv.input[0]], [name], f"{name}_transpose", perm=[0, 2, 3, 1])
        )
        graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * 4))
