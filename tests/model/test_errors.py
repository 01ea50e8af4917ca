"""Bad input: torchvision's types of error, with messages that name the argument, the image and the value."""

import math
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import retina_fast
from tests.model.pairs import IMAGES, good_targets, torchvision_model, with_boxes, with_labels

REFUSED = {
    "no targets": (None, AssertionError, "targets should not be none"),
    "boxes not a tensor": (with_boxes([[1, 2, 3, 4]]), AssertionError, r"Tensor: targets\[0\]\['boxes'\]"),
    "boxes not N by 4": (
        with_boxes(torch.rand(2, 5)),
        AssertionError,
        r"\[N, 4\]: targets\[0\]\['boxes'\] is \(2, 5\)",
    ),
    "degenerate box": (
        with_boxes(torch.tensor([[9.0, 9, 9, 12]]), 1),
        AssertionError,
        r"positive height and width. Found invalid box \[9.0, 9.0, 9.0, 12.0\] for target at index 1",
    ),
    "NaN box": (
        with_boxes(torch.tensor([[1.0, 2, math.nan, 4]]), 1),
        ValueError,
        r"targets\[1\]\['boxes'\]\[0\] is not",
    ),
    "label too large": (with_labels(torch.tensor([0, 3])), IndexError, r"targets\[0\]\['labels'\]\[1\] is 3.*\[0, 3\)"),
    "negative label": (with_labels(torch.tensor([-1]), 1), IndexError, r"targets\[1\]\['labels'\]\[0\] is -1"),
    "float labels": (with_labels(torch.tensor([0.0, 1.0])), IndexError, "must be integers"),
    "more labels than boxes": (with_labels(torch.tensor([0, 1, 2])), ValueError, r"targets\[0\] has 2 boxes"),
    "fewer labels than boxes": (with_labels(torch.tensor([0])), IndexError, r"targets\[0\] has 2 boxes"),
    "more targets than images": (good_targets() + good_targets()[:1], ValueError, "3 entries for 2 images"),
    "fewer targets than images": (good_targets()[:1], IndexError, "1 entries for 2 images"),
    "one dict": (good_targets()[0], TypeError, r"targets must be a list of dicts, .* got a <class 'dict'>"),
    "an iterator": (iter(good_targets()), TypeError, "targets must be a list of dicts, .*list_iterator"),
    "a target that is no dict": ([good_targets()[0], "b"], TypeError, r"targets\[1\] must be a dict"),
    "unsigned labels": (with_labels(torch.tensor([0, 3]).to(torch.uint16)), IndexError, r"\['labels'\]\[1\] is 3"),
    "no boxes": ([{"labels": torch.tensor([1])}] * 2, KeyError, r"targets\[0\] has no 'boxes'"),
    "complex boxes": (with_boxes(torch.ones(2, 4) * 1j), NotImplementedError, r"targets\[0\]\['boxes'\] must be real"),
    "no labels": ([{"boxes": torch.tensor([[1.0, 2, 3, 4]])}] * 2, KeyError, r"targets\[0\] has no 'labels'"),
}


@pytest.mark.parametrize(("targets", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_bad_targets_are_refused(model, targets, error, message):
    with pytest.raises(error, match=message):
        model(IMAGES, targets)


@pytest.mark.parametrize(
    "name",
    [
        *("boxes not a tensor", "boxes not N by 4", "no boxes", "complex boxes"),
        *("one dict", "an iterator", "a target that is no dict"),
    ],
)
def test_bad_boxes_are_refused_in_evaluation(model, name):
    targets, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        model.eval()(IMAGES, targets)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.uint32, torch.uint64])
def test_unsigned_labels_are_labels(model, dtype):
    labels = torch.tensor([2, 0])
    unsigned, expected = (with_labels(given) for given in (labels.to(dtype), labels))
    assert model(IMAGES, unsigned) == model(IMAGES, expected)


FLAT, FAR = {"boxes": torch.tensor([[5.0, 5, 5, 9]])}, torch.tensor([9])
ONE = {"boxes": torch.tensor([[1.0, 1, 60, 60]])}
FAULTS: dict[str, Any] = {
    "boxes that are a number": {"boxes": 0.0},
    "boxes (4,)": {"boxes": torch.arange(4.0)},
    "no boxes": {"labels": torch.tensor([1])},
    "a box without width": FLAT | {"labels": torch.tensor([0])},
    "a box without width or label": FLAT,
    "a class too many": ONE | {"labels": FAR},
    "no labels": ONE,
    "too few labels": {"boxes": torch.tensor([[1.0, 1, 30, 30], [9.0, 9, 60, 60]]), "labels": torch.tensor([1])},
    "no dict": None,
    "nothing": good_targets()[0],
}


def test_of_several_errors_torchvisions_comes_and_as_many_random_numbers_are_drawn(model):
    """Whichever image is wrong, and whether there is a target too many."""
    plain, image = torchvision_model(), torch.rand(3, 64, 64)
    bytes_ = (image * 255).byte()
    batches = [([image, image], [one, other]) for one in FAULTS.values() for other in FAULTS.values()]
    batches += [([image], [one, ONE | {"labels": FAR}]) for name, one in FAULTS.items() if name != "nothing"]
    batches += [([bytes_], [one]) for one in FAULTS.values()] + [([image[0]], [one]) for one in FAULTS.values()]

    def outcome(one, batch):
        torch.manual_seed(0)
        try:
            one(*batch)
        except Exception as error:
            return type(error), torch.rand(1)

    found = [(outcome(plain.train(), batch), outcome(model, batch)) for batch in batches]
    assert sum(expected is None for expected, _ in found) == 1
    assert all(expected == ours for expected, ours in found)


def test_bad_images_are_refused(model):
    model.eval()
    with pytest.raises(ValueError, match=r"images\[1\] is torch.Size\(\[3, 50\]\)"):
        model([IMAGES[0], torch.rand(3, 50)])
    with pytest.raises(TypeError, match=r"images\[0\] is torch.uint8"):
        model([torch.zeros(3, 8, 8, dtype=torch.uint8)])
    with pytest.raises(ValueError, match=r"images\[0\] must be \(3, H, W\)"):
        model([torch.rand(4, 8, 8)])
    with pytest.raises(ValueError, match=r"images\[1\] must have at least one pixel"):
        model([IMAGES[0], torch.rand(3, 0, 8)])
    with pytest.raises(TypeError, match=r"images must be a list of .* got a <class 'list_iterator'>"):
        model(iter(IMAGES))
    with pytest.raises(TypeError, match=r"batch must be a Tensor .* got <class 'list'>"):
        model.detect(IMAGES)
    with pytest.raises(ValueError, match="batch must be"):
        model.detect(IMAGES[0])
    with pytest.raises(RuntimeError, match=r"model.eval\(\)"):
        model.train().detect(torch.rand(1, 3, 64, 64))


def test_bad_arguments_are_refused():
    backbone = nn.Sequential(nn.Conv2d(3, 4, 8, 8))
    with pytest.raises(ValueError, match="out_channels"):
        retina_fast.RetinaNet(backbone, 3)
    backbone.out_channels = 4  # pyrefly: ignore[bad-argument-type]
    with pytest.raises(TypeError, match="AnchorGenerator"):
        retina_fast.RetinaNet(backbone, 3, anchor_generator="yes")
    with pytest.raises(AssertionError):
        retina_fast.RetinaNet(backbone, 3, fg_iou_thresh=0.3, bg_iou_thresh=0.4)
    with pytest.warns(UserWarning, match="unknown arguments score_tresh"):
        retina_fast.RetinaNet(backbone, 3, score_tresh=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        retina_fast.RetinaNet(backbone, 3, size_divisible=64, fixed_size=(64, 64), _skip_resize=True)
    with pytest.raises(ValueError, match="num_classes"):
        retina_fast.retinanet_resnet50_fpn(weights="COCO_V1", num_classes=5)
    with pytest.raises(KeyError):
        retina_fast.retinanet_resnet50_fpn(weights="COCO_V9")
    with pytest.raises(ValueError, match=r"range \[0,5\]"):
        retina_fast.retinanet_resnet50_fpn(weights="COCO_V1", trainable_backbone_layers=6)
    with pytest.raises(ValueError, match="no COCO weights of retinanet_resnet18_fpn"):
        retina_fast.retinanet_resnet18_fpn(weights="COCO_V1")
    with pytest.raises(TypeError, match="must be a torchvision RetinaNet, got torch"):
        retina_fast.from_torchvision(backbone)
    broken = retina_fast.from_torchvision(torchvision_model()).train()
    broken.head.regression_head._loss_type = "l2"
    with pytest.raises(AssertionError, match="Unsupported loss"):
        broken(IMAGES, good_targets())


def test_a_failed_download_says_what_to_do(monkeypatch):
    def unreachable(*_, **__):
        raise torch.hub.URLError("no route")

    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: "/nonexistent")
    monkeypatch.setattr("os.makedirs", lambda *_, **__: None)
    with pytest.raises(ConnectionError, match="could not be downloaded"):
        retina_fast.retinanet_resnet50_fpn_v2(weights="COCO_V1")
    with pytest.raises(ConnectionError, match="could not be downloaded"):
        retina_fast.retinanet_resnet50_fpn()


def test_checks_can_be_switched_off(model):
    model.check_targets = False
    assert not model(IMAGES, with_boxes(torch.tensor([[1.0, 2, math.nan, 4]]), 1))["bbox_regression"].isfinite()


def test_torchscript_is_refused(model):
    with pytest.raises(NotImplementedError, match="TorchScript"):
        torch.jit.script(model)


def test_legacy_arguments_warn():
    with pytest.warns(UserWarning, match="pretrained"):
        model = retina_fast.retinanet_resnet50_fpn(pretrained=False, pretrained_backbone=False, num_classes=2)
    assert model.head.classification_head.num_classes == 2
