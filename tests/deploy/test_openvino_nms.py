"""Suppression in OpenVINO keeps the boxes that torchvision keeps: by a stand-in, and by OpenVINO where it is installed.

The stand-in does what OpenVINO's operation is specified to do, box by box.
"""

import importlib.util
import itertools
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torchvision.ops import box_iou, nms

from retina_fast.deploy import openvino_nms
from retina_fast.deploy.openvino_nms import OpenVinoNms


def suppressed(boxes, scores, most, thresh):
    """Outputs 0 and 2 of NonMaxSuppression-9: what is selected, padded by -1, and how many."""
    found = []
    for image, label in itertools.product(*map(range, scores.shape[:2])):
        own, kept = scores[image, label], []
        for i in np.argsort(-own, kind="stable"):
            ious = box_iou(torch.from_numpy(boxes[image, i : i + 1]), torch.from_numpy(boxes[image, kept]))
            if own[i] > 0 and len(kept) < most and not (ious >= torch.from_numpy(thresh)).any():
                kept.append(i)
        found += [(image, label, i) for i in kept]
    padding = [(-1, -1, -1)] * (scores.size - len(found))
    return np.array(found + padding, np.int32), np.array([len(found)], np.int32)


@pytest.fixture(params=["stand-in", "OpenVINO"])
def ours(request, monkeypatch):
    """What is tested; ``ours.calls`` are the arrays that OpenVINO was given."""
    if request.param == "stand-in":
        ways = {
            "parameter": lambda *_: None,
            "non_max_suppression": lambda *_, **__: SimpleNamespace(output=lambda _: 0),
        }
        core = SimpleNamespace(compile_model=lambda *_: lambda arrays, share_inputs: suppressed(*arrays))
        parts = {"opset13": SimpleNamespace(**ways), "Core": lambda: core, "Model": lambda *_: None}
        monkeypatch.setitem(sys.modules, "openvino", SimpleNamespace(PartialShape=list, **parts))
    elif not importlib.util.find_spec("openvino"):
        pytest.skip("OpenVINO is not installed")
    monkeypatch.setattr(openvino_nms.platform, "machine", lambda: "x86_64")
    made, calls = OpenVinoNms(), []
    compiled = made._compiled

    def recorded(arrays, share_inputs):
        calls.append(arrays)
        return compiled(arrays, share_inputs=share_inputs)

    made._compiled = recorded
    return SimpleNamespace(run=made, calls=calls)


def check(run, boxes, labels, counts, thresh, most):
    """What stays is what torchvision keeps of each class, best first."""
    kept = run(boxes, None, labels, torch.tensor(counts), thresh, most)
    assert kept.positions.shape == (len(boxes), most)
    for b, count in enumerate(counts):
        scores = torch.arange(count, 0, -1, dtype=torch.float32)
        stay = torch.zeros(count, dtype=torch.bool)
        for label in labels[b, :count].unique():
            own = (labels[b, :count] == label).nonzero()[:, 0]
            stay[own[nms(boxes[b, own], scores[own], thresh)]] = True
        expected = stay.nonzero()[:most, 0]
        assert int(kept.counts[b]) == len(expected)
        torch.testing.assert_close(kept.positions[b], torch.nn.functional.pad(expected, (0, most - len(expected))))


def made(batch, count, side, whole):
    """Boxes (batch, count, 4) in a square, that overlap; of ``whole`` coordinates many IoUs are equal."""
    corner, size = torch.rand(batch, count, 2) * side, 1 + torch.rand(batch, count, 2) * side / 3
    boxes = torch.cat((corner, corner + size), dim=2)
    return boxes.round() if whole else boxes


@pytest.mark.parametrize("thresh", [0.5, 1 / 3, 0.05, 1.0])
@pytest.mark.parametrize("whole", [True, False])
def test_the_boxes_of_each_class_and_image_stay_that_torchvision_keeps(ours, thresh, whole):
    torch.manual_seed(0)
    boxes, labels = made(3, 300, 30, whole), torch.randint(3, (3, 300))
    check(ours.run, boxes, labels, [300, 0, 123], thresh, 300)
    check(ours.run, boxes, torch.zeros_like(labels), [299, 300, 1], thresh, 7)
    assert len(ours.calls) == 2


def test_another_default_dtype_changes_nothing(ours):
    torch.manual_seed(4)
    boxes, labels = made(1, 300, 30, True), torch.zeros(1, 300, dtype=torch.int64)
    torch.set_default_dtype(torch.float64)
    try:
        kept = ours.run(boxes, None, labels, torch.tensor([300]), 0.5, 300)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(kept.positions, ours.run(boxes, None, labels, torch.tensor([300]), 0.5, 300).positions)
    assert [array.dtype for array in ours.calls[0]] == [array.dtype for array in ours.calls[1]]


def test_an_iou_at_the_threshold_stays(ours):
    boxes = torch.tensor([[[0.0, 0, 4, 1], [0, 0, 2, 1], [0, 0, 3, 1]] + [[9.0, 9, 9, 9]] * 297])
    check(ours.run, boxes, torch.zeros(1, 300, dtype=torch.int64), [3], 0.5, 300)  # IoUs with the first: 0.5, 0.75
    assert ours.run(boxes, None, torch.zeros(1, 300).long(), torch.tensor([3]), 0.5, 3).counts.tolist() == [2]


def test_boxes_without_an_area_and_those_that_hold_a_nan_stay(ours):
    torch.manual_seed(1)
    boxes = made(1, 400, 20, True)
    boxes[0, ::7] = boxes[0, 3, :2].repeat(2)
    boxes[0, ::11, 2] = torch.nan
    check(ours.run, boxes, torch.zeros(1, 400, dtype=torch.int64), [400], 0.5, 400)


@pytest.mark.parametrize("thresh", [0.0, -0.5, 1.5, 1e-40])
def test_other_thresholds_are_left_to_numpy(ours, thresh):
    torch.manual_seed(2)
    check(ours.run, made(1, 300, 30, True), torch.zeros(1, 300, dtype=torch.int64), [300], thresh, 300)
    assert not ours.calls


def test_few_boxes_many_classes_and_other_processors_are_left_to_numpy(ours, monkeypatch):
    torch.manual_seed(3)
    boxes, one = made(1, 300, 30, True), torch.zeros(1, 300, dtype=torch.int64)
    check(ours.run, boxes[:, :100], one[:, :100], [100], 0.5, 100)
    check(ours.run, boxes, torch.randint(30, (1, 300)), [300], 0.5, 300)
    check(ours.run, boxes, one - 1, [0], 0.5, 300)  # nothing but padding
    monkeypatch.setattr(openvino_nms.platform, "machine", lambda: "aarch64")
    check(ours.run, boxes, one, [300], 0.5, 300)
    assert not ours.calls
