"""The last convs of a network in eight bits, computed in float32 where a detection can be, if that is at few cells.

Logits and box offsets are to be those of float32 convs. But nearly all cells of the pyramid are background, and these
two convs, left in float32, would take as long as all the others in eight bits. So the graph
(:mod:`retina_fast.deploy.eight_bits.sieved_graph`) computes the logits in eight bits, which serve to decide: a logit is
wanted in float32 if that value, plus a margin, exceeds the score threshold, and if it can be one of the k highest of
its image and level, which are all that is ever looked at. Such a logit is the product of the conv's float32 weights for
it with the 8-bit features around its cell. Those that exceed the threshold, and are among the highest, are the
candidates; box offsets are computed at their cells. Where many cells are wanted, a conv runs at all of them.

A level's margin is twice the largest amount by which an 8-bit logit was too low on the calibration images, and its
excess twice that by which one was too high. With q for 8-bit logits and q_k for the k-th highest of them, at least k
float32 logits are q_k - excess or more, so none of the k highest has a q below q_k - excess - margin.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from retina_fast.kernels.candidate_selection import Candidates, candidates_of, contenders, logit

MARGIN = 2.0
"""In units of the largest error on the calibration images."""
FEW_LOGITS = 64
"""Up to so many logits a cell are few: all of them are computed at each cell that has a candidate."""
GROUP = 64
"""With more, cells are taken in groups of this size; each group computes the logits that one of its cells wants."""
CELLS = 4096
"""So many cells are computed at a time, which bounds the memory that their neighbourhoods take in float32."""
MOST_CELLS = 0.4
"""If a conv is wanted at a larger share of a level's cells, it is computed at all of them."""


@dataclass(frozen=True)
class Codes:
    """How values are held in uint8: a code stands for ``scale * (code - zero)``."""

    scale: float
    zero: int

    def values(self, codes: Tensor) -> Tensor:
        """The float32 values of codes."""
        return (codes.float() - self.zero).mul_(self.scale)


@dataclass(frozen=True)
class LastConv:
    """A conv in float32, of stride 1, on features that are codes.

    Attributes:
        weight: (O, C, kernel height, kernel width).
        bias: (O,).
        pads: rows above, columns to the left, rows below, columns to the right.
        inputs: what a code of the features stands for, a level each.
    """

    weight: Tensor
    bias: Tensor
    pads: tuple[int, int, int, int]
    inputs: tuple[Codes, ...]

    def padded(self, features: Tensor, level: int) -> Tensor:
        """Features (B, H, W, C) uint8 with a border of the code that stands for 0."""
        top, left, bottom, right = self.pads
        return F.pad(features, (0, 0, left, right, top, bottom), value=self.inputs[level].zero)

    def everywhere(self, features: Tensor, level: int) -> Tensor:
        """The outputs (B, H, W, O) for features (B, H, W, C) uint8."""
        values = self.inputs[level].values(self.padded(features, level)).permute(0, 3, 1, 2)
        return F.conv2d(values, self.weight, self.bias).permute(0, 2, 3, 1)

    def patches(self, padded: Tensor, cells: Tensor) -> Tensor:
        """(N, kernel height * kernel width * C) uint8: what the conv reads at N cells.

        Args:
            padded: of :meth:`padded`.
            cells: (N,) their indices among the B * H * W cells without the border.
        """
        rows, columns, channels = padded.shape[1:]
        sides = self.weight.shape[2:]
        height, width = rows - sides[0] + 1, columns - sides[1] + 1
        down, right = (torch.arange(side) for side in sides)
        beside = (down[:, None] * columns + right).flatten()  # where a cell's neighbours lie beside the first of them
        line = cells // width  # of all images
        first = (line + line // height * (sides[0] - 1)) * columns + cells % width
        index = (first[:, None] + beside).flatten()
        return padded.view(-1, channels).index_select(0, index).view(len(cells), len(beside) * channels)

    def at_patches(self, patches: Tensor, level: int, outputs: Tensor | None = None) -> Tensor:
        """(P, N): P of the outputs, all if None, for N patches of a level."""
        codes = self.inputs[level]
        values = patches.float()
        if codes.zero:
            values -= codes.zero
        weight, bias = self.weight.permute(0, 2, 3, 1).flatten(1), self.bias  # a view of memory in channels_last
        if outputs is not None:
            weight, bias = weight.index_select(0, outputs), bias.index_select(0, outputs)
        return torch.addmm(bias[:, None], weight, values.T, alpha=codes.scale)

    def at(self, features: Tensor, level: int, cells: Tensor) -> Tensor:
        """(N, O) at N cells, their indices among the B * H * W of features (B, H, W, C) uint8."""
        if len(cells) > MOST_CELLS * features.shape[:3].numel():
            return self.everywhere(features, level).flatten(0, 2).index_select(0, cells)
        padded = self.padded(features, level)
        rows = [self.at_patches(self.patches(padded, some), level) for some in cells.split(CELLS)]
        return torch.cat(rows, dim=1).T


@dataclass(frozen=True)
class Sieve:
    """What finds the candidates, and the convs that are computed there.

    Its methods take the outputs of the graph, uint8 all: L levels of logits (B, H, W, O), then L of the features that
    the logits' conv reads, then L of those that the other reads, (B, H, W, C) each.

    Attributes:
        logits: the conv that gives the logits.
        deltas: the one that gives the box offsets.
        codes: what a code of the logits in eight bits stands for, a level each.
        margins: how far a logit in eight bits may lie below the one in float32, a level each.
        excesses: how far it may lie above, a level each.
    """

    logits: LastConv
    deltas: LastConv
    codes: tuple[Codes, ...]
    margins: tuple[float, ...]
    excesses: tuple[float, ...]

    def everywhere(self, outputs: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """The levels (B, O, H, W) of logits and of box offsets, in channels_last memory."""
        levels = len(self.codes)
        logits, deltas = (
            [conv.everywhere(outputs[first + i], i).permute(0, 3, 1, 2) for i in range(levels)]
            for conv, first in ((self.logits, levels), (self.deltas, 2 * levels))
        )
        return logits, deltas

    def candidates(self, outputs: Sequence[Tensor], num_classes: int, score_thresh: float, topk: int) -> Candidates:
        """What :func:`retina_fast.kernels.candidate_selection.candidate_selection` gives for the logits of all cells,
        unless an image makes larger errors in eight bits than margin and excess allow for."""
        batch, levels = len(outputs[0]), range(len(self.codes))
        of_levels = [self._found(i, outputs[i], outputs[len(levels) + i], logit(score_thresh), topk) for i in levels]
        images = [[found[b] for found in of_levels] for b in range(batch)]
        sizes = [outputs[i].shape[1:].numel() for i in levels]
        return candidates_of(images, sizes, num_classes, topk, outputs[0].device)

    def offsets(self, outputs: Sequence[Tensor], anchors: Tensor, per_cell: int) -> Tensor:
        """The box offsets (B, M, C) of chosen anchors (B, M), counted over all levels; a cell has ``per_cell``."""
        batch, levels = len(anchors), len(self.codes)
        cells = anchors // per_cell
        sizes = [level.shape[1:3].numel() for level in outputs[:levels]]
        chosen = torch.zeros(batch, sum(sizes), dtype=torch.bool).scatter_(1, cells, True)
        rows, places, first = [], [], 0
        for i, of_level in enumerate(chosen.split(sizes, dim=1)):
            flat = of_level.flatten()
            rows.append(self.deltas.at(outputs[2 * levels + i], i, flat.nonzero()[:, 0]))
            places.append(flat.cumsum(0).view_as(of_level) + (first - 1))
            first += len(rows[i])
        index = torch.cat(places, dim=1).gather(1, cells) * per_cell + anchors % per_cell
        of_anchors = torch.cat(rows).view(first * per_cell, len(self.deltas.bias) // per_cell)
        return of_anchors.index_select(0, index.flatten()).unflatten(0, anchors.shape)

    def _found(
        self, level: int, codes: Tensor, features: Tensor, threshold: float, topk: int
    ) -> list[tuple[Tensor, Tensor]]:
        """For each image the logits above a threshold that can be among the highest, and their positions among all of
        the image and level."""
        held, count = self.codes[level], codes.shape[3]
        # Code 255 may stand for any greater value, and code 0 for any lower one.
        least = math.ceil(max(0.0, min(255.0, (threshold - self.margins[level]) / held.scale + held.zero)))
        greatest = codes.amax(dim=3).flatten()
        cells = (greatest >= least).nonzero()[:, 0]
        of_cells = codes.view(-1, count).index_select(0, cells)
        images = cells // codes.shape[1:3].numel()
        leasts = torch.full_like(images, least, dtype=torch.uint8)  # of each cell
        if least:
            leasts = self._least_of_best(level, of_cells, images, len(codes), topk).clamp_(min=least)[images]
            chosen = (greatest.index_select(0, cells) >= leasts).nonzero()[:, 0]
            if len(chosen) < len(cells):
                cells, of_cells, leasts = cells[chosen], of_cells.index_select(0, chosen), leasts[chosen]
        if len(cells) > MOST_CELLS * len(greatest):
            exact = self.logits.everywhere(features, level).flatten(1)
            return [(image[place], place) for image in exact for place in (contenders(image, threshold, topk),)]
        if count <= FEW_LOGITS:
            rows = self.logits.at(features, level, cells)
            row, output = (rows > threshold).nonzero(as_tuple=True)
            values, places = rows[row, output], cells[row] * count + output
        else:
            values, places = self._in_groups(level, features, cells, of_cells >= leasts[:, None], threshold)
        size = codes.shape[1:].numel()
        counts = torch.searchsorted(places, torch.arange(len(codes) + 1) * size).diff().tolist()
        split = zip(values.split(counts), places.split(counts), strict=True)
        return [(value, place - b * size) for b, (value, place) in enumerate(split)]

    def _in_groups(
        self, level: int, features: Tensor, cells: Tensor, wanted: Tensor, threshold: float
    ) -> tuple[Tensor, Tensor]:
        """The logits above a threshold among those wanted of each cell (N, O), and their rising positions among all."""
        order = wanted.sum(dim=1).argsort()  # by how many logits they want
        padded = self.logits.padded(features, level)
        values, places = [torch.empty(0)], [cells[:0]]
        for group in order.split(GROUP) if len(order) else ():
            outputs = wanted.index_select(0, group).any(dim=0).nonzero()[:, 0]
            own = cells.index_select(0, group)
            rows = self.logits.at_patches(self.logits.patches(padded, own), level, outputs).T
            row, column = (rows > threshold).nonzero(as_tuple=True)
            values.append(rows[row, column])
            places.append(own[row] * wanted.shape[1] + outputs[column])
        place, order = torch.cat(places).sort()
        return torch.cat(values)[order], place

    def _least_of_best(self, level: int, of_cells: Tensor, images: Tensor, batch: int, topk: int) -> Tensor:
        """(batch,) uint8: the least code with which a logit of an image can be among its ``topk`` highest.

        Args:
            level: which one the logits are of.
            of_cells: (N, O) codes.
            images: (N,) ascending, of which image they are.
            batch: how many images there are.
            topk: how many are looked at.
        """
        below = (self.margins[level] + self.excesses[level]) / self.codes[level].scale
        leasts = []
        for of_image in of_cells.split(torch.bincount(images, minlength=batch).tolist()):
            counts = torch.bincount(of_image.flatten(), minlength=256).flip(0).cumsum(0)
            kth = 255 - int((counts < topk).sum())  # -1 if the image has fewer here
            leasts.append(max(0, math.ceil(kth - below)))
        return torch.tensor(leasts, dtype=torch.uint8)

    def measured(self, outputs: Iterable[Sequence[Tensor]]) -> "Sieve":
        """The same with the margins and excesses that the graph's outputs for some images ask for."""
        levels = range(len(self.codes))
        too_low, too_high = ([0.0] * len(levels) for _ in range(2))
        for of_image in outputs:
            for i in levels:
                codes, exact = of_image[i], self.logits.everywhere(of_image[len(levels) + i], i)
                error = exact - self.codes[i].values(codes)
                below, above = error[codes < 255], -error[codes > 0]  # 255 stands for all above, and 0 for all below
                too_low[i] = max(too_low[i], float(below.amax()) if len(below) else 0.0)
                too_high[i] = max(too_high[i], float(above.amax()) if len(above) else 0.0)
        margins, excesses = (tuple(MARGIN * error for error in errors) for errors in (too_low, too_high))
        return replace(self, margins=margins, excesses=excesses)
