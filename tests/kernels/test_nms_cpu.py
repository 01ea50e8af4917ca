"""Suppression on a CPU by each of its ways, against one call of torchvision's for every class."""

import itertools
import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch
import torchvision

from retina_fast import ops
from retina_fast.kernels import batched_nms as module
from retina_fast.kernels import nms_cpu
from retina_fast.kernels.batched_nms import nms_image

# Constants under which all boxes go one way. Small windows, chunks and loops make several of each.
WAYS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "pairs": {"_FEW": 10**9},
    "one window": {"_FEW": 0, "_FIRST": (10**9, 10**9), "_ROUNDS": 0},
    "lists": {"_FEW": 0, "_FIRST": (16, 16), "_CALL": 10**9, "_CHUNK": 50, "_LOOPED": 0, "_BEST": 1},
    "calls": {"_FEW": 0, "_FIRST": (16, 16), "_CALL": -(10**9)},
    "calls with the kept ones": {"_FEW": 0, "_FIRST": (16, 16), "_CALL": -(10**9), "_NEAR": 0},
}


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    for name, value in WAYS[request.param].items():
        monkeypatch.setattr(nms_cpu, name, value)
    monkeypatch.setattr(module, "FEW", 0)
    return request.param


@pytest.fixture
def listed(monkeypatch):
    """How many pairs each list of them had."""
    pairs: list[int] = []
    overlapping = nms_cpu._overlapping

    def counted(a, b, first, counts, thresh):
        pairs.append(int(counts.sum()))
        return overlapping(a, b, first, counts, thresh)

    monkeypatch.setattr(nms_cpu, "_overlapping", counted)
    return pairs


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
        "a column": torch.stack((0.0 * x, x * 8.0), dim=1),
        "one place": torch.zeros(count, 2),
        "none": torch.stack((x % 200 * 50.0, x // 200 * 50.0), dim=1),
    }[kind]
    if kind in ("a chain", "a column"):
        scores = scores.sort(descending=True).values
    size = 20 + (0 if kind in ("a chain", "a column", "one place") else 9 * torch.rand(count, 2, generator=generator))
    return torch.cat((corner, corner + size), dim=1).to(dtype), scores, labels


@pytest.mark.parametrize("kind", ["scattered", "a few places", "a chain", "a column", "one place"])
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


@pytest.mark.parametrize("threshold", [0.0, 1e-5, 0.5])
def test_widths_that_are_nothing_beside_the_heights(threshold):
    boxes = torch.tensor([[0.0, 0.0, 1e-300, 1e30]], dtype=torch.float64).repeat(2000, 1)
    assert nms_image(boxes, torch.arange(2000, 0, -1) / 2000, None, threshold).tolist() == [0]


def test_the_sum_of_two_areas_may_be_infinite(way):
    """Where each is finite: then the IoU is 0 in torchvision, too, and with a smaller box it is not."""
    side = 1.5e19  # an area of 2.25e38, of at most 3.4e38
    boxes = torch.tensor([[0, 0, side, side], [0, 0, side, side], [0, 0, side, side / 3]]).repeat(20, 1)
    scores, labels = torch.arange(60, 0, -1) / 60, torch.arange(60) % 2
    for threshold in (0.2, 0.5):
        expected = class_by_class(boxes, scores, labels, threshold)
        assert torch.equal(nms_image(boxes, scores, labels, threshold), expected)


@pytest.mark.parametrize(
    "labels",
    [
        torch.tensor([0, 1, 0]),
        torch.tensor([2**62, -(2**62), 2**62]),
        torch.tensor([2**40, 2**40 + 1, 2**40]),
        torch.tensor([-128, 127, -128], dtype=torch.int8),
        torch.tensor([0, 32, 0], dtype=torch.uint8),
    ],
)
def test_labels_of_any_size(labels, way):
    boxes = torch.tensor([[0.0, 0, 9, 9]]).repeat(3 * 30, 1)
    for threshold in (0.0, 0.5):
        kept = nms_image(boxes, torch.arange(90, 0, -1) / 90, labels.repeat(30), threshold)
        assert kept.tolist() == [0, 1]


@pytest.mark.parametrize("threshold", [0.003, 0.05, 0.3, 0.5, 0.75, 0.999, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pairs_as_far_apart_as_any_that_overlap_enough(threshold, dtype, way):
    """The second box of a pair is as wide, or the share of the threshold as wide or as high, or the reverse, and moved
    to where the IoU is nearly the threshold; all far from the origin, or so small that areas have few bits left."""
    generator = torch.Generator().manual_seed(0)
    ratio = torch.tensor([threshold, (1 + threshold) / 2, 1.0, 2 / (1 + threshold), 1 / threshold])
    ratio = ratio[torch.randint(0, 5, (400,), generator=generator)].double()
    covered = (1 + ratio) * threshold / (1 + threshold)  # the width of the intersection where the IoU is the threshold
    shift = torch.where(ratio < 1, 1 - covered, ratio - covered).clamp(min=0) * torch.randint(
        0, 2, (400,), generator=generator
    ).mul(2).sub(1)
    shift += (1 - ratio) / 2 * (shift == 0)
    shift += 1e-3 * torch.randn(400, generator=generator)
    first = torch.tensor([0.0, 0, 1, 1]).double().repeat(400, 1)
    second = torch.stack((shift, 0 * shift, shift + ratio, 0 * shift + 1), dim=1)
    place = 5 * torch.stack((torch.arange(400) % 20, torch.arange(400) // 20), dim=1).repeat(1, 2)
    boxes = torch.cat((first + place, second + place))
    boxes[::2] = boxes[::2, [1, 0, 3, 2]]
    scores, labels = torch.rand(800, generator=generator), torch.arange(400).repeat(2) % 3
    for scale, offset in ((1.0, 0.0), (8.0, -3e5), (1e-21, 0.0), (1e15, 1e18)):
        moved = (boxes * scale + offset).to(dtype)
        expected = class_by_class(moved, scores.to(dtype), labels, threshold)
        assert torch.equal(nms_image(moved, scores, labels, threshold), expected)


def test_a_wide_box_beside_a_narrow_one_at_a_low_threshold(way):
    """Rounding is relative to the wider box, and the middle of a wide one by more than a narrow one's width."""
    pairs = {
        float(np.float32(3e-5)): (
            (0.0857560932636261, 1.9738744497299194, 62937.3671875),
            (0.23817385733127594, 2.042165756225586),
        ),
        0.0: ((-5.540437797435516e-08, 0.967536211013794, -5.540436731621412e-08), (0.0, 0.4)),
    }
    scores, labels = torch.arange(300, 0, -1).float(), torch.arange(150).repeat_interleave(2)
    for threshold, ((left, *rights), (top, bottom)) in pairs.items():
        boxes = torch.tensor([[left, top, right, bottom] for right in rights]).repeat(150, 1)
        for given in (boxes, boxes[:, [1, 0, 3, 2]]):
            assert nms_image(given, scores, labels, threshold).tolist() == [*range(0, 300, 2)]


def test_many_boxes_on_one_place_after_many_that_are_apart(listed):
    """The rate at which boxes were kept says nothing then, and no more pairs are listed at once than of one window."""
    boxes, scores, _ = scene("none", 30_000, 1, torch.float32)
    boxes[15_000:] = torch.tensor([-99.0, -99.0, -50.0, -50.0])
    scores = torch.arange(30_000, 0, -1).float()
    assert nms_image(boxes, scores, None, 0.5).tolist() == [*range(15_001)]
    assert max(listed) < nms_cpu._LARGEST**2 / 2
    assert sum(listed) < 100 * 30_000


def test_copies_of_a_large_box_beside_many_small_ones(listed):
    """The best of all suppresses them: they are not compared with the small ones, too, which all lie near them."""
    i = torch.arange(4000)
    corner = torch.stack((i % 64 * 14.0 + i % 2 * 3000, i // 64 * 14.0), dim=1) + 50  # half of them near, half far away
    boxes = torch.tensor([0.0, 0, 1000, 1000]).repeat(20_000, 1)
    boxes[1:4001] = torch.cat((corner, corner + 1), dim=1)
    scores = torch.arange(20_000, 0, -1).float()
    assert nms_image(boxes, scores, None, 0.5).tolist() == [*range(4001)]
    assert sum(listed) < 100 * 20_000


def test_a_class_of_many_boxes_among_many_classes_of_one(listed):
    """What a window of one class costs depends on that class alone."""
    boxes, scores, _ = scene("one place", 20_000, 1, torch.float32)
    boxes += torch.arange(20_000)[:, None] // 2048 * 100.0
    labels = torch.cat((torch.zeros(19_000), torch.arange(1, 1001)))
    scores = torch.arange(20_000, 0, -1).float()
    assert torch.equal(nms_image(boxes, scores, labels, 0.5), class_by_class(boxes, scores, labels, 0.5))
    assert sum(listed) < 10 * 20_000


def test_scores_of_more_bits_than_the_boxes():
    boxes = torch.tensor([[0.0, 0, 9, 9]]).repeat(2, 1)
    for scores in ([0.5, 0.5 + 1e-12], [1e300, 1e301]):
        assert nms_image(boxes, torch.tensor(scores, dtype=torch.float64), None, 0.5).tolist() == [1]


def test_no_more_boxes_are_looked_at_than_a_few_times_those_that_serve(monkeypatch):
    """Where the best lie on one place, and the rate at which they are kept says nothing about the others."""
    seen = []
    of_ranks = nms_cpu._Frame.sorted

    def counted(frame, ranks):
        seen.append(len(ranks))
        return of_ranks(frame, ranks)

    monkeypatch.setattr(nms_cpu._Frame, "sorted", counted)
    boxes, scores, _ = scene("none", 30_000, 1, torch.float32)
    boxes[:600] = boxes[0]
    scores = torch.arange(30_000, 0, -1).float()
    kept = nms_image(boxes, scores, None, 0.5, 300)
    assert torch.equal(kept, torchvision.ops.nms(boxes, scores, 0.5)[:300])
    assert seen == [0, 600, 1200]


@pytest.mark.parametrize("kind", ["a chain", "a column"])
def test_boxes_are_sorted_along_the_axis_that_parts_them(kind, listed):
    boxes, scores, _ = scene(kind, 5000, 1, torch.float32)
    scores = scores[torch.randperm(5000, generator=torch.Generator().manual_seed(0))]
    assert torch.equal(nms_image(boxes, scores, None, 0.5), torchvision.ops.nms(boxes, scores, 0.5))
    assert sum(listed) < 10 * 5000


def test_no_more_memory_than_a_part_of_the_pairs_takes():
    """Boxes that each overlap a quarter of 20,000 kept ones, 10 million pairs, of which each takes 16 bytes or more."""
    boxes, scores, _ = scene("none", 22_000, 1, torch.float32)
    boxes[20_000:] = torch.tensor([0.0, 0.0, 5000.0, 2500.0])
    scores = torch.arange(22_000, 0, -1).float()
    tracemalloc.start()
    kept = nms_image(boxes, scores, None, 0.0)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert kept.tolist() == [*range(20_000)]
    assert most < 50e6


@pytest.mark.parametrize("threshold", [0.0, 0.05])
def test_at_low_thresholds_boxes_are_compared_that_may_touch(threshold, listed, monkeypatch):
    monkeypatch.setattr(nms_cpu._Frame, "calls_are_faster", lambda *_: False)
    boxes, scores, _ = scene("none", 5000, 1, torch.float32)
    scores = scores[torch.randperm(5000, generator=torch.Generator().manual_seed(0))]
    assert torch.equal(nms_image(boxes, scores, None, threshold), torchvision.ops.nms(boxes, scores, threshold))
    assert sum(listed) < 100 * 5000


@pytest.mark.parametrize("classes", [1, 20])
def test_many_boxes_on_one_place_that_all_stay_are_not_listed(classes, listed):
    """At a threshold of 1 each box is near all of its class and none goes: torchvision's function is faster."""
    boxes, scores, labels = scene("one place", 8000, classes, torch.float32)
    assert torch.equal(nms_image(boxes, scores, labels, 1.0), class_by_class(boxes, scores, labels, 1.0))
    assert sum(listed) < 20 * 8000


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
