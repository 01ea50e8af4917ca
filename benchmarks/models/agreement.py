"""How often our detections and torchvision's differ on the same head outputs, and why.

    python -m benchmarks.models.agreement

On up to 1000 boxes torchvision's ``batched_nms`` adds class * (largest coordinate + 1) to boxes, which rounds:
two boxes whose IoU lies within that rounding of the threshold may go either way. Each random image of clustered boxes
is therefore compared twice: with torchvision as it is, and with its exact class-by-class path without ties, with which
no difference may remain. Outputs in bfloat16 are given to torchvision in float32: as they are, it would round the
anchors to bfloat16, which moves them by pixels, and on a CPU has no NMS for them.
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


def lacking(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> Tensor:
    """Which of torchvision's detections ours lack, (D,): none has its label, box to 0.01 px and score to 1e-5."""
    near = (ours["boxes"][:, None] - theirs["boxes"]).abs().amax(dim=2) <= 0.01
    near &= (ours["scores"][:, None] - theirs["scores"]).abs() <= 1e-5
    near &= ours["labels"][:, None] == theirs["labels"]
    return ~near.any(dim=0)


def differing(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> int:
    """How many of torchvision's detections ours lack."""
    return int(lacking(ours, theirs).sum())


def margin(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Of the detections that only one has: how near the threshold of 0.5 an IoU with one of the same class comes."""
    nearest = float("inf")
    for these, those in ((ours, theirs), (theirs, ours)):
        alone = lacking(those, these)
        for other in (ours, theirs):
            iou = torchvision.ops.box_iou(these["boxes"][alone].double(), other["boxes"].double())
            distances = (iou - 0.5).abs()[these["labels"][alone][:, None] == other["labels"]]
            nearest = min([nearest, *distances.tolist()])
    return nearest


def anchors(model: torchvision.models.detection.RetinaNet) -> list[list[Tensor]]:
    """The anchors of one image by level."""
    features = [torch.zeros(1, 8, h, w) for h, w in GRIDS]
    (joined,) = model.anchor_generator(ImageList(torch.zeros(1, 3, 256, 320), [IMAGE]), features)
    return [list(joined.split([h * w * 9 for h, w in GRIDS]))]


def without_ties(outputs: dict[str, list[Tensor]]) -> dict[str, list[Tensor]]:
    """The outputs in float64, equal logits told apart by 1e-12 a place: torchvision leaves the order of ties open."""
    logits, first = [], 0
    for level in outputs["cls_logits"]:
        places = torch.arange(first, first + level[0].numel()).view(level.shape[1:])
        logits.append(level.double() - 1e-12 * places)
        first += places.numel()
    return {"cls_logits": logits, "bbox_regression": [level.double() for level in outputs["bbox_regression"]]}


def measure(cases: int, dtype: torch.dtype = torch.float32) -> dict[str, float]:
    """Over random images: images that differ, detections that differ, the widest margin of an image that differs, and
    images that differ from the exact path."""
    theirs, ours = models()
    split = anchors(theirs)
    images = detections = total = unexplained = 0
    widest = 0.0
    for seed in range(cases):
        outputs = {key: [level.to(dtype) for level in levels] for key, levels in random_outputs(seed).items()}
        (found,) = ours.postprocess_detections(outputs, split, [IMAGE])
        outputs = {key: [level.float() for level in levels] for key, levels in outputs.items()}
        (expected,) = theirs.postprocess_detections(outputs, split, [IMAGE])
        with patch.object(torchvision.ops.boxes, "batched_nms", torchvision.ops.boxes._batched_nms_vanilla):
            (exact,) = theirs.postprocess_detections(without_ties(outputs), split, [IMAGE])
        missing = differing(found, expected)
        images, detections, total = images + (missing > 0), detections + missing, total + len(expected["boxes"])
        if missing:
            widest = max(widest, margin(found, expected))
        unexplained += differing(found, exact) > 0 or len(found["boxes"]) != len(exact["boxes"])
    return {
        "cases": cases,
        "images": images,
        "detections": detections,
        "total": total,
        "margin": widest,
        "unexplained": unexplained,
    }


if __name__ == "__main__":
    for outputs_dtype in (torch.float32, torch.bfloat16):
        rate = measure(200, outputs_dtype)
        print(outputs_dtype)
        print(f"  images with a difference        {rate['images']} of {rate['cases']}")
        print(f"  detections that differ          {rate['detections']} of {rate['total']}")
        if rate["margin"] < 1e-3:  # else equal scores may stand behind the difference
            print(f"  in each of these images an IoU is as near to the threshold as {rate['margin']:.2g}")
        print(f"  images that differ from torchvision's exact path without ties  {rate['unexplained']}")
