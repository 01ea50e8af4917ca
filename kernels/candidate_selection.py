"""Candidate selection: which (anchor, class) pairs of each level are worth decoding (torchvision's postprocess).

Per image and level, the pairs whose score sigmoid(logit) exceeds the threshold, and of those the topk with the highest
logits, the lower index first on a tie. Since sigmoid is monotone, logits are compared with logit(threshold) and only
survivors are passed through it, in float32 whatever the logits' dtype. A NaN logit is never a candidate.

torchvision writes the sigmoid of every logit, a mask, and an index of every survivor, image by image and level by
level. Here the logits are read once.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from retina_fast.kernels.levels import flatten_all


class Candidates(NamedTuple):
    """Candidates of B images, padded to M; the first counts[b] of a row count, level by level, best first."""

    anchors: Tensor
    """(B, M) int64: which anchor, counted over all levels; 0 in the padding."""
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


def _top(values: Tensor, k: int) -> Tensor:
    """Positions of the k highest values (n,), highest first, the lower position first on a tie."""
    if len(values) > k > 0:
        kth = values.topk(k).values[-1]
        above = values > kth
        ties = (values == kth).nonzero().squeeze(1)[: k - int(above.sum())]
        positions = torch.cat((above.nonzero().squeeze(1), ties)).sort().values
        return positions[values[positions].sort(descending=True, stable=True).indices]
    return values.sort(descending=True, stable=True).indices[:k]


def candidate_selection_reference(
    logits: Sequence[Tensor], num_classes: int, score_thresh: float, topk: int
) -> Candidates:
    """The definition; see :func:`candidate_selection`."""
    levels = flatten_all(logits, num_classes)
    batch, device = len(levels[0]), levels[0].device
    width = max(1, sum(min(topk, level[0].numel()) for level in levels))
    anchors = torch.zeros((batch, width), dtype=torch.int64, device=device)
    scores = torch.zeros((batch, width), dtype=torch.float32, device=device)
    labels = torch.full((batch, width), -1, dtype=torch.int64, device=device)
    counts = torch.zeros(batch, dtype=torch.int64, device=device)
    threshold = logit(score_thresh)
    for b in range(batch):
        filled, first_anchor = 0, 0
        for level in levels:
            flat = level[b].reshape(-1).float()  # (N_l * K,)
            survivors = (flat > threshold).nonzero().squeeze(1)
            survivors = survivors[_top(flat[survivors], topk)]
            row = slice(filled, filled + len(survivors))
            anchors[b, row] = survivors // num_classes + first_anchor
            scores[b, row] = torch.sigmoid(flat[survivors])
            labels[b, row] = survivors % num_classes
            filled, first_anchor = row.stop, first_anchor + level.shape[1]
        counts[b] = filled
    return Candidates(anchors, scores, labels, counts)


def candidate_selection(
    logits: Sequence[Tensor], num_classes: int, score_thresh: float = 0.05, topk: int = 1000
) -> Candidates:
    """Pick the candidates of a batch: per image and level, the ``topk`` best scores above ``score_thresh``.

    Args:
        logits: the levels as the heads wrote them, each ``(B, A*K, H, W)`` or ``(B, N_l, K)``; any float dtype.
        num_classes: K.
        score_thresh: scores must exceed it; 0 lets every logit above -inf through, 1 none.
        topk: the most candidates of one image and level.

    Example::

        >>> candidates = candidate_selection([torch.tensor([[[0.0, -9.0], [3.0, 2.0]]])], num_classes=2)
        >>> candidates.anchors, candidates.labels, candidates.counts
        (tensor([[1, 1, 0, 0]]), tensor([[ 0,  1,  0, -1]]), tensor([3]))
    """
    return candidate_selection_reference(logits, num_classes, score_thresh, topk)
