"""The model against torchvision's: same weights, same inputs, float32 on a CPU."""

import functools
import re

import pytest
import torch
import torchvision

import retina_fast
from retina_fast import forward
from tests.instruments.agreement import differing

BUILDERS = ("retinanet_resnet50_fpn", "retinanet_resnet50_fpn_v2")
BATCHES = {  # image sizes, and ground truths an image
    "one odd image": ([(97, 131)], [7]),
    "differing sizes": ([(64, 140), (150, 90)], [1, 20]),
    "tiny and wide": ([(33, 40), (50, 160)], [0, 3]),
    "no ground truth": ([(64, 140), (97, 131)], [0, 0]),
    "crowded": ([(97, 131)], [300]),
    "three images": ([(64, 64), (40, 80), (64, 96)], [2, 0, 50]),
}


SLOW = pytest.mark.slow
EVERY = [  # each batch with a builder and a number of classes in turn; all of them in the slow tests
    pytest.param(builder, classes, *given, id=f"{builder}-{classes}-{name}", marks=() if k == 2 * j + i else SLOW)
    for i, builder in enumerate(BUILDERS)
    for j, classes in enumerate((1, 7, 91))
    for k, (name, given) in enumerate(BATCHES.items())
]


@functools.lru_cache(2)  # of 300 MB each
def pair(builder, num_classes):
    """torchvision's model and ours with the same weights, whose scores are spread enough to detect things."""
    torch.manual_seed(len(builder) + num_classes)
    kwargs = {"weights": None, "weights_backbone": None, "num_classes": num_classes, "min_size": 64, "max_size": 128}
    theirs = getattr(torchvision.models.detection, builder)(**kwargs)
    head = theirs.head.classification_head.cls_logits
    torch.nn.init.normal_(head.weight, std=0.05)
    torch.nn.init.constant_(head.bias, -2.5)
    ours = getattr(retina_fast, builder)(**kwargs)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def batch(sizes, counts, num_classes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images, targets = [], []
    for b, (h, w) in enumerate(sizes):
        images.append(torch.rand(3, h, w, generator=generator))
        count, limits = counts[b], torch.tensor([w, h])
        corner = torch.rand(count, 2, generator=generator) * limits * 0.8
        side = 2 + torch.rand(count, 2, generator=generator) * limits * 0.4
        labels = torch.randint(0, num_classes, (count,), generator=generator)
        targets.append({"boxes": torch.cat((corner, corner + side), dim=1), "labels": labels})
    return images, targets


@pytest.mark.parametrize(("builder", "num_classes", "sizes", "counts"), EVERY)
def test_training_equals_torchvision(builder, num_classes, sizes, counts):
    theirs, ours = (model.train() for model in pair(builder, num_classes))
    images, targets = batch(sizes, counts, num_classes)
    before = [{key: value.clone() for key, value in target.items()} for target in targets]
    buffers = {name: buffer.clone() for name, buffer in theirs.named_buffers()}  # BatchNorm moves them
    results = []
    for model in (theirs, ours):
        model.load_state_dict(buffers, strict=False)
        losses = model(images, targets)
        results.append((losses, torch.autograd.grad(torch.stack([*losses.values()]).sum(), list(model.parameters()))))
    (expected, expected_grads), (losses, grads) = results
    assert list(losses) == list(expected)
    for key in expected:
        assert abs(losses[key] - expected[key]) <= 1e-5 * abs(expected[key])
    for grad, reference in zip(grads, expected_grads, strict=True):
        assert (grad - reference).norm() <= 1e-4 * reference.norm()
    for target, kept in zip(targets, before, strict=True):
        assert all(torch.equal(target[key], kept[key]) for key in kept)


@pytest.mark.parametrize(("builder", "num_classes", "sizes", "counts"), EVERY)
def test_detections_equal_torchvision(builder, num_classes, sizes, counts, monkeypatch):
    """Against torchvision's exact NMS: its default rounds, see benchmarks/models/agreement.py."""
    monkeypatch.setattr(torchvision.ops.boxes, "batched_nms", torchvision.ops.boxes._batched_nms_vanilla)
    theirs, ours = (model.eval() for model in pair(builder, num_classes))
    images, _ = batch(sizes, counts, num_classes, seed=1)
    with torch.no_grad():
        expected, detections = theirs(images), ours(images)
    assert sum(len(image["boxes"]) for image in expected) > 0
    for image, reference in zip(detections, expected, strict=True):
        assert {key: value.dtype for key, value in image.items()} == {k: v.dtype for k, v in reference.items()}
        torch.testing.assert_close(image["scores"], reference["scores"], rtol=0, atol=1e-5)
        assert differing(image, reference) == 0  # by box, label and score: torchvision leaves open how ties are ordered


@pytest.mark.parametrize("builder", BUILDERS)
def test_detect_equals_forward(builder):
    _, model = pair(builder, 7)
    model.eval()
    images = torch.rand(2, 3, 100, 180, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        padded, expected = model.detect(images), model(images)
    d = model.detections_per_img
    assert padded.boxes.shape == (2, d, 4)
    assert padded.scores.shape == padded.labels.shape == (2, d)
    for image, reference in zip(padded.to_list(), expected, strict=True):
        assert all(torch.equal(image[key], reference[key]) for key in reference)
    for b, count in enumerate(padded.counts.tolist()):
        assert (padded.labels[b, count:] == -1).all()
        assert not padded.boxes[b, count:].any()
        assert not padded.scores[b, count:].any()
    again = retina_fast.Detections.from_list(expected, d)
    assert all(torch.equal(a, b) for a, b in zip(again, padded, strict=True))


def test_losses_and_detections_from_one_pass():
    theirs, model = pair("retinanet_resnet50_fpn", 7)
    images, targets = batch([(64, 140), (150, 90)], (5, 2), 7)
    model.eval()
    passes = []
    handle = model.backbone.register_forward_hook(lambda *_: passes.append(1))
    with torch.no_grad():
        losses, detections = model.losses_and_detections(images, targets)
        handle.remove()
        expected = model(images)
    assert len(passes) == 1
    for image, reference in zip(detections, expected, strict=True):
        assert all(torch.equal(image[key], reference[key]) for key in reference)
    theirs.train()
    for module in theirs.modules():  # as validation runs: training losses, evaluation BatchNorm
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    with torch.no_grad():
        reference = theirs(images, targets)
    for key, loss in losses.items():
        assert abs(loss - reference[key]) <= 1e-5 * abs(reference[key])


@pytest.mark.parametrize("builder", BUILDERS)
def test_state_dict_and_parameters(builder):
    theirs, ours = pair(builder, 91)
    ours_state, theirs_state = ours.state_dict(), theirs.state_dict()
    assert list(ours_state) == list(theirs_state)
    assert len(ours_state) == {"retinanet_resnet50_fpn": 354, "retinanet_resnet50_fpn_v2": 362}[builder]
    assert all(ours_state[key].shape == value.shape for key, value in theirs_state.items())
    theirs.load_state_dict(ours_state)


def test_same_seed_same_initial_weights():
    states = []
    for module in (torchvision.models.detection, retina_fast):
        torch.manual_seed(3)
        states.append(module.retinanet_resnet50_fpn_v2(num_classes=3).state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


LARGEST = re.compile("34|101|152|spinenet(96|143|190)")  # more of the blocks that others have


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=SLOW if LARGEST.search(name) else ()) for name in sorted(retina_fast.builders.MODELS)],
)
def test_every_builder_trains_and_detects(name):
    model = retina_fast.builders.MODELS[name](weights=None, weights_backbone=None, num_classes=3, min_size=64)
    images, targets = batch([(64, 96)] * 2, (2, 1), 3)  # BatchNorm needs two values of P7
    losses = model.train()(images, targets)
    assert all(loss.isfinite() for loss in losses.values())
    with torch.no_grad():
        assert [sorted(image) for image in model.eval()(images)] == [["boxes", "labels", "scores"]] * 2
    style = model.head.regression_head._loss_type
    assert style == ("giou" if name.endswith("_v2") else "l1")


def test_any_backbone_with_out_channels():
    backbone = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 8, 8), torch.nn.ReLU())  # one level, a plain tensor
    backbone.out_channels = 16  # pyrefly: ignore[bad-argument-type]
    sizes = torchvision.models.detection.anchor_utils.AnchorGenerator(((16, 32),), ((0.5, 1.0),))
    kwargs = {"num_classes": 2, "anchor_generator": sizes, "min_size": 96}
    ours = retina_fast.RetinaNet(backbone, **kwargs)
    theirs = torchvision.models.detection.RetinaNet(backbone, **kwargs)
    theirs.load_state_dict(ours.state_dict())
    images, targets = batch([(64, 96), (80, 40)], (2, 0), 2)
    losses, expected = ours(images, targets), theirs(images, targets)
    assert all(abs(losses[key] - expected[key]) <= 1e-5 * abs(expected[key]) for key in expected)


def test_bf16_autocast_keeps_geometry_in_float32():
    torch.manual_seed(0)
    model = retina_fast.retinanet_resnet18_fpn(weights_backbone=None, num_classes=7, min_size=32, max_size=64).eval()
    images, targets = batch([(97, 131), (128, 90)], (7, 3), 7)
    with torch.no_grad():
        exact, _ = model.losses_and_detections(images, targets)
        made = model.make_batch(images, None)
        wide = forward.run(model, made)
        with torch.autocast("cpu", torch.bfloat16):
            losses, detections = model.losses_and_detections(images, targets)
            narrow = forward.run(model, made)
    assert narrow.levels["cls_logits"][0].dtype == torch.bfloat16
    assert narrow.anchors.dtype == torch.float32
    assert torch.equal(narrow.anchors, wide.anchors)
    assert all(image["boxes"].dtype == image["scores"].dtype == torch.float32 for image in detections)
    for key in exact:
        assert abs(losses[key] - exact[key]) <= 1e-2 * abs(exact[key])
