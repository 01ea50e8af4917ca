"""Anchors in float32, whatever the features' dtype. torchvision's have that dtype: bf16 moves them by up to 8 pixels.

Anchors depend on sizes alone. So they are cached for a generator's last sizes, and a training step whose sizes are
cached launches no kernel for them.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

from retina_fast.device import stream_id, to_device
from retina_fast.stock import is_stock

_KEPT = 16  # sizes a generator; 3.2 MB each at 800x1344


class _Kept(NamedTuple):
    cells: list[Tensor]  # kept alive, so that their ids are not reused
    anchors: Tensor
    version: int


_CACHES: WeakKeyDictionary[AnchorGenerator, OrderedDict[Any, _Kept]] = WeakKeyDictionary()


def generator_of(anchors: Mapping[str, Any]) -> AnchorGenerator:
    """The anchor generator of plain data, as a builder's argument ``anchors`` and a model file hold it.

    Args:
        anchors: ``sizes``, for each level the sides of its squares in pixels, and ``ratios`` of height to width, which
            all levels have. A cell has an anchor of each size and ratio, of the square's area.

    Raises:
        ValueError: for other keys, no size or ratio, levels with different numbers of sizes, or a number that is not
            positive.

    Example::

        >>> generator_of({"sizes": [[32], [64], [128]], "ratios": [1.0]}).num_anchors_per_location()
        [1, 1, 1]
    """
    if not isinstance(anchors, Mapping) or set(anchors) != {"sizes", "ratios"}:
        raise ValueError(f"anchors must be a dictionary of sizes and ratios, got {anchors!r}")
    sizes, ratios = anchors["sizes"], anchors["ratios"]
    if not sizes or len({len(level) for level in sizes}) > 1 or not sizes[0] or not ratios:
        raise ValueError(f"anchors must have a ratio, and equally many sizes in each level, got {anchors!r}")
    if not all(0 < number < float("inf") for number in [*ratios, *(side for level in sizes for side in level)]):
        raise ValueError(f"sizes and ratios of anchors must be positive and finite, got {anchors!r}")
    return AnchorGenerator(tuple(map(tuple, sizes)), (tuple(ratios),) * len(sizes))


def taken_anchors(kwargs: dict[str, Any], levels: int, weights: Any = None) -> AnchorGenerator | None:
    """Takes the argument ``anchors`` out of a builder's, and makes the generator that it describes, if there is one.

    Raises:
        ValueError: with ``weights`` as well, for sizes of another number of levels than the backbone's, or as
            :func:`generator_of` does.
    """
    anchors = kwargs.pop("anchors", None)
    if anchors is None:
        return None
    if weights is not None:
        raise ValueError("the COCO weights are for torchvision's anchors: give weights or anchors, not both")
    generator = generator_of(anchors)
    if len(generator.sizes) != levels:
        raise ValueError(f"anchors must have sizes for the {levels} levels of the backbone, got {len(generator.sizes)}")
    return generator


def _grid(cell_anchors: Tensor, grid: tuple[int, int], stride: tuple[int, int]) -> Tensor:
    """(H*W*A, 4): the cell anchors moved to every cell, row by row."""
    y = torch.arange(grid[0], device=cell_anchors.device) * stride[0]
    x = torch.arange(grid[1], device=cell_anchors.device) * stride[1]
    y, x = torch.meshgrid(y, x, indexing="ij")
    shifts = torch.stack((x, y, x, y), dim=-1).reshape(-1, 1, 4)
    return (shifts + cell_anchors.float()).reshape(-1, 4)


def is_stock_generator(generator: object) -> bool:
    """Whether ``generator`` is torchvision's, whose anchors depend on nothing but sizes."""
    return is_stock(generator, AnchorGenerator, "forward", "grid_anchors", "set_cell_anchors")


def cell_versions(generator: AnchorGenerator) -> tuple[tuple[int, int], ...]:
    """A key that changes when the cell anchors of a generator are replaced or written to."""
    return tuple((id(cell), 0 if cell.is_inference() else cell._version) for cell in generator.cell_anchors)


def shared_anchors(generator: AnchorGenerator, batch: Tensor, features: Sequence[Tensor]) -> Tensor:
    """The anchors ``(N, 4)`` of a stock generator, float32 xyxy, that all images of a batch share.

    Raises:
        AssertionError: if the generator's sizes are not as many as the levels.
    """
    cells = list(generator.cell_anchors)
    if len(cells) != len(features):
        raise AssertionError(
            f"anchor_generator has sizes for {len(cells)} levels, the backbone returns {len(features)}"
        )
    grids = tuple((level.shape[-2], level.shape[-1]) for level in features)
    device = features[0].device
    if torch.compiler.is_compiling():  # sizes may be symbols there, and the graph is what is kept
        return _anchors([cell.to(device) for cell in cells], batch.shape[-2:], grids)
    # A stream must not read what another one may still be writing.
    key = (*batch.shape[-2:], grids, device, stream_id(device), cell_versions(generator))
    cache = _CACHES.setdefault(generator, OrderedDict())
    kept = cache.pop(key, None)
    if kept is None or kept.version != kept.anchors._version:  # a caller may have changed what it was given
        with torch.inference_mode(False), torch.no_grad():  # else training could not use what inference cached
            anchors = to_device(_anchors(cells, batch.shape[-2:], grids), device)
        kept = _Kept(cells, anchors, anchors._version)
    if type(kept.anchors) is Tensor:  # and not one that only a tracer understands
        cache[key] = kept
        if len(cache) > _KEPT:
            cache.popitem(last=False)
    return kept.anchors


def _anchors(cells: list[Tensor], size: Sequence[int], grids: Sequence[tuple[int, int]]) -> Tensor:
    """The anchors (N, 4) of all levels, on the device of the cell anchors."""
    height, width = size
    return torch.cat(
        [_grid(cell, (h, w), (height // h, width // w)) for cell, (h, w) in zip(cells, grids, strict=True)]
    )


def batch_anchors(
    generator: AnchorGenerator, batch: Tensor, image_sizes: Sequence[tuple[int, int]], features: Sequence[Tensor]
) -> Tensor:
    """The anchors of a batch, xyxy pixels: ``(N, 4)`` float32 that all images share, from torchvision's generator; or
    ``(B, N, 4)`` from a user's own, which may give every image others.

    Args:
        generator: torchvision's ``AnchorGenerator``, or one of the user's own, which is then called as it is.
        batch: the padded images ``(B, C, H, W)``; a level's stride is H or W // its grid size.
        image_sizes: B (height, width) before padding, for a generator of the user's own.
        features: the levels ``(B, C, h, w)``.

    Raises:
        AssertionError: if the generator's sizes are not as many as the levels.
    """
    if is_stock_generator(generator):
        return shared_anchors(generator, batch, features)
    return torch.stack(generator(ImageList(batch, list(image_sizes)), [level.float() for level in features]))
