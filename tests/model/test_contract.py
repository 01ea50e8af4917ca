"""What torchvision's RetinaNet takes and gives, with its signatures and results."""

import inspect
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.detection import retinanet as tv

import retina_fast
from retina_fast import targets as targets_module
from tests.instruments.agreement import differing
from tests.model.pairs import IMAGES, METHODS, assert_same, good_targets, torchvision_model, with_boxes, with_labels


def test_legal_targets_equal_torchvision(model):
    plain = torchvision_model().train()
    plain.load_state_dict(model.state_dict())
    outside = [{**t, "boxes": t["boxes"] + torch.tensor([-10.0, -10, 60, 60])} for t in good_targets()]
    assert_same(model, plain, targets=outside)
    ints = [{**t, "boxes": t["boxes"].long(), "labels": t["labels"].int(), "name": "x"} for t in good_targets()]
    assert_same(model, plain, targets=tuple(ints))
    assert_same(model, plain, images=tuple(IMAGES))
    assert_same(model, plain, images=torch.stack((IMAGES[0], IMAGES[0])))
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    assert_same(model, plain, targets=[empty, good_targets()[1]])


def test_half_precision_boxes(model):
    halves = [{**t, "boxes": t["boxes"].half()} for t in good_targets()]
    exact, losses = model(IMAGES, good_targets()), model(IMAGES, halves)
    assert all(torch.equal(exact[key], losses[key]) for key in exact)


def test_boxes_of_different_dtypes_keep_their_values():
    """Concatenated as they are, integers would become halves, which cannot hold 3001."""
    boxes = [torch.tensor([[4, 5, 3001, 4001]]), torch.zeros(0, 4).half()]
    targets = [{"boxes": b, "labels": torch.zeros(len(b), dtype=torch.int64)} for b in boxes]
    truths = targets_module.gather_targets(targets, 2, torch.device("cpu"))
    assert truths.boxes.tolist() == [[4, 5, 3001, 4001]]


def test_targets_in_evaluation(model):
    """torchvision resizes their boxes and looks whether they are degenerate; it never reads their labels."""
    plain = torchvision_model().eval()
    model.load_state_dict(plain.state_dict())
    model.eval()
    other_classes = with_labels(torch.tensor([90, -1]))
    no_labels = [{"boxes": target["boxes"]} for target in good_targets()]
    for targets in (good_targets(), other_classes, no_labels, good_targets() + good_targets()):
        plain(IMAGES, targets)
        assert all(torch.equal(model(IMAGES, targets)[0][key], model(IMAGES)[0][key]) for key in ("boxes", "labels"))
    for refusing in (plain, model):
        with pytest.raises(AssertionError, match="positive height and width"):
            refusing(IMAGES, with_boxes(torch.tensor([[9.0, 9, 9, 12]])))


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_images_of_any_channels(channels):
    """One mean and standard deviation serve any number of channels."""
    models = []
    for make in (torchvision_model, lambda **kw: retina_fast.from_torchvision(torchvision_model(**kw))):
        changed = make(image_mean=[0.4], image_std=torch.tensor([0.3]))
        torch.manual_seed(1)
        changed.backbone[0] = nn.Conv2d(channels, 16, 8, 8)
        models.append(changed)
    images = [image[:1].expand(channels, -1, -1) + torch.arange(channels)[:, None, None] / 9 for image in IMAGES]
    assert_same(models[1], models[0], images=images)
    with pytest.raises(ValueError, match=rf"images\[2\] must be \({max(2, channels)}, H, W\)"):
        models[1]([IMAGES[0][:1], torch.rand(max(2, channels), 64, 64), torch.rand(7, 64, 64)])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("score_thresh", None),
        ("nms_thresh", None),
        ("topk_candidates", None),
        ("topk_candidates", 2.5),
        ("detections_per_img", 2.5),
    ],
)
def test_thresholds_that_are_no_numbers_are_named(model, name, value):
    setattr(model.eval(), name, value)
    with pytest.raises(TypeError, match=rf"model\.{name} must be a .*number, got {value}"):
        model(IMAGES)


@pytest.mark.parametrize("name", ["topk_candidates", "detections_per_img"])
def test_limits_below_0_are_named(model, name):
    setattr(model.eval(), name, -5)
    with pytest.raises(ValueError, match=rf"model\.{name} must be at least 0, got -5"):
        model(IMAGES)


def test_losses_without_targets(model):
    with pytest.raises(AssertionError, match="targets should not be none when in training mode"):
        model.train().losses_and_detections(IMAGES, None)


@pytest.mark.parametrize(
    ("name", "limit"),
    [
        ("detections_per_img", None),
        *((name, limit) for name in ("detections_per_img", "topk_candidates") for limit in (0, 1, 10**9)),
    ],
)
def test_extreme_limits(model, name, limit):
    """A very large number is how users say that there is no limit: it must not be allocated."""
    plain = torchvision_model().eval()
    model.load_state_dict(plain.state_dict())
    for one in (plain, model.eval()):
        setattr(one, name, limit)
    exact = torchvision.ops.boxes._batched_nms_vanilla
    with torch.no_grad(), patch.object(torchvision.ops.boxes, "batched_nms", exact):
        for image, other in zip(model(IMAGES), plain(IMAGES), strict=True):
            assert len(image["boxes"]) == len(other["boxes"])
            assert differing(image, other) == 0
    assert len(model.detect(IMAGES[0][None]).to_list()[0]["boxes"]) == len(model(IMAGES[:1])[0]["boxes"])


def test_gradients_of_images(model):
    """As for saliency maps and adversarial examples: of the losses, and of what was detected."""
    plain = torchvision_model()
    model.load_state_dict(plain.state_dict())
    found = []
    for one in (model, plain):
        images = [image.clone().requires_grad_() for image in IMAGES]
        losses = one.train()(images, good_targets())
        grads = torch.autograd.grad(torch.stack([*losses.values()]).sum(), images)
        one.eval().score_thresh = 0.6
        detected: Any = sum(image["scores"].sum() + image["boxes"].sum() / 100 for image in one(images))
        found.append((*grads, *torch.autograd.grad(detected, images)))
    for grad, reference in zip(*found, strict=True):
        assert (grad - reference).norm() <= 1e-4 * reference.norm()


def test_signatures_equal_torchvision():
    def parameters(function):
        return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]

    detection = torchvision.models.detection
    pairs = [
        (retina_fast.RetinaNet, tv.RetinaNet),
        *((getattr(retina_fast.RetinaNet, name), getattr(tv.RetinaNet, name)) for name in METHODS),
        *(
            (getattr(retina_fast, name), getattr(detection, name))
            for name in detection.retinanet.__all__
            if "_resnet" in name
        ),
        *((getattr(retina_fast.ops, name), getattr(torchvision.ops, name)) for name in ("nms", "batched_nms")),
    ]
    for ours, theirs in pairs:
        assert parameters(ours) == parameters(theirs)


def test_label_zero_is_a_class(model):
    one = torchvision_model(num_classes=1)
    fast = retina_fast.from_torchvision(one)
    targets = [{**t, "labels": torch.zeros_like(t["labels"])} for t in good_targets()]
    assert_same(fast, one, targets=targets)
