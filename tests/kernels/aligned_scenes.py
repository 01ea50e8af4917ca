"""Scenes for the tests of task-aligned assignment, and what the paper's definition makes of them in float64."""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.ops import box_iou


class Scene(NamedTuple):
    """What the heads say of B images, their anchors, and the ground truths of each."""

    logits: list[Tensor]
    deltas: list[Tensor]
    anchors: Tensor
    images: list[Tensor]
    labels: list[Tensor]
    num_classes: int
    reg_max: int = 0


def scene(counts=(0, 3, 1), num_classes=4, reg_max=0, seed=0, dtype=torch.float32):
    """Two levels with strides 8 and 16, two anchors a cell."""
    generator = torch.Generator().manual_seed(seed)
    channels, levels, logits, deltas = 4 * (reg_max + 1), [], [], []
    for stride, (height, width) in ((8, (6, 7)), (16, (3, 2))):
        y, x = torch.meshgrid(torch.arange(height) * stride, torch.arange(width) * stride, indexing="ij")
        centre = torch.stack((x, y), dim=-1).reshape(-1, 1, 2).float()
        half = stride * torch.tensor([[1.0, 1.5], [2.0, 1.0]])
        levels.append(torch.cat((centre - half, centre + half), dim=2).flatten(0, 1))
        shape = len(counts), len(levels[-1])
        logits.append((torch.randn(*shape, num_classes, generator=generator) * 2 - 2).to(dtype))
        deltas.append((torch.randn(*shape, channels, generator=generator) * (2 if reg_max else 0.3)).to(dtype))
    images = []
    for count in counts:
        corner = torch.rand(count, 2, generator=generator) * 20 - 4
        images.append(torch.cat((corner, corner + 12 + torch.rand(count, 2, generator=generator) * 20), dim=1))
    labels = [torch.randint(0, num_classes, (count,), generator=generator) for count in counts]
    return Scene(logits, deltas, torch.cat(levels), images, labels, num_classes, reg_max)


def predicted(scene, b):
    """The boxes that the heads predict in image b, in float64."""
    deltas = torch.cat([level[b] for level in scene.deltas]).double()
    anchors = (scene.anchors if scene.anchors.dim() == 2 else scene.anchors[b]).double()
    size, centre = anchors[:, 2:] - anchors[:, :2], (anchors[:, 2:] + anchors[:, :2]) / 2
    if scene.reg_max:
        sides = deltas.reshape(len(anchors), 4, -1).softmax(2) @ torch.arange(scene.reg_max + 1.0).double()  # (N, 4)
        return torch.cat((centre - sides[:, :2] * size / 8, centre + sides[:, 2:] * size / 8), dim=1)
    centre, size = centre + deltas[:, :2] * size, size * deltas[:, 2:].exp()
    return torch.cat((centre - size / 2, centre + size / 2), dim=1)


def paper(scene, b, top_k, alpha, beta):
    """Indices and targets of image b by whole matrices in float64, and how close two candidates came to each other."""
    boxes, labels = scene.images[b].double(), scene.labels[b]
    anchors = (scene.anchors if scene.anchors.dim() == 2 else scene.anchors[b]).double()
    s = torch.cat([level[b] for level in scene.logits]).double().sigmoid()[:, labels].T  # (G, N)
    u = box_iou(boxes, predicted(scene, b))
    x, y = (anchors[:, :2] + anchors[:, 2:]).T / 2
    inside = (x > boxes[:, :1]) & (y > boxes[:, 1:2]) & (x < boxes[:, 2:3]) & (y < boxes[:, 3:])
    t = torch.where(inside, s**alpha * u**beta, 0)
    index, best, gap = torch.full((len(anchors),), -1), torch.zeros(len(anchors)).double(), math.inf
    for g in range(len(boxes)):
        order = t[g].sort(descending=True, stable=True).indices
        if len(order) > top_k and t[g, order[top_k]] > 0:
            gap = min(gap, float((t[g, order[top_k - 1]] / t[g, order[top_k]]).log()))
        for n in order[:top_k].tolist():
            if t[g, n] > 0:
                gap = min(gap, float((u[g, n] - best[n]).abs()))
                if u[g, n] > best[n]:
                    index[n], best[n] = g, u[g, n]
    targets = torch.zeros(len(anchors)).double()
    for g in range(len(boxes)):
        own = index == g
        if own.any():
            targets[own] = t[g, own] / t[g, own].max() * u[g, own].max()
    return index, targets, gap
