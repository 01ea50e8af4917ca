"""Static quantisation of an ONNX graph to eight bits, by onnxruntime.quantization.

A conv and what lies between two convs (ReLU, sum, max pooling, upsampling) compute in eight bits: int8 weights with a
scale for each output channel, uint8 activations with a scale and a zero point for each tensor, int32 biases. The last
convs, which give logits and box offsets, stay in float32 with all that comes after them, and so does what comes before
the first conv. What the last convs read is in eight bits where a conv makes it, with or without a ReLU, and in float32
where a norm does. The file says so with QuantizeLinear and DequantizeLinear, which are standard operators: a runtime
without 8-bit convs computes the same in float32. The scheme is that of Jacob et al., "Quantization and Training of
Neural Networks for Efficient Integer-Arithmetic-Only Inference" (CVPR 2018), equations 1 to 7.
"""

import copy
import itertools
import math
import tempfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retina_fast.data.errors import UserError
from retina_fast.deploy.eight_bits.equalize import equalized
from retina_fast.deploy.eight_bits.groups import with_even_groups
from retina_fast.deploy.eight_bits.parts import last_convs, part_before
from retina_fast.deploy.eight_bits.weight_scales import weight_scales
from retina_fast.deploy.export.onnx_file import onnx_session

_ACTIVATIONS = ("Relu", "Clip")
_BETWEEN = (*_ACTIVATIONS, "Add", "MaxPool", "Resize")  # onnxruntime has 8-bit kernels of these
_TYPES = ("Conv", *_BETWEEN)
_SCALED_ON = 16  # arrays, on which channels are brought to like ranges


@dataclass(frozen=True)
class Layer:
    """The convs of a graph that share a weight, such as those of a head on all levels.

    Attributes:
        name: of the weight.
        nodes: the names of the Conv nodes.
    """

    name: str
    nodes: tuple[str, ...]


class Quantizer:
    """The ranges of all tensors of a graph, from which 8-bit graphs are made.

    Args:
        proto: an ONNX ModelProto with one input, whose nodes have names.
        feeds: the arrays for that input, one after the other; of all but the first 16 only one is held at a time.
        symmetric: whether activations are int8 with a zero point of 0, and biases stay in float32.

    Raises:
        UserError: if the graph has no conv that could compute in eight bits, or an array makes an activation that is
            not finite.
        ModuleNotFoundError: without onnxruntime.

    Example::

        >>> quantizer = Quantizer(proto, [pixels])  # doctest: +SKIP
        >>> smaller = quantizer.quantized()  # doctest: +SKIP
    """

    def __init__(self, proto: Any, feeds: Iterable[Any], symmetric: bool = False) -> None:
        feeds = iter(feeds)
        first = list(itertools.islice(feeds, _SCALED_ON))
        self.layers, self._nodes, self._in_float = _quantizable(proto)
        if not self.layers:
            raise UserError("the model has no conv that could compute in eight bits: all but the last ones would")
        proto = equalized(with_even_groups(proto, first, but=self._in_float), first)
        self._proto, self._symmetric = proto, symmetric
        self.ranges: Mapping[str, Any] = _ranges(_heads(proto), itertools.chain(first, feeds))

    def quantized(self, but: Collection[str] = ()) -> Any:
        """The graph in eight bits, a new ModelProto, but for the layers of these names, which stay in float32."""
        kept = {node for layer in self.layers if layer.name in but for node in layer.nodes}
        kept |= _readers(self._proto, kept, ("Add", *_ACTIVATIONS))  # which would bring their outputs to eight bits
        return self._made(self._proto, [name for name in self._nodes if name not in kept])

    def most_changing(self, share: float, feeds: Sequence[Any]) -> list[str]:
        """The names of the layers to leave in float32, within a budget: those that change the outputs the most.

        Each layer is quantised alone, with the activations after it. Its change is the squared difference of what the
        last convs give, in units of the variance of each of them. The layers of the most change for each
        multiplication come first.

        Args:
            share: of the multiplications of all layers, in [0, 1], that these layers may have.
            feeds: the arrays on which to compare.
        """
        heads = _heads(self._proto)
        products = _products(heads, self.layers, feeds[0].shape)
        before = [_outputs(heads, feed) for feed in feeds]
        changes = {}
        for layer in self.layers:
            activations = _readers(heads, layer.nodes, _ACTIVATIONS)  # by whose outputs the steps are chosen
            alone = self._made(heads, [*layer.nodes, *activations.intersection(self._nodes)])
            after = [_outputs(alone, feed) for feed in feeds]
            changes[layer.name] = sum(map(_change, before, after))
        left, names = share * sum(products.values()), []
        for name in sorted(changes, key=lambda name: changes[name] / products[name], reverse=True):
            if products[name] <= left:
                names.append(name)
                left -= products[name]
        return names

    def _made(self, proto: Any, nodes: list[str]) -> Any:
        """A graph with these nodes in eight bits; with none, itself."""
        from onnx import numpy_helper
        from onnxruntime.quantization import QDQQuantizer, QuantType

        if not nodes:
            return copy.deepcopy(proto)
        chosen = {node.input[1] for node in proto.graph.node if node.op_type == "Conv" and node.name in nodes}
        weights = {w.name: numpy_helper.to_array(w) for w in proto.graph.initializer if w.name in chosen}
        scales = {
            name: [{"axis": 0, "scale": scale, "zero_point": 0} for scale in weight_scales(weight)]
            for name, weight in weights.items()
        }
        quantizer = QDQQuantizer(
            copy.deepcopy(proto),
            True,  # a scale a channel
            False,  # 8 bits of weights, not 7, see weight_scales
            QuantType.QInt8,
            QuantType.QInt8 if self._symmetric else QuantType.QUInt8,
            self.ranges,
            nodes,
            [],
            list(_TYPES),
            {
                "ActivationSymmetric": self._symmetric,
                "QuantizeBias": not self._symmetric,
                "TensorQuantOverrides": scales,
            },
        )
        made = quantizer.quantize_model()
        _leave_in_float(made.graph, self._in_float)
        _take_shapes_of_codes(made.graph)
        quantizer.model.topological_sort()
        quantizer.model.clean_initializers()
        del made.metadata_props[:]
        made.metadata_props.extend(proto.metadata_props)
        return made


def _quantizable(proto: Any) -> tuple[list[Layer], list[str], set[str]]:
    """What is to compute in eight bits: the layers of all convs but the last ones, and the names of their nodes and of
    those between them; and which of these convs' outputs stay in float32: those on which no conv in eight bits depends,
    unless a last conv reads them directly or through a ReLU."""
    weights = {weight.name: weight for weight in proto.graph.initializer}
    after: set[str] = set()  # the tensors that depend on a conv
    conv_outputs: set[str] = set()  # those that a conv gives
    for node in proto.graph.node:
        if node.op_type == "Conv" or after.intersection(node.input):
            after.update(node.output)
        conv_outputs.update(node.output if node.op_type == "Conv" else ())
    ahead: set[str] = set()  # the tensors on which a conv depends
    ahead_of_chosen: set[str] = set()  # those on which a conv in eight bits does
    before_last: set[str] = set()  # those that a last conv reads, with a ReLU or without
    convs: dict[str, list[Any]] = {}
    nodes: list[str] = []
    in_float: set[str] = set()
    for node in reversed(proto.graph.node):
        leads, serves, ends = (
            bool(tensors.intersection(node.output)) for tensors in (ahead, ahead_of_chosen, before_last)
        )
        chosen = leads and node.op_type == "Conv" and node.input[1] in weights
        if chosen:
            convs.setdefault(node.input[1], []).append(node)
            in_float.update(() if serves or ends else node.output)
        after_conv = ends and node.op_type in _ACTIVATIONS and node.input[0] in conv_outputs
        between = serves and node.op_type in _BETWEEN and (node.op_type != "Add" or after.issuperset(node.input))
        if chosen or after_conv or between:
            nodes.append(node.name)
        ahead.update(node.input if leads or node.op_type == "Conv" else ())
        ahead_of_chosen.update(node.input if serves or chosen else ())
        before_last.update(node.input[:1] if after_conv or (node.op_type == "Conv" and not leads) else ())
    layers = [Layer(name, tuple(node.name for node in sharing)) for name, sharing in reversed(convs.items())]
    return layers, nodes[::-1], in_float


def _readers(proto: Any, convs: Collection[str], kinds: Collection[str]) -> set[str]:
    """The nodes of these kinds that read what these convs give."""
    outputs = {output for node in proto.graph.node if node.name in convs for output in node.output}
    return {node.name for node in proto.graph.node if node.op_type in kinds and outputs.intersection(node.input)}


def _leave_in_float(graph: Any, tensors: Collection[str]) -> None:
    """Take out the QuantizeLinear and DequantizeLinear that follow these tensors."""
    pairs: dict[str, str] = {}  # what the readers of a pair read, and the tensor before it
    for node in list(graph.node):
        before = pairs.get(node.input[0], node.input[0])
        if before in tensors and node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            pairs[node.output[0]] = before
            graph.node.remove(node)
    for node in graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = pairs.get(name, name)


def _take_shapes_of_codes(graph: Any) -> None:
    """Let each Shape read codes, not values: ONNX Runtime would compute the values once more, for it alone."""
    codes = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    for node in graph.node:
        if node.op_type == "Shape":
            node.input[0] = codes.get(node.input[0], node.input[0])


def _heads(proto: Any) -> Any:
    """The part of a graph from its input to what the last convs give."""
    return part_before(proto, [output for conv in last_convs(proto) for output in conv.output])


def _products(heads: Any, layers: Sequence[Layer], shape: Sequence[int]) -> dict[str, int]:
    """How many multiplications each layer takes for an input of a shape."""
    import onnx

    sized = copy.deepcopy(heads)
    del sized.graph.value_info[:]
    for side, value in zip(sized.graph.input[0].type.tensor_type.shape.dim, shape, strict=True):
        side.dim_value = value
    sized = onnx.shape_inference.infer_shapes(sized, data_prop=True)
    sizes = {value.name: value.type.tensor_type.shape.dim for value in sized.graph.value_info}
    weights = {weight.name: math.prod(weight.dims) for weight in sized.graph.initializer}
    nodes = {node.name: node for node in sized.graph.node}

    def cells(output: str) -> int:
        return math.prod(side.dim_value for side in sizes[output][2:])

    return {
        layer.name: weights[layer.name] * sum(cells(nodes[name].output[0]) for name in layer.nodes) for layer in layers
    }


def _outputs(proto: Any, feed: Any) -> list[Any]:
    return onnx_session(proto.SerializeToString()).run(None, {proto.graph.input[0].name: feed})


def _change(before: Sequence[Any], after: Sequence[Any]) -> float:
    return sum(
        float(((ours - theirs) ** 2).mean() / max(theirs.var(), 1e-12))
        for theirs, ours in zip(before, after, strict=True)
    )


def _ranges(part: Any, feeds: Iterable[Any]) -> Mapping[str, Any]:
    """The least and greatest value of each tensor over all arrays."""
    import numpy as np
    import onnx
    from onnxruntime.quantization import CalibrationMethod, create_calibrator

    name = part.graph.input[0].name
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "part.onnx"
        onnx.save(part, path)
        calibrator = create_calibrator(
            path,
            list(_TYPES),
            augmented_model_path=str(Path(folder) / "augmented.onnx"),
            calibrate_method=CalibrationMethod.MinMax,
        )
        for feed in feeds:
            calibrator.collect_data(_Once({name: feed}))  # merges the ranges with those before
        ranges = calibrator.compute_data()
    if not all(np.isfinite(data.range_value).all() for data in ranges.values()):
        raise UserError("the model gives values that are not finite for the calibration images")
    return ranges


class _Once:
    """What onnxruntime calls a data reader: gives one set of inputs, then None."""

    def __init__(self, inputs: dict[str, Any]) -> None:
        self._left: list[dict[str, Any]] = [inputs]

    def get_next(self) -> dict[str, Any] | None:
        return self._left.pop() if self._left else None
