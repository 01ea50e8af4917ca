"""The last convs of a graph in eight bits, computed in float32 where a detection can be, and nowhere else.

Logits and box offsets are to be those of float32 convs. But nearly all cells of the pyramid are background, and these
two convs, left in float32, would take as long as all the others in eight bits. So the graph computes the logits in
eight bits, which serve to decide: a logit is a candidate if that value, plus a margin, exceeds the score threshold.
Candidates are computed in float32 here, as products with the 3x3 neighbourhoods of what the conv reads. All other
logits are minus infinity. Box offsets are computed at the cells where a float32 logit reaches the threshold. A level's
margin is twice the largest amount by which an 8-bit logit was too low on the calibration images.
"""

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

MARGIN = 2.0
"""In units of the largest error on the calibration images."""
LOWEST = -10.0
"""Logits below this need not be told apart: their scores are below 5e-5."""
FEW_LOGITS = 64
"""Up to so many logits a cell are few: all that one cell of a level wants are computed at each that has a candidate."""
GROUP = 128
"""If a cell has more, they are computed for groups of so many cells, those alone that one of the group wants."""
MOST_CELLS = 0.5
"""If a larger share of a level's cells have candidates, and a cell few logits, the convs are computed at all cells."""


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

    def at(self, features: Tensor, cells: Tensor, outputs: Tensor | None = None) -> Tensor:
        """(N, P): P of the outputs at N cells.

        Args:
            features: (B, H, W, C).
            cells: (N,) their indices among the B * H * W.
            outputs: (P,) which of the O; None stands for all.
        """
        height, width, channels = features.shape[1:]
        rows = (cells // width % height)[:, None, None] - self.pads[0]
        columns = (cells % width)[:, None, None] - self.pads[1]
        rows = rows + torch.arange(self.weight.shape[2])[:, None]  # (N, kernel height, 1)
        columns = columns + torch.arange(self.weight.shape[3])  # (N, 1, kernel width)
        first = cells - cells % (height * width)  # of the image
        index = first[:, None, None] + rows.clamp(0, height - 1) * width + columns.clamp(0, width - 1)
        patches = features.reshape(-1, channels).index_select(0, index.flatten())
        outside = (rows < 0) | (rows >= height) | (columns < 0) | (columns >= width)
        patches.index_fill_(0, outside.flatten().nonzero()[:, 0], 0.0)
        weight, bias = self.weight.permute(0, 2, 3, 1).flatten(1), self.bias  # a view of memory in channels_last
        if outputs is not None:
            weight, bias = weight.index_select(0, outputs), bias.index_select(0, outputs)
        return torch.addmm(bias, patches.view(len(cells), weight.shape[1]), weight.T)


class _Rows:
    """A tensor of rows with one value in all, which is given again and again; what was written is wiped each time."""

    def __init__(self, value: float) -> None:
        self.value = value
        self.tensor = torch.empty(0)
        self.written = torch.empty(0, dtype=torch.int64)

    def blank(self, rows: int, width: int) -> Tensor:
        """(rows, width) float32, to be written at ``written`` alone."""
        if self.tensor.shape == (rows, width):
            self.tensor.index_fill_(0, self.written, self.value)
        else:
            self.tensor = torch.full((rows, width), self.value)
        return self.tensor


@dataclass(frozen=True)
class Sieve:
    """What decides which logits are candidates, and the convs that are computed there.

    Attributes:
        logits: the conv that gives the logits.
        deltas: the one that gives the box offsets.
        codes: the scale and the zero point of each level's logits in eight bits.
        margins: what is added to each level's before they are compared with the threshold.
    """

    logits: LastConv
    deltas: LastConv
    codes: tuple[tuple[float, int], ...]
    margins: tuple[float, ...]
    _kept: dict[int, tuple[_Rows, _Rows]] = field(default_factory=dict, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_kept": {}}

    def __call__(self, outputs: Sequence[Tensor], threshold: float) -> tuple[list[Tensor], list[Tensor]]:
        """The levels (B, O, H, W) of logits and of box offsets, in channels_last memory, which the next call reuses.

        Args:
            outputs: of the graph: L levels of codes (B, H, W, O) uint8, then L of the features that the logits' conv
                reads, then L of those that the other reads, (B, H, W, C) float32 each.
            threshold: the score that a detection must exceed; 0 or less makes every logit a candidate.
        """
        levels = len(self.codes)
        logit = math.log(threshold / (1 - threshold)) if 0 < threshold < 1 else math.inf * (threshold - 0.5)
        logits, deltas = [], []
        for i, ((scale, zero), margin) in enumerate(zip(self.codes, self.margins, strict=True)):
            # Code 255 may stand for any greater value, and code 0 for any lower one.
            least = math.ceil(max(0.0, min(255.0, (logit - margin) / scale + zero)))
            codes, for_logits, for_deltas = outputs[i::levels]
            kept = self._kept.setdefault(i, (_Rows(-math.inf), _Rows(0.0)))
            level = self._level(codes, for_logits, for_deltas, least, logit, *kept)
            logits.append(level[0].permute(0, 3, 1, 2))
            deltas.append(level[1].permute(0, 3, 1, 2))
        return logits, deltas

    def _level(
        self,
        codes: Tensor,
        for_logits: Tensor,
        for_deltas: Tensor,
        least: int,
        logit: float,
        logits: _Rows,
        deltas: _Rows,
    ) -> tuple[Tensor, Tensor]:
        """One level's logits and box offsets, (B, H, W, O) each; the candidates are the codes of at least ``least``."""
        cells_of, outputs = codes.shape[:3], codes.shape[3]
        greatest = codes.amax(dim=3).flatten()
        cells = (greatest >= least).nonzero()[:, 0]
        few = outputs <= FEW_LOGITS
        if least == 0 or (few and len(cells) > MOST_CELLS * len(greatest)):
            return self.logits.everywhere(for_logits), self.deltas.everywhere(for_deltas)
        codes = codes.view(-1, outputs)
        rows = logits.blank(len(codes), outputs)
        offsets = deltas.blank(len(codes), len(self.deltas.bias))
        logits.written = cells
        if len(cells) and not few:  # cells that want few logits want much the same ones
            cells = cells[(codes.index_select(0, cells) >= least).sum(dim=1).argsort()]
        for group in cells.split(len(cells) if few else GROUP) if len(cells) else ():
            wanted = (codes.index_select(0, group).amax(dim=0) >= least).nonzero()[:, 0]
            rows[group[:, None], wanted] = self.logits.at(for_logits, group, wanted)
        deltas.written = cells = cells[(rows.index_select(0, cells) >= logit).any(dim=1)]
        if len(cells):
            offsets[cells] = self.deltas.at(for_deltas, cells)
        return rows.view(*cells_of, outputs), offsets.view(*cells_of, offsets.shape[1])

    def measured(self, outputs: Iterable[Sequence[Tensor]]) -> "Sieve":
        """The same with the margins that the graph's outputs for some images ask for."""
        levels = len(self.codes)
        largest = [0.0] * levels
        for levels_of_image in outputs:
            for i, (scale, zero) in enumerate(self.codes):
                codes, features = levels_of_image[i], levels_of_image[levels + i]
                exact = self.logits.everywhere(features)
                too_low = exact - scale * (codes.float() - zero)
                largest[i] = max(largest[i], float(too_low[codes < 255].amax()) if (codes < 255).any() else 0.0)
        return replace(self, margins=tuple(MARGIN * error for error in largest), _kept={})


def sieved(proto: Any, ranges: Mapping[str, Any]) -> tuple[Any, Sieve] | None:
    """A graph whose outputs are those that a :class:`Sieve` reads, and that sieve, without margins.

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
    return proto, Sieve(logits, deltas, codes, (0.0,) * half)


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


def _rounded(weight: Any) -> Any:
    """(O, C, kernel height, kernel width) as int8, of values in [-127, 127]; each takes on the error of the one before.

    A channel is much alike in neighbouring cells, and the errors of its weights then cancel. They are taken row by row,
    every other row backwards, so that each is a neighbour of the one before.
    """
    import numpy as np

    rounded, error = np.empty(weight.shape, np.int8), np.zeros(weight.shape[:2], weight.dtype)
    height, width = weight.shape[2:]
    for row in range(height):
        for column in range(width)[:: -1 if row % 2 else 1]:
            value = weight[:, :, row, column] + error
            rounded[:, :, row, column] = np.clip(np.rint(value), -127, 127)
            error = value - rounded[:, :, row, column]
    return rounded


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
        "weight": _rounded(weight / of_weight[:, None, None, None]),
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
