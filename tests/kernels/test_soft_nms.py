"""Soft-NMS against a plain Python loop over boxes, in float64 numbers."""

import math
from typing import Any
from unittest import mock

import pytest
import torch

from retina_fast import ops
from retina_fast.kernels import soft_nms as module
from retina_fast.kernels.soft_nms import METHODS, soft_nms, soft_nms_reference
from tests.ptx.cases import OTHER_ORDERS, check, names

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")  # numpy's, of interpreted kernels


def by_kernels(*arguments):
    with mock.patch.object(module, "runs_triton", return_value=True):
        return soft_nms(*arguments)


@pytest.fixture
def few_programs(monkeypatch):
    """Several classes share a program, and its boxes take several turns."""
    monkeypatch.setattr(module, "_GROUPS", 2)
    monkeypatch.setattr(module, "_SCAN", 16)


def iou(a, b):
    side = [max(min(a[k + 2], b[k + 2]) - max(a[k], b[k]), 0.0) for k in (0, 1)]
    area = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    union = sum(area) - side[0] * side[1]
    return side[0] * side[1] / union if union else math.nan


def naive(boxes, scores, labels, method, iou_thresh, sigma, score_thresh):
    """Positions and scores as Bodla's algorithm takes them, one box after another."""
    left, taken = dict(enumerate(scores)), []
    while left:
        best = min(left, key=lambda i: (-left[i], i))
        score = left.pop(best)
        if score <= score_thresh:
            break
        taken.append((best, score))
        for i in left:
            overlap = iou(boxes[best], boxes[i])
            if labels is not None and labels[i] != labels[best]:
                continue
            if method == "gaussian" and not math.isnan(overlap):
                left[i] *= math.exp(-(overlap**2) / sigma)
            if method == "linear" and overlap > iou_thresh:
                left[i] *= 1 - overlap
    return taken


def images(count: int = 40, dtype: torch.dtype = torch.float64) -> Any:
    generator = torch.Generator().manual_seed(0)
    corner = (torch.rand(3, count, 2, generator=generator) * 4).round() * 8 + torch.rand(
        3, count, 2, generator=generator
    )
    boxes = torch.cat((corner, corner + 6 + torch.rand(3, count, 2, generator=generator) * 6), dim=2)
    scores = torch.rand(3, count, generator=generator)
    labels = torch.randint(0, 3, (3, count), generator=generator)
    return boxes.to(dtype), scores.to(dtype), labels, torch.tensor([count, 0, count // 2])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("by_class", [True, False])
def test_matches_the_definition(method, by_class):
    boxes, scores, labels, counts = images()
    for iou_thresh, sigma, score_thresh in ((0.3, 0.5, 0.001), (0.0, 0.1, 0.2), (0.9, 5.0, 0.0)):
        rest = method, iou_thresh, sigma, score_thresh
        ours = soft_nms(boxes, scores, labels if by_class else None, counts, *rest, 30)
        for b, n in enumerate(counts.tolist()):
            image_labels = labels[b, :n].tolist() if by_class else None
            expected = naive(boxes[b, :n].tolist(), scores[b, :n].tolist(), image_labels, *rest)[:30]
            assert ours.counts[b] == len(expected)
            assert ours.positions[b, : len(expected)].tolist() == [i for i, _ in expected]
            assert ours.scores[b, : len(expected)].tolist() == pytest.approx([score for _, score in expected])
            assert not ours.positions[b, len(expected) :].any()
            assert not ours.scores[b, len(expected) :].any()


def equal(ours, expected):
    assert torch.equal(ours.counts.cpu(), expected.counts)
    assert torch.equal(ours.positions.cpu(), expected.positions)
    torch.testing.assert_close(ours.scores.cpu(), expected.scores, rtol=2e-6, atol=0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("by_class", [True, False])
def test_kernels_match_the_reference(method, by_class, device, few_programs):
    """Ties, a NaN score, boxes with a NaN, with infinite sides and without area, any integers as classes."""
    boxes, scores, labels, counts = images(dtype=torch.float32)
    scores[2] = (scores[2] * 8).round() / 8
    scores[0, 3], boxes[0, 5, 0], boxes[0, 6, 2:], boxes[0, 8:11, 2:] = math.nan, math.nan, math.inf, boxes[0, 8:11, :2]
    rows = boxes, scores, labels * 7919 - 10**12 if by_class else None, counts
    placed = [None if row is None else row.to(device) for row in rows]
    torch.use_deterministic_algorithms(True)  # fills empty buffers with NaN
    try:
        for most, score_thresh in ((25, 0.05), (60, 0.0), (0, 0.0)):
            rest: Any = (method, 0.3, 0.5, score_thresh, most)
            equal(by_kernels(*placed, *rest), soft_nms_reference(*rows, *rest))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
def test_empty(shape, device, few_programs):
    counts = torch.zeros(shape[0], dtype=torch.int64, device=device)
    given = torch.empty(*shape, 4, device=device), torch.empty(shape, device=device), None, counts
    for taken in (by_kernels(*given, "linear", 0.3, 0.5, 0.0, 3), soft_nms(*given, max_detections=3)):
        assert [tuple(field.shape) for field in taken] == [(shape[0], 3), (shape[0], 3), (shape[0],)]
        assert not taken.counts.any()


@pytest.mark.parametrize("method", METHODS)
def test_an_infinite_score_that_is_lowered_to_nothing(method, device, few_programs):
    """It becomes NaN, which is never taken, and the other boxes still are."""
    boxes = torch.tensor([[[0.0, 0, 8, 8], [0, 0, 8, 8], [20, 20, 28, 28]]])
    scores, counts = torch.tensor([[math.inf, math.inf, 0.5]]), torch.tensor([3])
    rest: Any = (method, 0.3, 1e-3, 0.0, 3)
    expected = soft_nms_reference(boxes, scores, None, counts, *rest)
    assert expected.positions.tolist() == [[0, 2, 0]]
    assert expected.counts.tolist() == [2]
    equal(by_kernels(boxes.to(device), scores.to(device), None, counts.to(device), *rest), expected)


def test_float64_is_kept():
    boxes, scores, labels, counts = images()
    assert ops.soft_nms(boxes, scores, labels, counts).scores.dtype == torch.float64


def test_errors():
    boxes, scores, labels, counts = images()
    given: dict[str, Any] = {"boxes": boxes, "scores": scores, "labels": labels, "counts": counts}
    for name, value in (
        ("boxes", boxes[0]), ("scores", scores[:, 1:]), ("labels", scores), ("counts", counts[:1]),
        ("method", "cosine"), ("sigma", 0.0), ("score_thresh", -0.1), ("max_detections", -1),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"{name} must be"):
            soft_nms(**given | {name: value})
    with pytest.raises(ValueError, match=r"boxes must be fewer than 2\^29 an image, got 536870912"):
        soft_nms(boxes[:1, :1].expand(1, 2**29, 4), scores[:1, :1].expand(1, 2**29), None, counts[:1])


def test_opcheck_and_compiles_whole(device, few_programs):
    boxes, scores, labels, counts = (row.to(device) for row in images(9, torch.float32))
    rest: Any = ("linear", 0.3, 0.5, 0.0, 5)
    for op in (module._op, module._reference_op):
        torch.library.opcheck(op, (boxes, scores, labels, counts, *rest))
    compiled = torch.compile(soft_nms, fullgraph=True, backend="aot_eager", dynamic=True)
    equal(compiled(boxes, scores, labels, counts, *rest), soft_nms_reference(*images(9, torch.float32), *rest))


# As compiled code


@pytest.mark.parametrize("name", names("soft_nms"))
def test_compiled(name):
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("order", OTHER_ORDERS)
@pytest.mark.parametrize("name", names("soft_nms"))
def test_compiled_in_other_orders(name, order):
    check(name, **OTHER_ORDERS[order])
