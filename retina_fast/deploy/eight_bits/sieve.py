"""The last convs of a network in eight bits, computed in float32 where a detection can be, if that is at few cells.

Logits and box offsets are to be those of float32 convs. But nearly all cells of the pyramid are background, and these
two convs, left in float32, would take as long as all the others in eight bits. So the graph
(:mod:`retina_fast.deploy.eight_bits.sieved_graph`) computes the logits in eight bits, which serve to decide: a logit is
wanted in float32 if that value, plus a margin, exceeds the score threshold, and if it can be one of the k highest of
its image and level, which are all that is ever looked at. Such a logit is the product of the conv's float32 weights for
it with the 8-bit features around its cell. Those that exceed the threshold, and are among the highest, are the
candidates; box offsets are computed at their cells. Where many cells are wanted, a conv runs at all of them.

A level's margin is 1.5 times the largest amount by which an 8-bit logit was too low on the calibration images, and its
excess 1.5 times that by which one was too high. With q for 8-bit logits and q_k for the k-th highest of them, at least
k float32 logits are q_k - excess or more, so none of the k highest has a q below q_k - excess - margin.

All levels and images go through each step together, which is faster than a step for each of them.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from retina_fast.deploy.eight_bits.box_tower import BoxTower, Run
from retina_fast.deploy.eight_bits.last_conv import Codes, LastConv, Pyramid
from retina_fast.kernels.candidate_selection import Candidates, candidate_selection, candidates_of, logit

MARGIN = 1.5
"""In units of the largest error on the calibration images."""
MOST_CELLS = 0.4
"""If a conv is wanted at a larger share of the cells of all levels and images, it is computed at all of them."""
MOST_LOGITS = 0.2
"""If a larger share of the chosen cells' logits is wanted, all of these are computed, by a matrix product. Else each
that is wanted is computed by itself, which takes five times as long a logit (AVX2)."""


@dataclass(frozen=True)
class Sieve:
    """What finds the candidates, and the convs that are computed there.

    Its methods take the outputs of the graph, uint8 all: L levels of logits (B, H, W, O or more, of which the first O
    count), then L of the features that the logits' conv reads, then L of those that the other or its tower reads,
    (B, H + border, W + border, C) each. With a tower, those that need box offsets take what runs its file, too.

    Attributes:
        logits: the conv that gives the logits.
        deltas: the one that gives the box offsets.
        codes: what a code of the logits in eight bits stands for, a level each.
        margins: how far a logit in eight bits may lie below the one in float32, a level each.
        excesses: how far it may lie above, a level each.
        tower: the convs before that of the box offsets, if the graph leaves them to the sieve.
    """

    logits: LastConv
    deltas: LastConv
    codes: tuple[Codes, ...]
    margins: tuple[float, ...]
    excesses: tuple[float, ...]
    tower: BoxTower | None = None

    def everywhere(self, outputs: Sequence[Tensor], run: Run | None = None) -> tuple[list[Tensor], list[Tensor]]:
        """The levels (B, O, H, W) of logits and of box offsets, in channels_last memory."""
        codes, *features = self._parts(outputs)
        before = self._after_tower(features[1], [torch.ones(c.shape[:3], dtype=torch.bool) for c in codes], run)
        return _everywhere(self.logits, features[0]), _everywhere(self.deltas, before)

    def candidates(self, outputs: Sequence[Tensor], num_classes: int, score_thresh: float, topk: int) -> Candidates:
        """What :func:`retina_fast.kernels.candidate_selection.candidate_selection` gives for the logits of all cells,
        unless an image makes larger errors in eight bits than margin and excess allow for."""
        codes, features, _ = self._parts(outputs)
        pyramid, threshold, count = Pyramid.of(codes), logit(score_thresh), len(self.logits.bias)
        cells, wanted = self._wanted(codes, pyramid, threshold, topk)
        if len(cells) > MOST_CELLS * int(pyramid.firsts[-1]):
            return candidate_selection(_everywhere(self.logits, features), num_classes, score_thresh, topk)
        index = _where(wanted.flatten())  # of logits, among all of the chosen cells
        if len(index) > MOST_LOGITS * wanted.numel():
            exact = self.logits.at(features, cells).flatten()
            index = _where(exact > threshold)
            values = exact[index]
        else:
            rows = index // count
            exact = self.logits.some_at(features, cells, rows, index - rows * count)
            above = _where(exact > threshold)
            values, index = exact[above], index[above]
        rows, sections = index // count, pyramid.sections(cells)
        moved = cells - pyramid.firsts[sections] - _numbers(cells)  # from a place among chosen cells to the section's
        places = index + (moved * count)[rows]
        counts = torch.bincount(sections[rows], minlength=len(pyramid.firsts) - 1).tolist()
        found = [*zip(values.split(counts), places.split(counts), strict=True)]
        images = [found[b :: pyramid.batch] for b in range(pyramid.batch)]
        return candidates_of(images, [size * count for size in pyramid.sizes], num_classes, topk, values.device)

    def offsets(self, outputs: Sequence[Tensor], anchors: Tensor, per_cell: int, run: Run | None = None) -> Tensor:
        """The box offsets (B, M, C) of chosen anchors (B, M), counted over all levels; a cell has ``per_cell``."""
        codes, _, features = self._parts(outputs)
        pyramid, cells = Pyramid.of(codes), anchors // per_cell
        which, cells = anchors - cells * per_cell, pyramid.of_images(cells)
        chosen = cells.new_zeros(int(pyramid.firsts[-1]), dtype=torch.bool).index_fill_(0, cells.flatten(), True)
        sections = chosen.split([pyramid.batch * size for size in pyramid.sizes])
        masks = [of_level.view(level.shape[:3]) for of_level, level in zip(sections, codes, strict=True)]
        features, at = self._after_tower(features, masks, run), _where(chosen)
        if len(at) > MOST_CELLS * len(chosen):
            of_cells = torch.cat(
                [level.permute(0, 2, 3, 1).flatten(0, 2) for level in _everywhere(self.deltas, features)]
            )
        else:
            of_cells = self.deltas.at(features, at)
            cells = torch.empty_like(chosen, dtype=torch.int64).index_copy_(0, at, _numbers(at))[cells]
        of_anchors = of_cells.reshape(len(of_cells) * per_cell, len(self.deltas.bias) // per_cell)
        return of_anchors.index_select(0, (cells * per_cell + which).flatten()).unflatten(0, anchors.shape)

    def measured(self, outputs: Iterable[Sequence[Tensor]]) -> "Sieve":
        """The same with the margins and excesses that the graph's outputs for some images ask for."""
        too_low, too_high = ([0.0] * len(self.codes) for _ in range(2))
        for of_image in outputs:
            levels, features, _ = self._parts(of_image)
            for i, codes in enumerate(levels):
                error = self.logits.everywhere(features[i], i) - self.codes[i].values(codes)
                below, above = error[codes < 255], -error[codes > 0]  # 255 stands for all above, and 0 for all below
                too_low[i] = max(too_low[i], float(below.amax()) if len(below) else 0.0)
                too_high[i] = max(too_high[i], float(above.amax()) if len(above) else 0.0)
        margins, excesses = (tuple(MARGIN * error for error in errors) for errors in (too_low, too_high))
        return replace(self, margins=margins, excesses=excesses)

    def _after_tower(self, features: Sequence[Tensor], chosen: Sequence[Tensor], run: Run | None) -> Sequence[Tensor]:
        """What the conv of the box offsets reads at chosen cells (B, H, W) of each level."""
        if not self.tower:
            return features
        assert run is not None, "a tower needs what runs its file"
        return self.tower.features(run, features, chosen)

    def _parts(self, outputs: Sequence[Tensor]) -> tuple[list[Tensor], Sequence[Tensor], Sequence[Tensor]]:
        """The levels of logits (B, H, W, O), and of what each of the two convs reads."""
        levels = len(self.codes)
        logits = [level[..., : len(self.logits.bias)] for level in outputs[:levels]]
        return logits, outputs[levels : 2 * levels], outputs[2 * levels :]

    def _wanted(self, levels: Sequence[Tensor], pyramid: Pyramid, threshold: float, topk: int) -> tuple[Tensor, Tensor]:
        """The cells (N,) with a logit that can exceed the threshold and be among the ``topk`` highest of its section,
        and which of their logits (N, O) can."""
        least, below = [], []
        for held, margin, excess in zip(self.codes, self.margins, self.excesses, strict=True):
            # Code 255 may stand for any greater value, and code 0 for any lower one.
            code = max(0.0, min(255.0, (threshold - margin) / held.scale + held.zero))
            least += [math.ceil(code)] * pyramid.batch
            below += [(margin + excess) / held.scale] * pyramid.batch
        bars = levels[0].new_tensor(least)  # of the sections, as all that follows
        greatest = torch.cat([level.amax(3).flatten() for level in levels])
        cells = _where(greatest >= bars.repeat_interleave(pyramid.firsts.diff()))
        of_levels = zip(levels, pyramid.places(cells), strict=True)
        codes = torch.cat([level.flatten(0, 2).index_select(0, places) for level, places in of_levels])
        sections = pyramid.sections(cells)
        parts = codes.split(torch.bincount(sections, minlength=len(bars)).tolist())
        counts = torch.cat([sections[:0], *(torch.bincount(part.flatten(), minlength=256) for part in parts)])
        kth = 255 - (counts.view(-1, 256).flip(1).cumsum(1) < topk).sum(1)  # -1 if there are fewer
        bars = bars.maximum((kth - kth.new_tensor(below, dtype=torch.float64)).ceil().clamp(min=0).to(torch.uint8))
        left = _where(greatest[cells] >= bars[sections])
        return cells[left], codes.index_select(0, left) >= bars[sections[left]][:, None]


def _everywhere(conv: LastConv, features: Sequence[Tensor]) -> list[Tensor]:
    """The levels (B, O, H, W) of a conv's outputs."""
    return [conv.everywhere(level, i).permute(0, 3, 1, 2) for i, level in enumerate(features)]


def _where(chosen: Tensor) -> Tensor:
    """The places (W,) at which chosen (N,) is true: NumPy finds them in half of PyTorch's time."""
    return torch.from_numpy(chosen.numpy().nonzero()[0])


def _numbers(cells: Tensor) -> Tensor:
    """0, 1, ... for N cells."""
    return torch.arange(len(cells), device=cells.device)
