"""Suppression of a few thousand boxes in two launches: each program walks down the boxes of its classes.

The classes of an image are shared out to programs. A program takes the boxes of its classes in tiles of 32, best first:
it compares a tile with the boxes it has kept so far, then within itself. It ends when it has kept as many as the result
can hold, or when all programs of the image together have: so of thousands of boxes mostly a few hundred are looked at.
"""

import torch
from torch import Tensor

from retina_fast.kernels.dispatch import tl, triton
from retina_fast.kernels.nms_overlap import WORD, before, count_of, load_box, overlap, position_of, settle

_PROGRAMS = 512  # of all images together, as far as that leaves an image no fewer and no more groups than these
_FEWEST_GROUPS, _MOST_GROUPS = 16, 128
_SCAN = 512  # boxes whose class a program looks at in one go
_FLAGS, _READ = 1024, 4096  # flags whose boxes a program writes, and words of four that it reads in one go
_DONE = 2**22  # more than a walk has boxes
_LANES = 32  # kept boxes that a tile is compared with in one go


@triton.jit
def flags_pitch(width):
    """How many flags an image of so many boxes has."""
    return tl.cdiv(width, 16) * 16


@triton.jit
def _deal(
    labels_ptr, keys_ptr, members_ptr, flags_ptr, scanned, count, group, GROUPS: tl.constexpr, SCAN: tl.constexpr
):  # fmt: skip
    """Writes down as members those of the next SCAN boxes that belong to the program's classes, with their positions if
    there are keys, and lowers their flags; returns how many."""
    i = scanned + tl.arange(0, SCAN)
    mine = i < count
    position = position_of(keys_ptr, i, mine)
    if labels_ptr is not None:
        label = tl.load(labels_ptr + position, mask=mine, other=0)
        mine &= (label & (GROUPS - 1)) == group
    slots = tl.cumsum(mine.to(tl.int32), axis=0) - 1
    tl.store(members_ptr + slots, i, mask=mine)
    if keys_ptr is not None:
        tl.store(members_ptr + SCAN + slots, position, mask=mine)
    tl.store(flags_ptr + i, tl.zeros([SCAN], tl.int8), mask=mine)
    return tl.sum(mine.to(tl.int32), axis=0)


@triton.jit
def _keep(
    boxes_ptr, labels_ptr, keys_ptr, members_ptr, kept_ptr, kept_labels_ptr, flags_ptr, head, tail, kept, max_kept,
    iou_thresh, above_thresh, SCAN: tl.constexpr, WORD: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Decides which of the next WORD members are kept, and notes their boxes; returns how many."""
    t, lanes = tl.arange(0, WORD), tl.arange(0, LANES)
    waiting = head + t < tail
    i = tl.load(members_ptr + head + t, mask=waiting, other=0)
    position = i
    if keys_ptr is not None:
        position = tl.load(members_ptr + SCAN + head + t, mask=waiting, other=0)
    box = load_box(boxes_ptr, labels_ptr, position[:, None])
    most = tl.full([WORD, LANES], -1.0, tl.float32)
    for first in range(0, kept, LANES):
        above = tl.minimum(first + lanes, kept - 1)
        better = load_box(kept_ptr, kept_labels_ptr, above[None, :])
        most = tl.maximum(most, overlap(better, box, iou_thresh, above_thresh))
    alive = waiting & (tl.max(most, axis=1) <= 0)
    better = load_box(boxes_ptr, labels_ptr, position[None, :])
    suppressed = overlap(better, box, iou_thresh, above_thresh) > 0
    by = tl.sum(tl.where(suppressed, (1 << t)[None, :], 0), axis=1) & before(
        t
    )  # [WORD]: the bits of those that suppress each
    staying = settle(alive, by, WORD)
    chosen = ((staying >> t) & 1) == 1
    slots = kept + tl.cumsum(chosen.to(tl.int32), axis=0) - 1
    chosen &= slots < max_kept
    into = kept_ptr + slots[:, None] * 4
    for side in tl.static_range(4):
        tl.store(into + side, box[side], mask=chosen[:, None])
    if labels_ptr is not None:
        tl.store(kept_labels_ptr + slots[:, None], box[5], mask=chosen[:, None])
    tl.store(flags_ptr + i, tl.full([WORD], 1, tl.int8), mask=chosen)
    return tl.sum(chosen.to(tl.int32), axis=0)


@triton.jit(do_not_specialize=["width", "max_kept"])
def _suppress_kernel(
    boxes_ptr, labels_ptr, keys_ptr, counts_ptr, members_ptr, kept_ptr, kept_labels_ptr, flags_ptr, progress_ptr, width,
    max_kept, iou_thresh, above_thresh, GROUPS: tl.constexpr, SCAN: tl.constexpr, WORD: tl.constexpr,
    LANES: tl.constexpr, DONE: tl.constexpr,
):  # fmt: skip
    """Program (g, b) handles the classes of image b whose low bits are g. It sets the flags of its boxes, by falling
    score, as far down as it walks: 1 where it keeps the box, which it does at most max_kept times.

    The image's boxes are decided in blocks of SCAN. For each block the programs add up, in one number, how many of them
    have decided theirs, times DONE, and how many boxes these had kept by then. So a program learns that all have come
    to the end of a block with max_kept boxes kept: what lies behind is of no use."""
    group = tl.program_id(0)
    image = tl.program_id(1).to(tl.int64)
    count = count_of(counts_ptr, image, width)
    boxes_ptr += image * width * 4
    flags_ptr += image * flags_pitch(width)
    if labels_ptr is not None:
        labels_ptr += image * width
        kept_labels_ptr += (image * GROUPS + group) * max_kept
    if keys_ptr is not None:
        keys_ptr += image * width
    members_ptr += (image * GROUPS + group) * 2 * SCAN
    kept_ptr += (image * GROUPS + group) * 4 * max_kept
    progress_ptr += image * tl.cdiv(width, SCAN)
    scanned, head, tail, kept, blocks, found = 0, 0, 0, 0, 0, 0
    while (kept < max_kept) & (found < max_kept) & ((head < tail) | (scanned < count)):
        if head == tail:
            tail = _deal(labels_ptr, keys_ptr, members_ptr, flags_ptr, scanned, count, group, GROUPS, SCAN)
            head = 0
            scanned += SCAN
        else:
            kept += _keep(
                boxes_ptr, labels_ptr, keys_ptr, members_ptr, kept_ptr, kept_labels_ptr, flags_ptr, head, tail, kept,
                max_kept, iou_thresh, above_thresh, SCAN, WORD, LANES,
            )  # fmt: skip
            head = tl.minimum(head + WORD, tail)
        tl.debug_barrier()  # members, kept and flags are used by other threads than wrote them
        if scanned < count:  # else nothing but members is left to do
            decided = scanned // SCAN
            if head < tail:
                decided -= 1
            else:
                tl.atomic_add(progress_ptr + decided - 1, DONE + kept, sem="relaxed")
            if blocks < decided:
                state = tl.atomic_max(progress_ptr + blocks, 0, sem="relaxed")  # by a load each warp might see another
                if state // DONE == GROUPS:
                    found = state % DONE
                    blocks += 1


@triton.jit(do_not_specialize=["width", "max_detections"])
def _first_kernel(
    flags_ptr, words_ptr, keys_ptr, counts_ptr, positions_ptr, kept_counts_ptr, width, max_detections,
    SCAN: tl.constexpr, READ: tl.constexpr,
):  # fmt: skip
    """Program (t, b) writes the positions of the flagged boxes among SCAN boxes of image b to their places in the
    result, as far as it holds them, and the zeros of SCAN places behind the last. It adds up the flags by itself, four
    of them in a word, until they are more than the result holds.

    No flag before the last box of the result is left unset: a program that ended early had kept max_detections by then.
    What is added up behind it makes no difference, whatever it is.
    """
    first = tl.program_id(0) * SCAN
    image = tl.program_id(1).to(tl.int64)
    count = tl.maximum(count_of(counts_ptr, image, width), 0)
    flags_ptr += image * flags_pitch(width)
    words_ptr += image * (flags_pitch(width) // 4)
    positions_ptr += image * max_detections
    if keys_ptr is not None:
        keys_ptr += image * width
    earlier = tl.zeros([READ], tl.int32)
    # How many there are in all is asked by those who write zeros, or the number.
    start, kept, words = 0, 0, tl.where(first < max_detections, count, tl.minimum(first, count)) // 4
    while (start < words) & (kept < max_detections):
        word = start + tl.arange(0, READ)
        flags = tl.load(words_ptr + word, mask=word < words, other=0) & 0x01010101
        flagged = (flags * 0x01010101) >> 24  # the sum of the four bytes
        kept += tl.sum(flagged, axis=0)
        earlier += tl.where(word < first // 4, flagged, 0)
        start += READ
    rest = count // 4 * 4 + tl.arange(0, 4)
    kept += tl.sum(tl.load(flags_ptr + rest, mask=rest < count, other=0).to(tl.int32) & 1, axis=0)
    kept = tl.minimum(kept, max_detections)
    i = first + tl.arange(0, SCAN)
    own = tl.load(flags_ptr + i, mask=i < count, other=0).to(tl.int32) & 1
    slots = tl.sum(earlier, axis=0) + tl.cumsum(own, axis=0) - 1
    position = position_of(keys_ptr, i, i < count).to(tl.int64)
    tl.store(positions_ptr + slots, position, mask=(own > 0) & (slots < max_detections))
    tl.store(positions_ptr + i, tl.zeros([SCAN], tl.int64), mask=(i >= kept) & (i < max_detections))
    if first == 0:
        tl.store(kept_counts_ptr + image, kept.to(tl.int64))


def new_flags(boxes: Tensor) -> Tensor:
    """One int8 for each of the boxes (B, M, 4), and then for none up to a multiple of 16."""
    return boxes.new_empty(len(boxes), triton.cdiv(boxes.shape[1], 16) * 16 or 16, dtype=torch.int8)


def progress_blocks(width: int) -> int:
    """How many zeros an image of so many boxes needs, in which programs tell each other how far they have come."""
    return triton.cdiv(width, _SCAN)


def flag_by_walks(
    boxes: Tensor, labels: Tensor | None, keys: Tensor | None, counts: Tensor, thresholds: tuple[float, float],
    max_detections: int, progress: Tensor,
) -> Tensor:  # fmt: skip
    """Flags of the boxes by falling score, as ``new_flags`` makes them, 1 where a box is kept: up to the
    max_detections-th kept box of an image, behind which they tell nothing. One launch; the arguments are those of
    ``suppress_by_tiles``, but ``progress_blocks`` zeros for each image."""
    batch, width = boxes.shape[:2]
    most = max(_FEWEST_GROUPS, min(_MOST_GROUPS, _PROGRAMS // max(1, batch)))
    groups = 1 if labels is None else 1 << (most.bit_length() - 1)  # a power of two
    max_kept = min(max_detections, width)
    flags = new_flags(boxes)
    members = boxes.new_empty(batch, groups, 2, _SCAN, dtype=torch.int32)
    lists = boxes.new_empty(batch, groups, max_kept, 4)
    kept_labels = None if labels is None else labels.new_empty(batch, groups, max_kept)
    with torch.cuda.device_of(boxes):
        _suppress_kernel[(groups, batch)](
            boxes, labels, keys, counts, members, lists, kept_labels, flags, progress, width, max_kept, *thresholds,
            GROUPS=groups, SCAN=_SCAN, WORD=WORD.value, LANES=_LANES, DONE=_DONE,
            num_warps=8 if groups == _MOST_GROUPS else 4, enable_fp_fusion=False,
        )  # fmt: skip
    return flags


def first_flagged(
    flags: Tensor, keys: Tensor | None, counts: Tensor, width: int, max_detections: int
) -> tuple[Tensor, Tensor]:
    """Positions ``(B, max_detections)`` of the first boxes with a flag, padded with 0, and how many there are ``(B,)``.
    One launch; flags are as ``flag_by_walks`` returns them, of M boxes an image, which are `width`."""
    batch = len(flags)
    positions = flags.new_empty(batch, max_detections, dtype=torch.int64)
    kept_counts = flags.new_empty(batch, dtype=torch.int64)
    with torch.cuda.device_of(flags):
        _first_kernel[(triton.cdiv(max(1, width, max_detections), _FLAGS), batch)](
            flags, flags.view(torch.int32), keys, counts, positions, kept_counts, width, max_detections, SCAN=_FLAGS,
            READ=_READ, num_warps=16, enable_fp_fusion=False,
        )  # fmt: skip
    return positions, kept_counts


def suppress_by_walks(
    boxes: Tensor, labels: Tensor | None, keys: Tensor | None, counts: Tensor, thresholds: tuple[float, float],
    max_detections: int, progress: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The fields of Kept, in two launches; the arguments are those of ``flag_by_walks``."""
    flags = flag_by_walks(boxes, labels, keys, counts, thresholds, max_detections, progress)
    return first_flagged(flags, keys, counts, boxes.shape[1], max_detections)
