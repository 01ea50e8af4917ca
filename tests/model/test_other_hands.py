"""What other code does around the drop-in: replaced functions, seeds, tracing, and the order in which errors come."""

import copy
from functools import partial, wraps

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.detection import _utils, transform
from torchvision.models.detection import retinanet as tv
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import boxes

import retina_fast


def pair(**kwargs):
    """torchvision's model and ours, with the same weights."""
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Conv2d(3, 16, 8, 8), nn.ReLU())
    backbone.out_channels = 16  # pyrefly: ignore[bad-argument-type]
    anchors = AnchorGenerator(((16, 24, 32),), ((0.5, 1.0, 2.0),))
    slow = tv.RetinaNet(backbone, 3, anchor_generator=anchors, **{"min_size": 64, "max_size": 128} | kwargs)
    for conv in slow.head.modules():
        if isinstance(conv, nn.Conv2d):
            nn.init.normal_(conv.weight, std=0.1)
    nn.init.constant_(slow.head.classification_head.cls_logits.bias, -1.0)
    return slow, retina_fast.from_torchvision(copy.deepcopy(slow))


IMAGES = [torch.rand(3, 64, 80, generator=torch.Generator().manual_seed(1))]
TARGETS = [{"boxes": torch.tensor([[4.0, 5, 30, 40], [20, 20, 50, 44]]), "labels": torch.tensor([0, 2])}]


# Functions of torchvision's that somebody has replaced
def _twice(function):
    return lambda *args, **kwargs: 2 * function(*args, **kwargs)


@pytest.mark.parametrize(
    ("module", "name", "value"),
    [
        (tv, "sigmoid_focal_loss", partial(tv.sigmoid_focal_loss, alpha=0.75)),
        (tv, "sigmoid_focal_loss", _twice(tv.sigmoid_focal_loss)),
        (tv, "_box_loss", _twice(tv._box_loss)),
        (tv.box_ops, "box_iou", torchvision.ops.generalized_box_iou),
    ],
)
def test_a_replaced_function_of_the_losses_is_called(monkeypatch, module, name, value):
    slow, fast = pair()
    before = fast(IMAGES, TARGETS)
    monkeypatch.setattr(module, name, value)
    expected, losses = slow(IMAGES, TARGETS), fast(IMAGES, TARGETS)
    assert not fast.uses_fast_losses()
    assert any(abs(before[key] - expected[key]) > 1e-3 for key in expected)
    for key, loss in expected.items():
        torch.testing.assert_close(losses[key], loss)


def test_replaced_suppression_is_called(monkeypatch):
    slow, fast = (model.eval() for model in pair())
    original = tv.box_ops.batched_nms
    without_classes = lambda boxes, scores, idxs, iou: original(boxes, scores, torch.zeros_like(idxs), iou)  # noqa: E731
    with torch.no_grad():
        before = fast(IMAGES)
        monkeypatch.setattr(tv.box_ops, "batched_nms", without_classes)
        (expected,), (found,) = slow(IMAGES), fast(IMAGES)
    assert len(found["boxes"]) == len(expected["boxes"]) < len(before[0]["boxes"])
    torch.testing.assert_close(found, expected)


def test_functions_of_ours_in_torchvisions_place_are_no_reason_to_step_aside(monkeypatch):
    monkeypatch.setattr(tv, "sigmoid_focal_loss", retina_fast.ops.sigmoid_focal_loss)
    monkeypatch.setattr(tv.box_ops, "batched_nms", retina_fast.ops.batched_nms)
    fast = pair()[1]
    assert fast.uses_fast_losses()
    assert fast.uses_fast_detections()


def _more(value):
    """Half as much again of whatever a function of torchvision's returns."""
    if isinstance(value, dict):
        return {key: _more(of_key) for key, of_key in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_more, value))
    changed = isinstance(value, torch.Tensor) and value.is_floating_point()
    return (value * 1.5).to(value.dtype) if changed else value


def _grown(function):
    return wraps(function)(lambda *args, **kwargs: _more(function(*args, **kwargs)))


def _found(model, training):
    torch.manual_seed(3)
    with torch.no_grad():
        return model.train(training)(IMAGES, TARGETS) if training else model.eval()(IMAGES)


OF_BOX_LOSSES = {"generalized_box_iou_loss": "giou", "distance_box_iou_loss": "diou", "complete_box_iou_loss": "ciou"}
OF_LOSSES = [
    (tv, "_sum"),
    (boxes, "box_area"),
    *((_utils, name) for name in OF_BOX_LOSSES),
    *((cls, "compute_loss") for cls in (tv.RetinaNet, tv.RetinaNetHead, tv.RetinaNetClassificationHead)),
    (tv.RetinaNetRegressionHead, "compute_loss"),
    (retina_fast.RetinaNet, "compute_loss"),
    *[(_utils.BoxCoder, "encode_single"), (_utils, "encode_boxes")],
    (transform.GeneralizedRCNNTransform, "__call__"),
]
OF_DETECTIONS = [
    (transform, "resize_boxes"),
    (boxes, "clip_boxes_to_image"),
    (_utils.BoxCoder, "decode_single"),
    (tv.RetinaNet, "postprocess_detections"),
    (retina_fast.RetinaNet, "postprocess_detections"),
    (transform.GeneralizedRCNNTransform, "postprocess"),
]
PARTS = tv.RetinaNetHead, tv.RetinaNetClassificationHead, tv.RetinaNetRegressionHead, AnchorGenerator
OF_BOTH = [
    (transform, "_resize_image_and_masks"),
    (tv.RetinaNet, "forward"),
    *((cls, name) for cls in PARTS for name in ("forward", "__call__")),
    (AnchorGenerator, "grid_anchors"),
    (transform.GeneralizedRCNNTransform, "normalize"),
    (transform.GeneralizedRCNNTransform, "resize"),
    (transform.GeneralizedRCNNTransform, "batch_images"),
]


@pytest.mark.parametrize(
    ("owner", "name", "training"),
    [
        *((*place, True) for place in OF_LOSSES + OF_BOTH),
        *((*place, False) for place in OF_DETECTIONS + OF_BOTH),
    ],
)
def test_what_stands_in_another_functions_place_is_called(monkeypatch, owner, name, training):
    """Whether it stands in a module or on a class, of torchvision's or ours, and under whatever name."""
    models = pair()
    if name in OF_BOX_LOSSES:
        for model in models:
            model.head.regression_head._loss_type = OF_BOX_LOSSES[name]
    before = _found(models[1], training)
    monkeypatch.setattr(owner, name, _grown(getattr(owner, name)))
    expected, found = (_found(model, training) for model in models)
    expected = _more(before) if owner is retina_fast.RetinaNet else expected
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(found, before, rtol=1e-4, atol=1e-4)


class _Darker(transform.GeneralizedRCNNTransform):
    def normalize(self, image):
        return super().normalize(image / 2)


class _Surer(tv.RetinaNetHead):
    def forward(self, x):
        return {name: 2 * output for name, output in super().forward(x).items()}


@pytest.mark.parametrize(("name", "own"), [("GeneralizedRCNNTransform", _Darker), ("RetinaNetHead", _Surer)])
def test_classes_in_torchvisions_place_make_the_parts_of_a_model(monkeypatch, name, own):
    def made(cls):
        torch.manual_seed(0)
        backbone = nn.Conv2d(3, 16, 8, 8)
        backbone.out_channels = 16
        model = cls(backbone, 3, min_size=64, anchor_generator=AnchorGenerator(((16, 24),), ((0.5, 1.0),)))
        for conv in model.head.modules():
            if isinstance(conv, nn.Conv2d):
                nn.init.normal_(conv.weight, std=0.1)
        return model

    before = _found(made(retina_fast.RetinaNet), True)
    monkeypatch.setattr(tv, name, own)
    expected, found = (_found(made(cls), True) for cls in (tv.RetinaNet, retina_fast.RetinaNet))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert abs(found["classification"] - before["classification"]) > 1e-3


@pytest.mark.parametrize("cls", [tv.RetinaNetHead, AnchorGenerator, transform.GeneralizedRCNNTransform])
def test_hooks_of_all_modules_see_the_parts(cls):
    seen = []
    hook = nn.modules.module.register_module_forward_hook(lambda module, args, output: seen.append(module))
    try:
        pair()[1](IMAGES, TARGETS)
    finally:
        hook.remove()
    assert sum(isinstance(module, cls) for module in seen) == 1


# Random numbers


@pytest.mark.parametrize("kwargs", [{}, {"min_size": (48, 64, 80)}, {"fixed_size": (64, 64)}, {"_skip_resize": True}])
def test_a_training_step_leaves_the_random_numbers_that_torchvisions_leaves(kwargs):
    after = []
    for model in pair(**kwargs):
        torch.manual_seed(7)
        model(IMAGES * 3, TARGETS * 3)
        after.append(torch.rand(2))
        model.eval()(IMAGES)
        after.append(torch.rand(2))
    assert torch.equal(torch.stack(after[:2]), torch.stack(after[2:]))


# Tracing


@pytest.mark.parametrize("export", ["trace", "onnx", "detect"])
def test_a_trace_is_refused_with_the_way_that_works(export, tmp_path):
    fast, image = pair()[1].eval(), torch.rand(1, 3, 64, 80)
    calls = {
        "trace": lambda: torch.jit.trace(lambda x: fast(x)[0]["boxes"], image),
        "detect": lambda: torch.jit.trace(lambda x: fast.detect(x).boxes, image),
        "onnx": lambda: torch.onnx.export(fast, (image,), tmp_path / "model.onnx", dynamo=False),
    }
    with pytest.raises(NotImplementedError, match=r"retina_fast\.export"):
        calls[export]()


# Errors


@pytest.mark.parametrize("given", [0.0, torch.rand(4), torch.rand(1, 5), torch.tensor([[1, 3, 1, 4], [2, 4, 3, 4]])])
@pytest.mark.parametrize("labels", [{}, {"labels": "none"}, {"labels": torch.rand(2)}])
def test_boxes_are_looked_at_before_labels(given, labels):
    with pytest.raises(AssertionError):
        pair()[1](IMAGES * 2, [*TARGETS, {"boxes": given, **labels}])


def test_where_boxes_are_right_the_labels_are_named():
    fast = pair()[1]
    for labels, error in (({}, KeyError), ({"labels": [1, 2]}, TypeError), ({"labels": torch.rand(2)}, IndexError)):
        with pytest.raises(error, match=r"targets\[0\]"):
            fast(IMAGES, [{"boxes": TARGETS[0]["boxes"], **labels}])


# Derivatives


def test_torch_func_sees_into_losses_and_scores():
    slow, fast = pair(score_thresh=0.0, detections_per_img=5)
    image = IMAGES[0]
    slopes = [torch.func.grad(lambda x, m=m: sum(m([x], TARGETS).values()))(image) for m in (slow, fast)]
    torch.testing.assert_close(slopes[1], slopes[0], rtol=1e-4, atol=1e-7)
    for name in ("scores", "boxes"):
        found = [
            torch.func.jvp(lambda x, m=m, n=name: m.eval()([x])[0][n], (image,), (torch.ones_like(image),))
            for m in (slow, fast)
        ]
        torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)
        assert found[1][1].any()


@pytest.mark.parametrize("loss_type", ["l1", "giou"])
def test_boxes_of_the_targets_have_derivatives(loss_type):
    found = []
    for model in pair():
        model.head.regression_head._loss_type = loss_type
        target = TARGETS[0]["boxes"]
        loss = lambda boxes, m=model: torch.stack([*m(IMAGES, [TARGETS[0] | {"boxes": boxes}]).values()]).sum()  # noqa: E731
        (slope,) = torch.autograd.grad(loss(given := target.clone().requires_grad_()), given)
        change = torch.func.jvp(loss, (target,), (torch.ones_like(target),))[1]
        found.append((slope, torch.func.grad(loss)(target), change))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)
    assert found[0][0].any()


@pytest.mark.parametrize("loss_type", ["l1", "giou"])
def test_gradients_of_several_losses_at_once(loss_type):
    found = []
    for model in pair():
        model.head.regression_head._loss_type = loss_type
        losses = torch.stack(list(model(IMAGES, TARGETS).values()))
        found.append(torch.autograd.grad(losses, model.backbone[0].weight, torch.eye(2), is_grads_batched=True))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)


def test_a_model_in_double_precision_detects_in_it():
    slow, fast = (model.double().eval() for model in pair(score_thresh=0.3))
    with torch.no_grad():
        expected, found = (model([image.double() for image in IMAGES]) for model in (slow, fast))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert found[0]["boxes"].dtype == found[0]["scores"].dtype == torch.float64


def test_a_gradient_penalty_is_torchvisions():
    grads = []
    for model in pair():
        weight = model.head.classification_head.conv[0][0].weight
        loss = torch.stack([*model(IMAGES, TARGETS).values()]).sum()
        (grad,) = torch.autograd.grad(loss, weight, create_graph=True)
        grads.append(torch.autograd.grad(grad.square().sum(), weight)[0])
    assert (grads[1] - grads[0]).norm() <= 1e-4 * grads[0].norm()


@pytest.mark.parametrize(
    "call",
    [
        *("eval", "train", "predict"),
        *(pytest.param(call, marks=pytest.mark.slow) for call in ("tiles", "without engine", "step")),
    ],
)
def test_another_default_device_changes_nothing(call):
    """`torch.set_default_device("cuda")` must not move what belongs on the host: in a CUDA graph it would be a copy. On
    the meta device it would have no values."""
    image, targets = torch.rand(3, 32, 40), [{"boxes": torch.tensor([[4.0, 4, 30, 30]]), "labels": torch.tensor([1])}]
    pixels = (image * 255).to(torch.uint8)

    def run():
        torch.manual_seed(0)
        with torch.device("cpu"):
            sizes = {"min_size": 24, "score_thresh": 0.0}
            model = retina_fast.retinanet_resnet18_fpn_lite(num_classes=3, weights_backbone=None, **sizes)
        model.train(call in ("train", "step"))
        if call == "eval":
            return model([image])[0]
        if call == "train":
            return model([image], targets)
        if call == "step":
            return retina_fast.TrainingStep(model, torch.optim.SGD(model.parameters(), 0.01))([image], targets)
        return model.predict(
            pixels, 0.1, tile=20 if call == "tiles" else None, engine="without" not in call
        ).detections()

    expected = run()
    with torch.device("meta"):
        found = run()
    assert {name: value.device.type for name, value in found.items()} == dict.fromkeys(expected, "cpu")
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_results_are_changed_in_place_while_gradients_are_recorded():
    slow, fast = pair(score_thresh=0.3, detections_per_img=20)
    sums = []
    for model in (slow.eval(), fast.eval()):
        total = torch.zeros(())
        for found in model([*IMAGES, IMAGES[0].flip(2)]):
            found["boxes"][:, 2:] -= found["boxes"][:, :2]
            found["boxes"].mul_(0.5)
            found["scores"].clamp_(min=0.35)
            total = total + found["boxes"].sum() + found["scores"].sum()
        total.backward()
        sums.append([total.detach(), *(p.grad for p in model.head.parameters() if p.grad is not None)])
    assert len(sums[0]) > 4
    for exact, ours in zip(*sums, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-4)
