"""The loss path on whatever device is there: matching, both losses and their backward, torchvision beside ours.

    python -m benchmarks.loss_path

Batch 2, 512x512 (49,104 anchors), 91 classes, 20 ground truths an image. Both start from the heads' outputs, as each
lays them out: concatenated for torchvision, level by level for ours. The two take turns in one process.
"""

import statistics
import time
from collections.abc import Callable

import torch
import torchvision
from torch import Tensor
from torchvision.models.detection.image_list import ImageList

from retina_fast import RetinaNet

B, SIZE, K, G = 2, 512, 91, 20
GRIDS = (64, 32, 16, 8, 4)


def models() -> tuple[torchvision.models.detection.RetinaNet, RetinaNet]:
    backbone = torch.nn.Identity()
    backbone.out_channels = 8  # type: ignore[assignment]
    return torchvision.models.detection.RetinaNet(backbone, K), RetinaNet(backbone, K)


def case() -> tuple[dict[str, list[Tensor]], list[dict[str, Tensor]], list[Tensor]]:
    """Head outputs level by level, targets, anchors."""
    generator = torch.Generator().manual_seed(0)
    outputs = {
        "cls_logits": [torch.randn(B, 9 * K, s, s, generator=generator) - 4.6 for s in GRIDS],
        "bbox_regression": [torch.randn(B, 9 * 4, s, s, generator=generator) * 0.1 for s in GRIDS],
    }
    targets = []
    for _ in range(B):
        corner = torch.rand(G, 2, generator=generator) * SIZE * 0.8
        boxes = torch.cat((corner, corner + 8 + torch.rand(G, 2, generator=generator) * SIZE * 0.4), dim=1)
        targets.append({"boxes": boxes, "labels": torch.randint(0, K, (G,), generator=generator)})
    features = [torch.zeros(B, 8, s, s) for s in GRIDS]
    images = ImageList(torch.zeros(B, 3, SIZE, SIZE), [(SIZE, SIZE)] * B)
    return outputs, targets, models()[0].anchor_generator(images, features)


def steps() -> tuple[Callable[[], dict[str, Tensor]], Callable[[], dict[str, Tensor]]]:
    """torchvision's loss path and ours, forward and backward."""
    outputs, targets, anchors = case()
    theirs, ours = models()
    shared = [anchors[0]] * B  # our model makes them once a batch
    levels = {key: [level.requires_grad_() for level in output] for key, output in outputs.items()}
    joined = {key: value.detach().requires_grad_() for key, value in ours._concatenated(levels).items()}

    def step_torchvision() -> dict[str, Tensor]:
        losses = theirs.compute_loss(targets, joined, anchors)
        torch.autograd.grad(sum(losses.values()), list(joined.values()))
        return losses

    def step_ours() -> dict[str, Tensor]:
        losses = ours.compute_loss(targets, levels, shared)
        leaves = [level for output in levels.values() for level in output]
        torch.autograd.grad(sum(losses.values()), leaves)  # type: ignore[arg-type]
        return losses

    return step_torchvision, step_ours


def main(repetitions: int = 15) -> None:
    both = steps()
    expected, losses = (step() for step in both)
    assert all(abs(losses[key] - expected[key]) <= 1e-5 * expected[key] for key in expected)
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(repetitions):
        for step, measured in zip(both, seconds, strict=True):
            start = time.perf_counter()
            step()
            measured.append(time.perf_counter() - start)
    slow, fast = (1000 * statistics.median(measured) for measured in seconds)
    print(f"{torch.get_num_threads()} CPU threads, torch {torch.__version__}, medians of {repetitions} runs in turns")
    print(f"torchvision {slow:.0f} ms, retina_fast {fast:.0f} ms, ratio {slow / fast:.2f}")


if __name__ == "__main__":
    main()
