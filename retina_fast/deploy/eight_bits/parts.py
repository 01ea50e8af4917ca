"""A graph, its last convs, the part before given tensors, and the ranges of tensors, as they are and are to be."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from retina_fast.deploy.export.onnx_file import onnx_session

Inputs = list[tuple[Any, int]]
"""Nodes, and which of their inputs."""
LEAST = 1 / 16
"""The least factor of a range: what is silent in these images may speak in others."""


def attributes(node: Any) -> dict[str, list[int]]:
    """Those of a node that are whole numbers."""
    return {entry.name: list(entry.ints) or [entry.i] for entry in node.attribute}


def last_convs(proto: Any) -> list[Any]:
    """The Conv nodes on which no other conv depends, in the order of the graph: they give logits and box offsets."""
    ahead: set[str] = set()  # the tensors on which a conv depends
    convs = []
    for node in reversed(proto.graph.node):
        leads = bool(ahead.intersection(node.output))
        if node.op_type == "Conv" and not leads:
            convs.append(node)
        ahead.update(node.input if leads or node.op_type == "Conv" else ())
    return convs[::-1]


def part_before(proto: Any, ends: Sequence[str]) -> Any:
    """The part of a graph from its input to these tensors, a new ModelProto."""
    import onnx

    inferred = onnx.shape_inference.infer_shapes(proto)
    return onnx.utils.Extractor(inferred).extract_model([proto.graph.input[0].name], list(ends))


def channel_ranges(proto: Any, tensors: Sequence[str], feeds: Iterable[Any]) -> Mapping[str, tuple[Any, Any]]:
    """The least and the greatest value (C,) in each channel of tensors (B, C, H, W), over all arrays for the input."""
    part = part_before(proto, tensors)
    session, name = onnx_session(part.SerializeToString()), part.graph.input[0].name
    found = dict.fromkeys(tensors, (np.float32(np.inf), np.float32(-np.inf)))
    for feed in feeds:
        for tensor, values in zip(tensors, session.run(list(tensors), {name: feed}), strict=True):
            least, greatest = found[tensor]
            axes = (0, 2, 3)
            found[tensor] = np.minimum(least, values.min(axis=axes)), np.maximum(greatest, values.max(axis=axes))
    return found


def like_ranges(reach: Any) -> Any:
    """The least factors c (N,), from 1/16 to 1, with which no row of ``reach / c`` exceeds the largest of its row.

    Args:
        reach: (L, N) how far each of N parts of a tensor reaches in each of L levels.

    Returns:
        None if a value is not finite, or a level reaches nowhere.
    """
    farthest = reach.max(axis=1, keepdims=True)
    if not np.isfinite(reach).all() or not farthest.all():
        return None
    return np.clip((reach / farthest).max(axis=0), LEAST, 1)


class Graph:
    """A graph's weights by name, and who makes and who reads each tensor.

    Args:
        graph: a GraphProto, whose weights the methods change in place.
    """

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

    def maker(self, node: Any, i: int) -> Any:
        """The node that makes an input of a node; None if something else reads that tensor, too."""
        return self.made_by.get(node.input[i]) if len(self.readers[node.input[i]]) == 1 else None

    def are_read_by_no_other(self, inputs: Inputs) -> bool:
        """Whether nothing else reads those of these weights that are a conv's."""
        names = [node.input[i] for node, i in inputs if node.op_type == "Conv"]
        return all(names.count(name) == len(self.readers[name]) for name in set(names))

    def array(self, name: str) -> Any:
        """The values of a weight."""
        from onnx import numpy_helper

        return numpy_helper.to_array(self.weights[name])

    def hold(self, name: str, value: Any) -> str:
        """Add a weight; its name. One that is there already must be the same."""
        from onnx import numpy_helper

        if name in self.weights:
            assert np.array_equal(self.array(name), value), f"the graph has another {name}"
            return name
        self.weights[name] = self.graph.initializer.add()
        self.weights[name].CopyFrom(numpy_helper.from_array(np.asarray(value), name))
        return name

    def scale(self, inputs: Inputs, factor: Any, axis: int, shift: Any = 0) -> None:
        """Multiply weights along an axis, and add to them there.

        A weight that other nodes read, too, stays as it is, and these nodes read a changed copy.

        Args:
            inputs: where they are read.
            factor: (N,) for an axis of that length.
            axis: of all of these weights.
            shift: (N,), added to the products.
        """
        from onnx import numpy_helper

        places: dict[str, Inputs] = defaultdict(list)
        for node, i in inputs:
            places[node.input[i]].append((node, i))
        for name, readers in places.items():
            value = self.array(name)
            shape = [-1 if side == axis else 1 for side in range(value.ndim)]
            value = (value * np.reshape(factor, shape) + np.reshape(shift, shape)).astype(value.dtype)
            if len(readers) == len(self.readers[name]):
                self.weights[name].CopyFrom(numpy_helper.from_array(value, name))
                continue
            own = self.hold(f"{name}_of_{readers[0][0].output[0]}", value)
            for node, i in readers:
                node.input[i] = own
