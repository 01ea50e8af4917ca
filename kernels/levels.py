"""The heads' outputs as the operations read them: a list of levels, each in memory as its convolution wrote it.

A level is ``(B, A*C, H, W)``, the output of a head, or ``(B, N, C)``, flattened as torchvision concatenates them. In
channels_last memory the first form is the second, so that ``flatten`` returns a view. Only NCHW memory is copied.

A Triton kernel takes the levels, and their sizes, as tuples with one entry a level. For the integers in a tuple Triton
ignores do_not_specialize and compiles variants for 1 and for multiples of 16, so that nearly every image size would
compile the kernel again. Odd negative numbers are neither, so ``encode_sizes`` turns sizes into such numbers.
"""

from collections.abc import Sequence
from itertools import accumulate

from torch import Tensor

from retina_fast.kernels.dispatch import tl, triton


def count_anchors(level: Tensor, channels: int) -> int:
    """The number of anchors in one image of a level, with ``channels`` values for each anchor.

    Raises:
        ValueError: if the level is neither ``(B, A*channels, H, W)`` nor ``(B, N, channels)``.
    """
    fits = level.shape[1] % channels == 0 if level.dim() == 4 else level.dim() == 3 and level.shape[2] == channels
    if not fits:
        raise ValueError(f"a level must be (B, A*{channels}, H, W) or (B, N, {channels}), got {tuple(level.shape)}")
    return level.shape[1:].numel() // channels


def check_levels(levels: Sequence[Tensor], channels: int) -> int:
    """The number of anchors in one image of all levels, after a check that the levels belong together.

    Raises:
        ValueError: if there is no level, a level has the wrong shape, or the levels differ in batch size, dtype or
            device.
    """
    if not levels:
        raise ValueError("levels must hold at least one level")
    anchors = sum(count_anchors(level, channels) for level in levels)
    for kind, values in (
        ("batch size", [level.shape[0] for level in levels]),
        ("dtype", [level.dtype for level in levels]),
        ("device", [level.device for level in levels]),
    ):
        if any(value != values[0] for value in values):
            raise ValueError(f"levels must share a {kind}, got {values}")
    return anchors


def flatten(level: Tensor, channels: int) -> Tensor:
    """A level as ``(B, H*W*A, channels)``. The anchors are in torchvision's order: by row, column, anchor of a cell."""
    anchors = count_anchors(level, channels)
    return level.permute(0, 2, 3, 1).reshape(level.shape[0], anchors, channels) if level.dim() == 4 else level


def flatten_all(levels: Sequence[Tensor], channels: int) -> list[Tensor]:
    """Every level as ``(B, N_l, channels)``."""
    return [flatten(level, channels) for level in levels]


def encode_sizes(sizes: Sequence[int]) -> tuple[int, ...]:
    """Sizes as the tuple argument of a kernel takes them."""
    return tuple(-1 - 2 * size for size in sizes)


def tile_levels(levels: Sequence[Tensor], tile: int) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Where each of the levels (B, N_l, C) begins among all anchors, and where among all tiles of so many anchors, both
    encoded and with the end of the last; and how many tiles there are."""
    sizes = [level.shape[1] for level in levels]
    starts = [*accumulate(sizes, initial=0)]
    first_tiles = [*accumulate((triton.cdiv(size, tile) for size in sizes), initial=0)]
    return encode_sizes(starts), encode_sizes(first_tiles), first_tiles[-1]


@triton.jit
def decode_size(code):
    """The size that ``encode_sizes`` made this code of."""
    return ~code >> 1


@triton.jit
def pick(entries, level):
    """The entry of a level: a pointer or an encoded size. The level is known only when the kernel runs."""
    entry = entries[0]
    for i in tl.static_range(1, len(entries)):
        if level == i:
            entry = entries[i]
    return entry


@triton.jit
def pick_size(codes, level):
    """The size of a level, from encoded sizes."""
    return decode_size(pick(codes, level))


@triton.jit
def level_of(first_tiles, tile):
    """The level that holds a tile, where tiles are counted through the levels. ``first_tiles`` holds the encoded number
    of each level's first tile, and last the number of all tiles."""
    level = 0
    for i in tl.static_range(1, len(first_tiles) - 1):
        if tile >= decode_size(first_tiles[i]):
            level = i
    return level


@triton.jit
def load_rows(ptr, row, mask):
    """The given rows of a (*, 4) tensor, such as boxes, as four float32 vectors: one a column, 0 where masked."""
    ptr += row * 4
    return (
        tl.load(ptr, mask=mask, other=0.0).to(tl.float32),
        tl.load(ptr + 1, mask=mask, other=0.0).to(tl.float32),
        tl.load(ptr + 2, mask=mask, other=0.0).to(tl.float32),
        tl.load(ptr + 3, mask=mask, other=0.0).to(tl.float32),
    )


@triton.jit
def truths_of(offsets_ptr, num_boxes, image):
    """The first row of an image's ground truths among those of all images, and their count, which never goes beyond
    num_boxes, whatever the offsets say."""
    first = tl.load(offsets_ptr + image)
    return first, tl.where(first < 0, 0, tl.minimum(tl.load(offsets_ptr + image + 1), num_boxes) - first)


@triton.jit
def load_matched(boxes_ptr, first, count, index, foreground):
    """The rows first + index of a (*, 4) tensor as four float32 vectors. What is not foreground, or has an index from
    count up, is NaN, and nothing is read for it."""
    known = foreground & (index < count)
    ptr, nan = boxes_ptr + (first + index) * 4, float("nan")
    return (
        tl.load(ptr, mask=known, other=nan).to(tl.float32),
        tl.load(ptr + 1, mask=known, other=nan).to(tl.float32),
        tl.load(ptr + 2, mask=known, other=nan).to(tl.float32),
        tl.load(ptr + 3, mask=known, other=nan).to(tl.float32),
    )


@triton.jit
def store_rows(ptr, row, a, b, c, d, mask):
    """Writes four columns to the given rows of a (*, 4) tensor, in the tensor's dtype."""
    ptr += row * 4
    dtype = ptr.dtype.element_ty
    tl.store(ptr, a.to(dtype), mask=mask)
    tl.store(ptr + 1, b.to(dtype), mask=mask)
    tl.store(ptr + 2, c.to(dtype), mask=mask)
    tl.store(ptr + 3, d.to(dtype), mask=mask)
