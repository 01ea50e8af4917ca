"""Head outputs that resemble a detector's, and how the detections of two detectors differ."""

import torch
import torchvision
from torch import Tensor
from torchvision.models.detection.image_list import ImageList

from retina_fast import RetinaNet

K = 91  # classes
GRIDS = ((32, 40), (16, 20), (8, 10), (4, 5), (2, 3))  # rows and columns of cells, by level
IMAGE = (250, 317)  # height and width of the image, in a padded batch of 256 x 320


def random_outputs(seed: int) -> dict[str, list[Tensor]]:
    """Returns the head outputs of one image by level, (1, N, C). Neighbouring anchors see the same object."""
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


def models(num_classes: int = K, loss_type: str = "l1") -> tuple[torchvision.models.detection.RetinaNet, RetinaNet]:
    """Returns torchvision's model and ours without a trunk, for their anchors, losses and postprocessing."""
    backbone = torch.nn.Identity()
    backbone.out_channels = 8  # pyrefly: ignore[bad-argument-type]
    theirs = torchvision.models.detection.RetinaNet(backbone, num_classes).eval()
    ours = RetinaNet(backbone, num_classes).eval()
    for model in (theirs, ours):
        model.head.regression_head._loss_type = loss_type
    return theirs, ours


def anchors(model: torchvision.models.detection.RetinaNet) -> list[list[Tensor]]:
    """Returns the anchors (N, 4) of one image by level, in a list of this one image."""
    features = [torch.zeros(1, 8, h, w) for h, w in GRIDS]
    (joined,) = model.anchor_generator(ImageList(torch.zeros(1, 3, 256, 320), [IMAGE]), features)
    return [list(joined.split([h * w * 9 for h, w in GRIDS]))]


def lacking(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> Tensor:
    """Returns which of their detections are missing from ours, (D,) bool.

    A detection is missing if none of ours has its label, its box to 0.01 px and its score to 1e-5.
    """
    near = (ours["boxes"][:, None] - theirs["boxes"]).abs().amax(dim=2) <= 0.01
    near &= (ours["scores"][:, None] - theirs["scores"]).abs() <= 1e-5
    near &= ours["labels"][:, None] == theirs["labels"]
    return ~near.any(dim=0)


def differing(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> int:
    """Returns how many of their detections are missing from ours."""
    return int(lacking(ours, theirs).sum())


def margin(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Returns how close to the NMS threshold of 0.5 the detections come that only one side has.

    The distance is that of the nearest IoU with a detection of the same class; infinity where nothing differs.
    """
    nearest = float("inf")
    for these, those in ((ours, theirs), (theirs, ours)):
        alone = lacking(those, these)
        for other in (ours, theirs):
            iou = torchvision.ops.box_iou(these["boxes"][alone].double(), other["boxes"].double())
            distances = (iou - 0.5).abs()[these["labels"][alone][:, None] == other["labels"]]
            nearest = min([nearest, *distances.tolist()])
    return nearest


def spread(head):
    """Give a head's convs weights whose outputs differ. Those of their own start nearly do not, and rounding then
    decides which score is the higher."""
    for conv in head.modules():
        if isinstance(conv, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(conv.weight)
            if conv.bias is not None:
                torch.nn.init.zeros_(conv.bias)
