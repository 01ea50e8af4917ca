"""Inputs that several benchmarks share: anchors of an image size, ground truths, and the outputs of a head."""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.models.detection.retinanet import _default_anchorgen

from retina_fast.anchors import batch_anchors
from retina_fast.targets import GroundTruths

ANCHORS_PER_CELL = 9


def grids(height: int, width: int) -> list[tuple[int, int]]:
    """Returns the rows and columns of cells of the five levels."""
    return [(math.ceil(height / stride), math.ceil(width / stride)) for stride in (8, 16, 32, 64, 128)]


def anchors(height: int, width: int, device: torch.device) -> Tensor:
    """Returns torchvision's default anchors (N, 4)."""
    features = [torch.zeros(1, 1, h, w) for h, w in grids(height, width)]
    batch = torch.zeros(1, 1, height, width)
    return batch_anchors(_default_anchorgen(), batch, [(height, width)], features).to(device)


class Scene(NamedTuple):
    """The ground truths of a batch, as torchvision takes them and flat."""

    targets: list[dict[str, Tensor]]
    truths: GroundTruths


def scene(batch: int, count: int, height: int, width: int, num_classes: int, device: torch.device) -> Scene:
    """Makes `count` ground truths an image, of the sizes that are frequent in COCO: most sides are below 200 pixels."""
    generator = torch.Generator().manual_seed(0)
    sides = torch.exp(torch.rand(batch, count, 2, generator=generator) * math.log(30)) * 10  # 10 to 300, log-uniform
    corner = torch.rand(batch, count, 2, generator=generator) * (torch.tensor([width, height]) - sides).clamp(min=0)
    boxes = torch.cat((corner, corner + sides), dim=2).to(device)
    labels = torch.randint(0, num_classes, (batch, count), generator=generator).to(device)
    targets = [{"boxes": boxes[b], "labels": labels[b]} for b in range(batch)]
    offsets = torch.arange(batch + 1, device=device) * count
    return Scene(targets, GroundTruths(boxes.flatten(0, 1), labels.flatten(), offsets, [count] * batch))


def levels(
    batch: int,
    channels: int,
    height: int,
    width: int,
    dtype: torch.dtype,
    device: torch.device,
    mean: float,
    std: float,
) -> list[Tensor]:
    """Returns a head's outputs (B, A*channels, h, w) in channels_last memory, normally distributed."""
    layout = torch.channels_last
    return [
        torch.empty(batch, ANCHORS_PER_CELL * channels, h, w, dtype=dtype, device=device, memory_format=layout)
        .normal_(mean, std)
        .requires_grad_()
        for h, w in grids(height, width)
    ]
