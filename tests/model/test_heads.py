"""The heads with a norm for each level, and SpineNet detectors through the same paths as torchvision's."""

from functools import partial
from typing import Any

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.detection import retinanet as tv
from torchvision.models.detection.anchor_utils import AnchorGenerator

import retina_fast
from retina_fast import checkpoint, forward
from retina_fast.backbones.spinenet import SpineNet
from retina_fast.builders import MODELS
from retina_fast.checkpoint import Checkpoint
from retina_fast.heads import LevelNormClassificationHead, batch_norm, level_norm_head, run_head
from retina_fast.model import RetinaNet
from tests.instruments.agreement import differing

SPINENETS = [name for name in MODELS if "spinenet" in name]
# One object for each of the five levels, so that none is without a foreground anchor; boxes may reach outside.
EVERY_LEVEL = [{"boxes": torch.tensor([[64.0 - s, 64 - s, 64 + s, 64 + s] for s in (14, 27, 55, 110, 220)]),
                "labels": torch.tensor([0, 1, 2, 1, 0])}] * 2  # fmt: skip
TARGETS = [
    {"boxes": torch.tensor([[20.0, 10, 60, 50], [90, 90, 120, 125]]), "labels": torch.tensor([0, 2])},
    {"boxes": torch.tensor([[5.0, 5, 120, 110]]), "labels": torch.tensor([1])},
]


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    torch.manual_seed(0)


def detector(norm_layer: Any = batch_norm, **kwargs) -> RetinaNet:
    """A tiny SpineNet detector, its predictors no longer near zero."""
    generator = AnchorGenerator(tuple((3 * s, 4 * s, 5 * s) for s in (8, 16, 32, 64, 128)), ((0.5, 1.0, 2.0),) * 5)
    head: Any = level_norm_head(8, 9, num_classes=3, width=6, depth=2, norm_layer=norm_layer)
    backbone = SpineNet(width=0.1, out_channels=8, norm_layer=norm_layer)
    settings: dict[str, Any] = {"min_size": None, "score_thresh": 0.01} | kwargs
    model = RetinaNet(backbone, 3, anchor_generator=generator, head=head, **settings)
    nn.init.normal_(head.classification_head.cls_logits.weight, std=0.3)
    nn.init.normal_(head.regression_head.bbox_reg.weight, std=0.03)
    return model


def images(count: int = 2) -> list[torch.Tensor]:
    return [torch.rand(3, 128, 128) for _ in range(count)]


def plain(head: Any, features: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """The head once more, anchor by anchor as torchvision concatenates them."""
    outputs = {}
    for key, part, last, channels in (
        ("cls_logits", head.classification_head, "cls_logits", 3),
        ("bbox_regression", head.regression_head, "bbox_reg", 4),
    ):
        rows = []
        for i, x in enumerate(features):
            for conv, norm in zip(part.conv.convs, part.conv.norms[i], strict=True):
                x = norm(conv(x)).relu()
            x = getattr(part, last)(x)
            rows.append(x.unflatten(1, (9, channels)).permute(0, 3, 4, 1, 2).flatten(1, 3))
        outputs[key] = torch.cat(rows, dim=1)
    return outputs


def test_a_call_of_the_head_returns_torchvisions_dict():
    head = level_norm_head(8, 9, num_classes=3, width=6, depth=3).eval()
    features = [torch.rand(2, 8, n, n + 1) for n in (8, 4, 2, 1, 1)]
    for norm in (module for module in head.modules() if isinstance(module, nn.BatchNorm2d)):
        norm.running_mean = torch.randn(6)
    torch.testing.assert_close(head(features), plain(head, features))
    assert type(head) is tv.RetinaNetHead


def test_convs_are_shared_and_norms_are_not():
    head = level_norm_head(8, 9, num_classes=3, width=6)
    level = torch.rand(2, 8, 4, 4)
    head.train()([level, level + 1, level, level, level])
    means = [norms[0].running_mean for norms in head.classification_head.conv.norms]
    assert torch.equal(means[0], means[2])
    assert not torch.equal(means[0], means[1])
    with pytest.raises(ValueError, match="norms for 5 levels, the backbone returns 4"):
        head([level] * 4)


def test_initialisation():
    head = level_norm_head(64, 9, num_classes=3)
    tower = head.regression_head.conv
    assert all(
        conv.weight.std().item() == pytest.approx(0.01, rel=0.05) and not conv.bias.any() for conv in tower.convs
    )
    assert head.classification_head.cls_logits.weight.std().item() == pytest.approx(1e-5, rel=0.05)
    assert head.regression_head.bbox_reg.weight.std().item() == pytest.approx(1e-5, rel=0.05)
    assert head.classification_head.cls_logits.bias.mean().item() == pytest.approx(-4.595, abs=1e-3)


def test_losses_are_those_of_torchvision_and_every_parameter_gets_a_gradient():
    model = detector()
    assert model.uses_fast_losses()
    made = model.make_batch(images(), TARGETS)
    outputs = forward.run(model, made)
    assert [level.dim() for level in outputs.levels["cls_logits"]] == [4] * 5  # as the convs wrote them
    losses = model.losses_of(made, outputs)
    anchors = [outputs.anchors] * len(TARGETS)
    torch.testing.assert_close(losses, tv.RetinaNet.compute_loss(model, TARGETS, outputs.joined(), anchors))
    torch.stack([*model(images(), EVERY_LEVEL).values()]).sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_every_parameter_of_49s_gets_a_gradient():
    model = retina_fast.retinanet_spinenet49s(num_classes=3, min_size=None)
    torch.stack([*model(images(), EVERY_LEVEL).values()]).sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_detections_are_those_of_torchvision(monkeypatch):
    monkeypatch.setattr(torchvision.ops.boxes, "batched_nms", torchvision.ops.boxes._batched_nms_vanilla)
    # At a cut, torchvision leaves ties open. And two anchors three strides wide, a stride apart, have an IoU of 0.5.
    settings = {"topk_candidates": 10_000, "detections_per_img": 10_000, "score_thresh": 0.01, "nms_thresh": 0.45}
    # Norms that need no statistics: with fresh ones of BatchNorm, all scores of a level are nearly the same.
    model = detector(partial(nn.GroupNorm, 1), **settings).eval()
    with torch.no_grad():
        pictures = images()
        found = model(pictures)
        assert all(100 < len(image["boxes"]) < 10_000 for image in found)
        padded = model.detect(torch.stack(pictures))
        parts = {"anchor_generator": model.anchor_generator, "head": model.head}
        size = {"min_size": 128, "max_size": 128, "size_divisible": 128}
        slow = tv.RetinaNet(model.backbone, 3, **parts, **size, **settings).eval()
        for ours, theirs in zip(found, slow(pictures), strict=True):
            assert len(ours["boxes"]) == len(theirs["boxes"])
            assert differing(ours, theirs) == 0
        for ours, theirs in zip(found, padded.to_list(), strict=True):
            torch.testing.assert_close(ours, theirs)
        fast = retina_fast.from_torchvision(slow)
        torch.testing.assert_close(fast(pictures), found)


def test_a_head_of_the_users_own_runs():
    class Louder(LevelNormClassificationHead):
        def forward(self, x):
            return super().forward(x) + 100

    model = detector().eval()
    quiet = forward.run(model, model.make_batch(images(1), None)).levels["cls_logits"]
    model.head.classification_head.__class__ = Louder
    loud = forward.run(model, model.make_batch(images(1), None)).levels["cls_logits"]
    assert [level.dim() for level in loud] == [3] * 5  # what it concatenated is split
    assert min(level.min() for level in loud) > 50 > max(level.max() for level in quiet)
    assert (model(images(1))[0]["scores"] == 1).all()


def test_another_class_count():
    model = detector().set_num_classes(7).eval()
    assert model.head(list(model.backbone(images()[0][None]).values()))["cls_logits"].shape[2] == 7
    targets = [{"boxes": target["boxes"], "labels": target["labels"] + 4} for target in TARGETS]
    assert all(torch.isfinite(loss) for loss in model.train()(images(), targets).values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_channels_last_and_bfloat16(dtype):
    model, pictures = detector().eval(), images()
    expected, _ = model.losses_and_detections(pictures, TARGETS)
    model = model.to(dtype).to(memory_format=torch.channels_last)
    pictures = [picture.to(dtype) for picture in pictures]
    losses, _ = model.losses_and_detections(pictures, TARGETS)
    torch.stack([*model.train()(pictures, TARGETS).values()]).sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(losses, expected, rtol=tolerance, atol=0, check_dtype=False)
    features = list(model.eval().backbone(torch.rand(2, 3, 128, 128, dtype=dtype)).values())
    assert all(level.is_contiguous(memory_format=torch.channels_last) for level in features)
    assert all(
        level.is_contiguous(memory_format=torch.channels_last) for level in run_head(model.head, features)["cls_logits"]
    )
    assert [len(image) for image in model(pictures)] == [3, 3]


def test_autocast():
    model = detector()
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(images(), TARGETS)
    torch.stack([*losses.values()]).sum().backward()
    assert all(torch.isfinite(loss) for loss in losses.values())


def test_batch_norms_become_synchronised_ones():
    model = nn.SyncBatchNorm.convert_sync_batchnorm(detector())
    norms = [module for module in model.modules() if "BatchNorm" in type(module).__name__]
    assert {type(norm) for norm in norms} == {nn.SyncBatchNorm}
    assert {(norm.momentum, norm.eps) for norm in norms} == {(0.01, 1e-3)}
    assert model.uses_fast_losses()
    assert all(
        torch.isfinite(level).all() for level in run_head(model.eval().head, [torch.rand(1, 8, 4, 4)] * 5)["cls_logits"]
    )


@pytest.mark.parametrize("name", SPINENETS)
def test_builders(name):
    build = MODELS[name]
    with torch.device("meta"):
        model = build(num_classes=5, activation="silu", stochastic_depth=0.2, score_thresh=0.3)
    assert (model.score_thresh, model.head.classification_head.num_classes) == (0.3, 5)
    assert {type(module) for module in model.modules() if isinstance(module, nn.ReLU | nn.SiLU)} == {nn.SiLU}
    base = 4 if name[-3:] in ("143", "190") else 3
    sides = model.anchor_generator.sizes
    assert [level[0] for level in sides] == [base * stride for stride in (8, 16, 32, 64, 128)]
    assert all(level == (level[0], int(level[0] * 2 ** (1 / 3)), int(level[0] * 2 ** (2 / 3))) for level in sides)
    for argument in ("weights", "weights_backbone"):
        with pytest.raises(ValueError, match=f"no weights of {name}, so {argument} must be None, got 'COCO_V1'"):
            build(**{argument: "COCO_V1"})
    with pytest.raises(ValueError, match="trainable_backbone_layers must be None"):
        build(trainable_backbone_layers=3)
    with pytest.raises(ValueError, match="row 0"):
        build(specification=[(9, "bottleneck", (0, 1))])


def test_the_longer_side_is_resized():
    with torch.device("meta"):
        model = retina_fast.retinanet_spinenet49s(num_classes=2).eval()
    passed_sizes = []
    model.backbone.register_forward_pre_hook(lambda module, x: passed_sizes.append(x[0].shape))
    model.transform.image_mean = model.transform.image_std = [0.5] * 3
    from retina_fast.transform import resized_size

    assert resized_size(model.transform, 480, 640) == (480, 640)
    assert resized_size(model.transform, 1000, 500) == (640, 320)
    assert resized_size(model.transform, 100, 200) == (320, 640)


def test_a_specification_of_ones_own_survives_a_model_file(tmp_path):
    rows = [
        [3, "residual", [0, 1], True],
        *([level, "residual", [level - 3, level - 2], True] for level in range(4, 8)),
    ]
    kwargs: dict[str, Any] = {"specification": rows, "activation": "silu", "min_size": None}
    name = "retinanet_spinenet49s"
    weights = checkpoint.build(name, 2, **kwargs).state_dict()
    checkpoint.save(Checkpoint(name, kwargs, ["a", "b"], [1, 2], weights), tmp_path / "model.pt")
    model = checkpoint.load(tmp_path / "model.pt").build().eval()
    assert [block.level for block in model.backbone.specification] == [3, 4, 5, 6, 7]
    assert len(model(images(1))) == 1
