"""Suppression of many boxes by all of the GPU: block after block of 2048 boxes of each class, best first.

Boxes of different classes are dealt out beforehand (``nms_deal.py``), so that the work grows with the sum of the
squared sizes of the classes, and classes go through their blocks at the same time. A block takes two launches. The
first compares the boxes of this and all later blocks with those that the block before has kept, and marks what they
suppress; and it writes, for every pair of boxes of this block, one bit that says whether the better one suppresses the
other. In the second, one program a class goes through the block, 32 boxes at a time, and keeps those that no kept box
suppresses: this walk is the only sequential part. The bits take 256 bytes a box, or without classes half a megabyte an
image.
"""

import torch
from torch import Tensor

from retina_fast.kernels.dispatch import tl, triton
from retina_fast.kernels.nms_deal import deal
from retina_fast.kernels.nms_overlap import WORD, before, count_bits, count_of, load_box, overlap, position_of, settle
from retina_fast.kernels.nms_walk import first_flagged

_BLOCK = 2048  # boxes
_COLUMNS = 128  # boxes that a program compares with better ones: four a thread
_ROWS = 4  # better ones in one go
_SHARES = 32  # programs that share out the kept boxes among them
_STRIPS, _STRIPS_OF_CLASSES = 64, 16  # programs that share out the words of a block among them
_MARKING, _WRITING = 2048, 1024  # programs of either kind: each takes a tile of columns after another
_GROUPS = 128  # of classes
_MOST_DEALT = 2**20  # boxes up to which there is memory for the bits of all of them


@triton.jit
def _range_of(starts_ptr, counts_ptr, image, width, group, GROUPS: tl.constexpr):
    """Where the boxes of a group begin and end."""
    if GROUPS == 1:
        start, end = group * 0, group * 0 + count_of(counts_ptr, image, width)
    else:
        starts_ptr += image * (GROUPS + 1) + group
        start, end = tl.load(starts_ptr), tl.load(starts_ptr + 1)
    return start, end


@triton.jit
def _tile_of(starts_ptr, counts_ptr, image, width, tile, first, most, COLUMNS: tl.constexpr, GROUPS: tl.constexpr):
    """The group of a tile of COLUMNS boxes, where tiles are counted through the groups, and where in the group it
    begins. Of a group the boxes from the first on count, at most so many. Behind the last tile the group is GROUPS."""
    groups = tl.arange(0, GROUPS)
    start, end = _range_of(starts_ptr, counts_ptr, image, width, groups, GROUPS)
    tiles = tl.cdiv(tl.minimum(tl.maximum(end - start - first, 0), most), COLUMNS)
    group = tl.sum((tl.cumsum(tiles, axis=0) <= tile).to(tl.int32), axis=0)
    return group, first + (tile - tl.sum(tl.where(groups < group, tiles, 0), axis=0)) * COLUMNS


@triton.jit(do_not_specialize=["width", "kept_width", "max_kept", "pitch", "block", "blocks", "marking"])
def _compare_kernel(
    boxes_ptr, labels_ptr, keys_ptr, counts_ptr, starts_ptr, ends_ptr, kept_ptr, removed_ptr, bits_ptr, width,
    kept_width, max_kept, pitch, block, blocks, marking, iou_thresh, above_thresh, SMALLER: tl.constexpr,
    BLOCK: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, WORD: tl.constexpr, SHARES: tl.constexpr,
    STRIPS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """The first programs mark those of this and later blocks that overlap with what the block before has kept: each
    takes tiles of boxes, and compares them with its share of the kept ones. The others write, for tiles of the block,
    the bits of those that suppress a box."""
    image = tl.program_id(1).to(tl.int64)
    boxes_ptr += image * width * 4
    kept_ptr += image * kept_width
    removed_ptr += image * width
    bits_ptr += image * pitch * (BLOCK // WORD)
    if labels_ptr is not None:
        labels_ptr += image * width
    if keys_ptr is not None:
        keys_ptr += image * width
    program, first = tl.program_id(0), block * BLOCK
    marks = program < marking
    shares = tl.where(marks, SHARES, STRIPS)
    program -= tl.where(marks, 0, marking)
    share, tile = program % shares, program // shares
    tiles = tl.where(marks, marking, tl.num_programs(0) - marking) // shares
    room = tl.where(marks, width, BLOCK)
    group, offset = _tile_of(starts_ptr, counts_ptr, image, width, tile, first, room, COLUMNS, GROUPS)
    while group < GROUPS:
        start, end = _range_of(starts_ptr, counts_ptr, image, width, group, GROUPS)
        end_ptr = ends_ptr + (image * GROUPS + group) * blocks + block
        kept = tl.load(end_ptr - 1, mask=block > 0, other=0)
        i = start + offset + tl.arange(0, COLUMNS)
        waiting = i < end
        box = load_box(boxes_ptr, labels_ptr, position_of(keys_ptr, i, waiting)[None, :])
        if kept >= max_kept:
            pass
        elif marks:
            most = tl.full([COLUMNS], -1.0, tl.float32)
            first_slot = tl.load(end_ptr - 2, mask=block > 1, other=0) + share * ROWS
            for slot in range(first_slot, kept, SHARES * ROWS):
                slots = tl.minimum(slot + tl.arange(0, ROWS), kept - 1)
                above = tl.load(kept_ptr + start + slots).to(tl.int32)
                better = load_box(boxes_ptr, labels_ptr, above[:, None])
                most = tl.maximum(most, tl.max(overlap(better, box, iou_thresh, above_thresh, SMALLER), axis=0))
            mask = waiting & (most > 0)
            tl.store(removed_ptr + i, tl.full([COLUMNS], 1, tl.int8), mask=mask)
        else:
            here = tl.minimum(offset + COLUMNS, end - start) - first
            for word in range(share, tl.cdiv(here, WORD), STRIPS):
                bits = tl.zeros([COLUMNS], tl.int32)
                for row in range(0, WORD, ROWS):
                    bit = row + tl.arange(0, ROWS)
                    j = start + first + word * WORD + bit
                    above = position_of(keys_ptr, j, j < end)
                    better = load_box(boxes_ptr, labels_ptr, above[:, None])
                    suppressed = overlap(better, box, iou_thresh, above_thresh, SMALLER) > 0
                    # Of `suppressed << ...` LLVM makes an array of booleans in local memory (Triton 3.9).
                    bits |= tl.sum(tl.where(suppressed, (1 << bit)[:, None], 0), axis=0)
                bits &= before(i - start - first - word * WORD)
                column = i - (first if GROUPS == 1 else 0)
                tl.store(bits_ptr + column.to(tl.int64) * (BLOCK // WORD) + word, bits, mask=waiting)
        tile += tiles
        group, offset = _tile_of(starts_ptr, counts_ptr, image, width, tile, first, room, COLUMNS, GROUPS)


@triton.jit
def _read(keys_ptr, ranks_ptr, removed_ptr, bits_ptr, start, end, column, word, BLOCK: tl.constexpr,
          WORD: tl.constexpr):  # fmt: skip
    """Of the next WORD boxes: the bits of the words before, and of their own, who is gone, position and rank."""
    words, t = tl.arange(0, BLOCK // WORD), word * WORD + tl.arange(0, WORD)
    inside = start + t < end
    bits_ptr += (column + t).to(tl.int64) * (BLOCK // WORD)
    earlier = tl.load(bits_ptr[:, None] + words[None, :], mask=inside[:, None], other=0)
    own = tl.load(bits_ptr + word, mask=inside, other=0)
    gone = tl.load(removed_ptr + start + t, mask=inside, other=1)
    position = position_of(keys_ptr, start + t, inside)
    rank = position
    if ranks_ptr is not None:
        rank = tl.load(ranks_ptr + start + t, mask=inside, other=0)
    return earlier, own, gone, position, rank


@triton.jit(do_not_specialize=["width", "kept_width", "max_kept", "pitch", "block", "blocks"])
def _decide_kernel(
    keys_ptr, ranks_ptr, counts_ptr, starts_ptr, removed_ptr, bits_ptr, ends_ptr, kept_ptr, flags_ptr,
    kept_counts_ptr, width, kept_width, max_kept, pitch, block, blocks, BLOCK: tl.constexpr, WORD: tl.constexpr,
    GROUPS: tl.constexpr, PADDING: tl.constexpr,
):  # fmt: skip
    """Program (g, b) appends what group g of image b keeps of the block to what it has kept, and sets flags of it by
    rank. Without groups, what is kept is the result, which the last block fills up."""
    group = tl.program_id(0)
    image = tl.program_id(1).to(tl.int64)
    start, end = _range_of(starts_ptr, counts_ptr, image, width, group, GROUPS)
    kept_ptr += image * kept_width + start
    end_ptr = ends_ptr + (image * GROUPS + group) * blocks + block
    removed_ptr += image * width
    bits_ptr += image * pitch * (BLOCK // WORD)
    if keys_ptr is not None:
        keys_ptr += image * width
    if ranks_ptr is not None:
        ranks_ptr += image * width
    kept = tl.load(end_ptr - 1, mask=block > 0, other=0)
    start += block * BLOCK
    end = tl.minimum(end, start + BLOCK)
    column = start if GROUPS > 1 else start * 0
    t, words = tl.arange(0, WORD), tl.arange(0, BLOCK // WORD)
    staying = tl.zeros([BLOCK // WORD], tl.int32)  # one bit a box of the block
    word = tl.full([], 0, tl.int32)
    earlier, own, gone, position, rank = _read(
        keys_ptr, ranks_ptr, removed_ptr, bits_ptr, start, end, column, word, BLOCK, WORD
    )
    while (word * WORD < end - start) & (kept < max_kept):
        # What the next turn needs is read before this one waits for anything.
        next_earlier, next_own, next_gone, next_position, next_rank = _read(
            keys_ptr, ranks_ptr, removed_ptr, bits_ptr, start, end, column, word + 1, BLOCK, WORD
        )
        by = tl.reduce_or(earlier & staying[None, :], axis=1)
        suppressed = tl.sum(tl.where(by != 0, 1 << t, 0), axis=0)  # as bits, which every warp then has
        bits = settle((gone == 0) & (((suppressed >> t) & 1) == 0), own, WORD)
        staying = tl.where(words == word, bits, staying)
        slots = kept + count_bits(bits & before(t))
        chosen = (((bits >> t) & 1) == 1) & (slots < max_kept)
        tl.store(kept_ptr + slots, position.to(kept_ptr.dtype.element_ty), mask=chosen)
        if ranks_ptr is not None:
            tl.store(flags_ptr + image * width + rank, tl.full([WORD], 1, tl.int8), mask=chosen)
        kept = tl.minimum(kept + count_bits(bits), max_kept)
        earlier, own, gone, position, rank = next_earlier, next_own, next_gone, next_position, next_rank
        word += 1
    tl.store(end_ptr, kept)
    if (GROUPS == 1) & (block == blocks - 1):
        tl.store(kept_counts_ptr + image, kept.to(tl.int64))
        slot = kept
        while slot < kept_width:
            slots = slot + tl.arange(0, PADDING)
            tl.store(kept_ptr + slots, tl.zeros([PADDING], kept_ptr.dtype.element_ty), mask=slots < kept_width)
            slot += PADDING


def suppress_by_blocks(
    boxes: Tensor, labels: Tensor | None, keys: Tensor | None, counts: Tensor, thresholds: tuple[float, float],
    max_detections: int, smaller: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The fields of Kept, of contiguous arguments and M > 0; two launches for every 2048 boxes, and with labels four.

    Args:
        boxes: ``(B, M, 4)`` float.
        labels: ``(B, M)`` integers, or None to suppress across classes.
        keys: ``(B, M)`` sorted keys, which tell the positions by falling score; None: the boxes lie best first.
        counts: ``(B,)`` integers.
        thresholds: of the IoU, and the next number above it, as ``overlap`` takes them.
        max_detections: D.
        smaller: whether boxes are compared by intersection over the smaller area, in place of the IoU.
    """
    batch, width = boxes.shape[:2]
    blocks, max_kept, word = triton.cdiv(width, _BLOCK), min(max_detections, width), WORD.value
    groups = 1 if labels is None or width > _MOST_DEALT else _GROUPS
    shares, strips = _SHARES, _STRIPS if groups == 1 else _STRIPS_OF_CLASSES
    ends = boxes.new_empty(batch, groups, blocks, dtype=torch.int32)  # how many are kept after each block
    kept_counts = boxes.new_empty(batch, dtype=torch.int64)
    if labels is None or groups == 1:
        order, ranks, starts, flags = keys, None, None, None
        removed = boxes.new_zeros(batch, width, dtype=torch.int8)
        kept, pitch = boxes.new_empty(batch, max_detections, dtype=torch.int64), _BLOCK
    else:
        order, ranks, starts = deal(labels, keys, counts, groups)
        removed, flags = boxes.new_zeros(2, batch, width, dtype=torch.int8)
        kept, pitch = torch.empty_like(order), width
    bits = boxes.new_zeros(batch, pitch, _BLOCK // word, dtype=torch.int32)  # by box: those of a word that suppress it
    with torch.cuda.device_of(boxes):
        for block in range(blocks):
            left = triton.cdiv(width - block * _BLOCK, _COLUMNS) + groups - 1  # tiles at most
            here = min(left, triton.cdiv(_BLOCK, _COLUMNS) * groups)
            marking = shares * min(left, _MARKING // shares) if block else 0
            writing = strips * min(here, (_WRITING if block or groups == 1 else 4 * _WRITING) // strips)
            _compare_kernel[(marking + writing, batch)](
                boxes, labels, order, counts, starts, ends, kept, removed, bits, width, kept.shape[1], max_kept, pitch,
                block, blocks, marking, *thresholds, SMALLER=smaller, BLOCK=_BLOCK, COLUMNS=_COLUMNS, ROWS=_ROWS,
                WORD=word, SHARES=shares, STRIPS=strips, GROUPS=groups, num_warps=1, enable_fp_fusion=False,
            )  # fmt: skip
            _decide_kernel[(groups, batch)](
                order, ranks, counts, starts, removed, bits, ends, kept, flags, kept_counts, width, kept.shape[1],
                max_kept, pitch, block, blocks, BLOCK=_BLOCK, WORD=word, GROUPS=groups, PADDING=1024,
                enable_fp_fusion=False,
            )  # fmt: skip
    return (kept, kept_counts) if flags is None else first_flagged(flags, keys, counts, max_detections)
