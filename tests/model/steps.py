"""Models, batches and plain steps that the tests of TrainingStep share."""

from typing import Any

import pytest
import torch
from torch import nn
from torchvision.models.detection.anchor_utils import AnchorGenerator

import retina_fast
from retina_fast import TrainingStep

K = 3


GPU = torch.cuda.is_available()
TOLERANCE = 1e-4 if GPU else 1e-6  # cuDNN may choose another kernel for what is captured
needs_gpu = pytest.mark.skipif(not GPU, reason="needs a GPU")


class Trunk(nn.Module):
    """Two small levels, with the norm and the activation of a real trunk."""

    out_channels = 8

    def __init__(self, dropout):
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.stem, self.norm = nn.Conv2d(3, 8, 8, stride=8, bias=False), nn.BatchNorm2d(8)
        self.down = nn.Conv2d(8, 8, 3, stride=2, padding=1)

    def forward(self, x):
        fine = self.norm(self.stem(x)).relu()
        return {"0": fine, "1": self.down(self.dropout(fine))}


def fresh_model(device="cuda" if GPU else "cpu", dropout=0.0) -> Any:
    torch.manual_seed(0)
    anchors = AnchorGenerator(((16,), (32,)), ((0.5, 1.0, 2.0),) * 2)
    return retina_fast.RetinaNet(Trunk(dropout), K, 64, 96, anchor_generator=anchors).train().to(device)


def batch(step: int, size=(64, 64), images=2, boxes=3):
    generator = torch.Generator().manual_seed(step)
    targets = []
    for _ in range(images):
        corner = torch.rand(boxes, 2, generator=generator) * 30
        side = 8 + torch.rand(boxes, 2, generator=generator) * 20
        labels = torch.randint(0, K, (boxes,), generator=generator)
        targets.append({"boxes": torch.cat((corner, corner + side), dim=1), "labels": labels})
    return [torch.rand(3, *size, generator=generator) for _ in range(images)], targets


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=2**-10, fused=True)  # exact in float32, in which a graph reads it


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=2**-6, momentum=0.9, weight_decay=1e-4)


def plain_step(model, optimizer, batch, max_grad_norm=None, dtype=None):
    """The step as everyone writes it."""
    images, targets = batch
    optimizer.zero_grad()
    device = next(model.parameters()).device
    images = [image.to(device) for image in images]
    targets = [{key: value.to(device) for key, value in target.items()} for target in targets]
    with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
        losses = model(images, targets)
    (losses["classification"] + losses["bbox_regression"]).backward()
    if max_grad_norm is not None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
    optimizer.step()
    return {key: value.detach() for key, value in losses.items()}


def assert_same_state(model, other, tolerance=TOLERANCE):
    for (name, value), expected in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert (value.double() - expected.double()).norm() <= tolerance * (1 + expected.double().norm()), name


def warmed(model, optimizer, **kwargs) -> TrainingStep:
    """A step whose graph is captured and replayed once."""
    step = TrainingStep(model, optimizer, **kwargs)
    warm(step)
    return step


def warm(step: TrainingStep) -> None:
    while not step.replayed_steps:
        step(*batch(step.uncaptured_steps))


def moved(model, step, number=50) -> float:
    """How far one step moves the weights."""
    before = [p.detach().clone() for p in model.parameters()]
    step(*batch(number))
    return float(sum((p.detach() - q).abs().sum() for p, q in zip(model.parameters(), before, strict=True)))
