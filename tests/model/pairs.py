"""torchvision's model and ours with the same weights, small enough for milliseconds; images and targets for them."""

from unittest.mock import patch

import torch
import torchvision
from torch import nn
from torchvision.models.detection import retinanet as tv
from torchvision.models.detection.anchor_utils import AnchorGenerator

from tests.instruments.agreement import differing

METHODS = ("forward", "compute_loss", "postprocess_detections")


def torchvision_model(num_classes=3, cls=tv.RetinaNet, **kwargs):
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Conv2d(3, 16, 8, 8), nn.ReLU())
    backbone.out_channels = 16  # pyrefly: ignore[bad-argument-type]
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


def assert_same(ours, theirs, images=IMAGES, targets=None):
    """Training losses and gradients, and detections, of two models with the same weights."""
    targets = targets or good_targets()
    ours.train(), theirs.train()
    losses, expected = ours(images, targets), theirs(images, targets)
    for key in expected:
        assert abs(losses[key] - expected[key]) <= 1e-5 * abs(expected[key]) + 1e-9
    grads, reference = (
        torch.autograd.grad(torch.stack([*x.values()]).sum(), list(m.parameters()), allow_unused=True)
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


def with_boxes(value, image=0):
    targets = good_targets()
    targets[image]["boxes"] = value
    return targets


def with_labels(value, image=0):
    targets = good_targets()
    targets[image]["labels"] = value
    return targets
