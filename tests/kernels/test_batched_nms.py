"""Non-maximum suppression against a plain Python loop, and against torchvision where that is exact."""

from typing import Any
from unittest import mock

import pytest
import torch
import torchvision
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from retina_fast import ops
from retina_fast.kernels import batched_nms as module
from retina_fast.kernels import nms_deal, nms_tiles, nms_walk
from retina_fast.kernels.batched_nms import Kept, batched_nms, batched_nms_reference
from retina_fast.kernels.dispatch import INTERPRETED
from tests.ptx.cases import CASES, OTHER_ORDERS, check, division_of_zero_faults, names, run_case

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")  # numpy's, of interpreted kernels


def by_kernels(*arguments):
    """By the kernels, whatever the device."""
    with mock.patch.object(module, "runs_triton", return_value=True):
        return batched_nms(*arguments)


def equal(ours, expected):
    assert torch.equal(ours.counts.cpu(), expected.counts.cpu())
    assert torch.equal(ours.positions.cpu(), expected.positions.cpu())


@pytest.fixture(params=["walks", "tiles"])
def small_tiles(request, monkeypatch):
    """Both ways of suppression, whatever the size. Walks have few programs and short scans, so that classes share a
    program and all come to the end of several scans; tiles are short, so that there are several."""
    walked = 0 if request.param == "tiles" else 10**9
    for name in ("_WALKED", "_WALKED_OF_ONE_CLASS"):
        monkeypatch.setattr(module, name, walked)
    for name, value in (("_FEWEST_GROUPS", 2), ("_MOST_GROUPS", 2), ("_SCAN", 64), ("_FLAGS", 32)):
        monkeypatch.setattr(nms_walk, name, value)
    for name, value in (("_TILE", 64), ("_PART", 16), ("_PART_OF_MANY", 32), ("_MANY", 100), ("_PAIRS", 1024)):
        monkeypatch.setattr(nms_tiles, name, value)
    for name, value in (("_PROGRAMS", 4), ("_GROUPS", 2)):
        monkeypatch.setattr(nms_tiles, name, value)
    monkeypatch.setattr(nms_deal, "_TILE", 64)


def greedy(boxes, scores, labels, threshold):
    """Kept positions by the definition, IoU in float32."""
    kept: list[int] = []
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    for i in sorted(range(len(boxes)), key=lambda i: (-float(scores[i]), i)):
        for j in kept:
            if labels is not None and labels[i] != labels[j]:
                continue
            side = (torch.minimum(boxes[i, 2:], boxes[j, 2:]) - torch.maximum(boxes[i, :2], boxes[j, :2])).clamp(min=0)
            intersection = side[0] * side[1]
            if intersection / (areas[j] + areas[i] - intersection) > threshold:
                break
        else:
            kept.append(i)
    return kept


def clusters(count, seed, classes=4):
    generator = torch.Generator().manual_seed(seed)
    centre = torch.rand(count // 5, 2, generator=generator)[torch.randint(0, count // 5, (count,), generator=generator)]
    corner = centre * 100 + torch.randn(count, 2, generator=generator) * 3
    boxes = torch.cat((corner, corner + 10 + torch.rand(count, 2, generator=generator) * 8), dim=1)
    scores = torch.rand(count, generator=generator).mul(50).round() / 50  # many ties
    return boxes, scores, torch.randint(0, classes, (count,), generator=generator)


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.5, 1.0])
def test_matches_the_definition(threshold):
    images = [clusters(60, seed) for seed in range(4)]
    boxes, scores, labels = (torch.stack(parts) for parts in zip(*images, strict=True))
    counts = torch.tensor([60, 0, 1, 33])
    for class_labels in (labels, None):
        ours = batched_nms(boxes, scores, class_labels, counts, threshold, 25)
        for b, n in enumerate(counts.tolist()):
            image_labels = None if class_labels is None else labels[b, :n]
            expected = greedy(boxes[b, :n], scores[b, :n], image_labels, threshold)[:25]
            assert ours.positions[b, : int(ours.counts[b])].tolist() == expected


@pytest.mark.parametrize("threshold", [-0.1, 0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("with_labels", [True, False])
def test_kernels_match_the_reference(threshold, with_labels, device, small_tiles):
    """Ties, a NaN and infinite scores, boxes with a NaN, with infinite sides, without area, turned inside out."""
    images = [clusters(150, seed) for seed in range(4)]
    boxes, scores, labels = (torch.stack(parts) for parts in zip(*images, strict=True))
    scores[0, 7], scores[0, 8], scores[3, 2] = float("nan"), -float("inf"), float("inf")
    boxes[0, 3], boxes[0, 5, 0], boxes[3, 4, 2:] = float("inf"), float("nan"), float("inf")
    boxes[0, 10:14, 2:] = boxes[0, 10:14, :2]
    boxes[3, 10:14] = boxes[3, 10:14].flip(1)
    boxes[3, 20, :2] = -float("inf")
    classes = (labels * 7919 - 10**12) if with_labels else None  # any integers
    rows = boxes, scores, classes, torch.tensor([150, 0, 1, 75])
    arguments = [None if row is None else row.to(device) for row in rows]
    for limit in (25, 150, 1, 0) if threshold == 0.3 else (25,):
        equal(by_kernels(*arguments, threshold, limit), batched_nms_reference(*rows, threshold, limit))


def test_boxes_that_lie_best_first_already(device, small_tiles):
    boxes, scores, labels = (rows[None] for rows in clusters(150, 3))
    order = scores[0].sort(descending=True, stable=True).indices
    counts = torch.tensor([150])
    expected = batched_nms_reference(boxes[:, order], None, labels[:, order], counts, 0.5, 40)
    unsorted = batched_nms_reference(boxes, scores, labels, counts, 0.5, 40)
    assert torch.equal(order[expected.positions], unsorted.positions)
    rows = (boxes[:, order].to(device), None, labels[:, order].to(device), counts.to(device))
    equal(by_kernels(*rows, 0.5, 40), expected)


def chain(count, overlap=0.6):
    """Each box suppresses the next one, and no other, but for the first, which lies apart: so a tile that begins at an
    even rank begins with a box that one of the tile before suppresses."""
    x = torch.arange(count) * 10 * (1 - overlap) / (1 + overlap)
    x[:1] = -1000
    return torch.stack((x, torch.zeros(count), x + 10, torch.full((count,), 10.0)), dim=1)


def sets(name, count):
    """Adversarial sets of one class: boxes (count, 4)."""
    if name == "chain":
        return chain(count)
    if name == "all overlapping":
        return torch.tensor([0.0, 0, 10, 10]) + torch.rand(count, 4, generator=torch.Generator().manual_seed(0))
    x = torch.arange(count) * 20.0
    return torch.stack((x, x, x + 10, x + 10), dim=1)  # none overlapping


@pytest.mark.parametrize("name", ["chain", "all overlapping", "none overlapping"])
def test_adversarial_sets(name, device, small_tiles):
    boxes = sets(name, 200)[None]
    scores = torch.linspace(1, 0, 200)[None]
    rows = boxes, scores, torch.zeros(1, 200, dtype=torch.int64), torch.tensor([200])
    for limit in (30, 200):
        expected = batched_nms_reference(*rows, 0.5, limit)
        equal(by_kernels(*(row.to(device) for row in rows), 0.5, limit), expected)
    kept = {"chain": 101, "all overlapping": 1, "none overlapping": 200}[name]
    assert expected.counts.tolist() == [kept]


def test_a_count_above_the_width_means_all(device, small_tiles):
    boxes, scores, labels = (torch.stack(rows) for rows in zip(*[clusters(60, seed) for seed in (1, 2)], strict=True))
    many, all_of_them = torch.tensor([2**40, 61]), torch.tensor([60, 60])
    for ranking in (scores, None):
        rows = [None if row is None else row.to(device) for row in (boxes, ranking, labels, many)]
        equal(by_kernels(*rows, 0.5, 60), batched_nms_reference(boxes, ranking, labels, all_of_them, 0.5, 60))


def test_a_program_ends_where_all_of_them_have_kept_enough(device, monkeypatch):
    """Interpreted programs run one after another, so the last one sees how far the first has come."""
    if device.type == "cuda":
        pytest.skip("on a GPU it depends on the order")
    for name, value in (("_FEWEST_GROUPS", 2), ("_MOST_GROUPS", 2), ("_SCAN", 32)):
        monkeypatch.setattr(nms_walk, name, value)
    boxes, labels = sets("none overlapping", 100)[None], torch.arange(100)[None] % 2
    for most, decided in ((20, 32), (32, 32), (33, 64), (100, 100)):
        progress = torch.zeros(1, nms_walk.progress_blocks(100), dtype=torch.int32)
        torch.use_deterministic_algorithms(True)  # fills empty buffers
        try:
            flags = nms_walk.flag_by_walks(boxes, labels, None, torch.tensor([100]), (0.5, 0.51), most, progress)
        finally:
            torch.use_deterministic_algorithms(False)
        assert flags[0, :decided].tolist() == [1] * decided
        assert (flags[0, decided:100][labels[0, decided:] == 1] > 1).all()


@pytest.mark.parametrize(
    "numerator", [n if n % 3 == 1 else pytest.param(n, marks=pytest.mark.slow) for n in range(1, 20)]
)
def test_an_iou_exactly_at_the_threshold(numerator, device, small_tiles):
    """n of 20 columns in common: the float32 quotient is compared with the threshold as the float64 it is."""
    boxes = torch.tensor([[[0.0, 0, 20, 1], [0, 0, numerator, 1]]])
    quotient = float(torch.tensor(numerator) / torch.tensor(20.0))
    rows = boxes, torch.tensor([[0.9, 0.8]]), None, torch.tensor([2])
    for threshold in (numerator / 20, quotient, quotient + 1e-12, quotient - 1e-12):
        expected = 1 if quotient > threshold else 2
        assert batched_nms_reference(*rows, threshold, 2).counts.tolist() == [expected]
        on_device = [None if row is None else row.to(device) for row in rows]
        assert by_kernels(*on_device, threshold, 2).counts.tolist() == [expected]


def test_half_precision_boxes_and_scores(device, small_tiles):
    boxes, scores, labels = clusters(60, 5)
    rows = boxes[None].half(), scores[None].bfloat16(), labels[None].int(), torch.tensor([60])
    expected = batched_nms_reference(rows[0].float(), rows[1].float(), *rows[2:], 0.5, 60)
    equal(by_kernels(*(row.to(device) for row in rows), 0.5, 60), expected)


def test_empty(device, small_tiles):
    for shape in ((0, 5), (2, 0)):
        rows = (
            torch.empty(*shape, 4),
            torch.empty(shape),
            torch.empty(shape, dtype=torch.int64),
            torch.zeros(shape[0]),
        )
        boxes, scores, labels, counts = (row.to(device) for row in rows)
        expected = Kept(torch.zeros(shape[0], 3, dtype=torch.int64), torch.zeros(shape[0], dtype=torch.int64))
        equal(by_kernels(boxes, scores, labels, counts.long(), 0.5, 3), expected)
        equal(batched_nms(boxes, scores, labels, counts.long(), 0.5, 3), expected)


grid = st.integers(0, 6).map(float)
box = st.tuples(grid, grid, st.integers(0, 6), st.integers(0, 6)).map(lambda t: (t[0], t[1], t[0] + t[2], t[1] + t[3]))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(box, st.integers(0, 3), st.integers(0, 2)), max_size=12), st.sampled_from([0.0, 0.25, 0.5]))
def test_adversarial_boxes(rows, threshold):
    """Zero areas, equal scores, identical boxes, IoU exactly at the threshold."""
    boxes = torch.tensor([row[0] for row in rows]).reshape(-1, 4)
    scores, labels = torch.tensor([row[1] / 3 for row in rows]), torch.tensor([row[2] for row in rows])
    expected = greedy(boxes, scores, labels, threshold)
    assert ops.batched_nms(boxes, scores, labels.long(), threshold).tolist() == expected
    assert ops.nms(boxes, scores, threshold).tolist() == greedy(boxes, scores, None, threshold)


numbers = st.sampled_from([0.0, 1.0, 2.0, 3.0, 5.0, 8.0, float("inf"), -float("inf"), float("nan")])
any_box = st.one_of(box, st.tuples(numbers, numbers, numbers, numbers))


@pytest.mark.skipif(not INTERPRETED, reason="compiles once, but the draws are made for the interpreter's pace")
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(any_box, st.sampled_from([0.0, 0.5, 1.0, float("nan")]), st.integers(0, 2)), max_size=12),
    st.sampled_from([0.0, 0.25, 0.5]),
    st.integers(0, 12),
)
@example([((x, 0.0, x + 3.0, 1.0), 0.5, 0) for x in range(12)], 0.25, 12)
def test_kernels_on_adversarial_boxes(small_tiles, rows, threshold, limit):
    """Chains where each suppresses the next, no area, infinities and NaN in boxes and scores."""
    boxes = torch.tensor([row[0] for row in rows]).reshape(1, -1, 4)
    scores, labels = torch.tensor([[row[1] for row in rows]]), torch.tensor([[row[2] for row in rows]]).long()
    for classes in (labels, None):
        arguments = boxes, scores, classes, torch.tensor([len(rows)]), threshold, limit
        equal(by_kernels(*arguments), batched_nms_reference(*arguments))


def test_torchvisions_signatures(device):
    boxes, scores, labels = clusters(200, 9)
    scores = scores + torch.arange(200) * 1e-6  # without ties torchvision's order is defined too
    boxes, scores, labels = boxes.to(device), scores.to(device), labels.to(device)
    assert torch.equal(ops.nms(boxes, scores, 0.5), torchvision.ops.nms(boxes, scores, 0.5))
    assert torch.equal(
        ops.batched_nms(boxes, scores, labels, 0.5), torchvision.ops.batched_nms(boxes, scores, labels, 0.5)
    )
    assert ops.batched_nms(boxes[:0], scores[:0], labels[:0], 0.5).shape == (0,)
    with pytest.raises(RuntimeError, match="same number of elements"):
        ops.nms(boxes, scores[:3], 0.5)


def test_half_precision_boxes_do_not_overflow():
    boxes = torch.tensor([[0, 0, 60000, 60000], [0, 0, 60000, 60000], [0, 0, 60000, 60000]], dtype=torch.float16)
    kept = ops.batched_nms(boxes, torch.tensor([0.9, 0.8, 0.7], dtype=torch.float16), torch.tensor([0, 90, 0]), 0.5)
    assert kept.tolist() == [0, 1]


def test_float64_boxes_are_compared_in_float64():
    """Map coordinates: in float32 a box at 5,000,000 metres is rounded to half a metre."""
    generator = torch.Generator().manual_seed(0)
    boxes = torch.rand(200, 4, generator=generator, dtype=torch.float64) * 20
    boxes[:, 2:] += boxes[:, :2] + 1
    scores, labels = torch.rand(200, generator=generator).double(), torch.arange(200) % 3
    far = boxes + 5_000_000
    for iou_thresh in (0.0, 0.3, 0.5):
        assert torch.equal(ops.nms(far, scores, iou_thresh), torchvision.ops.nms(far, scores, iou_thresh))
        exact = torchvision.ops.boxes._batched_nms_vanilla(far, scores, labels, iou_thresh)
        assert torch.equal(ops.batched_nms(far, scores, labels, iou_thresh), exact)


def test_scores_that_are_not_numbers_come_first():
    boxes = torch.tensor([[0.0, 0, 9, 9], [0, 0, 9, 8], [20, 20, 29, 29]])
    scores = torch.tensor([0.9, float("nan"), float("inf")])
    assert ops.nms(boxes, scores, 0.5).tolist() == [1, 2]


def test_every_output_is_written_and_the_result_is_deterministic(device, small_tiles):
    boxes, scores, labels = (rows[None].to(device) for rows in clusters(60, 1))
    arguments = boxes, scores, labels, torch.tensor([60], device=device), 0.5, 40
    torch.use_deterministic_algorithms(True)  # fills empty buffers with large numbers
    try:
        first, second = by_kernels(*arguments), by_kernels(*arguments)
    finally:
        torch.use_deterministic_algorithms(False)
    equal(first, second)
    equal(first, batched_nms_reference(*arguments))


def test_errors():
    boxes, counts = torch.zeros(2, 5, 4), torch.zeros(2, dtype=torch.int64)
    wrong: Any = (
        ((boxes[0], None, None, counts), "boxes"),
        ((boxes, torch.zeros(2, 4), None, counts), "scores"),
        ((boxes, None, torch.zeros(5), counts), "labels"),
        ((boxes, None, None, counts[:1]), "counts"),
        ((boxes, None, None, counts, 0.5, -1), "max_detections"),
        ((boxes[:1, :1].expand(1, 2**29, 4), None, None, counts[:1]), "boxes"),  # offsets of coordinates have 32 bits
    )
    for arguments, name in wrong:
        with pytest.raises(ValueError, match=f"{name} must be"):
            batched_nms(*arguments)


def test_opcheck(device, small_tiles):
    boxes, scores, labels = (rows[None].to(device) for rows in clusters(20, 1))
    counts = torch.tensor([20], device=device)
    torch.library.opcheck(module._op, (boxes, scores, labels, counts, 0.5, 9))
    torch.library.opcheck(module._op, (boxes, None, None, counts, 0.5, 9))
    torch.library.opcheck(module._reference_op, (boxes, scores, labels, counts, 0.5, 9))


@pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_compiles_whole(dynamic, device):
    boxes, scores, labels = (
        torch.stack(rows).to(device) for rows in zip(*[clusters(20, s) for s in (1, 2)], strict=True)
    )
    counts = torch.tensor([20, 11], device=device)
    compiled = torch.compile(batched_nms, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    equal(compiled(boxes, scores, labels, counts, 0.5, 9), batched_nms(boxes, scores, labels, counts, 0.5, 9))


# As compiled code


@pytest.mark.parametrize("name", names("batched_nms"))
def test_compiled(name):
    check(name)


def test_nothing_is_divided_where_nothing_intersects():
    outcome = run_case(CASES["batched_nms best first"], edit=division_of_zero_faults)
    assert not outcome.failures


@pytest.mark.slow
@pytest.mark.parametrize("order", OTHER_ORDERS)
@pytest.mark.parametrize("name", names("batched_nms"))
def test_compiled_in_other_orders(name, order):
    check(name, **OTHER_ORDERS[order])
