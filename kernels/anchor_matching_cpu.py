"""Anchor matching in PyTorch, for all images at once; see anchor_matching.py.

Few anchors have an IoU above the lower threshold. An IoU is at most the ratio of the two areas, so a ground truth is
compared only with tiles of anchors whose rectangle it meets and whose areas are near its own, many such pairs in one
operation. The low-quality rule needs the highest IoU of each ground truth, wherever it lies. Where this is below the
threshold, tiles of other sizes are searched, too, and the pairs that reach it once more for ties.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from retina_fast.kernels.labels import BACKGROUND, IGNORED
from retina_fast.kernels.pair_iou import pairwise_iou

_TILE = 256  # anchors; fewer make more pairs, more make pairs of anchors that are far away
_AT_ONCE = 1 << 15  # IoUs of an operation, which stay in the cache
_ROUNDING = 1 + 1e-5  # by which a rounded IoU may exceed the ratio of the rounded areas, and more
_LAST = 2**31 - 1


class Thresholds(NamedTuple):
    """When an anchor is foreground; see :func:`retina_fast.kernels.anchor_matching.anchor_matching`."""

    fg: float
    bg: float
    low_quality: bool


class _Pairs(NamedTuple):
    """Ground truths and tiles of anchors, (P,) each."""

    truth: Tensor
    tile: Tensor


class _Batch(NamedTuple):
    tiles: Tensor  # (5, tiles, n): the four sides of the anchors, and their areas
    boxes: Tensor  # (5, G, 1) ground truths of all images, as the tiles
    image: Tensor  # (G,) whose ground truth it is
    row: Tensor  # (G,) within its image
    tiles_an_image: int
    is_shared: bool  # whether all images have the same anchors

    def pairs(self, which: Tensor) -> _Pairs:
        """Those of ``which`` (G, T)."""
        truth, tile = which.nonzero(as_tuple=True)
        return _Pairs(truth, tile if self.is_shared else tile + self.image[truth] * self.tiles_an_image)

    def anchors(self, pairs: _Pairs) -> Tensor:
        """The first anchor of each tile (P,), counted through all images."""
        place = pairs.tile if not self.is_shared else pairs.tile + self.image[pairs.truth] * self.tiles_an_image
        return place * self.tiles.shape[2]

    def ious(self, pairs: _Pairs) -> Iterator[tuple[_Pairs, Tensor]]:
        """Some of the pairs after the other, and their IoUs (p, n), rounded as :func:`box_iou` rounds them."""
        step = max(1, _AT_ONCE // self.tiles.shape[2])
        for truth, tile in zip(pairs.truth.split(step), pairs.tile.split(step), strict=True):
            anchors, boxes = self.tiles.index_select(1, tile), self.boxes.index_select(1, truth)
            low = torch.maximum(anchors[:2], boxes[:2], out=anchors[:2])
            width, height = torch.minimum(anchors[2:4], boxes[2:4], out=anchors[2:4]).sub_(low).clamp_(min=0)
            intersection = width.mul_(height)
            yield _Pairs(truth, tile), intersection.div_(anchors[4].add_(boxes[4]).sub_(intersection))

    def sizes(self) -> tuple[Tensor, Tensor]:
        """Whether each ground truth meets the rectangle around each tile of its image, (G, T), and a bound of their
        IoUs."""
        lower, upper = self.tiles.amin(dim=2), self.tiles.amax(dim=2)  # (5, tiles)
        if self.is_shared:
            lower, upper = lower[:, None], upper[:, None]
        else:
            lower, upper = (x.view(5, -1, self.tiles_an_image)[:, self.image] for x in (lower, upper))
        x1, y1, x2, y2, area = self.boxes
        meets = (x1 < upper[2]) & (x2 > lower[0]) & (y1 < upper[3]) & (y2 > lower[1])
        nearest = torch.minimum(torch.maximum(area, lower[4]), upper[4])
        return meets, torch.minimum(area, nearest).div_(torch.maximum(area, nearest)).mul_(_ROUNDING)


def _search(batch: _Batch, images: int, thresholds: Thresholds) -> tuple[Tensor, Tensor, Tensor]:
    """For all anchors of all images, (anchors,): the highest IoU and its ground truth as an int64 that orders as IoU
    and then index do, -1 where no IoU reaches the lower threshold; whether they tie the highest IoU of a ground truth.
    And the highest IoU of each ground truth, (G,)."""
    fg, bg, low_quality = thresholds
    least, size = min(fg, bg), batch.tiles.shape[2]
    meets, bound = batch.sizes()
    near = meets & ~(bound < least)
    keys = batch.row.new_full((images * batch.tiles_an_image * size,), -1)
    ties = torch.zeros_like(keys, dtype=torch.bool)
    highest, searched = batch.boxes.new_zeros(len(batch.image)), []

    def search(which: Tensor, with_keys: bool) -> None:
        for pairs, iou in batch.ious(batch.pairs(which)):
            peak = iou.amax(dim=1)
            highest.scatter_reduce_(0, pairs.truth, peak, "amax")
            searched.append((*pairs, peak))
            if with_keys:
                reaches = (peak >= least).nonzero().squeeze(1)
                iou = iou[reaches]
                pair, place = (iou >= least).nonzero(as_tuple=True)
                bits = iou[pair, place].view(torch.int32).long() << 32
                pair = reaches[pair]
                key = bits | (_LAST - batch.row[pairs.truth[pair]])
                keys.scatter_reduce_(0, batch.anchors(pairs)[pair] + place, key, "amax")

    search(near, least > 0)
    if low_quality:
        search(meets & ~near & (highest < least)[:, None] & ~(bound < highest[:, None]), False)
        if searched:
            truth, tile, peak = (torch.cat(values) for values in zip(*searched, strict=True))
            which = (peak == highest[truth]) & (peak < max(fg, bg))  # anchors of a higher IoU are foreground already
            for pairs, iou in batch.ious(_Pairs(truth[which], tile[which])):
                pair, place = (iou == highest[pairs.truth, None]).nonzero(as_tuple=True)
                ties[batch.anchors(pairs)[pair] + place] = True
    return keys, ties, highest


def _with_areas(boxes: Tensor) -> Tensor:
    """Boxes (..., 4) as (5, ...): their sides, which vector instructions read one after the other, and areas."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    sides = torch.empty(5, *x1.shape, dtype=boxes.dtype, device=boxes.device)
    torch.stack((x1, y1, x2, y2), out=sides[:4])
    torch.mul(sides[2] - sides[0], sides[3] - sides[1], out=sides[4])
    return sides


def match_indices(anchors: Tensor, boxes: Tensor, rows: list[int], thresholds: Thresholds) -> tuple[Tensor, Tensor]:
    """The anchors that are not background, (C,), counted through all images, and their matched indices (C,).

    Args:
        anchors: ``(N, 4)`` float32, or ``(B, N, 4)``, N above 0.
        boxes: ``(G, 4)`` float32.
        rows: B + 1 offsets into the boxes, which some image has.
        thresholds: when an anchor is foreground.
    """
    fg, bg, low_quality = thresholds
    counts, device = torch.tensor([stop - start for start, stop in pairwise(rows)], device="cpu"), anchors.device
    images, n = len(counts), anchors.shape[-2]
    image = torch.arange(images, device="cpu").repeat_interleave(counts)
    row = torch.cat([torch.arange(count, device="cpu") for count in counts.tolist()])
    step = min(_TILE, n)
    columns = _with_areas(anchors)  # (5, N) or (5, B, N)
    tiles = columns
    if n % step:  # the last tile of an image is filled with its last anchor
        tiles = torch.cat((tiles, tiles[..., -1:].expand(*tiles.shape[:-1], -n % step)), dim=-1)
    batch = _Batch(
        tiles.reshape(5, -1, step),
        _with_areas(boxes[rows[0] : rows[-1]])[..., None],
        image.to(device),
        row.to(device),
        -(-n // step),
        anchors.dim() == 2,
    )
    keys, ties, highest = _search(batch, images, thresholds)
    keys, ties = (values.view(images, -1)[:, :n].reshape(-1) for values in (keys, ties))  # (B * N,)

    wanted = ties | (keys >= 0)
    for b, (start, stop) in enumerate(pairwise(rows)):
        if start == stop:
            continue
        of_image = slice(b * n, (b + 1) * n)
        if low_quality and not highest[start - rows[0] : stop - rows[0]].all():  # every anchor ties a highest IoU of 0
            ties[of_image] = wanted[of_image] = True
        elif min(fg, bg) <= 0:
            wanted[of_image] = True
    places = wanted.nonzero().squeeze(1)
    key = keys[places]
    value, index = (key >> 32).int().view(torch.float32), _LAST - (key & _LAST)
    lone = (key < 0).nonzero().squeeze(1)  # anchors of which only a tie is known
    for b, of_image in enumerate(lone.split((places[lone] // n).bincount(minlength=images).tolist())):
        if not len(of_image):
            continue
        own = boxes[rows[b] : rows[b + 1]]
        of_all = columns[:4] if columns.dim() == 2 else columns[:4, b]
        for part in of_image.split(max(1, _AT_ONCE // len(own))):
            iou = pairwise_iou(own, of_all[:, places[part] - b * n].T).nan_to_num_(0)  # (G, n)
            value[part], index[part] = iou.max(dim=0)
    found = torch.where(value < bg, BACKGROUND, torch.where(value < fg, IGNORED, index))
    return places, torch.where(ties[places], index, found)
