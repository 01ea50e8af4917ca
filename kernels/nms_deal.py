"""The boxes of an image dealt out by class, best first within each: a counting sort that keeps the order.

Classes with the same low bits share a group. One launch counts the boxes of each group in tiles of 512, a second adds
up what comes before a tile and writes each of its boxes to its place, and in which turn the groups' own tiles are to be
decided. So suppression need not compare boxes of different groups, nor learn on the host how large a class is.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from retina_fast.kernels.dispatch import tl, triton
from retina_fast.kernels.nms_overlap import count_of, position_of

_TILE = 512  # boxes that a program deals out
_CHUNK = 32  # tiles whose sizes it adds up in one go


class Dealt(NamedTuple):
    """The boxes of B images, those of each of G groups of classes together, best first."""

    positions: Tensor
    """(B, M) int32: position of the box among the image's boxes."""
    ranks: Tensor
    """(B, M) int32: how many boxes of the image are better."""
    starts: Tensor
    """(B, G + 1) int32: where each group begins, and where the last ends."""
    turns: Tensor
    """(B, M / decided + G) int32: how many tiles of boxes of one group there are, and for each its group plus G times
    how many tiles of the group come before it. First come the first tiles of all groups, then the second ones."""


@triton.jit(do_not_specialize=["width"])
def _count_groups_kernel(
    labels_ptr, keys_ptr, counts_ptr, orders_ptr, sizes_ptr, width, TILE: tl.constexpr, GROUPS: tl.constexpr
):
    """Program (t, b) counts the boxes of each group in a tile of image b, and notes of each box a number that orders
    the tile by group, then by rank."""
    tile = tl.program_id(0)
    image = tl.program_id(1).to(tl.int64)
    if keys_ptr is not None:
        keys_ptr += image * width
    t = tl.arange(0, TILE)
    i = tile * TILE + t
    inside = i < count_of(counts_ptr, image, width)
    label = tl.load(labels_ptr + image * width + position_of(keys_ptr, i, inside), mask=inside, other=0)
    group = (label & (GROUPS - 1)).to(tl.int32)
    tl.store(orders_ptr + image * width + i, group * TILE + t, mask=inside)
    sizes = tl.histogram(group, GROUPS, mask=inside)
    tl.store(sizes_ptr + (image * tl.num_programs(0) + tile) * GROUPS + tl.arange(0, GROUPS), sizes)


@triton.jit(do_not_specialize=["width", "turns"])
def _deal_kernel(
    keys_ptr, counts_ptr, orders_ptr, sizes_ptr, places_ptr, positions_ptr, ranks_ptr, starts_ptr, turns_ptr, width,
    turns, TILE: tl.constexpr, CHUNK: tl.constexpr, GROUPS: tl.constexpr, DECIDED: tl.constexpr,
):  # fmt: skip
    """Program (t, b) writes the boxes of a tile of image b to their places, and the turns of the t-th tiles of DECIDED
    boxes of all groups."""
    tile, tiles = tl.program_id(0), tl.num_programs(0)
    image = tl.program_id(1).to(tl.int64)
    if keys_ptr is not None:
        keys_ptr += image * width
    orders_ptr += image * width
    sizes_ptr += image * tiles * GROUPS
    places_ptr += (image * tiles + tile) * GROUPS
    group = tl.arange(0, GROUPS)
    whole, before = tl.zeros([GROUPS], tl.int32), tl.zeros([GROUPS], tl.int32)
    for first in range(0, tiles, CHUNK):
        other = first + tl.arange(0, CHUNK)[:, None]
        sizes = tl.load(sizes_ptr + other * GROUPS + group[None, :], mask=other < tiles, other=0)
        whole += tl.sum(sizes, axis=0)
        before += tl.sum(tl.where(other < tile, sizes, 0), axis=0)
    start = tl.cumsum(whole, axis=0) - whole
    own = tl.load(sizes_ptr + tile * GROUPS + group)
    # The place of the tile's first box of each group, less those of lower groups in the tile.
    tl.store(places_ptr + group, start + before - (tl.cumsum(own, axis=0) - own))
    turns_ptr += image * turns
    decided = tl.cdiv(whole, DECIDED)
    if tile == 0:
        tl.store(starts_ptr + image * (GROUPS + 1) + group, start)
        tl.store(starts_ptr + image * (GROUPS + 1) + GROUPS, tl.sum(whole, axis=0))
        tl.store(turns_ptr, tl.sum(decided, axis=0))
    for depth in range(tile, tl.cdiv(width, DECIDED), tiles):
        deeper = decided > depth
        turn = tl.sum(tl.minimum(decided, depth), axis=0) + tl.cumsum(deeper.to(tl.int32), axis=0)
        tl.store(turns_ptr + turn, depth * GROUPS + group, mask=deeper)
    tl.debug_barrier()  # the places are read by other threads

    t = tl.arange(0, TILE)
    count = count_of(counts_ptr, image, width)
    inside = tile * TILE + t < count
    order = tl.sort(tl.load(orders_ptr + tile * TILE + t, mask=inside, other=0x7FFFFFFF))
    place = image * width + tl.load(places_ptr + order // TILE, mask=inside, other=0) + t
    i = tile * TILE + order % TILE
    tl.store(positions_ptr + place, position_of(keys_ptr, i, inside), mask=inside)
    tl.store(ranks_ptr + place, i, mask=inside)


def deal(labels: Tensor, keys: Tensor | None, counts: Tensor, groups: int, decided: int) -> Dealt:
    """Two launches; the arguments are those of ``suppress_by_tiles``, a power of two groups, and how many boxes of a
    group are decided together."""
    batch, width = labels.shape
    tiles = max(1, triton.cdiv(width, _TILE))
    orders, positions, ranks = (counts.new_empty(batch, width, dtype=torch.int32) for _ in range(3))
    turns = triton.cdiv(width, decided) + groups  # their number, and as many as there can be
    starts, turned = (counts.new_empty(batch, n, dtype=torch.int32) for n in (groups + 1, turns))
    dealt = Dealt(positions, ranks, starts, turned)
    sizes, places = (counts.new_empty(batch, tiles, groups, dtype=torch.int32) for _ in range(2))
    with torch.cuda.device_of(labels):
        _count_groups_kernel[(tiles, batch)](
            labels, keys, counts, orders, sizes, width, TILE=_TILE, GROUPS=groups, enable_fp_fusion=False
        )
        _deal_kernel[(tiles, batch)](
            keys, counts, orders, sizes, places, *dealt, width, turns, TILE=_TILE, CHUNK=_CHUNK, GROUPS=groups,
            DECIDED=decided, num_warps=8, enable_fp_fusion=False,
        )  # fmt: skip
    return dealt
