"""How well a model's anchors fit the boxes of a data set: the highest IoU that each box reaches with any anchor.

On one level, the anchors of one shape differ only in their place on the grid. The IoU of a box with them grows with
their overlap, which is the product of an overlap in x and one in y; each is largest for the anchor nearest to the box.
So of each level and shape only the nearest anchor is compared: 45 in place of 200,000.
"""

import copy
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from retina_fast.anchors import generator_of
from retina_fast.data.coco import CocoDataset
from retina_fast.data.errors import UserError
from retina_fast.data.faults import corners
from retina_fast.transform import resized_size


class Level(NamedTuple):
    """The anchors of a level: its cell anchors (A, 4), the (height, width) of its grid, and its stride in y and x."""

    cells: Tensor
    grid: tuple[int, int]
    stride: tuple[int, int]


class AnchorFit:
    """A model's anchors for images of any size, compared with boxes.

    Args:
        model: a RetinaNet with torchvision's anchor generator. It loses its weights and cannot be used any more.

    Example::

        >>> import torch, retina_fast
        >>> model = retina_fast.retinanet_resnet50_fpn(weights_backbone=None)
        >>> fit = AnchorFit(model)
        >>> fit.best_ious(torch.tensor([[88.0, 88, 120, 120]]), (800, 800)).tolist()
        [1.0]
    """

    def __init__(self, model: Any) -> None:
        self.model = model.eval().to("meta")  # Only the shapes of its features are needed.
        for part in [*model.modules()]:
            for name, child in part.named_children():
                if type(child) is nn.BatchNorm2d:  # keeps shapes, and takes most of the time on this device
                    setattr(part, name, nn.Identity())
        self.generator = model.anchor_generator
        self._grids: dict[tuple[int, int], list[tuple[int, int]]] = {}

    def best_ious(self, boxes: Tensor, size: tuple[int, int]) -> Tensor:
        """(G,) the highest IoU of each box with any anchor.

        Args:
            boxes: (G, 4) xyxy in the pixels of the image.
            size: (height, width) of the image.
        """
        boxes = self.resized(boxes, size)
        found = torch.zeros(len(boxes))
        for level in self.levels(size):
            for cell in level.cells:
                found = torch.maximum(found, _best_iou(boxes, cell, level))
        return found

    def resized(self, boxes: Tensor, size: tuple[int, int]) -> Tensor:
        """The boxes (G, 4), from an image of `size`, in the pixels of the image as the model resizes it."""
        ratio = torch.tensor(resized_size(self.model.transform, *size)).float() / torch.tensor(size).float()
        return boxes * ratio.flip(0).repeat(2)

    def levels(self, size: tuple[int, int]) -> list[Level]:
        """The anchors for an image of `size` that is alone in its batch."""
        multiple = self.model.transform.size_divisible
        height, width = (-(-side // multiple) * multiple for side in resized_size(self.model.transform, *size))
        if (height, width) not in self._grids:
            features = self.model.backbone(torch.empty(1, 3, height, width, device="meta")).values()
            self._grids[height, width] = [(feature.shape[-2], feature.shape[-1]) for feature in features]
        return [
            Level(cell.float(), (h, w), (height // h, width // w))
            for cell, (h, w) in zip(self.generator.cell_anchors, self._grids[height, width], strict=True)
        ]

    def with_anchors(self, anchors: dict[str, Any]) -> "AnchorFit":
        """The same model with other anchors, as :func:`retina_fast.anchors.generator_of` takes them."""
        other = copy.copy(self)
        other.generator = generator_of(anchors)
        return other

    def strides(self, size: tuple[int, int]) -> list[int]:
        """The stride of each level for an image of `size`."""
        return [level.stride[0] for level in self.levels(size)]

    def anchor_shapes(self, size: tuple[int, int]) -> Tensor:
        """(A, 2) width and height of the anchors of all levels for an image of `size`."""
        return torch.cat([level.cells[:, 2:] - level.cells[:, :2] for level in self.levels(size)])


_FINEST = 17  # sides from 1 to 16 times a level's stride, and ratios from 1/4 to 4, in steps of a quarter octave
_SAMPLE = 20_000  # boxes that are compared: as many tell no more about a data set


def proposed_anchors(shapes: Tensor, strides: Sequence[int]) -> dict[str, Any]:
    """One anchor a cell: the sides, in proportion to the levels' strides, and the ratio of height to width that fit
    best. These have the highest mean, over the boxes, of the IoU with the best level's anchor around the same centre.

    Args:
        shapes: (G, 2) width and height of at least one box in the model's pixels.
        strides: of each level.

    Returns:
        What a builder's argument ``anchors`` takes.

    Example::

        >>> proposed_anchors(torch.tensor([[30.0, 30], [62, 66], [33, 34], [120, 125]]), [8, 16, 32])
        {'sizes': [[32], [64], [128]], 'ratios': [1.0]}
    """
    shapes = shapes[:: -(-len(shapes) // _SAMPLE)]
    best = (-1.0, 0.0, 0.0)
    steps = [(i - _FINEST // 2) / 4 for i in range(_FINEST)]
    steps.sort(key=abs)  # of equally good ones, the ratio nearest to 1
    multiples = [2.0 ** (i / 4) for i in range(_FINEST)]
    side = torch.tensor(multiples)[:, None] * torch.tensor(strides, dtype=torch.float32)  # (M, L)
    areas = shapes.prod(dim=1)[:, None, None]
    for ratio in (2.0**step for step in steps):
        width, height = side / ratio**0.5, side * ratio**0.5
        overlap = torch.minimum(shapes[:, :1, None], width) * torch.minimum(shapes[:, 1:, None], height)  # (G, M, L)
        iou = overlap / (areas + width * height - overlap)
        for mean, multiple in zip(iou.amax(dim=2).mean(dim=0).tolist(), multiples, strict=True):
            best = max(best, (round(mean, 6), multiple, ratio), key=lambda found: found[0])
    _, multiple, ratio = best
    return {"sizes": [[round(multiple * stride)] for stride in strides], "ratios": [round(ratio, 3)]}


def fitted_anchors(model: Any, data: CocoDataset) -> dict[str, Any]:
    """The anchors that :func:`proposed_anchors` proposes for a data set and a model, which cannot be used any more.

    Raises:
        UserError: if no image of a known size has a box.

    Example::

        >>> fitted_anchors(model, data)  # doctest: +SKIP
        {'sizes': [[19], [38], [76], [152]], 'ratios': [1.0]}
    """
    fit, by_size, shapes = AnchorFit(model), defaultdict(list), []
    for box in data.coco["annotations"]:
        if not box["iscrowd"] and (size := data.sizes[box["image_id"]]):
            by_size[size].append(box)
    for size, group in by_size.items():
        resized = fit.resized(corners(group).float(), size)
        shapes.append(resized[:, 2:] - resized[:, :2])
    if not shapes:
        raise UserError(f"{data.json_file}: has no box that anchors could be fitted to: leave out --anchors")
    return proposed_anchors(torch.cat(shapes), fit.strides(next(iter(by_size))))


def _best_iou(boxes: Tensor, cell: Tensor, level: Level) -> Tensor:
    """(G,) the highest IoU of each box with a cell anchor (4,) anywhere on the level's grid."""
    shift = [
        _nearest(boxes[:, axis::2], cell[axis::2], level.grid[1 - axis], level.stride[1 - axis]) for axis in (0, 1)
    ]
    anchors = torch.stack(shift * 2, dim=1) + cell  # (G, 4)
    overlap = torch.minimum(boxes[:, 2:], anchors[:, 2:]) - torch.maximum(boxes[:, :2], anchors[:, :2])
    intersection = overlap.clamp(min=0).prod(dim=1)
    areas = [(x[:, 2:] - x[:, :2]).prod(dim=1) for x in (boxes, anchors)]
    return intersection / (areas[0] + areas[1] - intersection)


def _nearest(spans: Tensor, cell: Tensor, count: int, stride: int) -> Tensor:
    """The place, of `count` along an axis, where the middle of a cell anchor is nearest to the middle of each span."""
    return ((spans - cell).mean(dim=1) / stride).round().clamp(0, count - 1) * stride
