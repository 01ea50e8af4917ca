"""Anchor matching against torchvision's Matcher, exactly."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.models.detection._utils import Matcher
from torchvision.models.detection.retinanet import _default_anchorgen
from torchvision.ops import box_iou

from retina_fast.anchors import batch_anchors
from retina_fast.kernels import anchor_matching as module
from retina_fast.kernels.anchor_matching import anchor_matching


def torchvision_indices(anchors, boxes, low_quality=True, fg=0.5, bg=0.4):
    if not len(boxes):
        return torch.full((len(anchors),), -1)
    return Matcher(fg, bg, allow_low_quality_matches=low_quality)(box_iou(boxes, anchors))


def random_boxes(count, size, generator, integers=False):
    corner = torch.rand(count, 2, generator=generator) * size
    boxes = torch.cat((corner, corner + 1 + torch.rand(count, 2, generator=generator) * size / 3), dim=1)
    return boxes.round() if integers else boxes


def match(anchors, images, **kwargs):
    """Matches of a list of (boxes, labels)."""
    boxes = torch.cat([boxes for boxes, _ in images])
    labels = torch.cat([labels for _, labels in images])
    offsets = torch.tensor([0] + [len(boxes) for boxes, _ in images]).cumsum(0)
    return anchor_matching(anchors, boxes, labels, offsets, **kwargs)


def assert_equals_torchvision(anchors, images, **kwargs):
    ours = match(anchors, images, **kwargs)
    for b, (boxes, labels) in enumerate(images):
        expected = torchvision_indices(anchors, boxes, kwargs.get("allow_low_quality_matches", True))
        assert torch.equal(ours.indices[b].long(), expected)
        classes = torch.where(expected >= 0, labels[expected.clamp(min=0)] if len(labels) else expected, expected)
        assert torch.equal(ours.labels[b].long(), classes)
        assert ours.num_foreground[b] == (expected >= 0).sum()


@pytest.fixture
def anchors():
    grids = [torch.zeros(1, 1, s, s) for s in (13, 7, 4, 2, 1)]
    return batch_anchors(_default_anchorgen(), torch.zeros(1, 3, 104, 104), [(104, 104)], grids)[0]


@pytest.mark.parametrize("low_quality", [True, False])
@pytest.mark.parametrize("integers", [True, False])
def test_matches_torchvision(anchors, integers, low_quality):
    generator = torch.Generator().manual_seed(0)
    images = []
    for count in (0, 1, 7, 300):
        labels = torch.randint(0, 5, (count,), generator=generator)
        images.append((random_boxes(count, 104, generator, integers), labels))
    assert_equals_torchvision(anchors, images, allow_low_quality_matches=low_quality)


@pytest.mark.parametrize("tile", [1, 17, 1 << 18])
def test_tiles_do_not_show(anchors, tile, monkeypatch):
    monkeypatch.setattr(module, "_TILE_PAIRS", tile * 20)
    boxes = random_boxes(20, 104, torch.Generator().manual_seed(1), integers=True)
    assert_equals_torchvision(anchors, [(boxes, torch.arange(20))])


def test_edges(anchors):
    far = torch.tensor([[5000.0, 5000.0, 5010.0, 5010.0]])  # touches no anchor: every anchor ties its best IoU of 0
    twins = anchors[40:41].repeat(3, 1)
    half = torch.cat((anchors[50:51], anchors[50:51] * torch.tensor([1.0, 1.0, 1.0, 2.0])))
    for boxes in (far, twins, half, torch.cat((far, twins)), anchors[:1] + 0.0, torch.tensor([[-9.0, -9.0, 3.0, 3.0]])):
        assert_equals_torchvision(anchors, [(boxes, torch.arange(len(boxes))), (boxes[:0], torch.arange(0))])
    assert (match(anchors, [(far, torch.tensor([3]))]).labels == 3).all()
    assert match(anchors, [(twins, torch.tensor([4, 5, 6]))]).indices[0, 40] == 0  # the first ground truth wins


def test_anchors_may_differ_between_images(anchors):
    boxes = random_boxes(5, 104, torch.Generator().manual_seed(2))
    both = torch.stack((anchors, anchors + 3))
    ours = match(both, [(boxes, torch.arange(5)), (boxes, torch.arange(5))])
    for b in range(2):
        assert torch.equal(ours.indices[b].long(), torchvision_indices(both[b], boxes))


corner = st.integers(-4, 20).map(float)
box = st.tuples(corner, corner, st.integers(1, 24), st.integers(1, 24)).map(
    lambda t: (t[0], t[1], t[0] + t[2], t[1] + t[3])
)


@settings(max_examples=200, deadline=None)
@given(anchors=st.lists(box, min_size=1, max_size=30), boxes=st.lists(box, max_size=8), low_quality=st.booleans())
def test_adversarial_boxes(anchors, boxes, low_quality):
    truths = torch.tensor(boxes).reshape(-1, 4)
    images = [(truths, torch.arange(len(truths)))]
    assert_equals_torchvision(torch.tensor(anchors), images, allow_low_quality_matches=low_quality)
