"""Candidate selection: which (anchor, class) pairs are worth decoding (torchvision's postprocess).

The survivors of an image and level are the pairs whose score sigmoid(logit) exceeds the threshold; its candidates are
the topk survivors with the highest logits. The candidates of all levels are ordered by falling logit, and among equal
logits by index: by level, anchor and class. Since sigmoid is monotone, logits are compared with logit(threshold), and
sigmoid is computed of candidates only, in float32 whatever the logits' dtype. A NaN logit is never a candidate.

torchvision writes the sigmoid of every logit, a mask, and an index of every survivor. Here the logits are read once
(``candidate_search.py``), and each candidate is one integer key that orders it. The keys are sorted (``key_sort.py``),
and the last step of the sort writes what each key stands for to its place.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from retina_fast.kernels.candidate_search import search_keys
from retina_fast.kernels.compiler import is_differentiated, runs_triton, tl, triton
from retina_fast.kernels.key_sort import (
    MAX_RUNS,
    MERGED,
    RUN,
    place_in_runs,
    sort_keys,
    sort_runs,
    sorts_by_kernels,
    unpack_index,
    unpack_number,
)
from retina_fast.kernels.levels import check_levels, flatten_all


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


def _width(levels: Sequence[Tensor], topk: int) -> int:
    """M: the most candidates that an image can have, and at least 1."""
    return max(1, sum(min(topk, level.shape[1] * level.shape[2]) for level in levels))


def _top(values: Tensor, k: int) -> Tensor:
    """Positions of the k highest values (n,), highest first, the lower position first on a tie."""
    if len(values) > k > 0:
        kth = values.topk(k).values[-1]
        above = values > kth
        ties = (values == kth).nonzero().squeeze(1)[: k - int(above.sum())]
        positions = torch.cat((above.nonzero().squeeze(1), ties)).sort().values
        return positions[values[positions].sort(descending=True, stable=True).indices]
    return values.sort(descending=True, stable=True).indices[:k]


_STRETCH = 64  # logits: a power of two, so that PyTorch finds the maxima by vector instructions


def _contenders(flat: Tensor, threshold: float, topk: int) -> Tensor:
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


def candidate_selection_reference(
    logits: Sequence[Tensor], num_classes: int, score_thresh: float, topk: int
) -> Candidates:
    """The definition; see :func:`candidate_selection`."""
    levels = flatten_all(logits, num_classes)
    shape = len(levels[0]), _width(levels, topk)
    anchors = levels[0].new_zeros(shape, dtype=torch.int64)
    scores = levels[0].new_zeros(shape, dtype=torch.float32)
    labels, counts = torch.full_like(anchors, -1), anchors.new_zeros(len(anchors))
    threshold = logit(score_thresh)
    for b in range(len(anchors)):
        values, indices, first = [], [], 0
        for level in levels:
            flat = level[b].reshape(-1)  # (N_l * K,)
            survivors = _contenders(flat, threshold, topk)
            survivors = survivors[_top(flat[survivors].float(), topk)]
            values.append(flat[survivors].float())
            indices.append(survivors + first)
            first += len(flat)
        joined, order = torch.cat(values).sort(descending=True, stable=True)
        chosen = torch.cat(indices)[order]
        row = slice(len(chosen))
        anchors[b, row] = chosen // num_classes
        scores[b, row] = torch.sigmoid(joined)
        labels[b, row] = chosen % num_classes
        counts[b] = len(chosen)
    return Candidates(anchors, scores, labels, counts)


@triton.jit
def _emit(keys, place, inside, anchors_ptr, scores_ptr, labels_ptr, index_bits, K: tl.constexpr, DROP: tl.constexpr):
    """Writes the anchors, scores and labels of keys to their places."""
    index = unpack_index(keys, index_bits)
    score = tl.div_rn(1.0, 1.0 + tl.exp(-unpack_number(keys, index_bits, DROP)))
    tl.store(anchors_ptr + place, tl.where(keys >= 0, index // K, 0).to(tl.int64), mask=inside)
    tl.store(scores_ptr + place, tl.where(keys >= 0, score, 0.0), mask=inside)
    tl.store(labels_ptr + place, tl.where(keys >= 0, index % K, -1).to(tl.int64), mask=inside)


@triton.jit(do_not_specialize=["width", "index_bits"])
def _place_kernel(
    runs_ptr, found_ptr, anchors_ptr, scores_ptr, labels_ptr, counts_ptr, width, index_bits, K: tl.constexpr,
    DROP: tl.constexpr, RUN: tl.constexpr, MAX_RUNS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Program (t, b) finds the places of KEYS keys of image b, and writes there what they stand for."""
    image = tl.program_id(1).to(tl.int64)
    count = tl.load(found_ptr + image)
    i = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    keys, place = place_in_runs(runs_ptr + image * width, i, count, RUN, MAX_RUNS, KEYS)
    _emit(keys, image * width + place, i < width, anchors_ptr, scores_ptr, labels_ptr, index_bits, K, DROP)
    if tl.program_id(0) == 0:
        tl.store(counts_ptr + image, count.to(tl.int64))


@triton.jit(do_not_specialize=["width", "index_bits"])
def _emit_kernel(
    keys_ptr, found_ptr, anchors_ptr, scores_ptr, labels_ptr, counts_ptr, width, index_bits, K: tl.constexpr,
    DROP: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Program (t, b) writes what TILE keys of the sorted row of image b stand for."""
    image = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)
    keys = tl.load(keys_ptr + image * width + i, mask=i < width, other=-1)
    _emit(keys, image * width + i, i < width, anchors_ptr, scores_ptr, labels_ptr, index_bits, K, DROP)
    if tl.program_id(0) == 0:
        tl.store(counts_ptr + image, tl.load(found_ptr + image).to(tl.int64))


_Fields = tuple[Tensor, Tensor, Tensor, Tensor]  # of Candidates


def _candidate_selection_triton(levels: list[Tensor], num_classes: int, score_thresh: float, topk: int) -> _Fields:
    """The fields of Candidates, of levels ``(B, N_l, K)``. The number of launches depends on the dtype and sizes alone,
    and is one more where an image can have more than 8192 candidates."""
    first, *_ = levels = [level.contiguous() for level in levels]
    batch, width = len(first), _width(levels, topk)
    drop = {torch.bfloat16: 16, torch.float16: 13}.get(first.dtype, 0)
    index_bits = max(1, (sum(level.shape[1] * level.shape[2] for level in levels) - 1).bit_length())
    anchors, labels = (first.new_empty(batch, width, dtype=torch.int64) for _ in range(2))
    scores, counts = first.new_empty(batch, width, dtype=torch.float32), first.new_empty(batch, dtype=torch.int64)
    with torch.cuda.device_of(first):
        keys, found = search_keys(levels, width, logit(score_thresh), topk, drop, index_bits)
        fields = found, anchors, scores, labels, counts, width, index_bits
        if sorts_by_kernels(width):
            _place_kernel[(triton.cdiv(width, MERGED), batch)](
                sort_runs(keys, found), *fields, K=num_classes, DROP=drop, RUN=RUN, MAX_RUNS=MAX_RUNS, KEYS=MERGED,
                enable_fp_fusion=False,
            )  # fmt: skip
        else:
            _emit_kernel[(triton.cdiv(width, 256), batch)](
                sort_keys(keys, found), *fields, K=num_classes, DROP=drop, TILE=256, num_warps=2,
                enable_fp_fusion=False,
            )  # fmt: skip
    return anchors, scores, labels, counts


_op = torch.library.custom_op("retina_fast::candidate_selection", _candidate_selection_triton, mutates_args=())


@torch.library.custom_op("retina_fast::candidate_selection_reference", mutates_args=())
def _reference_op(levels: list[Tensor], num_classes: int, score_thresh: float, topk: int) -> _Fields:
    """The reference's shapes depend on values: as an operation it is one node of a compiled or exported graph."""
    return candidate_selection_reference(levels, num_classes, score_thresh, topk)


@_op.register_fake
@_reference_op.register_fake
def _(levels, num_classes, score_thresh, topk):
    shape = levels[0].shape[0], _width(levels, topk)
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
