"""Suppression of many boxes by all of the GPU: block after block of 2048 boxes, best first.

A block takes three launches. The first writes, for every pair of boxes of the block, one bit that says whether the
better one suppresses the other. In the second, one warp an image goes through the block, 32 boxes at a time, and
appends those to the kept boxes that no kept box suppresses. The third compares the boxes of all later blocks with those
that the block has kept, and marks what they suppress. So the bits never take more than half a megabyte an image, and
only the second launch, a few instructions a box, is not parallel.
"""

import torch
from torch import Tensor

from retina_fast.kernels.dispatch import tl, triton
from retina_fast.kernels.nms_overlap import WORD, overlap, position_of, settle

_BLOCK = 2048  # boxes: the bits of 32 columns are 64 registers of a warp
_COLUMNS = 128  # boxes that a program compares with better ones
_SHARES = 8  # programs that share out the kept boxes among them


@triton.jit
def _is_full(ends_ptr, block, max_kept):
    """Whether the blocks before have kept all that the result can hold."""
    return tl.load(ends_ptr + block - 1, mask=block > 0, other=0) >= max_kept


@triton.jit(do_not_specialize=["width", "max_kept", "block", "blocks"])
def _block_bits_kernel(
    boxes_ptr, labels_ptr, keys_ptr, counts_ptr, ends_ptr, bits_ptr, width, max_kept, block, blocks, iou_thresh,
    below_thresh, SMALLER: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr, WORD: tl.constexpr,
):  # fmt: skip
    """Program (c, w, b) writes, for COLUMNS boxes of the block, the bits of those of word w that suppress them."""
    word = tl.program_id(1)
    image = tl.program_id(2).to(tl.int64)
    count = tl.load(counts_ptr + image).to(tl.int32)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row = word * WORD + tl.arange(0, WORD)
    boxes_ptr += image * width * 4
    if labels_ptr is not None:
        labels_ptr += image * width
    if keys_ptr is not None:
        keys_ptr += image * width
    some = (word * WORD < (tl.program_id(0) + 1) * COLUMNS) & (block * BLOCK + word * WORD < count)
    if some & ~_is_full(ends_ptr + image * blocks, block, max_kept):
        above = position_of(keys_ptr, block * BLOCK + row, block * BLOCK + row < count)
        waiting = block * BLOCK + column < count
        below = position_of(keys_ptr, block * BLOCK + column, waiting)
        comparable = (row[:, None] < column[None, :]) & waiting[None, :]
        suppressed = overlap(
            boxes_ptr, labels_ptr, above[:, None], below[None, :], comparable, iou_thresh, below_thresh, SMALLER
        )
        bits = tl.sum(suppressed << tl.arange(0, WORD)[:, None], axis=0)
        tl.store(bits_ptr + (image * (BLOCK // WORD) + word) * BLOCK + column, bits, mask=column < BLOCK)


@triton.jit(do_not_specialize=["width", "max_kept", "max_detections", "block", "blocks"])
def _decide_kernel(
    keys_ptr, counts_ptr, removed_ptr, bits_ptr, ends_ptr, positions_ptr, kept_counts_ptr, width, max_kept,
    max_detections, block, blocks, BLOCK: tl.constexpr, WORD: tl.constexpr, PADDING: tl.constexpr,
):  # fmt: skip
    """Program b appends what the block keeps to the positions of image b. The last block's fills up the row."""
    image = tl.program_id(0).to(tl.int64)
    count = tl.load(counts_ptr + image).to(tl.int32)
    ends_ptr += image * blocks + block
    removed_ptr += image * width
    bits_ptr += image * (BLOCK // WORD) * BLOCK
    positions_ptr += image * max_detections
    if keys_ptr is not None:
        keys_ptr += image * width
    kept = tl.load(ends_ptr - 1, mask=block > 0, other=0)
    t = tl.arange(0, WORD)
    words = tl.arange(0, BLOCK // WORD)
    staying = tl.zeros([BLOCK // WORD], tl.int32)  # one bit a box of the block
    word = 0
    while (word * WORD < BLOCK) & (block * BLOCK + word * WORD < count) & (kept < max_kept):
        column = word * WORD + t
        i = block * BLOCK + column
        inside = i < count
        before = (words < word)[:, None] & inside[None, :]
        by = tl.load(bits_ptr + words[:, None] * BLOCK + column[None, :], mask=before, other=0)
        suppressed = tl.max(((by & staying[:, None]) != 0).to(tl.int32), axis=0)
        removed = tl.load(removed_ptr + i, mask=inside, other=1)
        by = tl.load(bits_ptr + word * BLOCK + column, mask=inside, other=0)
        bits = settle(inside & (removed == 0) & (suppressed == 0), by, WORD)
        staying = tl.where(words == word, bits, staying)
        chosen = ((bits >> t) & 1) == 1
        slots = kept + tl.cumsum(chosen.to(tl.int32), axis=0) - 1
        position = position_of(keys_ptr, i, inside).to(tl.int64)
        tl.store(positions_ptr + slots, position, mask=chosen & (slots < max_kept))
        kept = tl.minimum(kept + tl.sum(chosen.to(tl.int32), axis=0), max_kept)
        word += 1
    tl.store(ends_ptr, kept)
    if block == blocks - 1:
        tl.store(kept_counts_ptr + image, kept.to(tl.int64))
        start = kept
        while start < max_detections:
            slots = start + tl.arange(0, PADDING)
            tl.store(positions_ptr + slots, tl.zeros([PADDING], tl.int64), mask=slots < max_detections)
            start += PADDING


@triton.jit(do_not_specialize=["width", "max_kept", "max_detections", "block", "blocks"])
def _remove_kernel(
    boxes_ptr, labels_ptr, keys_ptr, counts_ptr, ends_ptr, positions_ptr, removed_ptr, width, max_kept, max_detections,
    block, blocks, iou_thresh, below_thresh, SMALLER: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
    WORD: tl.constexpr,
):  # fmt: skip
    """Program (c, s, b) marks those of COLUMNS later boxes that overlap with its share of what the block has kept."""
    image = tl.program_id(2).to(tl.int64)
    count = tl.load(counts_ptr + image).to(tl.int32)
    start = (block + 1) * BLOCK + tl.program_id(0) * COLUMNS
    ends_ptr += image * blocks + block
    kept = tl.load(ends_ptr)
    first = tl.load(ends_ptr - 1, mask=block > 0, other=0) + tl.program_id(1) * WORD
    if (start < count) & (first < kept) & (kept < max_kept):
        boxes_ptr += image * width * 4
        positions_ptr += image * max_detections
        if labels_ptr is not None:
            labels_ptr += image * width
        if keys_ptr is not None:
            keys_ptr += image * width
        i = start + tl.arange(0, COLUMNS)
        waiting = i < count
        below = position_of(keys_ptr, i, waiting)
        suppressed = tl.zeros([WORD, COLUMNS], tl.int32)
        while first < kept:
            slots = first + tl.arange(0, WORD)
            above = tl.load(positions_ptr + slots, mask=slots < kept, other=0).to(tl.int32)
            comparable = (slots < kept)[:, None] & waiting[None, :]
            suppressed |= overlap(
                boxes_ptr, labels_ptr, above[:, None], below[None, :], comparable, iou_thresh, below_thresh, SMALLER
            )
            first += tl.num_programs(1) * WORD
        mask = tl.max(suppressed, axis=0) > 0
        tl.store(removed_ptr + image * width + i, tl.full([COLUMNS], 1, tl.int8), mask=mask)


def suppress_by_blocks(
    boxes: Tensor, labels: Tensor | None, keys: Tensor | None, counts: Tensor, thresholds: tuple[float, float],
    max_detections: int, smaller: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The fields of Kept, of contiguous arguments and M > 0; three launches for every 2048 boxes.

    Args:
        boxes: ``(B, M, 4)`` float.
        labels: ``(B, M)`` integers, or None to suppress across classes.
        keys: ``(B, M)`` sorted keys, which tell the positions by falling score; None: the boxes lie best first.
        counts: ``(B,)`` integers.
        thresholds: of the IoU, and a number a little below it.
        max_detections: D.
        smaller: whether boxes are compared by intersection over the smaller area, in place of the IoU.
    """
    batch, width = boxes.shape[:2]
    blocks, max_kept, word = triton.cdiv(width, _BLOCK), min(max_detections, width), WORD.value
    removed = boxes.new_zeros(batch, width, dtype=torch.int8)
    bits = boxes.new_empty(batch, _BLOCK // word, _BLOCK, dtype=torch.int32)
    ends = boxes.new_empty(batch, blocks, dtype=torch.int32)  # how many are kept after each block
    positions = boxes.new_empty(batch, max_detections, dtype=torch.int64)
    kept_counts = boxes.new_empty(batch, dtype=torch.int64)
    for block in range(blocks):
        here, later = min(_BLOCK, width - block * _BLOCK), max(0, width - (block + 1) * _BLOCK)
        _block_bits_kernel[(triton.cdiv(here, _COLUMNS), triton.cdiv(here, word), batch)](
            boxes, labels, keys, counts, ends, bits, width, max_kept, block, blocks, *thresholds, SMALLER=smaller,
            BLOCK=_BLOCK, COLUMNS=_COLUMNS, WORD=word, enable_fp_fusion=False,
        )  # fmt: skip
        _decide_kernel[(batch,)](
            keys, counts, removed, bits, ends, positions, kept_counts, width, max_kept, max_detections, block, blocks,
            BLOCK=_BLOCK, WORD=word, PADDING=1024, num_warps=1, enable_fp_fusion=False,
        )  # fmt: skip
        if later:
            _remove_kernel[(triton.cdiv(later, _COLUMNS), _SHARES, batch)](
                boxes, labels, keys, counts, ends, positions, removed, width, max_kept, max_detections, block, blocks,
                *thresholds, SMALLER=smaller, BLOCK=_BLOCK, COLUMNS=_COLUMNS, WORD=word, enable_fp_fusion=False,
            )  # fmt: skip
    return positions, kept_counts
