"""Anchors in float32, whatever the features' dtype (torchvision's follow it: bf16 moves them by up to 8 pixels)."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

from retina_fast.stock import is_stock


def _grid(cell_anchors: Tensor, grid: tuple[int, int], stride: tuple[int, int]) -> Tensor:
    """(H*W*A, 4): the cell anchors moved to every cell, row by row."""
    y = torch.arange(grid[0], device=cell_anchors.device) * stride[0]
    x = torch.arange(grid[1], device=cell_anchors.device) * stride[1]
    y, x = torch.meshgrid(y, x, indexing="ij")
    shifts = torch.stack((x, y, x, y), dim=-1).reshape(-1, 1, 4)
    return (shifts + cell_anchors).reshape(-1, 4)


def batch_anchors(
    generator: AnchorGenerator, batch: Tensor, image_sizes: list[tuple[int, int]], features: Sequence[Tensor]
) -> list[Tensor]:
    """One ``(N, 4)`` float32 xyxy tensor an image, as torchvision's generator returns; a stock one's are shared.

    Args:
        generator: torchvision's ``AnchorGenerator``, or one of the user's own, which is then called as it is.
        batch: the padded images ``(B, C, H, W)``; a level's stride is H or W // its grid size.
        image_sizes: B (height, width) before padding, for a generator of the user's own.
        features: the levels ``(B, C, h, w)``.

    Raises:
        AssertionError: if the generator's sizes are not as many as the levels.
    """
    if not is_stock(generator, AnchorGenerator, "forward", "grid_anchors", "set_cell_anchors"):
        return generator(ImageList(batch, image_sizes), [level.float() for level in features])
    if len(generator.cell_anchors) != len(features):
        raise AssertionError(
            f"anchor_generator has sizes for {len(generator.cell_anchors)} levels, the backbone returns {len(features)}"
        )
    generator.set_cell_anchors(torch.float32, features[0].device)
    height, width = batch.shape[-2:]
    grids = [(level.shape[-2], level.shape[-1]) for level in features]
    levels = [
        _grid(cell, (h, w), (height // h, width // w))
        for cell, (h, w) in zip(generator.cell_anchors, grids, strict=True)
    ]
    return [torch.cat(levels)] * len(image_sizes)
