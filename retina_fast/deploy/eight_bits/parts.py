"""Parts of an ONNX graph: its last convs, and what lies before some tensors."""

from collections.abc import Sequence
from typing import Any


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
