"""Adaptive training sample selection, by the reference and by the kernels, against the paper's algorithm in float64."""

from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import box_iou

from retina_fast.kernels import atss_matching as module
from retina_fast.kernels import match_keys
from retina_fast.kernels.anchor_matching import Matches
from retina_fast.kernels.atss_matching import atss_matching, atss_matching_reference
from tests.instruments.fake_gpu import launches_of
from tests.instruments.kernel_calls import KERNEL_CALLS
from tests.instruments.peak_bytes import PeakBytes
from tests.ptx.cases import OTHER_ORDERS, check, names

PATHS = pytest.mark.parametrize("path", ["reference", "kernel"])


def grid(per_cell=1):
    """Anchors of three levels with strides 8, 16 and 48, of whole and half pixels, and the levels' sizes."""
    levels = []
    for stride, (height, width) in ((8, (9, 8)), (16, (6, 3)), (48, (2, 1))):
        y, x = torch.meshgrid(torch.arange(height) * stride, torch.arange(width) * stride, indexing="ij")
        centre = torch.stack((x, y), dim=-1).reshape(-1, 1, 2).float()
        side = 3 * stride * torch.tensor([[1.0, 1.0], [1.5, 1.0], [1.0, 2.0]])[:per_cell]
        levels.append(torch.cat((centre - side / 2, centre + side / 2), dim=2).flatten(0, 1))
    return torch.cat(levels), [len(level) for level in levels]


def random_boxes(count, generator):
    """Boxes of whole pixels, so that float32 and float64 agree about distances."""
    corner = torch.randint(-8, 70, (count, 2), generator=generator)
    return torch.cat((corner, corner + torch.randint(4, 60, (count, 2), generator=generator)), dim=1).float()


def paper(anchors, boxes, sizes, top_k):
    """Algorithm 1 with whole matrices, in float64: matched indices, and how close an IoU came to a threshold."""
    anchors, boxes = anchors.double(), boxes.double()
    iou = box_iou(boxes, anchors)  # (G, N)
    centre, target = (anchors[:, :2] + anchors[:, 2:]) / 2, (boxes[:, :2] + boxes[:, 2:]) / 2
    distance = torch.cdist(target, centre, compute_mode="donot_use_mm_for_euclid_dist")
    best, index, gap = torch.full((len(anchors),), -1.0), torch.full((len(anchors),), -1), 1.0
    for g in range(len(boxes)):
        candidates = torch.cat(
            [
                start + distance[g, start:stop].sort(stable=True).indices[:top_k]
                for start, stop in pairwise(accumulate(sizes, initial=0))
            ]
        )
        found = iou[g, candidates]
        threshold = found.mean() + (found.std() if len(found) > 1 else 0)
        inside = ((centre[candidates] > boxes[g, :2]) & (centre[candidates] < boxes[g, 2:])).all(dim=1)
        gap = min(gap, float((found - threshold).abs().min()))
        for n in candidates[inside & (found >= threshold)].tolist():
            if iou[g, n] > best[n]:
                best[n], index[n] = iou[g, n], g
    return index, gap


def match(path, anchors, images, sizes, top_k=9):
    """Matches of a list of ground truths; the label of each is 3 more than its index."""
    device = torch.device("cuda" if path == "kernel" and torch.cuda.is_available() else "cpu")
    function: Any = module._atss_matching_triton if path == "kernel" else atss_matching_reference
    boxes = torch.cat([torch.zeros(0, 4), *images])
    labels = torch.cat([torch.zeros(0, dtype=torch.int64), *[torch.arange(len(boxes)) + 3 for boxes in images]])
    offsets = torch.tensor([0] + [len(boxes) for boxes in images]).cumsum(0)
    on_device: list = [x.to(device) for x in (anchors, boxes, labels, offsets)]
    matches = Matches(*[x.cpu() for x in function(*on_device, sizes, top_k)])
    assert torch.equal(matches.labels, torch.where(matches.indices >= 0, matches.indices + 3, -1))
    assert torch.equal(matches.num_foreground, (matches.indices >= 0).sum(dim=1))
    return matches.indices


def assert_equals_paper(path, anchors, images, sizes, top_k=9):
    ours = match(path, anchors, images, sizes, top_k)
    for b, boxes in enumerate(images):
        expected, gap = paper(anchors if anchors.dim() == 2 else anchors[b], boxes, sizes, top_k)
        assert gap > 4e-6, "an IoU of the case is at its threshold, where rounding decides"
        assert torch.equal(ours[b].long(), expected)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several tiles and several chunks of them, and programs that serve several ground truths, where all are few."""
    monkeypatch.setattr(module, "_TILE", 16)
    monkeypatch.setattr(module, "_TILES", 4)
    monkeypatch.setattr(module, "_PROGRAMS", 18)
    monkeypatch.setattr(match_keys, "_TILE", 64)
    monkeypatch.setattr(module, "_PAIRS", 300)


@pytest.fixture(autouse=True)
def _poisoned():
    """What a kernel leaves unwritten is the largest integer."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@PATHS
@pytest.mark.parametrize(("per_cell", "top_k"), [(1, 9), (3, 27), (1, 1000)])
def test_matches_the_paper(path, per_cell, top_k):
    anchors, sizes = grid(per_cell)
    generator = torch.Generator().manual_seed(0)
    images = [random_boxes(count, generator) for count in (0, 1, 3, 2)]
    assert_equals_paper(path, anchors, images, sizes, top_k)


@PATHS
def test_some_anchors_are_matched_to_the_better_of_two(path):
    anchors, sizes = grid()
    near = torch.tensor([[8.0, 8.0, 30.0, 32.0], [9.0, 7.0, 33.0, 33.0]])
    alone = [match(path, anchors, [box[None]], sizes)[0] >= 0 for box in near]
    assert (alone[0] & alone[1]).any()
    assert_equals_paper(path, anchors, [near, near.flip(0)], sizes)


@PATHS
def test_equal_ground_truths_the_first_wins(path):
    anchors, sizes = grid()
    box = torch.tensor([[8.0, 8.0, 33.0, 31.0]])
    alone = match(path, anchors, [box], sizes)
    assert (alone == 0).any()
    assert torch.equal(match(path, anchors, [box.repeat(3, 1)], sizes), alone)


@PATHS
def test_equal_ious_reach_their_mean(path):
    """All candidates lie within the ground truth and are alike: their standard deviation is 0."""
    anchors, sizes = grid()
    inside = torch.tensor([[-500.0, -500.0, 500.3, 500.7]])
    assert (match(path, anchors[: sizes[0]], [inside], [sizes[0]], 9) == 0).sum() == 9
    assert (match(path, anchors[:1], [inside], [1], 9) == 0).all()


@PATHS
def test_of_equal_distances_the_lower_index_is_nearer(path):
    anchors = torch.tensor([[20.0, 0, 30, 10], [0, 0, 10, 10], [10, 0, 20, 10], [-10, 0, 0, 10], [20, 0, 30, 10]])
    box = torch.tensor([[10.0, 0.0, 20.0, 10.0]])
    generous = torch.tensor([[-1000.0, -1000.0, 1030.0, 1010.0]])  # has the same centre, and matches all candidates
    assert match(path, anchors, [box, generous], [5], 1).tolist() == [[-1, -1, 0, -1, -1]] * 2
    assert match(path, anchors, [generous], [5], 2).tolist() == [[0, -1, 0, -1, -1]]
    assert match(path, anchors, [generous], [5], 3).tolist() == [[0, 0, 0, -1, -1]]


@PATHS
def test_ground_truths_that_no_anchor_answers_for(path):
    """One lies far from all anchors, one between their centres."""
    anchors, sizes = grid()
    lost = torch.tensor([[5000.0, 5000.0, 5010.0, 5010.0], [1.0, 1.0, 6.0, 7.0]])
    assert (match(path, anchors, [lost], sizes) == -1).all()


@PATHS
def test_anchors_may_differ_between_images(path):
    anchors, sizes = grid()
    boxes = random_boxes(3, torch.Generator().manual_seed(3))
    assert_equals_paper(path, torch.stack((anchors, anchors + 3)), [boxes, boxes], sizes)


@PATHS
def test_nothing_at_all(path):
    anchors, sizes = grid()
    none = torch.zeros(0, 4)
    assert match(path, anchors, [], sizes).shape == (0, len(anchors))
    assert match(path, anchors[:0], [none], [0, 0]).shape == (1, 0)
    assert match(path, anchors[:0], [random_boxes(1, torch.Generator())], [0]).shape == (1, 0)
    assert (match(path, anchors, [none, none], sizes) == -1).all()
    sizes = [sizes[0], 0, *sizes[1:]]  # an empty level among the others
    assert_equals_paper(path, anchors, [none, random_boxes(2, torch.Generator().manual_seed(0))], sizes)


@pytest.mark.parametrize("path", ["reference", pytest.param("kernel", marks=pytest.mark.slow)])
def test_ten_thousand_ground_truths(path, monkeypatch):
    monkeypatch.setattr(module, "_PAIRS", 1 << 19)
    anchors, sizes = grid()
    sizes = sizes[-1:] if path == "kernel" else sizes  # few loops for the interpreter
    anchors = anchors[-sum(sizes) :]
    generator = torch.Generator().manual_seed(3)
    boxes = torch.cat((random_boxes(9_990, generator) + 2000, random_boxes(10, generator)))
    boxes = boxes[torch.randperm(10_000, generator=generator)]
    near = (boxes[:, 0] < 1000).nonzero().squeeze(1)
    expected, _ = paper(anchors, boxes[near], sizes, 9)
    ours = match(path, anchors, [boxes], sizes)[0].long()
    assert torch.equal(ours, torch.where(expected >= 0, near[expected.clamp(min=0)], -1))


corner = st.integers(-4, 20).map(float)
side = st.one_of(st.integers(1, 24).map(float), st.sampled_from([1e-20, 1e-3, 1e4, 1e15, 1e22]))
box = st.tuples(corner, corner, side, side).map(lambda t: (t[0], t[1], t[0] + t[2], t[1] + t[3]))


@settings(max_examples=10, deadline=None)
@given(
    anchors=st.lists(box, min_size=1, max_size=20),
    images=st.lists(st.lists(box, max_size=3), min_size=1, max_size=2),
    share=st.floats(0, 1),
    top_k=st.integers(1, 9),
)
def test_the_kernels_match_as_the_reference(anchors, images, share, top_k):
    truths = [torch.tensor(boxes).reshape(-1, 4) for boxes in images]
    first = round(share * len(anchors))
    arguments = torch.tensor(anchors), truths, [first, len(anchors) - first], top_k
    assert torch.equal(match("kernel", *arguments), match("reference", *arguments))


@PATHS
def test_an_iou_that_is_no_number_counts_as_0(path):
    """Areas of 1e44 are infinite in float32."""
    huge = torch.tensor([[0.0, 0, 1e22, 1e22]])
    anchors = torch.cat((torch.tensor([[0.0, 0, 1, 1]]).repeat(5, 1), huge))
    assert match(path, anchors, [huge], [0, 6], 1).tolist() == [[-1, -1, -1, -1, -1, 0]]
    near = torch.tensor([[0.0, 0, 2, 2], [1, 1, 3, 3]])  # IoUs of 1, 1/7 and 0 with the first, all 0 with the huge one
    assert match(path, torch.cat((near, huge)), [near[:1], huge], [3], 3).tolist() == [[0, -1, -1], [0, 0, 0]]


def test_boxes_that_are_no_boxes_stay_in_bounds():
    """On a GPU they are reported at a later call; until then the kernels must live with them."""
    anchors, sizes = grid()
    nan, inf = float("nan"), float("inf")
    boxes = torch.tensor([[nan] * 4, [inf] * 4, [0, 0, nan, 9], [9.0, 9, 3, 3], [5, 5, 5, 5], [-inf, -inf, inf, inf]])
    indices = match("kernel", anchors, [boxes], sizes)
    assert ((indices >= -1) & (indices < 6)).all()


@pytest.mark.parametrize(
    ("sizes", "top_k", "message"),
    [
        ([3, 1], 9, r"level_sizes must add up to the 5 anchors, got \[3, 1\]"),
        ([6, -1], 9, r"level_sizes must add up to the 5 anchors, got \[6, -1\]"),
        ([5], 0, "top_k must be at least 1, got 0"),
    ],
)
def test_bad_arguments(sizes, top_k, message):
    with pytest.raises(ValueError, match=message):
        atss_matching(torch.zeros(5, 4), torch.zeros(2, 4), torch.zeros(2).long(), torch.tensor([0, 2]), sizes, top_k)


def test_too_many_candidates():
    with pytest.raises(ValueError, match="top_k 1100 gives a ground truth 2200 candidates in 2 levels, more than"):
        atss_matching(
            torch.zeros(4000, 4), torch.zeros(0, 4), torch.zeros(0).long(), torch.tensor([0, 0]), [2000] * 2, 1100
        )


def test_registration(device):
    anchors, sizes = grid()
    boxes = random_boxes(4, torch.Generator().manual_seed(4)).to(device)
    offsets = torch.tensor([0, 2, 4], device=device)
    inputs = anchors.to(device), boxes, torch.arange(4, device=device), offsets, sizes, 9
    torch.library.opcheck(module._reference_op, inputs, test_utils=("test_schema", "test_faketensor"))
    compiled = torch.compile(atss_matching, fullgraph=True, backend="aot_eager", dynamic=True)
    for ours, expected in zip(compiled(*inputs), atss_matching_reference(*inputs), strict=True):
        assert torch.equal(ours, expected)


def test_registration_of_the_kernels(device):
    boxes, offsets = torch.tensor([[8.0, 8.0, 30.0, 32.0]]), torch.tensor([0, 1])
    tensors = [x.to(device) for x in (grid()[0][-2:], boxes, torch.tensor([3]), offsets)]
    torch.library.opcheck(module._op, (*tensors, [2], 1), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("path", ["reference", "launcher"])
def test_memory_of_many_ground_truths(path, monkeypatch):
    monkeypatch.undo()
    counted, count = PeakBytes(), 500 if path == "launcher" else 20

    def run(device):
        anchors = torch.rand(120_000, 4, device=device)
        boxes = torch.rand(count, 4, device=device)
        labels, offsets = (
            torch.zeros(count, dtype=torch.int64, device=device),
            torch.tensor([0, count]).to(device, non_blocking=True),
        )
        with counted:
            atss_matching(anchors, boxes, labels, offsets, [90_000, 30_000])

    if path == "reference":
        run("cpu")
    else:
        assert len(launches_of(lambda: run("cuda"))) == 4
    assert 9e5 < counted.most < 30e6  # matrices of float32 distances and IoUs: 480 MB at 500 ground truths


def test_launches_do_not_grow_with_the_batch():
    assert [launch.kernel.__name__ for launch in launches_of(KERNEL_CALLS["atss_matching"].run)] == [
        "_surround_kernel", "_nearest_kernel", "_choose_kernel", "_write_matches_kernel",
    ]  # fmt: skip


# As compiled code


@pytest.mark.parametrize("name", names("atss_matching"))
def test_compiled(name):
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("order", OTHER_ORDERS)
@pytest.mark.parametrize("name", names("atss_matching"))
def test_compiled_in_other_orders(name, order):
    check(name, **OTHER_ORDERS[order])
