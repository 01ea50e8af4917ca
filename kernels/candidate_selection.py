"""Candidate selection: which (anchor, class) pairs are worth decoding (torchvision's postprocess).

The survivors of an image and level are the pairs whose score sigmoid(logit) exceeds the threshold; its candidates are
the topk survivors with the highest logits. The candidates of all levels are ordered by falling logit, and among equal
logits by index: by level, anchor and class. Since sigmoid is monotone, logits are compared with logit(threshold), and
sigmoid is computed of candidates only, in float32 whatever the logits' dtype. A NaN logit is never a candidate.

torchvision writes the sigmoid of every logit, a mask, and an index of every survivor. Here the logits are read once
(``candidate_search.py``), and each candidate is one integer key that orders it. Each key finds its place, and what it
stands for is written there (``candidate_places.py``).
"""

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from retina_fast.kernels.candidate_places import write_candidates
from retina_fast.kernels.candidate_search import search_keys
from retina_fast.kernels.dispatch import is_differentiated, runs_triton
from retina_fast.kernels.levels import check_levels, flatten_all
from retina_fast.kernels.nms_cpu import positions_of, rank_keys


class Candidates(NamedTuple):
    """Candidates of B images, padded to M; the first counts[b] of a row count, best first."""

    anchors: Tensor
    """(B, M) int64: the anchor, counted over all levels; 0 in the padding."""
    scores: Tensor
    """(B, M) float32: sigmoid of the logit; 0 in the padding."""
    labels: Tensor
    """(B, M) int64: the class; -1 in the padding."""
    counts: Tensor
    """(B,) int64."""


def logit(score: float) -> float:
    """The logit of a score; -inf from 0 down and inf from 1 up."""
    if score <= 0:
        return -math.inf
    return math.inf if score >= 1 else math.log(score / (1 - score))


def candidates_width(levels: Sequence[Tensor], topk: int) -> int:
    """M: the most candidates that an image can have, and at least 1."""
    return max(1, sum(min(topk, level.shape[1] * level.shape[2]) for level in levels))


_STRETCH = 64  # logits: a power of two, so that PyTorch finds the maxima by vector instructions


def contenders(flat: Tensor, threshold: float, topk: int) -> Tensor:
    """Rising positions of values (n,) above the threshold, the topk highest among them.

    The values are looked at by stretches of 64. Each of the topk stretches with the highest maxima holds a value that
    is at least the lowest of these maxima. So no lower value is one of the topk, and of the other stretches nothing but
    the maximum is needed.
    """
    whole = len(flat) - len(flat) % _STRETCH
    maxima = flat[:whole].view(-1, _STRETCH).amax(dim=1).float()  # NaN where a stretch holds one
    lowest = -math.inf
    if len(maxima) > topk > 0:
        lowest = float(maxima.where(maxima == maxima, -math.inf).topk(topk).values[-1])
    stretches = (~((maxima < lowest) | (maxima <= threshold))).nonzero()  # (S, 1)
    positions = (stretches * _STRETCH + torch.arange(_STRETCH, device=flat.device)).flatten()
    positions = torch.cat((positions, torch.arange(whole, len(flat), device=flat.device)))
    values = flat[positions].float()
    return positions[(values > threshold) & (values >= lowest)]


def _best(values: Tensor, counts: Sequence[int], topk: int) -> NDArray[np.int64]:
    """Positions, best first, of each level's topk highest of float32 values, which lie level by level, ``counts`` of
    each. Of equal values the one at the lower position is the better."""
    keys = rank_keys(values.detach().cpu().numpy())
    levels = np.split(keys, np.cumsum(counts[:-1], dtype=np.int64))
    best = [np.partition(level, topk)[:topk] if len(level) > topk else level for level in levels]
    return positions_of(np.sort(np.concatenate(best)))


def candidates_of(
    found: Sequence[Sequence[tuple[Tensor, Tensor]]],
    sizes: Sequence[int],
    num_classes: int,
    topk: int,
    device: torch.device,
) -> Candidates:
    """The candidates among logits that exceed the threshold.

    Args:
        found: for each image and level, the logits ``(n,)`` float32, and their rising positions ``(n,)`` among all
            of that image and level.
        sizes: how many logits an image has on each level.
        num_classes: K.
        topk: the most candidates of an image and level.
        device: where the result is to lie.
    """
    if topk < 0:
        raise ValueError(f"topk must be at least 0, got {topk}")
    shape = len(found), max(1, sum(min(topk, size) for size in sizes))
    anchors = torch.zeros(shape, dtype=torch.int64, device=device)
    scores = torch.zeros(shape, dtype=torch.float32, device=device)
    labels, counts = torch.full_like(anchors, -1), anchors.new_zeros(len(anchors))
    firsts = [*accumulate(sizes, initial=0)]
    for b, levels in enumerate(found):
        values = torch.cat([of_level for of_level, _ in levels])
        index = torch.cat([places + first for (_, places), first in zip(levels, firsts, strict=False)])
        order = _best(values, [len(of_level) for of_level, _ in levels], topk)
        chosen = torch.from_numpy(order).to(device)
        index, row = index[chosen], slice(len(order))
        anchors[b, row] = index // num_classes
        scores[b, row] = torch.sigmoid(values[chosen])
        labels[b, row] = index % num_classes
        counts[b] = len(order)
    return Candidates(anchors, scores, labels, counts)


def candidate_selection_reference(
    logits: Sequence[Tensor], num_classes: int, score_thresh: float, topk: int
) -> Candidates:
    """The definition; see :func:`candidate_selection`."""
    levels = flatten_all(logits, num_classes)
    threshold = logit(score_thresh)

    def found(image: Tensor) -> tuple[Tensor, Tensor]:
        flat = image.reshape(-1)  # (N_l * K,)
        positions = contenders(flat, threshold, topk)
        return flat[positions].float(), positions

    images = [[found(level[b]) for level in levels] for b in range(len(levels[0]))]
    sizes = [level.shape[1] * level.shape[2] for level in levels]
    return candidates_of(images, sizes, num_classes, topk, levels[0].device)


_Fields = tuple[Tensor, Tensor, Tensor, Tensor]  # of Candidates


def _candidate_selection_triton(levels: list[Tensor], num_classes: int, score_thresh: float, topk: int) -> _Fields:
    """The fields of Candidates, of levels ``(B, N_l, K)``. The number of launches depends on dtype and sizes alone."""
    found = search_keys(levels, logit(score_thresh), topk)
    return write_candidates(found, candidates_width(levels, topk), num_classes)


_op = torch.library.custom_op("retina_fast::candidate_selection", _candidate_selection_triton, mutates_args=())


@torch.library.custom_op("retina_fast::candidate_selection_reference", mutates_args=())
def _reference_op(levels: list[Tensor], num_classes: int, score_thresh: float, topk: int) -> _Fields:
    """The reference's shapes depend on values: as an operation it is one node of a compiled or exported graph."""
    return candidate_selection_reference(levels, num_classes, score_thresh, topk)


@_op.register_fake
@_reference_op.register_fake
def _(levels, num_classes, score_thresh, topk):
    shape = levels[0].shape[0], candidates_width(levels, topk)
    anchors, labels = (levels[0].new_empty(shape, dtype=torch.int64) for _ in range(2))
    scores = levels[0].new_empty(shape, dtype=torch.float32)
    return anchors, scores, labels, levels[0].new_empty(shape[0], dtype=torch.int64)


def candidate_selection(
    logits: Sequence[Tensor], num_classes: int, score_thresh: float = 0.05, topk: int = 1000
) -> Candidates:
    """Pick the candidates of a batch: per image and level, the ``topk`` best scores above ``score_thresh``.

    Args:
        logits: the levels as the heads wrote them, each ``(B, A*K, H, W)`` or ``(B, N_l, K)``; any float dtype. The
            scores are differentiable.
        num_classes: K.
        score_thresh: scores must exceed it; 0 lets every logit above -inf through, 1 none.
        topk: the most candidates of one image and level. M, the width of the result, is the sum over the levels of
            min(topk, N_l * K), and at least 1.

    Raises:
        ValueError: if a level does not hold K logits an anchor, the levels differ in batch size, dtype or device, topk
            is negative, or an image has 2^30 - 2^15 logits or more.

    Example::

        >>> candidates = candidate_selection([torch.tensor([[[0.0, -9.0], [3.0, 2.0]]])], num_classes=2)
        >>> candidates.anchors, candidates.labels, candidates.counts
        (tensor([[1, 1, 0, 0]]), tensor([[ 0,  1,  0, -1]]), tensor([3]))
    """
    count = check_levels(logits, num_classes)
    if topk < 0:
        raise ValueError(f"topk must be at least 0, got {topk}")
    if count * num_classes >= 2**30 - 2**15:  # encoded sizes are 32 bits wide
        raise ValueError(f"levels must hold fewer than 2^30 - 2^15 logits an image, got {count * num_classes}")
    levels = [level.float() if level.dtype == torch.float64 else level for level in flatten_all(logits, num_classes)]
    op = _op if runs_triton(levels[0]) else _reference_op
    candidates = Candidates(*op([level.detach() for level in levels], num_classes, score_thresh, topk))
    if is_differentiated(*levels):
        joined = torch.cat([level.flatten(1) for level in levels], dim=1)
        index = candidates.anchors * num_classes + candidates.labels.clamp(min=0)
        scores = torch.where(candidates.labels >= 0, torch.sigmoid(joined.gather(1, index).float()), 0)
        return candidates._replace(scores=scores)
    return candidates
