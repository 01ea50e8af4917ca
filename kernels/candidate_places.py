"""The last step of selection: each key finds its place among the candidates of its image, and what it stands for is
written there: anchor, score and label, and, where deltas are given, the decoded box.

So neither the sorted keys nor the anchors have to be read again to learn which box belongs to which place.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from retina_fast.kernels.box_decode import MAX_LOG_SCALE, decode_boxes, store_boxes
from retina_fast.kernels.candidate_search import FoundKeys
from retina_fast.kernels.dispatch import tl, triton
from retina_fast.kernels.key_sort import (
    count_of_row,
    places,
    placing,
    sorts_by_kernels,
    unpack_index,
    unpack_number,
)
from retina_fast.kernels.levels import encode_sizes


class Decoding(NamedTuple):
    """What the boxes of candidates are decoded from."""

    deltas: list[Tensor]
    """The levels, each contiguous ``(B, N_l, C)``."""
    anchors: Tensor
    """``(N, 4)`` or ``(B, N, 4)`` float32, contiguous."""
    image_sizes: Tensor
    """``(B, 2)`` contiguous."""
    reg_max: int = 0
    """n where each side is a distribution over 0, 1, ..., n units, and 0 for deltas."""


@triton.jit(do_not_specialize=["row_width", "width", "most", "index_bits", "anchors_stride"])
def _place_kernel(
    rows_ptr, found_ptr, part_starts, anchors_ptr, scores_ptr, labels_ptr, boxes_ptr, counts_ptr, deltas, delta_starts,
    anchor_boxes_ptr, sizes_ptr, row_width, width, most, index_bits, anchors_stride, max_log_scale, K: tl.constexpr,
    DROP: tl.constexpr, SORTED: tl.constexpr, KEYS: tl.constexpr, COUNTED: tl.constexpr, CHUNK: tl.constexpr,
    RUN: tl.constexpr, MAX_RUNS: tl.constexpr, COUNT: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """Program (t, b) writes what KEYS keys of image b stand for to their places, and its share of the padding."""
    tile = tl.program_id(0)
    image = tl.program_id(1).to(tl.int64)
    found_ptr += image * (len(part_starts) - 1)
    count = count_of_row(found_ptr, part_starts, most)
    i = tile * KEYS + tl.arange(0, KEYS)
    if SORTED:
        keys, place, belongs = tl.load(rows_ptr + image * row_width + i, mask=i < count, other=-1), i, i < count
    else:
        keys, place, belongs = places(
            rows_ptr + image * row_width, found_ptr, part_starts, tile, most, KEYS, COUNTED, CHUNK, RUN, MAX_RUNS
        )
    out = image * width + place
    index = unpack_index(keys, index_bits)
    score = tl.div_rn(1.0, 1.0 + tl.exp(-unpack_number(keys, index_bits, DROP)))
    anchor = index // K
    tl.store(scores_ptr + out, score, mask=belongs)
    tl.store(labels_ptr + out, (index % K).to(tl.int64), mask=belongs)
    if anchors_ptr is not None:
        tl.store(anchors_ptr + out, anchor.to(tl.int64), mask=belongs)
    if boxes_ptr is not None:
        x1, y1, x2, y2 = decode_boxes(
            deltas, delta_starts, anchor_boxes_ptr + image * anchors_stride, sizes_ptr, image, anchor, belongs,
            max_log_scale, COUNT, BINS,
        )  # fmt: skip
        store_boxes(boxes_ptr + out * 4, x1, y1, x2, y2, belongs)

    out = image * width + i
    padding = (i >= count) & (i < width)
    tl.store(scores_ptr + out, tl.zeros([KEYS], tl.float32), mask=padding)
    tl.store(labels_ptr + out, tl.full([KEYS], -1, tl.int64), mask=padding)
    if anchors_ptr is not None:
        tl.store(anchors_ptr + out, tl.zeros([KEYS], tl.int64), mask=padding)
    if boxes_ptr is not None:
        zero = tl.zeros([KEYS], tl.float32)
        store_boxes(boxes_ptr + out * 4, zero, zero, zero, zero, padding)
    if tile == 0:
        tl.store(counts_ptr + image, count.to(tl.int64))


def write_candidates(
    found: FoundKeys, width: int, num_classes: int, decoding: Decoding | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Anchors, or boxes if they are to be decoded, scores and labels ``(B, width)``, best first, and counts ``(B,)``.

    One launch, or two in a large batch; where an image may have more than 8192 keys, torch.sort comes before.
    """
    keys, part_starts, most = found.keys, encode_sizes(found.part_starts), found.most
    batch, row_width = keys.shape
    scores, labels = keys.new_empty(batch, width, dtype=torch.float32), keys.new_empty(batch, width)
    counts = keys.new_empty(batch)
    anchors = boxes = deltas = delta_starts = anchor_boxes = sizes = None
    stride, places = 0, 1
    if decoding is None:
        anchors = keys.new_empty(batch, width)
    else:
        boxes, anchor_boxes, sizes = scores.new_empty(batch, width, 4), decoding.anchors, decoding.image_sizes
        deltas, starts, places = tuple(decoding.deltas), [0], decoding.reg_max + 1
        for level in deltas:
            starts.append(starts[-1] + level.shape[1])
        delta_starts, stride = encode_sizes(starts), 0 if anchor_boxes.dim() == 2 else 4 * starts[-1]
    by_kernels = sorts_by_kernels(row_width)
    with torch.cuda.device_of(keys):
        if by_kernels:
            keys, constants = placing(keys, found.counts, part_starts)
        else:
            keys, constants = _sorted_by_torch(found), {"KEYS": 256, "COUNTED": False, "CHUNK": 1}
            constants |= {"RUN": 1, "MAX_RUNS": 1}
        _place_kernel[(triton.cdiv(max(keys.shape[1], width), constants["KEYS"]), batch)](
            keys, found.counts, part_starts, anchors, scores, labels, boxes, counts, deltas, delta_starts,
            anchor_boxes, sizes, keys.shape[1], width, most, found.index_bits, stride, MAX_LOG_SCALE, K=num_classes,
            DROP=found.drop, SORTED=not by_kernels, COUNT=places, BINS=triton.next_power_of_2(places), **constants,
            enable_fp_fusion=False,
        )  # fmt: skip
    written = anchors if boxes is None else boxes
    assert written is not None
    return written, scores, labels, counts


def _sorted_by_torch(found: FoundKeys) -> Tensor:
    """Rows of keys in falling order, of each part the greatest ones; behind them padding."""
    ends = found.part_starts[1:]
    parts = [found.keys[:, start:end] for start, end in zip(found.part_starts, ends, strict=False)]
    if any(part.shape[1] > found.most for part in parts):
        parts = [part.sort(dim=1, descending=True).values[:, : found.most] for part in parts]
    return torch.cat(parts, dim=1).sort(dim=1, descending=True).values
