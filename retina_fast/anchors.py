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


def is_stock_generator(generator: object) -> bool:
    """Whether ``generator`` is torchvision's, whose anchors depend on nothing but the shapes."""
    return is_stock(generator, AnchorGenerator, "forward", "grid_anchors", "set_cell_anchors")


def shared_anchors(generator: AnchorGenerator, batch: Tensor, features: Sequence[Tensor]) -> Tensor:
    """The anchors ``(N, 4)`` of a stock generator, float32 xyxy, that all images of a batch share.

    Raises:
        AssertionError: if the generator's sizes are not as many as the levels.
    """
    if len(generator.cell_anchors) != len(features):
        raise AssertionError(
            f"anchor_generator has sizes for {len(generator.cell_anchors)} levels, the backbone returns {len(features)}"
        )
    device = features[0].device
    if not torch.compiler.is_compiling():  # moved once, kept by the generator
        generator.set_cell_anchors(torch.float32, device)
    cells = [cell.to(device, torch.float32) for cell in generator.cell_anchors]
    height, width = batch.shape[-2:]
    grids = [(level.shape[-2], level.shape[-1]) for level in features]
    return torch.cat(
        [_grid(cell, (h, w), (height // h, width // w)) for cell, (h, w) in zip(cells, grids, strict=True)]
    )


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
    if not is_stock_generator(generator):
        return generator(ImageList(batch, image_sizes), [level.float() for level in features])
    return [shared_anchors(generator, batch, features)] * len(image_sizes)
