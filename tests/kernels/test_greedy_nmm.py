"""Greedy non-maximum merging against a plain loop in exact fractions, and against SAHI where that is installed."""

import math
from fractions import Fraction
from typing import Any
from unittest import mock

import pytest
import torch

from retina_fast import ops
from retina_fast.kernels import greedy_nmm as module
from retina_fast.kernels import greedy_nmm_cpu as cpu_module
from retina_fast.kernels import nms_deal, nms_tiles
from retina_fast.kernels.greedy_nmm import METRICS, Merged, greedy_nmm, greedy_nmm_reference
from tests.ptx.cases import OTHER_ORDERS, check, names

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")  # numpy's, of interpreted kernels

COPIES = [[0, 0, 8, 8]] * 5
NESTED = [[k, k, 40 - k, 40 - k] for k in range(9)]
CHAIN = [[3 * k, 0, 3 * k + 6, 6] for k in range(12)]  # each half over the next, which only merging reaches
HALVES = [[0, 0, 10, 10], [0, 0, 10, 5], [5, 0, 15, 10], [0, 5, 10, 15], [0, 0, 20, 10], [2, 0, 12, 10]]
STRIPES = [[0, k, 60, k + 2] for k in range(0, 20, 2)] + [[k, 0, k + 2, 20] for k in range(0, 60, 7)]
GROWING = [[0, 0, 10, 10], [2, 0, 13, 10], [3, 0, 14, 10], [4, 0, 15, 10], [8, 0, 19, 10], [9, 9, 10, 10]]
FLAT = [[0, 0, 9, 9], [0, 0, 0, 9], [3, 3, 3, 3], [0, 0, 9, 0], [5, 5, 2, 2]]
LARGE = [[0, 0, 900, 900], *[[31 * k, 17 * k, 31 * k + 9, 17 * k + 9] for k in range(25)]]
SEAM = [[0, 0, 20, 10], [15, 0, 40, 10], [15, 0, 20, 10], [0, 0, 40, 10], [16, 1, 19, 9]]
ADVERSARIAL = [COPIES, NESTED, CHAIN, HALVES, STRIPES, GROWING, FLAT, LARGE, SEAM, SEAM[::-1]]
"""Sets of boxes on whole pixels: equal ones, nested ones, overlaps of exactly 0.5, boxes without an area."""


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """Few and small ones, which the interpreter runs one after another."""
    for name, value in (("_TILE", 64), ("_PART", 16), ("_PART_OF_MANY", 32), ("_MANY", 100), ("_PAIRS", 1024)):
        monkeypatch.setattr(nms_tiles, name, value)
    for name, value in (("_PROGRAMS", 4), ("_GROUPS", 2)):
        monkeypatch.setattr(nms_tiles, name, value)
    monkeypatch.setattr(nms_deal, "_TILE", 64)


def by_kernels(*arguments):
    with mock.patch.object(module, "runs_triton", return_value=True):
        return greedy_nmm(*arguments)


def equal(found: Merged, expected: Merged) -> None:
    for name, ours, theirs in zip(Merged._fields, found, expected, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs.cpu(), rtol=0, atol=0, equal_nan=True, msg=name)


def adversarial(k: int) -> tuple[Any, Any, Any]:
    """Boxes, scores of which many are equal, and classes of one image."""
    boxes = torch.tensor([ADVERSARIAL[k]], dtype=torch.float32)
    count = boxes.shape[1]
    scores = torch.tensor([[0.9 if i % 3 else 0.8 for i in range(count)]])
    return boxes, scores, torch.tensor([[i % 5 // 3 for i in range(count)]])


def random_set(seed: int, count: int = 60) -> tuple[Any, Any, Any]:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(1, count, 2, generator=generator) * (40 + 10 * (seed % 5))
    boxes = torch.cat((corner, corner + 2 + torch.rand(1, count, 2, generator=generator) * 20), dim=2)
    return boxes, torch.rand(1, count, generator=generator), torch.randint(0, 3, (1, count), generator=generator)


def images(count: int = 40) -> Any:
    """Three images; one has few boxes and one none. Some scores are equal, some boxes odd."""
    boxes, scores, labels = (torch.cat([random_set(seed, count)[k] for seed in range(3)]) for k in range(3))
    scores = (scores * 8).round() / 8
    boxes[0, 3:5] = boxes[0, 2]
    boxes[0, 6, 0], boxes[0, 7, 2:], boxes[0, 8, 2:] = math.nan, math.inf, boxes[0, 8, :2]
    scores[0, 5] = math.nan
    return boxes, scores, labels, torch.tensor([count, 7, 0])


def exact(a, b, metric):
    a, b = [*map(Fraction, a)], [*map(Fraction, b)]
    shared = math.prod(max(min(a[k + 2], b[k + 2]) - max(a[k], b[k]), 0) for k in (0, 1))
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return shared / (sum(areas) - shared if metric == "IOU" else min(areas)) if shared else Fraction(0)


def naive(boxes, scores, labels, metric, threshold):
    """What SAHI's GreedyNMMPostprocess gives: (box, position, members) of each group, by falling score."""
    left = sorted(range(len(boxes)), key=lambda i: (-scores[i], boxes[i], i))
    merged = []
    while left:
        best = left.pop(0)
        members = [
            i
            for i in left
            if (labels is None or labels[i] == labels[best]) and exact(boxes[best], boxes[i], metric) >= threshold
        ]
        left = [i for i in left if i not in members]
        box = boxes[best]
        for i in members:
            if exact(box, boxes[i], metric) >= threshold:
                box = [*map(min, box[:2], boxes[i][:2]), *map(max, box[2:], boxes[i][2:])]
        merged.append((box, best, members))
    return merged


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("by_class", [True, False])
def test_matches_the_definition(metric, by_class):
    for given in [*map(adversarial, range(10)), *map(random_set, range(2))]:
        boxes, scores, labels = given
        labels = labels if by_class else None
        count = torch.tensor([boxes.shape[1]])
        rest = None if labels is None else labels[0].tolist()
        expected = naive(boxes[0].tolist(), scores[0].tolist(), rest, metric, Fraction(1, 2))
        for merge in (greedy_nmm_reference, greedy_nmm):
            boxes_left, positions, counts, groups = merge(boxes, scores, labels, count, metric, 0.5, boxes.shape[1])
            assert counts.tolist() == [len(expected)]
            for d, (box, best, members) in enumerate(expected):
                assert boxes_left[0, d].tolist() == box
                assert positions[0, d] == best
                assert sorted([best, *members]) == (groups[0] == d).nonzero()[:, 0].tolist()


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("limit", [3, 50])
def test_both_ways_match_the_reference(metric, limit, device, monkeypatch):
    """With few boxes in one go, so that the search takes several turns."""
    monkeypatch.setattr(cpu_module, "_PAIRS", 50)
    monkeypatch.setattr(module, "_COLUMNS", 16)
    for by_class in (True, False):
        boxes, scores, labels, counts = images()
        given = boxes, scores, labels if by_class else None, counts
        expected = greedy_nmm_reference(*given, metric, 0.3, limit)
        equal(greedy_nmm(*given, metric, 0.3, limit), expected)
        ours = by_kernels(*(None if row is None else row.to(device) for row in given), metric, 0.3, limit)
        equal(ours, expected)


def test_order_does_not_matter():
    """Not even among equal scores, unless the boxes are equal, too."""
    boxes, scores, labels = random_set(3)
    scores = (scores * 4).round() / 4
    count = torch.tensor([60])
    first = greedy_nmm(boxes, scores, labels, count, "IOS", 0.4, 60)
    turned = greedy_nmm(boxes.flip(1), scores.flip(1), labels.flip(1), count, "IOS", 0.4, 60)
    assert torch.equal(first.boxes, turned.boxes)
    assert torch.equal(first.groups, turned.groups.flip(1))


def test_many_boxes_of_all_sizes():
    """Many turns and a grid whose cells are much smaller than some boxes and much larger than others."""
    generator = torch.Generator().manual_seed(0)
    side = 2 ** (torch.rand(1, 700, 2, generator=generator) * 8)
    corner = torch.rand(1, 700, 2, generator=generator) * 900
    boxes, scores = torch.cat((corner, corner + side), dim=2), torch.rand(1, 700, generator=generator)
    given = boxes, scores, None, torch.tensor([700]), "IOS", 0.5, 700
    with mock.patch.object(cpu_module, "_PAIRS", 3000):
        equal(greedy_nmm(*given), greedy_nmm_reference(*given))


def test_equals_sahi():
    """50 random sets and 10 adversarial ones."""
    combine = pytest.importorskip("sahi.postprocess.combine", exc_type=ImportError)
    backends = pytest.importorskip("sahi.postprocess.backends", exc_type=ImportError)
    from sahi.prediction import ObjectPrediction

    backends.set_postprocess_backend("numpy")
    for given in [*map(adversarial, range(10)), *map(random_set, range(50))]:
        boxes, scores, labels = given
        rows = [*zip(boxes[0].tolist(), scores[0].tolist(), labels[0].tolist(), strict=True)]
        for metric in METRICS:
            for threshold in (0.3, 0.5):
                for by_class in (True, False):
                    predictions = [ObjectPrediction(bbox=b, score=s, category_id=c) for b, s, c in rows]
                    merge = combine.GreedyNMMPostprocess(threshold, metric, class_agnostic=not by_class)
                    theirs = sorted((-p.score.value, p.bbox.to_xyxy()) for p in merge(predictions))
                    count = torch.tensor([len(rows)])
                    found = greedy_nmm(boxes, scores, labels if by_class else None, count, metric, threshold, len(rows))
                    left = range(int(found.counts))
                    ours = sorted((-float(scores[0, found.positions[0, d]]), found.boxes[0, d].tolist()) for d in left)
                    assert ours == theirs


def test_differs_from_nmm_in_what_it_must():
    """A member that no longer overlaps with the grown box is gone without adding to it."""
    boxes = torch.tensor([[[0.0, 0, 10, 10], [0, 0, 10, 30], [-6, 0, 4, 10]]])
    merged = ops.greedy_nmm(boxes, torch.tensor([[0.9, 0.8, 0.7]]), None, torch.tensor([3]), "IOU", 0.25, 3)
    assert merged.groups.tolist() == [[0, 0, 0]]
    assert merged.boxes[0, 0].tolist() == [0, 0, 10, 30]


def test_float64_is_kept_and_half_precision_is_not():
    boxes, scores, labels, counts = images()
    found = greedy_nmm(boxes.double(), scores.double(), labels, counts)
    assert found.boxes.dtype == torch.float64
    equal(found, greedy_nmm_reference(boxes.double(), scores.double(), labels, counts))
    assert greedy_nmm(boxes.bfloat16(), scores.bfloat16(), labels, counts).boxes.dtype == torch.float32


@pytest.mark.parametrize("metric", METRICS)
def test_the_sum_of_two_areas_may_be_infinite(metric):
    """Where each is finite: two of the three boxes overlap nothing then, and the third overlaps both."""
    side = 1.5e19  # an area of 2.25e38, of at most 3.4e38
    boxes = torch.tensor([[[0, 0, side, side], [0, 0, side, side / 3], [0, 0, side, side]]])
    arguments = boxes, torch.tensor([[0.9, 0.8, 0.7]]), None, torch.tensor([3]), metric, 0.2, 3
    merged = greedy_nmm(*arguments)
    assert merged.groups.tolist() == greedy_nmm_reference(*arguments).groups.tolist() == [[0, 0, 1]]


@pytest.mark.parametrize("shape", [(0, 5, 3), (2, 0, 3), (2, 5, 0)])
def test_empty(shape, device):
    batch, width, limit = shape
    boxes = torch.rand(batch, width, 4, device=device)
    counts = torch.full((batch,), width, device=device)
    for merge in (greedy_nmm, by_kernels):
        found = merge(boxes, boxes[..., 0], None, counts, "IOS", 0.5, limit)
        assert [tuple(field.shape) for field in found] == [(batch, limit, 4), (batch, limit), (batch,), (batch, width)]
        assert not found.counts.any()
        assert (found.groups == -1).all()


def test_errors():
    boxes, scores, labels, counts = images()
    given: dict[str, Any] = {"boxes": boxes, "scores": scores, "labels": labels, "counts": counts}
    for name, value in (
        ("boxes", boxes[0]), ("scores", scores[:, 1:]), ("labels", scores), ("counts", counts[:1]),
        ("match_metric", "GIOU"), ("match_threshold", 0.0), ("match_threshold", math.nan), ("max_detections", -1),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"{name} must be"):
            greedy_nmm(**given | {name: value})


def test_opcheck_and_compiles_whole(device):
    boxes, scores, labels, counts = images(9)
    boxes[0, 6:8] = boxes[0, 2]  # opcheck takes no NaN for equal to another
    given = [row.to(device) for row in (boxes, scores, labels, counts)]
    torch.library.opcheck(module._op, (*given, "IOS", 0.3, 5))
    torch.library.opcheck(module._cpu_op, (*given, "IOS", 0.3, 5), test_utils=("test_schema", "test_faketensor"))
    compiled: Any = torch.compile(greedy_nmm, fullgraph=True, backend="aot_eager", dynamic=True)
    expected = greedy_nmm_reference(boxes, scores, labels, counts, "IOS", 0.3, 5)
    equal(compiled(*given, "IOS", 0.3, 5), expected)


# As compiled code


def test_compiled():
    check("greedy_nmm")


@pytest.mark.slow
@pytest.mark.parametrize("name", names("greedy_nmm")[1:])
def test_compiled_in_other_ways(name):
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("order", OTHER_ORDERS)
@pytest.mark.parametrize("name", names("greedy_nmm"))
def test_compiled_in_other_orders(name, order):
    check(name, **OTHER_ORDERS[order])
