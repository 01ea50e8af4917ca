"""Candidate selection: which (anchor, class) pairs are worth decoding (torchvision's postprocess).

The survivors of an image and level are the pairs whose score sigmoid(logit) exceeds the threshold; its candidates are
the topk survivors with the highest logits. The candidates of all levels are ordered by falling logit, and among equal
logits by index: by level, anchor and class. Since sigmoid is monotone, logits are compared with logit(threshold), and
sigmoid is computed of candidates only, in float32 whatever the logits' dtype. A NaN logit is never a candidate.

torchvision writes the sigmoid of every logit, a mask, and an index of every survivor. Here the logits are read once,
and the survivors of each image and level are listed, each as one integer key that orders it. Where more than topk
survive, a radix search over the keys, 8 bits a pass, finds the lowest key that stays. A list has room for 3% of the
logits; where more survive, the passes read the logits instead.
"""

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from retina_fast.kernels.compiler import is_differentiated, runs_triton, tl, triton
from retina_fast.kernels.key_sort import PADDING, pack, sort_keys, unpack_index, unpack_number
from retina_fast.kernels.levels import check_levels, encode_sizes, flatten_all, level_of, pick, pick_size


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
            survivors = (flat.float() > threshold).nonzero().squeeze(1)
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


# Triton. A segment is one level of one image. A tile is a run of logits of one segment that starts on a 16-byte
# boundary. A thread looks at 16 bytes of a tile at a time, and notes as bits which of these logits survive.

_TILE_BYTES = 32768  # by instruction counts: at half of that a tile's set-up costs 1 more an element
_LISTED = 32  # the list of a segment has room for one in 32 of its logits
_SEARCH_TILE = 2048
_SEARCH_PROGRAMS = 2048  # over all segments: about what an H200 holds at once
_BINS = tl.constexpr(256)


@triton.jit
def _survivors(x_ptr, begin, end, threshold, TILE: tl.constexpr, RUN: tl.constexpr, MASKED: tl.constexpr):
    """For each run of RUN logits, (TILE // RUN,): bits of those that exceed the threshold, plus 2^16 times their
    number."""
    place = tl.arange(0, RUN)[None, :]
    i = tl.arange(0, TILE // RUN)[:, None] * RUN + place
    if MASKED:
        x = tl.load(x_ptr + i, mask=(begin + i >= 0) & (begin + i < end), other=float("-inf"))
    else:
        x = tl.load(x_ptr + i)
    return tl.sum(tl.where(x.to(tl.float32) > threshold, (1 << place) + 65536, 0), axis=1)


@triton.jit
def _list(x_ptr, begin, first_index, found, list_ptr, found_ptr, capacity, index_bits, DROP: tl.constexpr,
          TILE: tl.constexpr, RUN: tl.constexpr):  # fmt: skip
    """Counts a tile's survivors, and appends their keys to the list as far as it has room."""
    counts = found >> 16
    total = tl.sum(counts, axis=0)
    if total > 0:
        slot = tl.atomic_add(found_ptr, total, sem="relaxed")
        if slot < capacity:
            slots = slot + tl.cumsum(counts, axis=0) - counts
            bits = found & 65535
            start = tl.arange(0, TILE // RUN) * RUN
            while tl.max(bits, axis=0) > 0:  # one survivor of each run at a time
                lowest = (bits & -bits).to(tl.float32).to(tl.int32, bitcast=True)
                i = start + (lowest >> 23) - 127  # the exponent of a power of two
                x = tl.load(x_ptr + i, mask=bits > 0, other=0.0).to(tl.float32)
                key = pack(x, first_index + begin + i, index_bits, DROP)
                tl.store(list_ptr + slots, key, mask=(bits > 0) & (slots < capacity))
                slots += 1
                bits &= bits - 1


@triton.jit(do_not_specialize=["list_width", "index_bits"])
def _list_kernel(
    levels, starts, first_tiles, list_starts, lists_ptr, found_ptr, list_width, index_bits, threshold,
    DROP: tl.constexpr, TILE: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """Program (t, b) lists the survivors of tile t, counted through the levels, of image b."""
    tile = tl.program_id(0)
    image = tl.program_id(1).to(tl.int64)
    level = level_of(first_tiles, tile)
    start, list_start = pick_size(starts, level), pick_size(list_starts, level)
    end = pick_size(starts[1:], level) - start  # logits of an image in this level
    shift = ((image * end) & 15).to(tl.int32)  # the image's first logit may lie off the 16-byte boundaries
    tile -= pick_size(first_tiles, level)
    begin = tile * TILE - shift
    x_ptr = pick(levels, level) + tl.multiple_of(image * end - shift, 16) + tile * TILE
    if (begin >= 0) & (begin + TILE <= end):
        found = _survivors(x_ptr, begin, end, threshold, TILE, RUN, False)
    else:
        found = _survivors(x_ptr, begin, end, threshold, TILE, RUN, True)
    capacity = pick_size(list_starts[1:], level) - list_start
    list_ptr = lists_ptr + image * list_width + list_start
    _list(x_ptr, begin, start, found, list_ptr, found_ptr + image * len(levels) + level, capacity, index_bits, DROP,
          TILE, RUN)  # fmt: skip


@triton.jit
def _lowest_key(states_ptr, histograms_ptr, found, digit, shift, topk, PASSES: tl.constexpr, BINS: tl.constexpr):
    """What ``digit`` passes tell of the lowest key that stays: the lowest key with the same high digits, and how many
    of the keys with these digits stay, or 0 where all of them do."""
    if digit == 0:
        lowest = tl.full([], 0, tl.int64)
        staying = tl.where(found > topk, topk, 0)
        if topk == 0:
            lowest = tl.full([], 0x7FFFFFFFFFFFFFFF, tl.int64)
    else:
        lowest = tl.load(states_ptr + 2 * digit - 2)
        staying = tl.load(states_ptr + 2 * digit - 1).to(tl.int32)
        if staying > 0:
            falling = tl.arange(0, BINS)
            counts = tl.load(histograms_ptr + (digit - 1) * BINS + BINS - 1 - falling)
            bin = tl.sum((tl.cumsum(counts, axis=0) < staying).to(tl.int32), axis=0)
            staying -= tl.sum(tl.where(falling < bin, counts, 0), axis=0)
            if staying == tl.sum(tl.where(falling == bin, counts, 0), axis=0):
                staying = 0
            lowest += (BINS - 1 - bin).to(tl.int64) << (shift + 8)
    return lowest, staying


@triton.jit(do_not_specialize=["width", "list_width", "index_bits", "digit", "shift", "topk"])
def _search_kernel(
    levels, starts, list_starts, lists_ptr, found_ptr, states_ptr, histograms_ptr, rows_ptr, counts_ptr, width,
    list_width, index_bits, threshold, topk, digit, shift, DROP: tl.constexpr, PASSES: tl.constexpr,
    TILE: tl.constexpr, BINS: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Program (p, s) looks at its share of segment s. It counts by their next digit the keys whose higher digits are
    those of the lowest key that stays. In the LAST pass this key is known, and all keys from it up go to the rows."""
    segment = tl.program_id(1).to(tl.int64)
    image = segment // len(levels)
    level = segment - image * len(levels)
    start, list_start = pick_size(starts, level), pick_size(list_starts, level)
    found = tl.load(found_ptr + segment)
    states_ptr += segment * (2 * PASSES)
    histograms_ptr += segment * (PASSES * BINS)
    lowest, staying = _lowest_key(states_ptr, histograms_ptr, found, digit, shift, topk, PASSES, BINS)
    if not LAST and tl.program_id(0) == 0:
        tl.store(states_ptr + 2 * digit, lowest)
        tl.store(states_ptr + 2 * digit + 1, staying.to(tl.int64))

    in_level = pick_size(starts[1:], level) - start
    listed = found <= pick_size(list_starts[1:], level) - list_start
    list_ptr = lists_ptr + image * list_width + list_start
    x_ptr = pick(levels, level) + image * in_level
    work = tl.where(listed, found, in_level)
    if not LAST:
        work = tl.where(staying > 0, work, 0)
    histogram = tl.zeros([BINS], tl.int32)
    offset = tl.program_id(0) * TILE
    while offset < work:
        i = offset + tl.arange(0, TILE)
        if listed:
            keys = tl.load(list_ptr + i, mask=i < work, other=-1)
        else:
            x = tl.load(x_ptr + i, mask=i < work, other=float("-inf")).to(tl.float32)
            keys = tl.where(x > threshold, pack(x, start + i, index_bits, DROP), -1)
        if LAST:
            chosen = keys >= lowest
            total = tl.sum(chosen.to(tl.int64), axis=0)
            if total > 0:
                slot = tl.atomic_add(counts_ptr + image, total, sem="relaxed")
                slots = slot + tl.cumsum(chosen.to(tl.int32), axis=0) - 1
                tl.store(rows_ptr + image * width + slots, keys, mask=chosen)
        else:
            digits = (keys - lowest) >> shift
            matching = (keys >= lowest) & (digits < BINS)
            histogram += tl.histogram(tl.where(matching, digits, 0).to(tl.int32), BINS, mask=matching)
        offset += tl.num_programs(0) * TILE
    if not LAST and offset > tl.program_id(0) * TILE:
        bins = histograms_ptr + digit * BINS + tl.arange(0, BINS)
        tl.atomic_add(bins, histogram, mask=histogram > 0, sem="relaxed")


@triton.jit(do_not_specialize=["width", "index_bits"])
def _emit_kernel(
    keys_ptr, anchors_ptr, scores_ptr, labels_ptr, width, index_bits, K: tl.constexpr, DROP: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Program t writes the anchors, scores and labels of TILE keys of the sorted rows."""
    i = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    key = tl.load(keys_ptr + i, mask=i < width, other=-1)
    index = unpack_index(key, index_bits)
    score = tl.div_rn(1.0, 1.0 + tl.exp(-unpack_number(key, index_bits, DROP)))
    tl.store(anchors_ptr + i, tl.where(key >= 0, index // K, 0).to(tl.int64), mask=i < width)
    tl.store(scores_ptr + i, tl.where(key >= 0, score, 0.0), mask=i < width)
    tl.store(labels_ptr + i, tl.where(key >= 0, index % K, -1).to(tl.int64), mask=i < width)


_Fields = tuple[Tensor, Tensor, Tensor, Tensor]  # of Candidates


def _candidate_selection_triton(levels: list[Tensor], num_classes: int, score_thresh: float, topk: int) -> _Fields:
    """The fields of Candidates, of levels ``(B, N_l, K)``. The number of launches depends on the dtype and N alone."""
    first, *_ = levels = [level.contiguous() for level in levels]
    batch, width = len(first), _width(levels, topk)
    tile, run = _TILE_BYTES // first.element_size(), 16 // first.element_size()
    logits = [level.shape[1] * num_classes for level in levels]
    starts = [0, *accumulate(logits)]
    first_tiles = [0, *accumulate(triton.cdiv(count + 15, tile) for count in logits)]
    list_starts = [0, *accumulate(count // _LISTED + 1 for count in logits)]
    drop = {torch.bfloat16: 16, torch.float16: 13}.get(first.dtype, 0)
    index_bits = max(1, (starts[-1] - 1).bit_length())
    passes = triton.cdiv(32 - drop + index_bits, 8)
    segments = batch * len(levels)
    zeros = first.new_zeros(segments * (1 + passes * _BINS.value), dtype=torch.int32)
    found, histograms = zeros[:segments], zeros[segments:]
    counts = first.new_zeros(batch, dtype=torch.int64)
    states, lists = (counts.new_empty(shape) for shape in ((segments, passes, 2), (batch, list_starts[-1])))
    rows = counts.new_full((batch, width), PADDING)
    anchors, scores, labels = (torch.empty_like(rows, dtype=x) for x in (torch.int64, torch.float32, torch.int64))
    programs = max(1, min(_SEARCH_PROGRAMS // max(1, segments), triton.cdiv(starts[-1], 8 * _SEARCH_TILE)))
    with torch.cuda.device_of(first):
        _list_kernel[(first_tiles[-1], batch)](
            tuple(levels), encode_sizes(starts), encode_sizes(first_tiles), encode_sizes(list_starts), lists, found,
            list_starts[-1], index_bits, logit(score_thresh), DROP=drop, TILE=tile, RUN=run, enable_fp_fusion=False,
        )  # fmt: skip
        for digit in range(passes + 1):
            _search_kernel[(programs, segments)](
                tuple(levels), encode_sizes(starts), encode_sizes(list_starts), lists, found, states, histograms, rows,
                counts, width, list_starts[-1], index_bits, logit(score_thresh), min(topk, 2**31 - 1), digit,
                8 * (passes - 1 - digit), DROP=drop, PASSES=passes, TILE=_SEARCH_TILE, BINS=_BINS.value,
                LAST=digit == passes, enable_fp_fusion=False,
            )  # fmt: skip
        keys = sort_keys(rows, counts)
        _emit_kernel[(triton.cdiv(rows.numel(), 256),)](
            keys, anchors, scores, labels, rows.numel(), index_bits, K=num_classes, DROP=drop, TILE=256, num_warps=2,
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
