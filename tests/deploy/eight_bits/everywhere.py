"""A sieve beside its convs at all cells, and graphs of which one is made."""

import numpy as np
import pytest
import torch

from retina_fast.kernels.candidate_selection import candidate_selection
from retina_fast.kernels.levels import flatten_all


def same_as_everywhere(sieve, outputs, num_classes, score_thresh, topk, run=None):
    """Whether candidates and box offsets are those that the convs give at all cells; the candidates.
    ``run`` is what runs the tower of the box head, if there is one."""
    logits, deltas = sieve.everywhere(outputs, run)
    right = candidate_selection(logits, num_classes, score_thresh, topk)
    ours = sieve.candidates(outputs, num_classes, score_thresh, topk)
    assert torch.equal(ours.counts, right.counts)
    per_cell = logits[0].shape[1] // num_classes
    offsets = sieve.offsets(outputs, ours.anchors, per_cell, run)
    flat = torch.cat(flatten_all(deltas, offsets.shape[2]), dim=1)
    for b, count in enumerate(right.counts.tolist()):
        (keys, scores), (right_keys, right_scores) = (
            ((found.anchors * num_classes + found.labels)[b, :count], found.scores[b, :count])
            for found in (ours, right)
        )
        assert (scores.diff() <= 0).all()
        order, right_order = keys.argsort(), right_keys.argsort()
        assert torch.equal(keys[order], right_keys[right_order])
        torch.testing.assert_close(scores[order], right_scores[right_order], rtol=1e-4, atol=1e-5)
        assert (ours.labels[b, count:] == -1).all()
        torch.testing.assert_close(offsets[b, :count], flat[b, ours.anchors[b, :count]], rtol=1e-4, atol=1e-3)
    return ours


def model_of(nodes, values):
    """An ONNX model from ``x`` (batch, 3, height, width) to ``output0`` to ``output3``, whose weights are given."""
    onnx = pytest.importorskip("onnx")
    value = onnx.helper.make_tensor_value_info
    made = onnx.helper.make_graph(
        nodes,
        "graph",
        [value("x", 1, ["batch", 3, "height", "width"])],
        [value(f"output{i}", 1, [None] * 4) for i in range(4)],
        [onnx.numpy_helper.from_array(np.asarray(number), name) for name, number in values.items()],
    )
    model = onnx.helper.make_model(made, opset_imports=[onnx.helper.make_opsetid("", 19)], ir_version=10)
    return onnx.shape_inference.infer_shapes(model)
