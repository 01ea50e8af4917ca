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
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from retina_fast.kernels.candidate_selection import Candidates, candidates_of, contenders, logit

MARGIN = 2.0
"""In units of the largest error on the calibration images."""
MOST_CELLS = 0.4
"""If a conv is wanted at a larger share of a level's cells, it is computed at all of them."""
MOST_LOGITS = 0.2
"""If a larger share of the chosen cells' logits is wanted, all of these are computed, by a matrix product. Else each
that is wanted is computed by itself, which takes five times as long a logit (AVX2)."""
CELLS = 4096
"""So many cells are computed at a time, which bounds the memory that their neighbourhoods take in float32."""

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # that sparse tensors are in beta, and not checked: said of the first of a process
    torch.sparse_csr_tensor([0, 0], [], [], (1, 1), device="cpu")


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
    """A conv in float32, of stride 1, on features that are codes and have the border that its pads add.

    Attributes:
        weight: (O, C, kernel height, kernel width).
        bias: (O,).
        inputs: what a code of the features stands for, a level each.
    """

    weight: Tensor
    bias: Tensor
    inputs: tuple[Codes, ...]

    def everywhere(self, features: Tensor, level: int) -> Tensor:
        """The outputs (B, H, W, O) for features (B, H + border, W + border, C) uint8."""
        values = self.inputs[level].values(features).permute(0, 3, 1, 2)
        return F.conv2d(values, self.weight, self.bias).permute(0, 2, 3, 1)

    def grid(self, features: Tensor) -> tuple[int, int]:
        """H and W, without the border."""
        rows, columns = features.shape[1:3]
        return rows - self.weight.shape[2] + 1, columns - self.weight.shape[3] + 1

    def patches(self, features: Tensor, cells: Tensor) -> Tensor:
        """(N, kernel height * kernel width * C) uint8: what the conv reads at N cells.

        Args:
            features: as :meth:`everywhere` takes them.
            cells: (N,) their indices among the B * H * W cells without the border.
        """
        columns, channels = features.shape[2:]
        sides, (height, width) = self.weight.shape[2:], self.grid(features)
        beside = torch.tensor(
            [down * columns + right for down in range(sides[0]) for right in range(sides[1])], device=cells.device
        )
        line = cells // width  # of all images
        first = cells + line * (sides[1] - 1)  # of its neighbours, as if in the first image
        if len(features) > 1:
            first += line // height * ((sides[0] - 1) * columns)
        index = (first[:, None] + beside).flatten()
        return features.view(-1, channels).index_select(0, index).view(len(cells), len(beside) * channels)

    def at_patches(self, patches: Tensor, level: int) -> Tensor:
        """(O, N) for N patches of a level."""
        values, weight = self._factors(patches, level)
        return torch.addmm(self.bias[:, None], weight, values.T, alpha=self.inputs[level].scale)

    def some_at_patches(self, patches: Tensor, level: int, starts: Tensor, outputs: Tensor) -> Tensor:
        """(W,) single outputs of N patches.

        Args:
            patches: as :meth:`patches` gives them.
            level: of the features.
            starts: (N + 1,) where each patch begins among the outputs, the last value is W.
            outputs: (W,) which ones.
        """
        values, weight = self._factors(patches, level)
        size = len(patches), len(weight)
        chosen = torch.sparse_csr_tensor(starts, outputs, self.bias[outputs], size)
        return torch.sparse.sampled_addmm(chosen, values, weight.T, alpha=self.inputs[level].scale).values()

    def _factors(self, patches: Tensor, level: int) -> tuple[Tensor, Tensor]:
        """What patches stand for, but for the scale, and the weights (O, kernel height * kernel width * C)."""
        values, zero = patches.float(), self.inputs[level].zero
        if zero:
            values -= zero
        return values, self.weight.permute(0, 2, 3, 1).flatten(1)  # a view of memory in channels_last

    def at(self, features: Tensor, level: int, cells: Tensor) -> Tensor:
        """(N, O) at N cells, given as :meth:`patches` takes them."""
        if len(cells) > MOST_CELLS * len(features) * math.prod(self.grid(features)):
            return self.everywhere(features, level).flatten(0, 2).index_select(0, cells)
        rows = [self.at_patches(self.patches(features, some), level) for some in cells.split(CELLS)]
        return torch.cat(rows, dim=1).T

    def some_at(self, features: Tensor, level: int, cells: Tensor, rows: Tensor, outputs: Tensor) -> Tensor:
        """(W,) single outputs.

        Args:
            features: as :meth:`everywhere` takes them.
            level: theirs.
            cells: (N,) as :meth:`patches` takes them.
            rows: (W,) of which of the cells, rising.
            outputs: (W,) which ones.
        """
        every = torch.arange(len(cells) + 1, device=rows.device)
        starts = torch.searchsorted(rows, every)  # (N + 1,) where each cell's begin among all
        values = [self.bias[:0]]
        for first in range(0, len(cells), CELLS):
            own = starts[first : first + CELLS + 1]
            patches = self.patches(features, cells[first : first + CELLS])
            values.append(self.some_at_patches(patches, level, own - own[0], outputs[own[0] : own[-1]]))
        return torch.cat(values)


@dataclass(frozen=True)
class Sieve:
    """What finds the candidates, and the convs that are computed there.

    Its methods take the outputs of the graph, uint8 all: L levels of logits (B, H, W, O or more, of which the first O
    count), then L of the features that the logits' conv reads, then L of those that the other reads,
    (B, H + border, W + border, C) each.

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
        codes, threshold = self._logits(outputs), logit(score_thresh)
        of_levels = [self._found(i, level, outputs[len(codes) + i], threshold, topk) for i, level in enumerate(codes)]
        images = [[found[b] for found in of_levels] for b in range(len(codes[0]))]
        sizes = [level.shape[1:].numel() for level in codes]
        return candidates_of(images, sizes, num_classes, topk, outputs[0].device)

    def offsets(self, outputs: Sequence[Tensor], anchors: Tensor, per_cell: int) -> Tensor:
        """The box offsets (B, M, C) of chosen anchors (B, M), counted over all levels; a cell has ``per_cell``."""
        batch, levels = len(anchors), len(self.codes)
        cells = anchors // per_cell
        sizes = [level.shape[1:3].numel() for level in outputs[:levels]]
        chosen = torch.zeros(batch, sum(sizes), dtype=torch.bool, device=cells.device).scatter_(1, cells, True)
        rows, places, first = [], [], 0
        for i, of_level in enumerate(chosen.split(sizes, dim=1)):
            flat = of_level.flatten()
            rows.append(self.deltas.at(outputs[2 * levels + i], i, flat.nonzero()[:, 0]))
            places.append(flat.cumsum(0).view_as(of_level) + (first - 1))
            first += len(rows[i])
        index = torch.cat(places, dim=1).gather(1, cells) * per_cell + anchors % per_cell
        of_anchors = torch.cat(rows).view(first * per_cell, len(self.deltas.bias) // per_cell)
        return of_anchors.index_select(0, index.flatten()).unflatten(0, anchors.shape)

    def _logits(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """The levels of logits (B, H, W, O) in eight bits."""
        return [level[..., : len(self.logits.bias)] for level in outputs[: len(self.codes)]]

    def _found(
        self, level: int, codes: Tensor, features: Tensor, threshold: float, topk: int
    ) -> list[tuple[Tensor, Tensor]]:
        """For each image the logits above a threshold that can be among the highest, and their positions among all of
        the image and level."""
        held, count, cells_of_image = self.codes[level], codes.shape[3], codes.shape[1:3].numel()
        # Code 255 may stand for any greater value, and code 0 for any lower one.
        least = math.ceil(max(0.0, min(255.0, (threshold - self.margins[level]) / held.scale + held.zero)))
        images = [self._wanted(level, image, least, topk) for image in codes.flatten(1, 2)]
        first = torch.empty(0, dtype=torch.int64, device=codes.device)
        cells = torch.cat([first, *(chosen + b * cells_of_image for b, (chosen, _) in enumerate(images))])
        if len(cells) > MOST_CELLS * len(codes) * cells_of_image:
            exact = self.logits.everywhere(features, level).flatten(1)
            return [(image[place], place) for image in exact for place in (contenders(image, threshold, topk),)]
        wanted = torch.cat([codes.new_empty(0, count, dtype=torch.bool), *(logits for _, logits in images)])
        if int(wanted.count_nonzero()) > MOST_LOGITS * wanted.numel():
            found = self.logits.at(features, level, cells)
            row, output = (found > threshold).nonzero(as_tuple=True)
            values = found[row, output]
        else:
            row, output = wanted.nonzero(as_tuple=True)
            values = self.logits.some_at(features, level, cells, row, output)
            above = (values > threshold).nonzero()[:, 0]
            values, row, output = values[above], row[above], output[above]
        places = cells[row] * count + output
        ends = torch.arange(len(codes) + 1, device=places.device) * (cells_of_image * count)
        counts = torch.searchsorted(places, ends).diff().tolist()
        split = zip(values.split(counts), places.split(counts), strict=True)
        return [(value, place - b * cells_of_image * count) for b, (value, place) in enumerate(split)]

    def _wanted(self, level: int, codes: Tensor, least: int, topk: int) -> tuple[Tensor, Tensor]:
        """The cells (N,) of an image, of those with a code of ``least`` or more, with a logit that can be among the
        ``topk`` highest, and which of their logits (N, O) can.

        Args:
            level: which one the codes are of.
            codes: (H * W, O).
            least: 0 if all are wanted.
            topk: how many are looked at.
        """
        greatest = codes.amax(dim=1)
        cells = (greatest >= least).nonzero()[:, 0]
        of_cells = codes.index_select(0, cells)
        if least > 0 and topk < of_cells.numel():
            counts = torch.bincount(of_cells.flatten(), minlength=256).flip(0).cumsum(0)
            kth = 255 - int((counts < topk).sum())
            below = (self.margins[level] + self.excesses[level]) / self.codes[level].scale
            least = max(least, math.ceil(kth - below))
            chosen = (greatest.index_select(0, cells) >= least).nonzero()[:, 0]
            cells, of_cells = cells.index_select(0, chosen), of_cells.index_select(0, chosen)
        return cells, of_cells >= least

    def measured(self, outputs: Iterable[Sequence[Tensor]]) -> "Sieve":
        """The same with the margins and excesses that the graph's outputs for some images ask for."""
        levels = range(len(self.codes))
        too_low, too_high = ([0.0] * len(levels) for _ in range(2))
        for of_image in outputs:
            for i, codes in enumerate(self._logits(of_image)):
                exact = self.logits.everywhere(of_image[len(levels) + i], i)
                error = exact - self.codes[i].values(codes)
                below, above = error[codes < 255], -error[codes > 0]  # 255 stands for all above, and 0 for all below
                too_low[i] = max(too_low[i], float(below.amax()) if len(below) else 0.0)
                too_high[i] = max(too_high[i], float(above.amax()) if len(above) else 0.0)
        margins, excesses = (tuple(MARGIN * error for error in errors) for errors in (too_low, too_high))
        return replace(self, margins=margins, excesses=excesses)
