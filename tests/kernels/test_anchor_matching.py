"""Anchor matching, by the reference and by the kernels, against torchvision's Matcher, exactly."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.models.detection._utils import Matcher
from torchvision.models.detection.retinanet import _default_anchorgen
from torchvision.ops import box_iou

from retina_fast.anchors import batch_anchors
from retina_fast.kernels import anchor_matching as module
from retina_fast.kernels import anchor_matching_cpu
from retina_fast.kernels.anchor_matching import Matches, anchor_matching, anchor_matching_reference
from tests.instruments.fake_gpu import launches_of
from tests.instruments.kernel_calls import KERNEL_CALLS
from tests.instruments.peak_bytes import PeakBytes
from tests.ptx.cases import CASES, OTHER_ORDERS, check, division_of_zero_faults, names, run_case

PATHS = pytest.mark.parametrize("path", ["reference", "kernel"])


def torchvision_indices(anchors, boxes, low_quality=True, fg=0.5, bg=0.4):
    if not len(boxes):
        return torch.full((len(anchors),), -1)
    return Matcher(fg, bg, allow_low_quality_matches=low_quality)(box_iou(boxes, anchors))


def random_boxes(count, size, generator, integers=False):
    corner = torch.rand(count, 2, generator=generator) * size
    boxes = torch.cat((corner, corner + 1 + torch.rand(count, 2, generator=generator) * size / 3), dim=1)
    return boxes.round() if integers else boxes


def match(path, anchors, images, fg=0.5, bg=0.4, low_quality=True):
    """Matches of a list of (boxes, labels)."""
    device = torch.device("cuda" if path == "kernel" and torch.cuda.is_available() else "cpu")
    function: Any = module._anchor_matching_triton if path == "kernel" else anchor_matching_reference
    boxes = torch.cat([torch.zeros(0, 4), *[boxes for boxes, _ in images]])
    labels = torch.cat([torch.zeros(0, dtype=torch.int64), *[labels for _, labels in images]])
    offsets = torch.tensor([0] + [len(boxes) for boxes, _ in images]).cumsum(0)
    on_device: list = [x.to(device) for x in (anchors, boxes, labels, offsets)]
    return Matches(*[x.cpu() for x in function(*on_device, fg, bg, low_quality)])


def assert_equals_torchvision(path, anchors, images, fg=0.5, bg=0.4, low_quality=True):
    ours = match(path, anchors, images, fg, bg, low_quality)
    for b, (boxes, labels) in enumerate(images):
        image_anchors = anchors if anchors.dim() == 2 else anchors[b]
        expected = torchvision_indices(image_anchors, boxes, low_quality, fg, bg)
        assert torch.equal(ours.indices[b].long(), expected)
        classes = torch.where(expected >= 0, labels[expected.clamp(min=0)] if len(labels) else expected, expected)
        assert torch.equal(ours.labels[b].long(), classes)
        assert ours.num_foreground[b] == (expected >= 0).sum()


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several tiles and several chunks of ground truths where anchors and boxes are few."""
    monkeypatch.setattr(module, "_TILE", 256)
    monkeypatch.setattr(module, "_CHUNK", 16)


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    """What a kernel leaves unwritten is the largest integer."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def anchors():
    grids = [torch.zeros(1, 1, s, s) for s in (13, 7, 4, 2, 1)]
    return batch_anchors(_default_anchorgen(), torch.zeros(1, 3, 104, 104), [(104, 104)], grids)


@PATHS
@pytest.mark.parametrize("low_quality", [True, False])
@pytest.mark.parametrize("integers", [True, False])
def test_matches_torchvision(path, anchors, integers, low_quality):
    generator = torch.Generator().manual_seed(0)
    images = []
    for count in (0, 1, 7, 60):
        labels = torch.randint(0, 5, (count,), generator=generator)
        images.append((random_boxes(count, 104, generator, integers), labels))
    assert_equals_torchvision(path, anchors, images, low_quality=low_quality)


@pytest.mark.parametrize("tile", [1, 17, 1 << 18])
def test_tiles_do_not_show(anchors, tile, monkeypatch):
    monkeypatch.setattr(anchor_matching_cpu, "_TILE", tile)
    monkeypatch.setattr(anchor_matching_cpu, "_AT_ONCE", max(tile, 1000))
    boxes = random_boxes(20, 104, torch.Generator().manual_seed(1), integers=True)
    images = [(boxes[:12], torch.arange(12)), (boxes[12:], torch.arange(8))]
    assert_equals_torchvision("reference", anchors, images)
    assert_equals_torchvision("reference", torch.stack((anchors, anchors + 3)), images)


def test_ground_truths_of_other_sizes_than_any_anchor(anchors):
    """No IoU of these reaches a threshold: what ties their highest is found by the bound of their areas."""
    corner = torch.rand(40, 2, generator=torch.Generator().manual_seed(4)) * 80
    for size in ([3.0, 3.0], [1.0, 90.0], [104.0, 2.0], [9.0, 30.0]):
        boxes = torch.cat((corner, corner + torch.tensor(size)), dim=1)
        for step in (1, 40):
            images = [(boxes[i : i + step], torch.arange(step)) for i in range(0, 40, step)]
            assert_equals_torchvision("reference", anchors, images)
            assert_equals_torchvision("reference", anchors, images, fg=0.3, bg=0.1)


def test_without_area_or_with_nan(anchors):
    """A box of no area is the best of no anchor. One with NaN does not hide the others."""
    boxes = torch.cat((anchors[700:701, [0, 1, 0, 1]], anchors[300:301]))
    assert_equals_torchvision("reference", anchors, [(boxes, torch.arange(2))], low_quality=False)
    assert_equals_torchvision("reference", anchors, [(boxes, torch.arange(2))])
    boxes[0, 2] = float("nan")
    assert match("reference", anchors, [(boxes, torch.tensor([3, 4]))]).labels[0, 300] == 4


@PATHS
def test_edges(path, anchors):
    far = torch.tensor([[5000.0, 5000.0, 5010.0, 5010.0]])  # touches no anchor: every anchor ties its best IoU of 0
    twins = anchors[40:41].repeat(3, 1)
    half = torch.cat((anchors[50:51], anchors[50:51] * torch.tensor([1.0, 1.0, 1.0, 2.0])))
    outside = torch.tensor([[-9.0, -9.0, 3.0, 3.0]])
    images = [(boxes, torch.arange(len(boxes))) for boxes in (far, twins, half, anchors[:1] + 0.0, outside)]
    images += [(torch.cat((far, twins)), torch.arange(4)), (torch.cat((twins, far)), torch.arange(4))]
    assert_equals_torchvision(path, anchors, [*images, (far[:0], torch.arange(0))])
    assert (match(path, anchors, [(far, torch.tensor([3]))]).labels == 3).all()
    twin_labels = torch.tensor([4, 5, 6])
    assert match(path, anchors, [(twins, twin_labels)]).indices[0, 40] == 0  # the first ground truth wins


@PATHS
def test_an_iou_at_the_threshold_is_above_it(path):
    anchors = torch.tensor([[0.0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10]])
    boxes = torch.tensor([[0.0, 0, 10, 5], [20, 0, 30, 4]])  # IoU exactly 1/2, and 0.4 rounded
    images = [(boxes, torch.tensor([7, 8]))]
    assert match(path, anchors, images, low_quality=False).indices.tolist() == [[0, -2, -1]]
    assert_equals_torchvision(path, anchors, images, low_quality=False)
    assert_equals_torchvision(path, anchors, images, fg=0.4, bg=0.4, low_quality=False)
    assert_equals_torchvision(path, anchors, images, fg=0.0, bg=0.0)


@PATHS
def test_anchors_may_differ_between_images(path, anchors):
    boxes = random_boxes(5, 104, torch.Generator().manual_seed(2))
    assert_equals_torchvision(path, torch.stack((anchors, anchors + 3)), [(boxes, torch.arange(5))] * 2)


@PATHS
def test_nothing_at_all(path, anchors):
    none = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
    assert match(path, anchors, []).indices.shape == (0, len(anchors))
    assert match(path, anchors[:0], [none]).indices.shape == (1, 0)
    assert (match(path, anchors, [none, none], fg=0.0, bg=0.0).indices == -1).all()


@pytest.mark.parametrize("path", [pytest.param("reference", marks=pytest.mark.slow), "kernel"])
def test_ten_thousand_ground_truths(path, anchors, monkeypatch):
    monkeypatch.setattr(module, "_TILE", 4096)  # one tile, and chunks of 32: few loops for the interpreter
    monkeypatch.setattr(module, "_CHUNK", 32)
    generator = torch.Generator().manual_seed(3)
    boxes = random_boxes(10_000, 50_000, generator) + 200  # beside the anchors, but for
    boxes[::1000] = random_boxes(10, 104, generator)
    labels = torch.randint(0, 91, (10_000,), generator=generator)
    assert_equals_torchvision(path, anchors, [(boxes, labels)])
    assert_equals_torchvision(path, anchors, [(boxes, labels)], low_quality=False)


corner = st.integers(-4, 20).map(float)
side = st.one_of(st.integers(1, 24).map(float), st.sampled_from([1e-20, 1e-3, 1e4, 1e15, 1e22]))
box = st.tuples(corner, corner, side, side).map(lambda t: (t[0], t[1], t[0] + t[2], t[1] + t[3]))
anchor = st.tuples(corner, corner, st.integers(1, 24), st.integers(1, 24)).map(
    lambda t: (t[0], t[1], t[0] + t[2], t[1] + t[3])
)


@PATHS
@settings(max_examples=40, deadline=None)
@given(
    anchors=st.lists(anchor, min_size=1, max_size=30),
    images=st.lists(st.lists(box, max_size=8), min_size=1, max_size=3),
    low_quality=st.booleans(),
)
def test_adversarial_boxes(path, anchors, images, low_quality):
    truths = [torch.tensor(boxes).reshape(-1, 4) for boxes in images]
    truths = [boxes[(boxes[:, 2:] > boxes[:, :2]).all(dim=1)] for boxes in truths]  # a tiny side may have vanished
    labelled = [(boxes, torch.arange(len(boxes))) for boxes in truths]
    assert_equals_torchvision(path, torch.tensor(anchors), labelled, low_quality=low_quality)


def test_boxes_that_are_no_boxes_stay_in_bounds(anchors):
    """On a GPU they are reported at a later call; until then the kernels must live with them."""
    nan, inf = float("nan"), float("inf")
    boxes = torch.tensor([[nan] * 4, [inf] * 4, [0, 0, nan, 9], [9.0, 9, 3, 3], [5, 5, 5, 5], [-inf, -inf, inf, inf]])
    for rows in (boxes, boxes.flip(0)):
        matches = match("kernel", anchors, [(rows, torch.arange(6))])
        assert ((matches.indices >= -2) & (matches.indices < 6)).all()
        assert matches.num_foreground[0] == (matches.indices >= 0).sum()


@pytest.mark.parametrize(
    ("anchors", "boxes", "labels", "message"),
    [
        (torch.zeros(5, 3), torch.zeros(2, 4), torch.zeros(2), r"anchors must be .* got \(5, 3\)"),
        (torch.zeros(3, 5, 4), torch.zeros(2, 4), torch.zeros(2), r"anchors must be .* \(1, N, 4\), got \(3, 5, 4\)"),
        (torch.zeros(5, 4), torch.zeros(2, 4), torch.zeros(3), r"boxes \(2, 4\) and labels \(3,\)"),
    ],
)
def test_shapes_that_do_not_fit(anchors, boxes, labels, message):
    with pytest.raises(ValueError, match=message):
        anchor_matching(anchors, boxes, labels.long(), torch.tensor([0, 2]))


@pytest.mark.parametrize("low_quality", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_registration(anchors, device, low_quality):
    boxes = random_boxes(6, 104, torch.Generator().manual_seed(4)).to(device)
    offsets = torch.tensor([0, 2, 6], device=device)
    inputs = anchors.to(device), boxes, torch.arange(6, device=device), offsets, 0.5, 0.4, low_quality
    torch.library.opcheck(module._op, inputs)
    torch.library.opcheck(module._reference_op, inputs)
    compiled = torch.compile(anchor_matching, fullgraph=True, backend="aot_eager", dynamic=True)
    for ours, expected in zip(compiled(*inputs), anchor_matching_reference(*inputs), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("path", [pytest.param("reference", marks=pytest.mark.slow), "launcher"])
def test_memory_of_500_ground_truths_and_201600_anchors(path):
    counted = PeakBytes()

    def run(device):
        anchors = torch.rand(201_600, 4, device=device)
        boxes = torch.rand(500, 4, device=device)
        labels, offsets = (
            torch.zeros(500, dtype=torch.int64, device=device),
            torch.tensor([0, 500]).to(device, non_blocking=True),
        )
        with counted:
            anchor_matching(anchors, boxes, labels, offsets)

    if path == "reference":
        run("cpu")
    else:
        assert len(launches_of(lambda: run("cuda"))) == 2
    assert 1.6e6 < counted.most < 20e6  # torchvision: 3.6e9


def test_launches_do_not_grow_with_the_batch():
    launches = launches_of(KERNEL_CALLS["anchor_matching"].run)
    assert [launch.kernel.__name__ for launch in launches] == ["_anchor_matching_kernel", "_match_kernel"]
    assert [launch.grid for launch in launches] == [(470 * 8 * 4,), (470, 8)]


# As compiled code


@pytest.mark.parametrize("name", names("anchor_matching"))
def test_compiled(name):
    check(name)


def test_nothing_is_divided_where_nothing_intersects():
    outcome = run_case(CASES["anchor_matching unaligned"], edit=division_of_zero_faults)
    assert not outcome.failures


@pytest.mark.slow
@pytest.mark.parametrize("order", OTHER_ORDERS)
@pytest.mark.parametrize("name", names("anchor_matching"))
def test_compiled_in_other_orders(name, order):
    check(name, **OTHER_ORDERS[order])
