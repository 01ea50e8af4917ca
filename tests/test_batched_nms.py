"""Non-maximum suppression against a plain Python loop, and against torchvision where that is exact."""

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st

from retina_fast import ops
from retina_fast.kernels.batched_nms import batched_nms


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


grid = st.integers(0, 6).map(float)
box = st.tuples(grid, grid, st.integers(0, 6), st.integers(0, 6)).map(lambda t: (t[0], t[1], t[0] + t[2], t[1] + t[3]))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(box, st.integers(0, 3), st.integers(0, 2)), max_size=12), st.sampled_from([0.0, 0.25, 0.5]))
def test_adversarial_boxes(rows, threshold):
    """Zero areas, equal scores, identical boxes, IoU exactly at the threshold."""
    boxes = torch.tensor([row[0] for row in rows]).reshape(-1, 4)
    scores, labels = torch.tensor([row[1] / 3 for row in rows]), torch.tensor([row[2] for row in rows])
    expected = greedy(boxes, scores, labels, threshold)
    assert ops.batched_nms(boxes, scores, labels.long(), threshold).tolist() == expected
    assert ops.nms(boxes, scores, threshold).tolist() == greedy(boxes, scores, None, threshold)


def test_torchvisions_signatures():
    boxes, scores, labels = clusters(200, 9)
    scores = scores + torch.arange(200) * 1e-6  # without ties torchvision's order is defined too
    assert torch.equal(ops.nms(boxes, scores, 0.5), torchvision.ops.nms(boxes, scores, 0.5))
    assert torch.equal(
        ops.batched_nms(boxes, scores, labels, 0.5), torchvision.ops.batched_nms(boxes, scores, labels, 0.5)
    )
    assert ops.batched_nms(boxes[:0], scores[:0], labels[:0], 0.5).shape == (0,)
    with pytest.raises(ValueError, match="scores must be"):
        ops.nms(boxes, scores[:3], 0.5)


def test_half_precision_boxes_do_not_overflow():
    boxes = torch.tensor([[0, 0, 60000, 60000], [0, 0, 60000, 60000], [0, 0, 60000, 60000]], dtype=torch.float16)
    kept = ops.batched_nms(boxes, torch.tensor([0.9, 0.8, 0.7], dtype=torch.float16), torch.tensor([0, 90, 0]), 0.5)
    assert kept.tolist() == [0, 1]
