"""Suppression on a CPU by each of its ways, against one call of torchvision's for every class."""

import itertools

import numpy as np
import pytest
import torch
import torchvision

from retina_fast import ops
from retina_fast.kernels import batched_nms as module
from retina_fast.kernels import nms_cpu
from retina_fast.kernels.batched_nms import nms_image

# Constants under which all boxes go one way. Few pairs in a loop, a chunk or a block make several of each.
WAYS = {
    "as it is": {},
    "pairs": {"_FEW": 10**9},
    "classes": {"_FEW": 0, "_LIST": 10**9},
    "sweeps": {"_FEW": 0, "_LIST": 0, "_OF_A_CLASS": 0, "_LISTED": 0, "_CHUNK": 400, "_LOOPED": 0},
    "sweeps in vain": {"_FEW": 0, "_LIST": 0, "_OF_A_CLASS": 0, "_LISTED": 0, "_CHUNK": 50, "_KNOWN": 9},
    "blocks": {
        "_FEW": 0,
        "_LIST": 0,
        "_OF_A_CLASS": 0,
        "_LISTED": 10**9,
        "_CALLED": 0,
        "_ALONE": 10**9,
        "_BLOCK": 999,
        "_ROUNDS": 0,
        "_SPARSE": 0,
    },
    "calls": {"_FEW": 0, "_LIST": 0, "_OF_A_CLASS": 0, "_LISTED": 10**9, "_PROBE": 3, "_CALLS": 0, "_CALLED": 10**9},
    "blocks of each class": {
        "_FEW": 0,
        "_LIST": 0,
        "_OF_A_CLASS": 0,
        "_LISTED": 10**9,
        "_PROBE": 3,
        "_CALLED": 0,
        "_ALONE": 1,
        "_SPARSE": 10**9,
    },
}


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    for name, value in WAYS[request.param].items():
        monkeypatch.setattr(nms_cpu, name, value)
    monkeypatch.setattr(module, "FEW", 0)
    return request.param


def class_by_class(boxes, scores, labels, threshold):
    """Positions of the kept boxes by torchvision's exact function, best first."""
    classes = [(labels == label).nonzero().squeeze(1) for label in labels.unique()]
    kept = torch.cat([own[torchvision.ops.nms(boxes[own], scores[own], threshold)] for own in classes]).sort().values
    return kept[scores[kept].sort(descending=True, stable=True).indices]


def scene(kind, count, classes, dtype):
    """Boxes (N, 4), scores with ties, and labels, of which some are far apart."""
    generator = torch.Generator().manual_seed(count + classes)
    scores = torch.randint(0, count, (count,), generator=generator).to(dtype) / count
    labels = torch.randint(0, classes, (count,), generator=generator) * 3 - 1
    x = torch.arange(count)
    corner = {
        "scattered": torch.rand(count, 2, generator=generator) * 300 - 50,
        "a few places": torch.rand(5, 2, generator=generator)[x % 5] * 200
        + torch.rand(count, 2, generator=generator) * 9,
        "a chain": torch.stack((x * 8.0, 0.0 * x), dim=1),
        "one place": torch.zeros(count, 2),
        "none": torch.stack((x % 200 * 50.0, x // 200 * 50.0), dim=1),
    }[kind]
    if kind == "a chain":
        scores = scores.sort(descending=True).values
    size = 20 + (0 if kind in ("a chain", "one place") else 9 * torch.rand(count, 2, generator=generator))
    return torch.cat((corner, corner + size), dim=1).to(dtype), scores, labels


@pytest.mark.parametrize("kind", ["scattered", "a few places", "a chain", "one place"])
def test_each_way_keeps_what_torchvision_keeps(kind, way):
    for dtype, classes, count in itertools.product((torch.float32, torch.float64), (1, 4), (30, 170)):
        boxes, scores, labels = scene(kind, count, classes, dtype)
        for threshold in (0.0, 0.3, 0.5):
            expected = class_by_class(boxes, scores, labels, threshold)
            assert torch.equal(nms_image(boxes, scores, labels, threshold), expected)
            assert torch.equal(nms_image(boxes, scores, labels, threshold, 7), expected[:7])
            if classes == 1:
                assert torch.equal(nms_image(boxes, scores, None, threshold), expected)


def test_boxes_that_overlap_nothing(way):
    """NaN, infinite, turned round, without an area, or so far away that the order by side cannot tell others apart."""
    boxes, scores, labels = scene("a few places", 200, 3, torch.float32)
    nan, inf = float("nan"), float("inf")
    for i, odd in enumerate(([nan, 0, 9, 9], [0, 0, inf, 9], [-inf, 0, inf, inf], [9, 9, 0, 0], [9, 0, 0, 9])):
        boxes[7 * i] = boxes[7 * i + 1] = torch.tensor(odd)
    boxes[50] = boxes[51] = torch.tensor([5.0, 5, 5, 9])
    for far in ([-1e38, 0, -1e38, 9], [-2e30, 0, -1e30, 1e-3], [0, 0, 1.6e19, 1.6e19], [0, 0, 1.6e19, 1.0e19]):
        boxes[60] = torch.tensor(far)
        scores[5] = scores[9] = nan
        for threshold in (-0.1, 0.0, 0.5, 1.0, 2.0, nan):
            expected = class_by_class(boxes, scores, labels, threshold)
            assert torch.equal(nms_image(boxes, scores, labels, threshold), expected)
            assert torch.equal(nms_image(boxes, scores, None, threshold), torchvision.ops.nms(boxes, scores, threshold))
    huge = boxes[:40].double().nan_to_num() * 5e305
    expected = class_by_class(huge, scores[:40].double(), labels[:40], 0.5)
    assert torch.equal(nms_image(huge, scores[:40].double(), labels[:40], 0.5), expected)


def test_the_sum_of_two_areas_may_be_infinite(way):
    """Where each is finite: then the IoU is 0 in torchvision, too, and with a smaller box it is not."""
    side = 1.5e19  # an area of 2.25e38, of at most 3.4e38
    boxes = torch.tensor([[0, 0, side, side], [0, 0, side, side], [0, 0, side, side / 3]]).repeat(20, 1)
    scores, labels = torch.arange(60, 0, -1) / 60, torch.arange(60) % 2
    for threshold in (0.2, 0.5):
        expected = class_by_class(boxes, scores, labels, threshold)
        assert torch.equal(nms_image(boxes, scores, labels, threshold), expected)


@pytest.mark.parametrize("labels", [[0, 1, 0], [2**62, -(2**62), 2**62], [2**40, 2**40 + 1, 2**40]])
def test_labels_of_any_size(labels, way):
    boxes = torch.tensor([[0.0, 0, 9, 9]]).repeat(3 * 30, 1)
    kept = nms_image(boxes, torch.arange(90, 0, -1) / 90, torch.tensor(labels).repeat(30), 0.5)
    assert kept.tolist() == [0, 1]


def test_no_more_boxes_are_looked_at_than_a_few_times_those_that_serve(monkeypatch):
    """Where the best lie on one place, and the rate at which they are kept says nothing about the others."""
    seen = []
    stay = nms_cpu._stay

    def counted(boxes, labels, thresh):
        seen.append(len(boxes))
        return stay(boxes, labels, thresh)

    monkeypatch.setattr(nms_cpu, "_stay", counted)
    boxes, scores, _ = scene("none", 30_000, 1, torch.float32)
    boxes[:600] = boxes[0]
    scores = torch.arange(30_000, 0, -1).float()
    kept = nms_image(boxes, scores, None, 0.5, 300)
    assert torch.equal(kept, torchvision.ops.nms(boxes, scores, 0.5)[:300])
    assert seen == [600, 9600]


@pytest.mark.parametrize("count", [9, 1000])
def test_order_of_scores(count):
    rows = np.random.default_rng(0).integers(-3, 4, count) / np.float32(3)
    rows[:8] = np.nan, -np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-45, -1e-45
    for scores in (rows.astype(np.float32), rows.astype(np.float64)):
        expected = torch.from_numpy(scores).sort(descending=True, stable=True).indices
        assert nms_cpu.best_first(scores).tolist() == expected.tolist()


def test_where_operations_are_watched_and_where_not():
    """In eager mode on a CPU the public functions go past the dispatcher, but not where a mode would miss them."""
    boxes, scores, labels = scene("scattered", 300, 4, torch.float32)

    class Seen(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(str(func))
            return func(*args, **(kwargs or {}))

    names: list[str] = []
    eager = ops.nms(boxes, scores, 0.5), ops.batched_nms(boxes, scores, labels, 0.5)
    with Seen():
        watched = ops.nms(boxes, scores, 0.5), ops.batched_nms(boxes, scores, labels, 0.5)
    assert names.count("retina_fast.nms.default") == 2
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(eager, watched, strict=True))
