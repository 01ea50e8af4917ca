"""What users of torchvision's RetinaNet rely on: errors, live changes, parts of their own, ways in."""

import copy
import inspect
import math
import pickle
import threading
import warnings
from unittest.mock import patch

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.detection import retinanet as tv
from torchvision.models.detection._utils import BoxCoder, Matcher
from torchvision.models.detection.anchor_utils import AnchorGenerator

import retina_fast
from instruments.agreement import differing
from retina_fast import targets as targets_module

METHODS = ("forward", "compute_loss", "postprocess_detections")


def torchvision_model(num_classes=3, cls=tv.RetinaNet, **kwargs):
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Conv2d(3, 16, 8, 8), nn.ReLU())
    backbone.out_channels = 16  # type: ignore[assignment]
    anchors = AnchorGenerator(((16, 24, 32),), ((0.5, 1.0, 2.0),))
    model = cls(backbone, num_classes, anchor_generator=anchors, min_size=64, max_size=128, **kwargs)
    for conv in (*model.head.modules(),):
        if isinstance(conv, nn.Conv2d):
            nn.init.normal_(conv.weight, std=0.1)
    nn.init.constant_(model.head.classification_head.cls_logits.bias, -1.0)
    return model


IMAGES = [
    torch.rand(3, 64, 80, generator=torch.Generator().manual_seed(1)),
    torch.rand(3, 50, 64, generator=torch.Generator().manual_seed(2)),
]


def good_targets():
    return [
        {"boxes": torch.tensor([[4.0, 5, 30, 40], [20, 20, 50, 44]]), "labels": torch.tensor([0, 2])},
        {"boxes": torch.tensor([[10.0, 5, 30, 25]]), "labels": torch.tensor([1])},
    ]


@pytest.fixture
def model():
    return retina_fast.from_torchvision(torchvision_model()).train()


def assert_same(ours, theirs, images=IMAGES, targets=None):
    """Training losses and gradients, and detections, of two models with the same weights."""
    targets = targets or good_targets()
    ours.train(), theirs.train()
    losses, expected = ours(images, targets), theirs(images, targets)
    for key in expected:
        assert abs(losses[key] - expected[key]) <= 1e-5 * abs(expected[key]) + 1e-9
    grads, reference = (
        torch.autograd.grad(sum(x.values()), list(m.parameters()), allow_unused=True)
        for m, x in ((ours, losses), (theirs, expected))
    )
    for grad, other in zip(grads, reference, strict=True):
        assert (grad is None) == (other is None)
        assert grad is None or (grad - other).norm() <= 1e-4 * other.norm() + 1e-9
    ours.eval(), theirs.eval()
    exact = torchvision.ops.boxes._batched_nms_vanilla
    with torch.no_grad(), patch.object(torchvision.ops.boxes, "batched_nms", exact):
        for image, other in zip(ours(images), theirs(images), strict=True):
            assert len(image["boxes"]) == len(other["boxes"]) > 0
            assert differing(image, other) == 0


# Errors: torchvision's types, messages that name the argument, the image and the value.


def _boxes(value, image=0):
    targets = good_targets()
    targets[image]["boxes"] = value
    return targets


def _labels(value, image=0):
    targets = good_targets()
    targets[image]["labels"] = value
    return targets


REFUSED = {
    "no targets": (None, AssertionError, "targets should not be none"),
    "boxes not a tensor": (_boxes([[1, 2, 3, 4]]), AssertionError, r"Tensor: targets\[0\]\['boxes'\]"),
    "boxes not N by 4": (_boxes(torch.rand(2, 5)), AssertionError, r"\[N, 4\]: targets\[0\]\['boxes'\] is \(2, 5\)"),
    "degenerate box": (
        _boxes(torch.tensor([[9.0, 9, 9, 12]]), 1),
        AssertionError,
        r"positive height and width. Found invalid box \[9.0, 9.0, 9.0, 12.0\] for target at index 1",
    ),
    "NaN box": (_boxes(torch.tensor([[1.0, 2, math.nan, 4]]), 1), ValueError, r"targets\[1\]\['boxes'\]\[0\] is not"),
    "label too large": (_labels(torch.tensor([0, 3])), IndexError, r"targets\[0\]\['labels'\]\[1\] is 3.*\[0, 3\)"),
    "negative label": (_labels(torch.tensor([-1]), 1), IndexError, r"targets\[1\]\['labels'\]\[0\] is -1"),
    "float labels": (_labels(torch.tensor([0.0, 1.0])), IndexError, "must be integers"),
    "more labels than boxes": (_labels(torch.tensor([0, 1, 2])), ValueError, r"targets\[0\] has 2 boxes"),
    "fewer labels than boxes": (_labels(torch.tensor([0])), IndexError, r"targets\[0\] has 2 boxes"),
    "more targets than images": (good_targets() + good_targets()[:1], ValueError, "3 entries for 2 images"),
    "fewer targets than images": (good_targets()[:1], IndexError, "1 entries for 2 images"),
    "one dict": (good_targets()[0], TypeError, r"targets\[0\] must be a dict"),
    "no boxes": ([{"labels": torch.tensor([1])}] * 2, KeyError, r"targets\[0\] has no 'boxes'"),
    "no labels": ([{"boxes": torch.rand(1, 4)}] * 2, KeyError, r"targets\[0\] has no 'labels'"),
}


@pytest.mark.parametrize(("targets", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_bad_targets_are_refused(model, targets, error, message):
    with pytest.raises(error, match=message):
        model(IMAGES, targets)


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
    backbone.out_channels = 4  # type: ignore[assignment]
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
    assert not model(IMAGES, _boxes(torch.tensor([[1.0, 2, math.nan, 4]]), 1))["bbox_regression"].isfinite()


def test_torchscript_is_refused(model):
    with pytest.raises(NotImplementedError, match="TorchScript"):
        torch.jit.script(model)


def test_legacy_arguments_warn():
    with pytest.warns(UserWarning, match="pretrained"):
        model = retina_fast.retinanet_resnet50_fpn(pretrained=False, pretrained_backbone=False, num_classes=2)
    assert model.head.classification_head.num_classes == 2


# Legal input.


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
    other_classes = _labels(torch.tensor([90, -1]))
    no_labels = [{"boxes": target["boxes"]} for target in good_targets()]
    for targets in (good_targets(), other_classes, no_labels, good_targets() + good_targets()):
        plain(IMAGES, targets)
        assert all(torch.equal(model(IMAGES, targets)[0][key], model(IMAGES)[0][key]) for key in ("boxes", "labels"))
    for refusing in (plain, model):
        with pytest.raises(AssertionError, match="positive height and width"):
            refusing(IMAGES, _boxes(torch.tensor([[9.0, 9, 9, 12]])))


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


@pytest.mark.parametrize("limit", [0, 1, 10**9])
@pytest.mark.parametrize("name", ["detections_per_img", "topk_candidates"])
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
        grads = torch.autograd.grad(sum(losses.values()), images)
        one.eval().score_thresh = 0.6
        detected = sum(image["scores"].sum() + image["boxes"].sum() / 100 for image in one(images))
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


# Live changes and parts of a user's own.


def test_live_changes(model):
    plain = torchvision_model()
    for change in (
        lambda m: setattr(m, "score_thresh", 0.2),
        lambda m: setattr(m, "nms_thresh", 0.2),
        lambda m: setattr(m, "detections_per_img", 7),
        lambda m: setattr(m, "topk_candidates", 20),
        lambda m: setattr(m.head.regression_head, "_loss_type", "giou"),
        lambda m: setattr(m, "proposal_matcher", Matcher(0.7, 0.3)),
        lambda m: setattr(m.transform, "min_size", (40,)),
    ):
        change(plain), change(model)
        assert_same(model, plain)


def test_replaced_last_layer(model):
    plain = torchvision_model()
    for head in (plain.head.classification_head, model.head.classification_head):
        torch.manual_seed(5)
        head.cls_logits = nn.Conv2d(16, 9 * 5, 3, padding=1)
        head.num_classes = 5
    assert_same(model, plain, targets=_labels(torch.tensor([4, 1])))
    with pytest.raises(IndexError, match=r"\[0, 5\)"):
        model.train()(IMAGES, _labels(torch.tensor([5, 1])))


@pytest.mark.parametrize("num_classes", [1, 5])
def test_set_num_classes(model, num_classes):
    assert model.set_num_classes(num_classes) is model
    labels = [{**t, "labels": torch.full_like(t["labels"], num_classes - 1)} for t in good_targets()]
    assert model(IMAGES, labels)["classification"].isfinite()
    prior = torch.sigmoid(model.head.classification_head.cls_logits.bias)
    assert torch.allclose(prior, torch.full_like(prior, 0.01))
    with pytest.raises(ValueError, match="at least 1"):
        model.set_num_classes(0)


class OwnMatcher(Matcher):
    def __call__(self, quality):
        matches = super().__call__(quality)
        matches[::2] = self.BELOW_LOW_THRESHOLD
        return matches


class OwnCoder(BoxCoder):
    def decode_single(self, codes, boxes):
        return super().decode_single(codes * 0.5, boxes)


class OwnClassification(tv.RetinaNetClassificationHead):
    def forward(self, x):
        return super().forward(x) + 0.25


class OwnLoss(tv.RetinaNetRegressionHead):
    def compute_loss(self, targets, head_outputs, anchors, matched_idxs):
        return 3 * super().compute_loss(targets, head_outputs, anchors, matched_idxs)


class OwnAnchors(AnchorGenerator):
    def forward(self, image_list, feature_maps):
        return [a + i for i, a in enumerate(super().forward(image_list, feature_maps))]


class OwnTransform(torchvision.models.detection.transform.GeneralizedRCNNTransform):
    def normalize(self, image):
        return super().normalize(image) * 0.5


class OwnPostprocess(torchvision.models.detection.transform.GeneralizedRCNNTransform):
    def postprocess(self, result, image_shapes, original_image_sizes):
        result = super().postprocess(result, image_shapes, original_image_sizes)
        return [{**image, "boxes": image["boxes"] + 1} for image in result]


class WrappedTransform(nn.Module):
    """Torchvision's transform as a part of something that is none."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.postprocess = inner.postprocess

    def forward(self, images, targets=None):
        return self.inner(images, targets)


class OwnOutputs(tv.RetinaNetHead):
    """Returns what only its own loss can read."""

    def forward(self, x):
        outputs = super().forward(x)
        return {"mine": outputs, "levels": x} if self.training else {**outputs, "extra": outputs["cls_logits"]}

    def compute_loss(self, targets, head_outputs, anchors, matched_idxs):
        return super().compute_loss(targets, head_outputs["mine"], anchors, matched_idxs)


def _on_the_object(part, name, change):
    """Replace a method of one object, as monkey patches do."""
    method = getattr(part, name)
    setattr(part, name, lambda *args, **kwargs: change(method, *args, **kwargs))


PARTS = {
    "head outputs": lambda m: setattr(m.head, "__class__", OwnOutputs),
    "postprocess": lambda m: setattr(m.transform, "__class__", OwnPostprocess),
    "transform of another kind": lambda m: setattr(m, "transform", WrappedTransform(m.transform)),
    "normalize on the object": lambda m: _on_the_object(m.transform, "normalize", lambda f, image: f(image) * 0.5),
    "resize on the object": lambda m: _on_the_object(
        m.transform, "resize", lambda f, image, target=None: (image, target)
    ),
    "postprocess on the object": lambda m: _on_the_object(m.transform, "postprocess", lambda f, found, *sizes: found),
    "matcher": lambda m: setattr(m, "proposal_matcher", OwnMatcher(0.5, 0.4, allow_low_quality_matches=True)),
    "coder": lambda m: setattr(m, "box_coder", OwnCoder((1.0, 1.0, 1.0, 1.0))),
    "coder weights": lambda m: setattr(m.head.regression_head, "box_coder", BoxCoder((10.0, 10.0, 5.0, 5.0))),
    "head": lambda m: setattr(m.head, "classification_head", _like(OwnClassification(16, 9, 3), m)),
    "head loss": lambda m: setattr(m.head.regression_head, "__class__", OwnLoss),
    "anchors": lambda m: setattr(m.anchor_generator, "__class__", OwnAnchors),
    "transform": lambda m: setattr(m.transform, "__class__", OwnTransform),
    "hook": lambda m: m.head.classification_head.register_forward_hook(lambda mod, args, out: out * 0.5),
}


def _like(head, model):
    head.load_state_dict(model.head.classification_head.state_dict())
    return head


@pytest.mark.parametrize("change", PARTS.values(), ids=PARTS)
def test_parts_of_ones_own_run(change):
    plain = torchvision_model()
    change(plain)
    fast = retina_fast.from_torchvision(torchvision_model())
    fast.load_state_dict(plain.state_dict())
    change(fast)
    assert_same(fast, plain)


def test_overridden_methods_run():
    class Own(tv.RetinaNet):
        def compute_loss(self, targets, head_outputs, anchors):
            assert head_outputs["cls_logits"].dim() == 3
            losses = super().compute_loss(targets, head_outputs, anchors)
            return {**losses, "extra": losses["classification"] * 2}

        def postprocess_detections(self, head_outputs, anchors, image_shapes):
            detections = super().postprocess_detections(head_outputs, anchors, image_shapes)
            return [{key: value[:2] for key, value in image.items()} for image in detections]

    plain = torchvision_model(cls=Own)
    fast = retina_fast.from_torchvision(plain)
    assert isinstance(fast, Own)
    assert_same(fast, plain)
    assert fast.detect(IMAGES[0][None]).counts.tolist() == [2]


def test_a_users_head_on_its_own():
    fast, plain = retina_fast.from_torchvision(torchvision_model()), torchvision_model()
    features = [torch.rand(2, 16, 8, 10)]
    outputs, expected = fast.head(features), plain.head(features)
    assert all(torch.equal(outputs[key], expected[key]) for key in expected)
    anchors = [torch.rand(720, 4) * 40 + torch.tensor([0, 0, 41, 41]) * (1 + i) for i in range(2)]
    losses = fast.compute_loss(good_targets(), outputs, anchors)
    reference = plain.compute_loss(good_targets(), expected, anchors)
    for key in reference:
        assert abs(losses[key] - reference[key]) <= 1e-5 * reference[key]
    levels = {"cls_logits": [expected["cls_logits"][:, :360], expected["cls_logits"][:, 360:]]}
    levels["bbox_regression"] = [expected["bbox_regression"]]
    again = fast.compute_loss(good_targets(), levels, anchors)
    assert all(torch.allclose(again[key], losses[key]) for key in losses)


def test_bytes_for_a_transform_that_takes_them():
    plain = torchvision_model()
    plain.transform.normalize = lambda image: (image.float() / 255 - 0.5) / 0.25
    fast = retina_fast.from_torchvision(plain)
    assert_same(fast, plain, images=[(image * 255).byte() for image in IMAGES])


def test_boxes_that_a_transform_converts():
    class FromXYWH(torchvision.models.detection.transform.GeneralizedRCNNTransform):
        def forward(self, images, targets=None):
            if targets is not None:
                targets = [{**t, "boxes": torchvision.ops.box_convert(t["boxes"], "xywh", "xyxy")} for t in targets]
            return super().forward(images, targets)

    plain = torchvision_model()
    plain.transform.__class__ = FromXYWH
    narrow = [{**t, "boxes": torch.tensor([[20.0, 20, 12, 9]]), "labels": t["labels"][:1]} for t in good_targets()]
    assert_same(retina_fast.from_torchvision(plain), plain, targets=narrow)


def test_keypoints_and_masks_reach_a_loss_of_ones_own_resized():
    seen = []

    class Own(tv.RetinaNet):
        def compute_loss(self, targets, head_outputs, anchors):
            seen.append(targets[1])
            return super().compute_loss(targets, head_outputs, anchors)

    plain = torchvision_model(cls=Own)
    targets = good_targets()
    for target, image in zip(targets, IMAGES, strict=True):
        target["keypoints"] = torch.rand(len(target["boxes"]), 2, 3) * 30
        target["masks"] = torch.rand(len(target["boxes"]), *image.shape[1:]).round().byte()
    for one in (retina_fast.from_torchvision(plain), plain):
        one.train()(IMAGES, targets)
    assert seen[0]["masks"].shape[1:] == (64, 81)
    assert all(torch.equal(seen[0][key], seen[1][key]) for key in ("boxes", "keypoints", "masks"))


def test_more_detections_than_the_limit():
    """What a postprocess of the user's own returns is not cut."""

    class Own(tv.RetinaNet):
        def postprocess_detections(self, *args):
            return [
                {key: v.repeat(2, *[1] * (v.dim() - 1)) for key, v in image.items()}
                for image in super().postprocess_detections(*args)
            ]

    fast = retina_fast.from_torchvision(torchvision_model(cls=Own, detections_per_img=5)).eval()
    assert fast.detect(IMAGES[0][None]).counts.tolist() == [10]


# Ways in.


class Locked(tv.RetinaNet):
    """Holds what cannot be copied, and leaves it out of its state."""

    def __getstate__(self):
        return {key: value for key, value in vars(self).items() if key != "lock"}


def test_a_subclass_says_what_its_state_is():
    plain = torchvision_model(cls=Locked)
    plain.lock = threading.Lock()
    twin = copy.deepcopy(retina_fast.from_torchvision(plain))
    assert isinstance(twin, Locked)
    assert not hasattr(twin, "lock")


class RetinaNetHub(tv.RetinaNet):
    """In the manner of DeepForest's: own anchors, one class, a state_dict hook that holds the module."""

    def __init__(self, *args, label_dict=None, **kwargs):
        super().__init__(*args, **kwargs)
        self._register_load_state_dict_pre_hook(RetinaNetHub._strip_prefix, with_module=True)
        self.label_dict = label_dict or {"Tree": 0}

    @staticmethod
    def _strip_prefix(module, state_dict, prefix, *_):
        assert module.label_dict == {"Tree": 0}
        for key in [key for key in state_dict if key.startswith("model.")]:
            state_dict[key.removeprefix("model.")] = state_dict.pop(key)


def test_from_torchvision_with_a_subclass():
    plain = torchvision_model(num_classes=1, cls=RetinaNetHub)
    fast = retina_fast.from_torchvision(plain)
    assert isinstance(fast, RetinaNetHub)
    assert isinstance(fast, retina_fast.RetinaNet)
    assert all(a is b for a, b in zip(fast.parameters(), plain.parameters(), strict=True))
    assert_same(fast, plain, targets=[{**t, "labels": t["labels"] * 0} for t in good_targets()])
    old = {f"model.{key}": value + 1 for key, value in plain.state_dict().items()}
    del plain  # the hook must hold the fast model, not the one it came from
    fast.load_state_dict(dict(old))
    assert all(torch.equal(value, old[f"model.{key}"]) for key, value in fast.state_dict().items())
    for twin in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert type(twin) is type(fast)
        assert twin.label_dict == {"Tree": 0}
    assert retina_fast.from_torchvision(fast) is fast


def test_from_torchvision_leaves_the_original_as_it_is():
    plain = torchvision_model()
    fast = retina_fast.from_torchvision(plain)
    assert type(plain) is tv.RetinaNet
    assert type(fast) is retina_fast.RetinaNet
    fast.score_thresh = 0.9
    assert plain.score_thresh == 0.05
    with torch.no_grad():
        plain.head.classification_head.cls_logits.bias.fill_(1.0)
    assert (fast.head.classification_head.cls_logits.bias == 1).all()


def test_old_checkpoints_keys():
    model = retina_fast.retinanet_resnet50_fpn(weights=None, weights_backbone=None, num_classes=2)
    state = model.state_dict()
    old = {key.replace(".conv.0.0.", ".conv.0.") if "head" in key else key: value for key, value in state.items()}
    for i in range(1, 4):
        old = {k.replace(f".conv.{i}.0.", f".conv.{2 * i}.") if "head" in k else k: v for k, v in old.items()}
    assert old.keys() != state.keys()
    model.load_state_dict(old)


# Targets on a GPU: checked without waiting.


class FakeEvent:
    done = False

    def record(self, stream=None):
        pass

    def query(self):
        return FakeEvent.done


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
    assert targets_module.first_error(boxes, labels, 3) == (7 if row is None else row)
    if wrong[1] < 3:
        assert targets_module.first_error(boxes, labels, None) == (7 if row is None else row)
    assert targets_module.first_error(boxes[:0], labels[:0], 3) == 0
