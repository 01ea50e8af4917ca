"""Suppression of many boxes by all of the GPU in one launch: tiles of 512 boxes of a class, best first.

A tile is decided once those before it are. Parts of its boxes are compared, by programs of their own, with what the
tiles before have kept, in the order in which these are decided. Meanwhile each part writes, for its boxes, one bit for
every better box of the tile: whether that one suppresses it. The last part to end decides on the tile. Who stays is
computed for all of its boxes at once, from who stayed the round before, until nothing changes; or, if a chain of boxes
is long of which each suppresses the next, box after box.

Programs take the parts by numbers that they draw, and wait only for parts with lower numbers, which have been drawn
before by programs that run: so nobody waits for a program that has not begun (Merrill and Garland 2016, Single-pass
parallel prefix scan with decoupled look-back). A tile whose boxes are all suppressed waits for nobody. So boxes that
all overlap take little longer than reading them; where none do, all pairs are compared, and the GPU is full.

Boxes of different classes are dealt out beforehand (``nms_deal.py``). The best tiles of all classes come first, then
the next ones. The bits take 64 bytes a box.
"""

import torch
from torch import Tensor

from retina_fast.kernels.dispatch import tl, triton
from retina_fast.kernels.nms_deal import deal
from retina_fast.kernels.nms_overlap import WORD, before, count_of, overlap, position_of
from retina_fast.kernels.nms_walk import first_flagged, flags_pitch, new_flags

_TILE = 512  # boxes that are decided together, a multiple of 32
_PAIRS = 4096  # of a box of a part and a better one, in one go; at least 32 for each box of a part
_PART, _PART_OF_MANY = 32, 128  # boxes of a tile that one program compares with better ones
_MANY = 2**15  # boxes of all images together
_ROUNDS = 6  # in which a tile is settled as a whole, before it is walked through
_PROGRAMS = 256  # of all images together; an H200 runs 132 of them at once
_GROUPS = 128  # of classes


@triton.jit
def _tile_of(turns_ptr, starts_ptr, counts_ptr, image, width, tile, TILE: tl.constexpr, GROUPS: tl.constexpr):
    """Of the tile that comes at this turn: how many tiles of its group come before, and where the group begins and
    ends; and a number that no other tile has, which grows by one from tile to tile of a group."""
    if turns_ptr is None:
        depth, start, end, number = tile, tile * 0, count_of(counts_ptr, image, width), tile
    else:
        turn = tl.load(turns_ptr + 1 + tile)
        group, depth = turn % GROUPS, turn // GROUPS
        start, end = tl.load(starts_ptr + group), tl.load(starts_ptr + group + 1)
        number = start // TILE + group + depth  # a group has at most one tile more than whole ones in this count
    return depth, start, end, number


@triton.jit
def _load_boxes(boxes_ptr, labels_ptr, position, AXIS: tl.constexpr):
    """Boxes as ``overlap`` takes them, along the columns of a matrix (AXIS 0) or its rows (1); each takes one load."""
    count: tl.constexpr = position.shape[0]
    sides = tl.load(boxes_ptr + position[:, None] * 4 + tl.arange(0, 4)[None, :])
    x, y = tl.split(tl.reshape(sides, [count, 2, 2]))
    x1, x2 = tl.split(x)
    y1, y2 = tl.split(y)
    label = position * 0
    if labels_ptr is not None:
        label = tl.load(labels_ptr + position)
    area = (x2 - x1) * (y2 - y1)
    return (
        tl.expand_dims(x1, AXIS), tl.expand_dims(y1, AXIS), tl.expand_dims(x2, AXIS), tl.expand_dims(y2, AXIS),
        tl.expand_dims(area, AXIS), tl.expand_dims(label, AXIS),
    )  # fmt: skip


@triton.jit
def _rank_of(ranks_ptr, i, mask):
    """How many boxes of the image are better than the i-th; without ranks all are of one group."""
    rank = i
    if ranks_ptr is not None:
        rank = tl.load(ranks_ptr + i, mask=mask, other=0)
    return rank


@triton.jit
def _pack(chosen, TILE: tl.constexpr, WORD: tl.constexpr):
    """TILE booleans as bits of words."""
    bit = 1 << (tl.arange(0, TILE) % WORD)
    return tl.sum(tl.reshape(tl.where(chosen, bit, 0), [TILE // WORD, WORD]), axis=1)


@triton.jit
def _write_bits(
    boxes_ptr, labels_ptr, keys_ptr, bits_ptr, box, first, end, part, iou_thresh, above_thresh, SMALLER: tl.constexpr,
    TILE: tl.constexpr, PART: tl.constexpr, ROWS: tl.constexpr, WORD: tl.constexpr,
):  # fmt: skip
    """Writes for each box of a part which better boxes of the tile suppress it, 32 to a word."""
    t = part * PART + tl.arange(0, PART)
    for row in range(0, part * PART + PART, ROWS):
        i = first + row + tl.arange(0, ROWS)
        better = _load_boxes(boxes_ptr, labels_ptr, position_of(keys_ptr, i, i < end), 0)
        suppressed = overlap(better, box, iou_thresh, above_thresh, SMALLER) > 0
        # Of `suppressed << ...` LLVM makes an array of booleans in local memory (Triton 3.9).
        bits = tl.where(suppressed, (1 << (tl.arange(0, ROWS) % WORD))[None, :], 0)
        words = row // WORD + tl.arange(0, ROWS // WORD)
        bits = tl.sum(tl.reshape(bits, [PART, ROWS // WORD, WORD]), axis=2)
        bits &= before(t[:, None] - words[None, :] * WORD)
        into = bits_ptr + (first + t).to(tl.int64)[:, None] * (TILE // WORD) + words[None, :]
        tl.store(into, bits, mask=(first + t < end)[:, None] & (words < TILE // WORD)[None, :])


@triton.jit
def _compare(
    boxes_ptr, labels_ptr, keys_ptr, bits_ptr, kept_ptr, kept_labels_ptr, state_ptr, max_kept, depth, start, first, end,
    part, iou_thresh, above_thresh, SMALLER: tl.constexpr, TILE: tl.constexpr, PART: tl.constexpr, ROWS: tl.constexpr,
    WORD: tl.constexpr,
):  # fmt: skip
    """Which boxes of a part are suppressed by none that the tiles before it have kept, and a number above 0 if there
    are any: there is none once max_kept boxes of the group are kept.

    A state is one more than the number of boxes that a tile has kept, and 0 until it is decided. The loop also comes to
    the state of the part's own tile, where it waits for nobody and writes the bits at the latest."""
    i = first + part * PART + tl.arange(0, PART)
    alive = i < end
    box = _load_boxes(boxes_ptr, labels_ptr, position_of(keys_ptr, i, alive), 1)
    most = tl.full([PART, ROWS], -1.0, tl.float32)
    left, kept, seen, checked, written = 1, 0, 0, 0, 0
    while (left > 0) & ((checked < depth) | (written == 0)):
        # By a load each warp might see another number.
        count = tl.atomic_add(state_ptr + seen, 0, sem="acquire") - 1
        if count >= 0:
            into = start + seen * TILE
            for slot in range(0, count, ROWS):
                slots = into + tl.minimum(slot + tl.arange(0, ROWS), count - 1)
                better = _load_boxes(kept_ptr, kept_labels_ptr, slots, 0)
                most = tl.maximum(most, overlap(better, box, iou_thresh, above_thresh, SMALLER))
            kept += count
            seen += 1
        # To look who is left takes as long as some comparisons: it is done when 1, 2, 4, ... tiles are through, and
        # before a wait.
        if (seen > checked) & ((count < 0) | (seen >= 2 * checked)):
            alive &= tl.max(most, axis=1) <= 0
            left = tl.where(kept < max_kept, tl.sum(alive.to(tl.int32), axis=0), 0)
            checked = seen
        if (count < 0) & (written == 0) & (left > 0):
            _write_bits(
                boxes_ptr, labels_ptr, keys_ptr, bits_ptr, box, first, end, part, iou_thresh, above_thresh, SMALLER,
                TILE, PART, ROWS, WORD,
            )  # fmt: skip
            written = 1
    return alive & (left > 0), left


@triton.jit
def _walk(bits, bits_ptr, alive, TILE: tl.constexpr, WORD: tl.constexpr):
    """Which boxes of a tile stay, however long the chains are: word after word, and in a word box after box."""
    t, words = tl.arange(0, TILE), tl.arange(0, TILE // WORD)
    staying = tl.zeros([TILE // WORD], tl.int32)
    for word in range(TILE // WORD):
        free = alive & (tl.reduce_or(bits & staying[None, :], axis=1) == 0) & (t // WORD == word)
        free = tl.sum(tl.where(free, 1 << (t % WORD), 0), axis=0)
        stays = free * 0
        for n in tl.static_range(WORD):
            is_free = (free >> n) & 1
            own = tl.load(bits_ptr + (word * WORD + n) * (TILE // WORD) + word, mask=is_free == 1, other=0)
            stays |= tl.where((own & stays) == 0, is_free << n, 0)
        staying = tl.where(words == word, stays, staying)
    return alive & (tl.reduce_or(bits & staying[None, :], axis=1) == 0)


@triton.jit
def _decide(
    boxes_ptr, labels_ptr, keys_ptr, ranks_ptr, bits_ptr, kept_ptr, kept_labels_ptr, flags_ptr, first, end,
    TILE: tl.constexpr, WORD: tl.constexpr, ROUNDS: tl.constexpr,
):  # fmt: skip
    """Writes the boxes that a tile keeps, and leaves flags to them alone; returns how many they are."""
    t, words = tl.arange(0, TILE), tl.arange(0, TILE // WORD)
    i = first + t
    inside = i < end
    flags_ptr += _rank_of(ranks_ptr, i, inside)
    alive = tl.load(flags_ptr, mask=inside, other=0) != 0
    bits_ptr += first.to(tl.int64) * (TILE // WORD)
    ptr = bits_ptr + t[:, None] * (TILE // WORD) + words[None, :]
    written = alive[:, None] & (words[None, :] * WORD <= t[:, None])
    bits = tl.load(ptr, mask=written, other=0)
    chosen = alive
    staying = _pack(chosen, TILE, WORD)
    changed, left = 1, ROUNDS
    while (changed > 0) & (left > 0):  # after n rounds the first n boxes are decided; a few rounds mostly decide all
        chosen = alive & (tl.reduce_or(bits & staying[None, :], axis=1) == 0)
        stays = _pack(chosen, TILE, WORD)
        changed = tl.sum((stays != staying).to(tl.int32), axis=0)
        staying = stays
        left -= 1
    if changed > 0:
        chosen = _walk(bits, bits_ptr, alive, TILE, WORD)
    slots = first + tl.cumsum(chosen.to(tl.int32), axis=0) - 1
    position = position_of(keys_ptr, i, inside)
    for side in tl.static_range(4):
        tl.store(kept_ptr + slots * 4 + side, tl.load(boxes_ptr + position * 4 + side), mask=chosen)
    if labels_ptr is not None:
        tl.store(kept_labels_ptr + slots, tl.load(labels_ptr + position), mask=chosen)
    tl.store(flags_ptr, chosen.to(tl.int8), mask=inside)
    return tl.sum(chosen.to(tl.int32), axis=0)


@triton.jit(do_not_specialize=["width", "max_kept", "states"])
def _tiles_kernel(
    boxes_ptr, labels_ptr, keys_ptr, ranks_ptr, counts_ptr, starts_ptr, turns_ptr, progress_ptr, bits_ptr, kept_ptr,
    kept_labels_ptr, flags_ptr, width, max_kept, states, iou_thresh, above_thresh, SMALLER: tl.constexpr,
    TILE: tl.constexpr, PART: tl.constexpr, ROWS: tl.constexpr, WORD: tl.constexpr, GROUPS: tl.constexpr,
    ROUNDS: tl.constexpr,
):  # fmt: skip
    """The programs (., b) take the parts of the tiles of image b, and set the flags of the boxes that are kept.

    Of an image, progress has the number of parts that have been taken; then for each tile one more than the number of
    boxes it has kept, once that is decided; then for each tile how many parts have ended, plus twice TILE and more if
    any of them has boxes left."""
    image = tl.program_id(1).to(tl.int64)
    boxes_ptr += image * width * 4
    kept_ptr += image * width * 4
    flags_ptr += image * flags_pitch(width)
    bits_ptr += image * width * (TILE // WORD)
    progress_ptr += image * (1 + 2 * states)
    if labels_ptr is not None:
        labels_ptr += image * width
        kept_labels_ptr += image * width
    if keys_ptr is not None:
        keys_ptr += image * width
    if turns_ptr is None:
        tiles = tl.cdiv(count_of(counts_ptr, image, width), TILE)
    else:
        ranks_ptr += image * width
        starts_ptr += image * (GROUPS + 1)
        turns_ptr += image * states
        tiles = tl.load(turns_ptr)
    item = tl.atomic_add(progress_ptr, 1, sem="relaxed")
    while item < tiles * (TILE // PART):
        tile, part = item // (TILE // PART), item % (TILE // PART)
        depth, start, end, number = _tile_of(turns_ptr, starts_ptr, counts_ptr, image, width, tile, TILE, GROUPS)
        first = start + depth * TILE
        end = tl.minimum(end, first + TILE)
        state_ptr = progress_ptr + 1 + number - depth  # of the first tile of the group
        if first + part * PART < end:
            alive, left = _compare(
                boxes_ptr, labels_ptr, keys_ptr, bits_ptr, kept_ptr, kept_labels_ptr, state_ptr, max_kept, depth, start,
                first, end, part, iou_thresh, above_thresh, SMALLER, TILE, PART, ROWS, WORD,
            )  # fmt: skip
            i = first + part * PART + tl.arange(0, PART)
            tl.store(flags_ptr + _rank_of(ranks_ptr, i, i < end), alive.to(tl.int8), mask=i < end)
            tl.debug_barrier()  # what all threads have written is to be seen by whom the next number is told
            ended = tl.atomic_add(state_ptr + depth + states, 1 + left * (2 * TILE), sem="acq_rel")
            if ended % (2 * TILE) == tl.cdiv(end - first, PART) - 1:
                count = 0
                if left + ended // (2 * TILE) > 0:
                    count = _decide(
                        boxes_ptr, labels_ptr, keys_ptr, ranks_ptr, bits_ptr, kept_ptr, kept_labels_ptr, flags_ptr,
                        first, end, TILE, WORD, ROUNDS,
                    )  # fmt: skip
                tl.debug_barrier()
                tl.atomic_xchg(state_ptr + depth, count + 1, sem="release")
        item = tl.atomic_add(progress_ptr, 1, sem="relaxed")


def _states(width: int, groups: int) -> int:
    """More than an image of so many boxes has tiles, however large its groups are."""
    return triton.cdiv(width, _TILE) + groups


def tile_progress(width: int, by_class: bool) -> int:
    """How many zeros an image of so many boxes needs, in which programs tell each other how far they have come."""
    return 1 + 2 * _states(width, _GROUPS if by_class else 1)


def suppress_by_tiles(
    boxes: Tensor, labels: Tensor | None, keys: Tensor | None, counts: Tensor, thresholds: tuple[float, float],
    max_detections: int, progress: Tensor, smaller: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The fields of Kept, of contiguous arguments and M > 0; two launches, and with labels four.

    Args:
        boxes: ``(B, M, 4)`` float.
        labels: ``(B, M)`` integers, or None to suppress across classes.
        keys: ``(B, M)`` sorted keys, which tell the positions by falling score; None: the boxes lie best first.
        counts: ``(B,)`` integers.
        thresholds: of the IoU, and the next number above it, as ``overlap`` takes them.
        max_detections: D.
        progress: int32 zeros, ``tile_progress`` for each image.
        smaller: whether boxes are compared by intersection over the smaller area, in place of the IoU.
    """
    batch, width = boxes.shape[:2]
    order, ranks, starts, turns, groups = keys, None, None, None, 1
    if labels is not None:
        groups = _GROUPS
        order, ranks, starts, turns = deal(labels, keys, counts, groups, _TILE)
    states = _states(width, groups)
    bits = boxes.new_empty(batch, width, _TILE // WORD.value, dtype=torch.int32)
    flags = new_flags(boxes)
    kept, kept_labels = torch.empty_like(boxes), None if labels is None else torch.empty_like(labels)
    part = _PART if batch * width <= _MANY else _PART_OF_MANY
    parts = (states - 1) * (_TILE // part)
    with torch.cuda.device_of(boxes):
        _tiles_kernel[(min(parts, max(1, _PROGRAMS // max(1, batch))), batch)](
            boxes, labels, order, ranks, counts, starts, turns, progress, bits, kept, kept_labels, flags, width,
            min(max_detections, width), states, *thresholds, SMALLER=smaller, TILE=_TILE, PART=part,
            ROWS=_PAIRS // part, WORD=WORD.value, GROUPS=groups, ROUNDS=_ROUNDS, num_warps=16, enable_fp_fusion=False,
        )  # fmt: skip
    return first_flagged(flags, keys, counts, width, max_detections)
