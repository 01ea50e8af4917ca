"""Live changes, and parts of a user's own: they run, and the fast path steps aside."""

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.detection import retinanet as tv
from torchvision.models.detection._utils import BoxCoder, Matcher
from torchvision.models.detection.anchor_utils import AnchorGenerator

import retina_fast
from tests.model.pairs import IMAGES, assert_same, good_targets, torchvision_model, with_labels


def test_live_changes(model):
    plain = torchvision_model()
    for change in (
        lambda m: setattr(m, "score_thresh", 0.2),
        lambda m: setattr(m, "nms_thresh", 0.2),
        lambda m: setattr(m, "detections_per_img", 7),
        lambda m: setattr(m, "topk_candidates", 20),
        lambda m: setattr(m.head.regression_head, "_loss_type", "giou"),
        lambda m: setattr(m.head.classification_head, "num_classes", np.int64(3)),
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
    assert_same(model, plain, targets=with_labels(torch.tensor([4, 1])))
    with pytest.raises(IndexError, match=r"\[0, 5\)"):
        model.train()(IMAGES, with_labels(torch.tensor([5, 1])))


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
    "marks of the matcher": lambda m: vars(m.proposal_matcher).update(BELOW_LOW_THRESHOLD=-2, BETWEEN_THRESHOLDS=-1),
    "marks of the loss": lambda m: setattr(m.head.classification_head, "BETWEEN_THRESHOLDS", -7),
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
