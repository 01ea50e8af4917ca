"""Task-aligned assignment, TOOD (Feng et al. 2021, https://arxiv.org/abs/2108.07755, section 3.3): which anchors have
to predict a ground truth is decided by what they predict, and so is what their scores should be.

With s the predicted score of the ground truth's class at an anchor, and u the IoU of the anchor's predicted box with
the ground truth, both without gradient, the anchor's alignment with it is (equation 3)

    t = s^alpha u^beta

Of the anchors whose centres lie inside a ground truth, the top_k of greatest t are foreground, as far as t > 0. An
anchor that is foreground for several ground truths is matched to the one of greatest u, the first on a tie; all others
are background (-1), none is ignored. Of equal t the anchor of lower index comes first. The target of a foreground
anchor's score is its t, scaled so that the greatest of a ground truth's anchors equals the greatest u of these.

Alignments are compared as costs, -log t = alpha softplus(-x) - beta log u for the logit x, which do not underflow. A
score or a box that is NaN has no cost, so that its anchor is background.

The authors' program makes matrices of anchors x ground truths. It chooses the top_k first and drops those outside
afterwards, which may leave a ground truth without an anchor. Where that is evened out, mmdet 3.3.0 and this reference
agree about all 16,787 foreground anchors of 200 random images but 7, which lie within 0.01 pixels of a side, where
mmdet drops them; their targets agree to 1e-6.

Here a program reads only anchors near the ground truth. Memory is 24 bytes an anchor of each image beside the results,
and 256 top_k bytes a ground truth.
"""

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from retina_fast.kernels.aligned_candidates import EMPTY, aligned_candidates
from retina_fast.kernels.anchor_matching import checked_geometry
from retina_fast.kernels.arguments import check_anchors, check_devices, check_shape, offsets_on_host
from retina_fast.kernels.box_decode import decode
from retina_fast.kernels.dispatch import is_transformed, runs_triton, tl, triton
from retina_fast.kernels.labels import BACKGROUND
from retina_fast.kernels.levels import check_levels, count_anchors, flatten_all, load_rows
from retina_fast.kernels.match_keys import (
    FIRST,
    NONE,
    TL_FIRST,
    centres_of,
    float_of,
    index_of,
    key_of,
    keys_of,
    matched_of,
    write_matches,
)
from retina_fast.kernels.pair_iou import box_iou, tile_iou
from retina_fast.kernels.side_distributions import box_channels

MAX_TOP_K = 128
"""The most foreground anchors of a ground truth."""

_PAIRS = 1 << 19  # anchors times ground truths that the reference looks at together


class AlignedMatches(NamedTuple):
    """The matches of N anchors in each of B images; the first three as those of other matchers."""

    indices: Tensor
    """(B, N) int32: row of the matched ground truth within its image, -1 background."""
    labels: Tensor
    """(B, N) int32: class of the matched ground truth, -1 background."""
    num_foreground: Tensor
    """(B,) int32: the number of anchors of each image that matched a ground truth."""
    targets: Tensor
    """(B, N) float32 in [0, 1]: what the score of a foreground anchor's class should be; 0 for all others."""


def _scores(levels: Sequence[Tensor], anchor: Tensor, label: Tensor) -> Tensor:
    """The logits (F,), float32, of pairs of an anchor and a class in levels (N_l, K) of an image."""
    scores = torch.empty(len(anchor), device=anchor.device)
    for level, first in zip(levels, accumulate((len(level) for level in levels), initial=0), strict=False):
        own = (anchor >= first) & (anchor < first + len(level))
        scores[own] = level[anchor[own] - first, label[own]].float()
    return scores


def _aligned(
    levels: Sequence[Tensor], centres: Tensor, predicted: Tensor, boxes: Tensor, labels: Tensor, top_k: int,
    alpha: float, beta: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Of the pairs of boxes (g, 4) and anchors whose centres (N, 2) lie inside, the top_k of least cost of each box, as
    rows of boxes, anchors, costs and IoUs, each (F,)."""
    x, y = centres.T.contiguous()
    left, top, right, bottom = boxes.T[..., None]
    row, anchor = ((x > left) & (x < right) & (y > top) & (y < bottom)).nonzero(as_tuple=True)
    iou = box_iou(boxes[row], predicted[anchor]).clamp(max=1)
    cost = alpha * F.softplus(-_scores(levels, anchor, labels[row])) - beta * iou.log()
    row, anchor, cost, iou = (x[cost < math.inf] for x in (row, anchor, cost, iou))  # NaN is not
    order = keys_of(cost, anchor).argsort()
    order = order[row[order].argsort(stable=True)]
    counts = row.bincount(minlength=len(boxes))
    rank = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row[order]]
    chosen = order[rank < top_k]
    return row[chosen], anchor[chosen], cost[chosen], iou[chosen]


def task_aligned_matching_reference(
    logits: Sequence[Tensor],
    deltas: Sequence[Tensor],
    anchors: Tensor,
    boxes: Tensor,
    labels: Tensor,
    offsets: Tensor,
    num_classes: int,
    top_k: int = 13,
    alpha: float = 1.0,
    beta: float = 6.0,
    reg_max: int = 0,
) -> AlignedMatches:
    """The definition; see :func:`task_aligned_matching`."""
    rows, num_anchors = offsets_on_host(offsets, len(boxes)), anchors.shape[-2]
    unknown = labels[(labels < 0) | (labels >= num_classes)]
    if len(unknown):
        raise ValueError(f"labels must be in [0, num_classes = {num_classes}), got {int(unknown[0])}")
    logits, deltas = flatten_all(logits, num_classes), flatten_all(deltas, box_channels(reg_max))
    best = torch.zeros(len(rows) - 1, num_anchors, dtype=torch.int64, device=anchors.device)
    classes, targets = torch.full_like(best, BACKGROUND, dtype=torch.int32), best.float()
    for b, (start, stop) in enumerate(pairwise(rows)):
        if start == stop or not num_anchors:
            continue
        own = anchors if anchors.dim() == 2 else anchors[b]
        predicted = decode(torch.cat([level[b] for level in deltas]).float(), own)  # (N, 4)
        centre, found, first = centres_of(own), [], start
        for chunk in boxes[start:stop].split(max(1, _PAIRS // num_anchors)):
            given = centre, predicted, chunk, labels[first : first + len(chunk)], top_k, alpha, beta
            row, *others = _aligned([level[b] for level in logits], *given)
            found.append((row + (first - start), *others))
            first += len(chunk)
        row, anchor, cost, iou = (torch.cat(parts) for parts in zip(*found, strict=True))
        best[b].scatter_reduce_(0, anchor, keys_of(iou, FIRST - row), "amax")
        matched = matched_of(best[b])
        classes[b] = torch.where(matched >= 0, labels[start:stop][matched.clamp(min=0)], matched)
        kept = matched[anchor] == row
        row, anchor, cost, iou = (x[kept] for x in (row, anchor, cost, iou))
        least = cost.new_full((stop - start,), math.inf).scatter_reduce_(0, row, cost, "amin")
        peak = iou.new_zeros(stop - start).scatter_reduce_(0, row, iou, "amax")
        targets[b, anchor] = torch.exp(least[row] - cost) * peak[row]
    indices = matched_of(best).int()
    return AlignedMatches(indices, classes, (indices >= 0).sum(dim=1, dtype=torch.int32), targets)


# Triton. aligned_candidates.py finds the candidates. All that follows here is exact but for an exponential.

_PROGRAMS = 4096  # about as many as an H200 holds


@triton.jit(do_not_specialize=["num_anchors", "k", "n"])
def _offer_kernel(
    predicted_ptr, boxes_ptr, offsets_ptr, keys_ptr, best_ptr, num_anchors, k, n, WIDTH: tl.constexpr
):  # fmt: skip
    """Program (p, b) offers ground truths p, p + P, ... of image b to the anchors of the k least of their n keys, and
    empties the other keys. An anchor keeps the greatest key that it is offered: the highest IoU, then the first ground
    truth."""
    image = tl.program_id(1).to(tl.int64)
    i = tl.arange(0, WIDTH)
    first = tl.load(offsets_ptr + image).to(tl.int32)
    end = tl.load(offsets_ptr + image + 1).to(tl.int32)
    box = first + tl.program_id(0)
    while box < end:
        keys = tl.load(keys_ptr + box.to(tl.int64) * n + i, mask=i < n, other=NONE)
        last = tl.min(keys, axis=0)
        for _ in range(1, k):
            last = tl.min(tl.where(keys > last, keys, NONE), axis=0)
        chosen = (keys <= last) & (keys < EMPTY)
        tl.store(keys_ptr + box.to(tl.int64) * n + i, tl.where(chosen, keys, NONE), mask=i < n)
        ptr = boxes_ptr + box.to(tl.int64) * 4
        left, top, right, bottom = tl.load(ptr), tl.load(ptr + 1), tl.load(ptr + 2), tl.load(ptr + 3)
        row = image * num_anchors + index_of(keys)
        x1, y1, x2, y2 = load_rows(predicted_ptr, row, chosen)
        iou = tl.minimum(tile_iou(x1, y1, x2, y2, (x2 - x1) * (y2 - y1), left, top, right, bottom), 1.0)
        tl.atomic_max(best_ptr + row, key_of(iou, first - box + TL_FIRST), mask=chosen, sem="relaxed")
        box += tl.num_programs(0)


@triton.jit(do_not_specialize=["num_anchors", "n"])
def _target_kernel(offsets_ptr, keys_ptr, best_ptr, targets_ptr, num_anchors, n, WIDTH: tl.constexpr):
    """Program (p, b) writes the targets of the anchors that ground truths p, p + P, ... of image b were left with."""
    image = tl.program_id(1).to(tl.int64)
    i = tl.arange(0, WIDTH)
    first = tl.load(offsets_ptr + image).to(tl.int32)
    end = tl.load(offsets_ptr + image + 1).to(tl.int32)
    box = first + tl.program_id(0)
    while box < end:
        keys = tl.load(keys_ptr + box.to(tl.int64) * n + i, mask=i < n, other=NONE)
        chosen = keys < EMPTY
        row = image * num_anchors + index_of(keys)
        best = tl.load(best_ptr + row, mask=chosen, other=0)
        kept = chosen & (index_of(best) == first - box + TL_FIRST)
        cost, iou = float_of(keys), float_of(best)
        least = tl.min(tl.where(kept, cost, float("inf")), axis=0)
        peak = tl.max(tl.where(kept, iou, 0.0), axis=0)
        tl.store(targets_ptr + row, tl.exp(least - cost) * peak, mask=kept)
        box += tl.num_programs(0)


def _task_aligned_matching_triton(
    logits: Sequence[Tensor], deltas: Sequence[Tensor], anchors: Tensor, boxes: Tensor, labels: Tensor, offsets: Tensor,
    num_classes: int, top_k: int, alpha: float, beta: float, reg_max: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    logits, deltas = (tuple(level.contiguous() for level in levels) for levels in (logits, deltas))
    anchors, boxes, labels, offsets = (x.contiguous() for x in (anchors, boxes, labels, offsets))
    batch, num_anchors = len(offsets) - 1, anchors.shape[-2]
    best = anchors.new_zeros((batch, num_anchors), dtype=torch.int64)
    targets = torch.zeros_like(best, dtype=torch.float32)
    if not len(boxes) or not best.numel():
        return *write_matches(best, labels, offsets), targets
    given = num_classes, top_k, float(alpha), float(beta), reg_max
    keys, predicted = aligned_candidates(logits, deltas, anchors, boxes, labels, offsets, *given)
    n, programs = keys.shape[1] * top_k, min(len(boxes), triton.cdiv(_PROGRAMS, batch))
    width = triton.next_power_of_2(n)
    warps = max(1, width // 512)
    with torch.cuda.device_of(anchors):
        _offer_kernel[(programs, batch)](
            predicted, boxes, offsets, keys, best, num_anchors, top_k, n, WIDTH=width, num_warps=warps,
            enable_fp_fusion=False,
        )  # fmt: skip
        found = write_matches(best, labels, offsets)
        _target_kernel[(programs, batch)](offsets, keys, best, targets, num_anchors, n, WIDTH=width, num_warps=warps)
    return *found, targets


@torch.library.custom_op("retina_fast::task_aligned_matching", mutates_args=())
def _op(
    logits: list[Tensor], deltas: list[Tensor], anchors: Tensor, boxes: Tensor, labels: Tensor, offsets: Tensor,
    num_classes: int, top_k: int, alpha: float, beta: float, reg_max: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    given = anchors, boxes, labels, offsets, num_classes, top_k, alpha, beta, reg_max
    return _task_aligned_matching_triton(logits, deltas, *given)


@torch.library.custom_op("retina_fast::task_aligned_matching_reference", mutates_args=())
def _reference_op(
    logits: list[Tensor], deltas: list[Tensor], anchors: Tensor, boxes: Tensor, labels: Tensor, offsets: Tensor,
    num_classes: int, top_k: int, alpha: float, beta: float, reg_max: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The reference reads offsets on the host: as an operation it is one node of a compiled or exported graph."""
    given = anchors, boxes, labels, offsets, num_classes, top_k, alpha, beta, reg_max
    return task_aligned_matching_reference(logits, deltas, *given)


@_op.register_fake
@_reference_op.register_fake
def _(logits, deltas, anchors, boxes, labels, offsets, num_classes, top_k, alpha, beta, reg_max):
    indices = anchors.new_empty((len(offsets) - 1, anchors.shape[-2]), dtype=torch.int32)
    return indices, torch.empty_like(indices), indices.new_empty(len(indices)), anchors.new_empty(indices.shape)


def task_aligned_matching(
    logits: Sequence[Tensor],
    deltas: Sequence[Tensor],
    anchors: Tensor,
    boxes: Tensor,
    labels: Tensor,
    offsets: Tensor,
    num_classes: int,
    top_k: int = 13,
    alpha: float = 1.0,
    beta: float = 6.0,
    reg_max: int = 0,
) -> AlignedMatches:
    """Match the anchors of a batch of images to their ground truths by task-aligned assignment.

    Args:
        logits: the levels as the heads wrote them, each ``(B, A*K, H, W)`` or ``(B, N_l, K)``; any float dtype.
        deltas: the same of boxes, ``(B, A*4, H, W)`` or ``(B, N_l, 4)``. With ``reg_max``, they have 4 (reg_max + 1)
            numbers an anchor in place of 4. No gradient flows into either.
        anchors: ``(N, 4)`` xyxy pixels, shared by the images, or ``(B, N, 4)``; read as float32.
        boxes: ``(G, 4)`` ground truths of all images, concatenated; read as float32.
        labels: ``(G,)`` integer classes in [0, K).
        offsets: ``(B + 1,)`` integers: image b owns rows offsets[b] to offsets[b + 1].
        num_classes: K.
        top_k: how many anchors a ground truth may have, at most 128.
        alpha, beta: exponents of the score and of the IoU, at least 0. The defaults of all three are the paper's.
        reg_max: n where each side is a distribution over 0, 1, ..., n units, and 0 for deltas.

    Raises:
        ValueError: for shapes that do not fit each other, labels or offsets that are not integers, tensors on different
            devices, a top_k or an exponent out of its range, or, on a CPU, offsets that fall or end above G, or a label
            that is no class.

    Example::

        >>> anchors = torch.tensor([[0.0, 0.0, 16.0, 16.0], [4.0, 4.0, 20.0, 20.0], [40.0, 40.0, 56.0, 56.0]])
        >>> logits, deltas = torch.tensor([[[0.0], [2.0], [5.0]]]), torch.zeros(1, 3, 4)
        >>> arguments = torch.tensor([[2.0, 2.0, 18.0, 18.0]]), torch.tensor([0]), torch.tensor([0, 1])
        >>> matches = task_aligned_matching([logits], [deltas], anchors, *arguments, num_classes=1)
        >>> matches.indices, matches.targets
        (tensor([[ 0,  0, -1]], dtype=torch.int32), tensor([[0.3521, 0.6203, 0.0000]]))
    """
    channels = num_classes, box_channels(reg_max)
    count, _ = check_levels(logits, num_classes), check_levels(deltas, channels[1])
    first = logits[0]
    found = [
        (len(levels[0]), [count_anchors(level, each) for level in levels])
        for levels, each in zip((logits, deltas), channels, strict=True)
    ]
    if found[0] != found[1]:
        raise ValueError(f"logits and deltas must have the same images and anchors a level, got {found}")
    check_anchors(anchors, len(first), count)
    check_shape("offsets", offsets, "(B + 1,)", (len(first) + 1,))
    check_devices(first.device, deltas=deltas[0], anchors=anchors, boxes=boxes, labels=labels, offsets=offsets)
    anchors, boxes = checked_geometry(anchors, boxes, labels, offsets)
    if not 1 <= top_k <= MAX_TOP_K:
        raise ValueError(f"top_k must be from 1 to {MAX_TOP_K}, got {top_k}")
    for name, exponent in (("alpha", alpha), ("beta", beta)):
        if not 0 <= exponent < math.inf:
            raise ValueError(f"{name} must be a number of at least 0, got {exponent}")
    x, y = ([level.detach() for level in flatten_all(*of)] for of in zip((logits, deltas), channels, strict=True))
    given = anchors, boxes, labels, offsets, num_classes, top_k, float(alpha), float(beta), reg_max
    if is_transformed(*x, *y):
        return task_aligned_matching_reference(x, y, *given)
    return AlignedMatches(*(_op if runs_triton(*x, *y) else _reference_op)(x, y, *given))
