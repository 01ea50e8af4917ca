"""The IoU (intersection over union) of pairs of boxes, xyxy, rounded exactly as torchvision's ``box_iou`` rounds."""

import torch
from torch import Tensor

from retina_fast.kernels.dispatch import tl, triton


def box_iou(boxes: Tensor, anchors: Tensor) -> Tensor:
    """IoU (...) of boxes (..., 4) and anchors (..., 4), which are broadcast."""
    area = (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])
    anchor_area = (anchors[..., 2] - anchors[..., 0]) * (anchors[..., 3] - anchors[..., 1])
    width = torch.minimum(boxes[..., 2], anchors[..., 2]).sub_(torch.maximum(boxes[..., 0], anchors[..., 0]))
    height = torch.minimum(boxes[..., 3], anchors[..., 3]).sub_(torch.maximum(boxes[..., 1], anchors[..., 1]))
    intersection = width.clamp_(min=0).mul_(height.clamp_(min=0))
    return intersection.div_((area + anchor_area).sub_(intersection))


def pairwise_iou(boxes: Tensor, anchors: Tensor) -> Tensor:
    """IoU (G, n) of boxes (G, 4) and anchors (n, 4)."""
    return box_iou(boxes[:, None], anchors)


@triton.jit
def tile_iou(x1, y1, x2, y2, area, box_x1, box_y1, box_x2, box_y2):
    """The IoU of a tile of anchors and one ground truth, or what is not above 0 where they do not intersect. Most pairs
    do not, and to divide 0 would take the slow path of div.rn, some 30 instructions."""
    width = tl.minimum(box_x2, x2) - tl.maximum(box_x1, x1)
    height = tl.minimum(box_y2, y2) - tl.maximum(box_y1, y1)
    intersection = width * height
    union = (box_x2 - box_x1) * (box_y2 - box_y1) + area - intersection
    return tl.div_rn(tl.where(tl.minimum(width, height) > 0, intersection, -union), union)


@triton.jit
def iou_with(x1, y1, x2, y2, boxes_ptr, box):
    """tile_iou of a tile of anchors and row ``box`` of the ground truths (G, 4)."""
    ptr = boxes_ptr + box * 4
    box_x1, box_y1, box_x2, box_y2 = tl.load(ptr), tl.load(ptr + 1), tl.load(ptr + 2), tl.load(ptr + 3)
    return tile_iou(x1, y1, x2, y2, (x2 - x1) * (y2 - y1), box_x1, box_y1, box_x2, box_y2)
