"""Counts how often our detections and torchvision's differ on the same head outputs, and explains each difference.

    python -m benchmarks.models.agreement

On up to 1000 boxes torchvision's `batched_nms` adds class * (largest coordinate + 1) to the boxes, which rounds them.
Two boxes whose IoU lies within that rounding of the threshold may go either way. So each image of random clustered
boxes is compared twice: with torchvision as it is, and with torchvision's exact class-by-class path on scores without
ties, from which nothing may differ. Outputs in bfloat16 are given to torchvision in float32, because it would otherwise
round the anchors to bfloat16, which moves them by pixels, and because it has no bfloat16 NMS on a CPU.
"""

from unittest.mock import patch

import torch
import torchvision
from torch import Tensor

from tests.instruments.agreement import IMAGE, anchors, differing, margin, models, random_outputs


def without_ties(outputs: dict[str, list[Tensor]]) -> dict[str, list[Tensor]]:
    """Returns the outputs in float64 with 1e-12 a place subtracted from the logits, so that no two are equal.

    torchvision leaves the order of equal scores open.
    """
    logits, first = [], 0
    for level in outputs["cls_logits"]:
        places = torch.arange(first, first + level[0].numel()).view(level.shape[1:])
        logits.append(level.double() - 1e-12 * places)
        first += places.numel()
    return {"cls_logits": logits, "bbox_regression": [level.double() for level in outputs["bbox_regression"]]}


def measure(cases: int, dtype: torch.dtype = torch.float32) -> dict[str, float]:
    """Compares both sides on random images.

    Returns the number of `images` and `detections` that differ, the `total` of torchvision's detections, the widest
    `margin` of an image that differs, and how many images differ from the exact path, which is `unexplained`.
    """
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
