"""Targets on a GPU are checked without waiting, and the error names the step and the image."""

import math

import pytest
import torch

from retina_fast import targets as targets_module
from tests.model.pairs import IMAGES, good_targets


class FakeEvent:
    done = False

    def record(self, stream=None):
        pass

    def query(self):
        return FakeEvent.done

    def synchronize(self):
        assert FakeEvent.done


def test_deferred_errors_name_step_and_image(monkeypatch):
    """The answer of the check is read at a later call, once it is there, and says where it belongs."""
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    empty = torch.empty
    monkeypatch.setattr(targets_module.torch, "empty", lambda *a, pin_memory=False, **k: empty(*a, **k))
    check = targets_module.TargetCheck()
    check.num_classes = 3

    class OnGPU(torch.Tensor):
        device = torch.device("cuda")

    boxes = torch.tensor([[0.0, 0, 5, 5], [0, 0, 5, 5], [3, 3, 3, 9]])
    labels = torch.tensor([0, 1, 2])
    check(boxes.as_subclass(OnGPU), labels, [2, 1])
    check(boxes[:2].as_subclass(OnGPU), labels[:2], [2])  # the first answer has not come in: nothing is raised
    FakeEvent.done = True
    try:
        with pytest.raises(AssertionError, match=r"targets\[1\]\['boxes'\]\[0\] \(in the targets of training step 1\)"):
            check(boxes[:2].as_subclass(OnGPU), labels[:2], [2])
        check(boxes[:2].as_subclass(OnGPU), labels[:2], [2])
    finally:
        FakeEvent.done = False


def test_a_step_counts_once_where_a_loss_of_the_users_own_calls_ours(model):
    original = model.compute_loss
    model.compute_loss = lambda targets, outputs, anchors: original(targets, outputs, anchors)
    for _ in range(3):
        model(IMAGES, good_targets())
    assert targets_module.target_check(model).step == 3


@pytest.mark.parametrize("row", [None, 0, 3, 6])
@pytest.mark.parametrize(
    "wrong",
    [
        ([1.0, 1.0, 1.0, 5.0], 0), ([1.0, 6.0, 5.0, 5.0], 0), ([math.nan, 1.0, 5.0, 5.0], 0),
        ([1.0, 1.0, 5.0, math.inf], 0), ([-math.inf, 1.0, 5.0, 5.0], 0), ([1.0, 1.0, 5.0, 5.0], -1),
        ([1.0, 1.0, 5.0, 5.0], 3),
    ],
)  # fmt: skip
def test_the_first_wrong_row_is_found(row, wrong):
    boxes, labels = torch.tensor([[-3e38, 0.0, 3e38, 1e-30]] * 7), torch.tensor([0, 1, 2, 0, 1, 2, 0])
    if row is not None:
        for later in range(row, 7, 2):
            boxes[later], labels[later] = torch.tensor(wrong[0]), wrong[1]
    found = 14 if row is None else row + 7 * (wrong[1] != 0)
    assert targets_module.first_error(boxes, labels, 3) == found
    if wrong[1] < 3:
        assert targets_module.first_error(boxes, labels, None) == found
    labels[0] = 5  # comes after all boxes
    assert targets_module.first_error(boxes, labels, 3) == min(found, 7)
    assert targets_module.first_error(boxes[:0], labels[:0], 3) == 0
