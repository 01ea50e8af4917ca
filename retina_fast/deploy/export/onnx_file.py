"""Writing an ONNX file: the parts of the graph for which ONNX has operators of its own, and the file's checksum."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from retina_fast.deploy.export.graph import SHAPES
from retina_fast.deploy.export.postprocess import Postprocess

KEY = "retina_fast"
"""The key under which a file holds its metadata, as JSON."""

OPSET = 18
QUANTIZED_OPSET = 19
"""Of files in eight bits: the first whose QuantizeLinear onnx's reference evaluator knows."""
OUTPUTS = ("boxes", "scores", "labels", "counts")


@torch.library.custom_op("retina_fast::non_max_suppression", mutates_args=())
def _non_max_suppression(boxes: Tensor, ranks: Tensor, iou_thresh: float, most: int) -> Tensor:
    """A placeholder in the traced graph, which :func:`_onnx_suppression` translates into ONNX's NonMaxSuppression."""
    raise NotImplementedError("retina_fast::non_max_suppression is for the ONNX exporter alone")


@_non_max_suppression.register_fake
def _(boxes: Tensor, ranks: Tensor, iou_thresh: float, most: int) -> Tensor:
    return boxes.new_empty(boxes.shape[:2], dtype=torch.int64)


def _onnx_suppression(boxes: Any, ranks: Any, iou_thresh: float, most: int) -> Any:
    """(B, M) int64, 1 where kept."""
    from onnxscript import opset18 as op

    def numbers(*values: int) -> Any:
        return op.Constant(value_ints=list(values))

    threshold: Any = op.Constant(value_floats=[iou_thresh])
    least: Any = op.Constant(value_floats=[0.5])
    chosen = op.NonMaxSuppression(boxes, ranks, numbers(most), threshold, least)  # (S, 3): image, class, box
    places = op.Gather(chosen, numbers(0, 2), axis=1)
    none = op.Expand(numbers(0), op.Shape(boxes, start=0, end=2))
    return op.ScatterND(none, places, op.Expand(numbers(1), op.Shape(chosen, start=0, end=1)))


class OnnxPostprocess(Postprocess):
    """The same with two operators of ONNX: TopK, which gives the lower index first on a tie, and NonMaxSuppression."""

    def best(self, values: Tensor, k: int) -> tuple[Tensor, Tensor]:
        best = values.topk(k)
        return best.values, best.indices

    def suppress(self, boxes: Tensor, labels: Tensor, valid: Tensor, most: int) -> Tensor:
        falling = torch.arange(boxes.shape[1], 0, -1, device=boxes.device).float()  # in place of scores: no ties
        own = labels[:, None] == torch.arange(self.num_classes, device=boxes.device)[:, None]  # (B, K, M)
        ranks = torch.where(own & valid[:, None], falling, 0.0)
        return _non_max_suppression(boxes, ranks, self.iou_thresh, most) > 0


def checksum(content: bytes) -> bytes:
    """What follows ``content`` in an ONNX file: one more entry of its metadata, the SHA-256 of all that is before it.

    A protobuf message may be written in pieces, so ONNX's readers see one file.
    """
    entry = b"".join(
        bytes([number << 3 | 2, len(value)]) + value
        for number, value in ((1, b"sha256"), (2, hashlib.sha256(content).hexdigest().encode()))
    )
    return bytes([14 << 3 | 2, len(entry)]) + entry  # ModelProto.metadata_props


def translate(
    program: torch.export.ExportedProgram,
    dynamic_shapes: dict[str, Any] = SHAPES,
    outputs: Sequence[str] = OUTPUTS,
    opset: int = OPSET,
) -> Any:
    """The ModelProto of a traced program, checked; its dynamic sizes have the names of ``dynamic_shapes``."""
    import onnx
    import onnxscript  # noqa: F401 - torch needs it, and would name it less clearly

    written = torch.onnx.export(
        program,
        dynamo=True,
        opset_version=opset,
        output_names=list(outputs),
        dynamic_shapes=dynamic_shapes,
        custom_translation_table={torch.ops.retina_fast.non_max_suppression.default: _onnx_suppression},
        verbose=False,
    )
    assert written is not None
    onnx.checker.check_model(written.model_proto, full_check=True)
    return written.model_proto


def onnx_session(content: bytes) -> Any:
    """An InferenceSession of onnxruntime for the content of a file, with as many threads as PyTorch has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.force_spinning_stop", "1")  # else they wait busily when a run has ended
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def write_onnx(proto: Any, path: Path, described: dict[str, Any]) -> None:
    """Write a ModelProto and its metadata."""
    proto.metadata_props.add(key=KEY, value=json.dumps(described))
    content = proto.SerializeToString()
    path.write_bytes(content + checksum(content))
