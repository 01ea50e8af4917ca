"""How often our detections and torchvision's differ on the same head outputs, and why.

    python -m benchmarks.agreement

On up to 1000 candidates torchvision's ``batched_nms`` adds class * (largest coordinate + 1) to boxes, which rounds:
two boxes whose IoU lies within that rounding of the threshold may go either way. Each random image of clustered boxes
is therefore compared twice: with torchvision as it is, and with its exact class-by-class path, with which no difference
may remain.
"""

from unittest.mock import patch

import torch
import torchvision
from torch import Tensor
from torchvision.models.detection.image_list import ImageList

from retina_fast import RetinaNet

K = 91
GRIDS = ((32, 40), (16, 20), (8, 10), (4, 5), (2, 3))
IMAGE = (250, 317)  # in a padded batch of 256 x 320


def random_outputs(seed: int) -> dict[str, list[Tensor]]:
    """Head outputs of one image, by level (1, N, C): clusters of anchors that see the same object."""
    generator = torch.Generator().manual_seed(seed)
    outputs: dict[str, list[Tensor]] = {"cls_logits": [], "bbox_regression": []}
    for h, w in GRIDS:
        logits = torch.full((1, h * w * 9, K), -9.0)
        for _ in range(max(2, h * w // 40)):
            first = int(torch.randint(0, h * w * 9 - 17, (), generator=generator))
            label = int(torch.randint(0, K, (), generator=generator))
            logits[0, first : first + 18, label] = torch.randn(18, generator=generator)  # two neighbouring cells
        outputs["cls_logits"].append(logits)
        outputs["bbox_regression"].append(torch.randn(1, h * w * 9, 4, generator=generator) * 0.1)
    return outputs


def models() -> tuple[torchvision.models.detection.RetinaNet, RetinaNet]:
    """torchvision's model and ours; only their postprocess is used."""
    backbone = torch.nn.Identity()
    backbone.out_channels = 8  # type: ignore[assignment]
    return torchvision.models.detection.RetinaNet(backbone, K).eval(), RetinaNet(backbone, K).eval()


def differing(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> int:
    """How many of torchvision's detections ours lack: same label, box within 0.01 px, score within 1e-5."""
    near = (ours["boxes"][:, None] - theirs["boxes"]).abs().amax(dim=2) <= 0.01
    near &= (ours["scores"][:, None] - theirs["scores"]).abs() <= 1e-5
    near &= ours["labels"][:, None] == theirs["labels"]
    return int((~near.any(dim=0)).sum())


def measure(cases: int) -> dict[str, float]:
    """Over random images: images that differ, detections that differ, and images that differ from the exact path."""
    theirs, ours = models()
    grids = [torch.zeros(1, 8, h, w) for h, w in GRIDS]
    anchors = theirs.anchor_generator(ImageList(torch.zeros(1, 3, 256, 320), [IMAGE]), grids)
    split = [list(anchors[0].split([h * w * 9 for h, w in GRIDS]))]
    images = detections = total = unexplained = 0
    for seed in range(cases):
        outputs = random_outputs(seed)
        (found,) = ours.postprocess_detections(outputs, split, [IMAGE])
        (expected,) = theirs.postprocess_detections(outputs, split, [IMAGE])
        with patch.object(torchvision.ops.boxes, "batched_nms", torchvision.ops.boxes._batched_nms_vanilla):
            (exact,) = theirs.postprocess_detections(outputs, split, [IMAGE])
        missing = differing(found, expected)
        images, detections, total = images + (missing > 0), detections + missing, total + len(expected["boxes"])
        unexplained += differing(found, exact) > 0 or len(found["boxes"]) != len(exact["boxes"])
    return {"cases": cases, "images": images, "detections": detections, "total": total, "unexplained": unexplained}


if __name__ == "__main__":
    rate = measure(200)
    print(f"images with a difference        {rate['images']} of {rate['cases']}")
    print(f"detections that differ          {rate['detections']} of {rate['total']}")
    print(f"images that differ from torchvision's exact path  {rate['unexplained']}")
