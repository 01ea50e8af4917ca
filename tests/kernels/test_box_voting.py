"""Box voting against a plain Python loop over boxes, in float64 numbers."""

import math
from typing import Any
from unittest import mock

import pytest
import torch

from retina_fast import ops
from retina_fast.kernels import box_voting as module
from retina_fast.kernels.batched_nms import batched_nms
from retina_fast.kernels.box_voting import box_voting, box_voting_reference
from tests.kernels.test_soft_nms import images, iou
from tests.ptx.cases import OTHER_ORDERS, check, names

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")  # numpy's, of interpreted kernels


def by_kernels(*arguments):
    with mock.patch.object(module, "runs_triton", return_value=True):
        return box_voting(*arguments)


def rows(dtype: torch.dtype, by_class: bool = True, count: int = 40) -> Any:
    """All that is asked for: boxes of three images, and what NMS has kept of them."""
    boxes, scores, labels, counts = images(count, dtype)
    scores = scores - 0.1  # some are negative
    kept = batched_nms(boxes, scores, labels, counts, 0.3, 12)
    return boxes, scores, labels if by_class else None, counts, kept.positions, kept.counts


@pytest.mark.parametrize("by_class", [True, False])
@pytest.mark.parametrize("iou_thresh", [0.0, 0.3, 0.9])
def test_matches_the_definition(by_class, iou_thresh):
    boxes, scores, labels, counts, positions, kept = rows(torch.float64, by_class)
    ours = box_voting(boxes, scores, labels, counts, positions, kept, iou_thresh)
    for b, n in enumerate(counts.tolist()):
        for d, i in enumerate(positions[b, : kept[b]].tolist()):
            voters = [
                j
                for j in range(n)
                if iou(boxes[b, i].tolist(), boxes[b, j].tolist()) > iou_thresh
                and (labels is None or labels[b, i] == labels[b, j])
            ]
            weights = [max(float(scores[b, j]), 0.0) for j in voters]
            expected = boxes[b, i].tolist()
            if sum(weights):
                expected = [
                    sum(w * float(boxes[b, j, side]) for w, j in zip(weights, voters, strict=True)) / sum(weights)
                    for side in range(4)
                ]
            assert ours[b, d].tolist() == pytest.approx(expected)
        assert not ours[b, kept[b] :].any()


@pytest.mark.parametrize("by_class", [True, False])
def test_kernels_match_the_reference_in_float64(by_class, device, monkeypatch):
    """Boxes with a NaN, of infinite area and without any; scores that are NaN; programs with several turns."""
    monkeypatch.setattr(module, "_CHUNK", 16)
    boxes, scores, labels, counts, positions, kept = rows(torch.float32, by_class)
    positions[0, :4] = torch.tensor([3, 5, 6, 8])
    scores[0, 3], boxes[0, 5, 0], boxes[0, 6, 2:], boxes[0, 8:11, 2:] = math.nan, math.nan, math.inf, boxes[0, 8:11, :2]
    given = boxes, scores, labels, counts, positions, kept
    torch.use_deterministic_algorithms(True)  # fills empty buffers with NaN
    try:
        ours = by_kernels(*(None if row is None else row.to(device) for row in given))
    finally:
        torch.use_deterministic_algorithms(False)
    exact = box_voting_reference(boxes.double(), scores.double(), labels, counts, positions, kept)
    torch.testing.assert_close(ours.cpu().double(), exact, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_differentiable_and_exported_name():
    boxes, scores, *rest = rows(torch.float32)
    out = ops.box_voting(boxes.requires_grad_(), scores.requires_grad_(), *rest)
    grads = torch.autograd.grad(out.sum(), (boxes, scores))
    assert all(grad[0].isfinite().all() and grad[0].any() and not grad[1].any() for grad in grads)


def test_gradients_where_nobody_votes():
    """The second kept box has no area, and the second image no box."""
    boxes = torch.tensor([[[0.0, 0, 8, 8], [2, 0, 8, 8], [5, 5, 5, 5]]] * 2, requires_grad=True)
    counts, kept = torch.tensor([3, 0]), torch.tensor([[0, 2], [0, 0]])
    out = box_voting(boxes, torch.tensor([[0.75, 0.25, 0.5]] * 2), None, counts, kept, torch.tensor([2, 0]))
    (gradient,) = torch.autograd.grad(out.sum(), boxes)
    assert gradient[:, :, 0].tolist() == [[0.75, 0.25, 1], [0, 0, 0]]


@pytest.mark.parametrize("shape", [(0, 5, 3), (2, 0, 3), (2, 5, 0)])
def test_empty(shape, device):
    batch, width, kept = shape
    zeros = torch.zeros(batch, dtype=torch.int64, device=device)
    given = torch.zeros(batch, width, 4, device=device), torch.zeros(batch, width, device=device), None, zeros
    positions = torch.zeros(batch, kept, dtype=torch.int64, device=device)
    for out in (by_kernels(*given, positions, zeros), box_voting(*given, positions, zeros)):
        assert out.shape == (batch, kept, 4)
        assert not out.any()


def test_errors():
    boxes, scores, labels, counts, positions, kept = rows(torch.float32)
    given = {"boxes": boxes, "scores": scores, "labels": labels, "counts": counts, "positions": positions}
    for name, value in (
        ("boxes", boxes[0]), ("scores", scores[:, 1:]), ("labels", scores), ("counts", counts[:1]),
        ("positions", positions.float()), ("positions", positions[0]), ("positions", positions[0, 0]),
        ("kept_counts", kept[:1]),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"{name} must be"):
            box_voting(**{**given, "kept_counts": kept, name: value})


def test_opcheck_and_compiles_whole(device):
    given = [row.to(device) for row in rows(torch.float32, count=9)]
    torch.library.opcheck(module._op, (*given, 0.5))
    compiled = torch.compile(box_voting, fullgraph=True, backend="aot_eager", dynamic=True)
    torch.testing.assert_close(compiled(*given).cpu(), box_voting_reference(*rows(torch.float32, count=9)))


# As compiled code


@pytest.mark.parametrize("name", names("box_voting"))
def test_compiled(name):
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("order", OTHER_ORDERS)
@pytest.mark.parametrize("name", names("box_voting"))
def test_compiled_in_other_orders(name, order):
    check(name, **OTHER_ORDERS[order])
