"""The last convs of a network in eight bits, computed in float32 where a detection can be, and nowhere else.

Logits and box offsets are to be those of float32 convs. But nearly all cells of the pyramid are background, and these
two convs, left in float32, would take as long as all the others in eight bits. So the graph
(:mod:`retina_fast.deploy.eight_bits.sieved_graph`) computes the logits in eight bits, which serve to decide: a logit is
a candidate if that value, plus a margin, exceeds the score threshold, and if it can be one of the k highest of its
image and level, which are all that is ever looked at. Candidates are computed in float32 here, as products with the 3x3
neighbourhoods of what the conv reads, which is in eight bits. All other logits are minus infinity. Box offsets are
computed at the cells where a float32 logit reaches the threshold.

A level's margin is twice the largest amount by which an 8-bit logit was too low on the calibration images, and its
excess twice that by which one was too high. With q for 8-bit logits and q_k for the k-th highest of them, at least k
float32 logits are q_k - excess or more, so none of the k highest has a q below q_k - excess - margin.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

MARGIN = 2.0
"""In units of the largest error on the calibration images."""
FEW_LOGITS = 64
"""Up to so many logits a cell are few: all of them are computed at each cell that has a candidate."""
GROUP = 32
"""With more, cells are taken in groups of this size; each group computes the logits that one of its cells wants."""
MOST_CELLS = 0.5
"""If a larger share of a level's cells have candidates, and a cell few logits, the convs are computed at all cells."""


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

    def everywhere(self, features: Tensor, level: int) -> Tensor:
        """(B, H, W, O) of features (B, H, W, C) uint8."""
        top, left, bottom, right = self.pads
        padded = F.pad(self.inputs[level].values(features), (0, 0, left, right, top, bottom)).permute(0, 3, 1, 2)
        return F.conv2d(padded, self.weight, self.bias).permute(0, 2, 3, 1)

    def patches(self, features: Tensor, level: int, cells: Tensor) -> Tensor:
        """(N, kernel height * kernel width * C) uint8: what the conv reads at N cells.

        Args:
            features: (B, H, W, C) uint8.
            level: which one they are of.
            cells: (N,) their indices among the B * H * W.
        """
        height, width, channels = features.shape[1:]
        table = features.view(-1, channels)
        down, right = (
            torch.arange(side) - before for side, before in zip(self.weight.shape[2:], self.pads[:2], strict=True)
        )
        beside = (down[:, None] * width + right).flatten()  # where a cell's neighbours lie beside it
        index = (cells[:, None] + beside).clamp_(0, len(table) - 1)  # at an edge wrong, and replaced below
        patches = table.index_select(0, index.flatten())
        row, column = cells // width % height, cells % width
        at_edge = (row + down[0] < 0) | (row + down[-1] >= height)
        at_edge |= (column + right[0] < 0) | (column + right[-1] >= width)
        edge = at_edge.nonzero()[:, 0]
        rows, columns = row[edge, None] + down, column[edge, None] + right
        outside = ((rows < 0) | (rows >= height))[:, :, None] | ((columns < 0) | (columns >= width))[:, None]
        places = edge[:, None] * len(beside) + torch.arange(len(beside))
        patches.index_fill_(0, places[outside.flatten(1)], self.inputs[level].zero)
        return patches.view(len(cells), len(beside) * channels)

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


class _Rows:
    """A buffer filled with one value; :meth:`blank` first wipes the rows that were written since its last call."""

    def __init__(self, value: float) -> None:
        self.value = value
        self.tensor = torch.empty(0)
        self.written = torch.empty(0, dtype=torch.int64)

    def blank(self, rows: int, width: int) -> Tensor:
        """(rows, width) float32, to be written at ``written`` alone."""
        if self.tensor.shape == (rows, width):
            self.tensor.index_fill_(0, self.written, self.value)
        else:
            self.tensor = torch.full((rows, width), self.value)
        return self.tensor


@dataclass(frozen=True)
class Sieve:
    """What decides which logits are candidates, and the convs that are computed there.

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
    _buffers: dict[int, tuple[_Rows, _Rows]] = field(default_factory=dict, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_buffers": {}}

    def __call__(self, outputs: Sequence[Tensor], threshold: float, topk: int) -> tuple[list[Tensor], list[Tensor]]:
        """The levels (B, O, H, W) of logits and of box offsets, in channels_last memory, which the next call reuses.

        Args:
            outputs: of the graph, uint8 all: L levels of logits (B, H, W, O), then L of the features that the logits'
                conv reads, then L of those that the other reads, (B, H, W, C) each.
            threshold: the score that a detection must exceed; 0 or less makes every logit a candidate.
            topk: the most candidates of an image and level.
        """
        levels = len(self.codes)
        logit = math.log(threshold / (1 - threshold)) if 0 < threshold < 1 else math.inf * (threshold - 0.5)
        logits, deltas = [], []
        for i, (codes, margin) in enumerate(zip(self.codes, self.margins, strict=True)):
            # Code 255 may stand for any greater value, and code 0 for any lower one.
            least = math.ceil(max(0.0, min(255.0, (logit - margin) / codes.scale + codes.zero)))
            level = self._level(i, outputs[i::levels], least, logit, topk)
            logits.append(level[0].permute(0, 3, 1, 2))
            deltas.append(level[1].permute(0, 3, 1, 2))
        return logits, deltas

    def _level(
        self, level: int, outputs: Sequence[Tensor], least: int, logit: float, topk: int
    ) -> tuple[Tensor, Tensor]:
        """One level's logits and box offsets, (B, H, W, O) each; candidates have codes of at least ``least``."""
        codes, for_logits, for_deltas = outputs
        count = codes.shape[3]
        greatest = codes.amax(dim=3).flatten()
        cells = (greatest >= least).nonzero()[:, 0]
        few = count <= FEW_LOGITS
        of_cells = codes.view(-1, count).index_select(0, cells)
        if least:
            raised = self._least_of_best(level, of_cells, cells // (codes.shape[1] * codes.shape[2]), topk)
            if raised > least:
                least, chosen = raised, (greatest.index_select(0, cells) >= raised).nonzero()[:, 0]
                cells, of_cells = cells[chosen], of_cells.index_select(0, chosen)
        if least == 0 or (few and len(cells) > MOST_CELLS * len(greatest)):
            return self.logits.everywhere(for_logits, level), self.deltas.everywhere(for_deltas, level)
        logits, deltas = self._buffers.setdefault(level, (_Rows(-math.inf), _Rows(0.0)))
        rows = logits.blank(len(greatest), count)
        offsets = deltas.blank(len(greatest), len(self.deltas.bias))
        logits.written = cells
        if len(cells) and not few:  # cells that want few logits want much the same ones
            order = (of_cells >= least).sum(dim=1).argsort()
            cells, of_cells = cells[order], of_cells.index_select(0, order)
        size = max(len(cells), 1) if few else GROUP
        groups = zip(cells.split(size), of_cells.split(size), strict=True)
        found = [cells[:0]]
        for group, of_group in groups if len(cells) else ():
            wanted = None if few else (of_group.amax(dim=0) >= least).nonzero()[:, 0]
            made = self.logits.at_patches(self.logits.patches(for_logits, level, group), level, wanted).T
            if wanted is None:
                rows[group] = made
            else:
                rows[group[:, None], wanted] = made
            found.append(group[made.amax(dim=1) >= logit])
        deltas.written = cells = torch.cat(found)
        offsets[cells] = self.deltas.at_patches(self.deltas.patches(for_deltas, level, cells), level).T
        return rows.view(codes.shape), offsets.view(*codes.shape[:3], offsets.shape[1])

    def _least_of_best(self, level: int, of_cells: Tensor, images: Tensor, topk: int) -> int:
        """The least code with which a logit can be among the ``topk`` highest of its image.

        Args:
            level: which one the logits are of.
            of_cells: (N, O) codes.
            images: (N,) ascending.
            topk: how many are looked at.
        """
        lowest = 255
        for of_image in of_cells.split([count for count in torch.bincount(images).tolist() if count]):
            counts = torch.bincount(of_image.flatten(), minlength=256).flip(0).cumsum(0)
            kth = 255 - int((counts < topk).sum())  # -1 if the image has fewer here
            lowest = min(lowest, kth)
        return math.ceil(lowest - (self.margins[level] + self.excesses[level]) / self.codes[level].scale)

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
        return replace(self, margins=margins, excesses=excesses, _buffers={})
