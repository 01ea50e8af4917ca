"""What both ways of suppression share: the place of a box, whether boxes overlap, and who of 32 boxes stays."""

from retina_fast.kernels.dispatch import tl, triton
from retina_fast.kernels.key_sort import unpack_index

POSITION_BITS = tl.constexpr(31)  # of a key
WORD = tl.constexpr(32)  # boxes that are decided together, one bit each


@triton.jit
def position_of(keys_ptr, i, mask):
    """Position of the i-th best box of an image; 0 where masked. Without keys the boxes lie best first."""
    if keys_ptr is None:
        position = tl.where(mask, i, 0)
    else:
        key = tl.load(keys_ptr + i, mask=mask, other=-1)
        position = unpack_index(key, POSITION_BITS)
    return position


@triton.jit
def overlap(boxes_ptr, labels_ptr, above, below, comparable, iou_thresh, below_thresh, SMALLER: tl.constexpr = False):
    """1 where a box ``above`` [R, 1] suppresses a box ``below`` [1, C] and they are comparable [R, C], else 0.

    ``below_thresh`` is so far below ``iou_thresh`` that a ratio under it, computed by a product, is surely under the
    threshold, too. With ``SMALLER`` the overlap is intersection over the smaller area instead of IoU.
    """
    if labels_ptr is not None:
        comparable &= tl.load(labels_ptr + above) == tl.load(labels_ptr + below)
    x1, y1 = tl.load(boxes_ptr + above * 4), tl.load(boxes_ptr + above * 4 + 1)
    x2, y2 = tl.load(boxes_ptr + above * 4 + 2), tl.load(boxes_ptr + above * 4 + 3)
    u1, v1 = tl.load(boxes_ptr + below * 4), tl.load(boxes_ptr + below * 4 + 1)
    u2, v2 = tl.load(boxes_ptr + below * 4 + 2), tl.load(boxes_ptr + below * 4 + 3)
    width = tl.maximum(tl.minimum(x2, u2) - tl.maximum(x1, u1), 0.0)
    height = tl.maximum(tl.minimum(y2, v2) - tl.maximum(y1, v1), 0.0)
    intersection = width * height
    area, other = (x2 - x1) * (y2 - y1), (u2 - u1) * (v2 - v1)
    # Of an infinite area both are NaN.
    union = tl.minimum(area, other) + 0.0 * (area + other) if SMALLER else area + other - intersection
    # A division costs as much as all of this, and nearly no pair comes near the threshold. The quotient of the other
    # pairs is not looked at: 1 instead of mostly 0, which would take the slow path of the division.
    near = comparable & ~(intersection < below_thresh * union)
    suppressed = near.to(tl.int32)
    if tl.max(tl.max(suppressed, axis=1), axis=0) > 0:
        iou = tl.div_rn(tl.where(near, intersection, union), union)
        suppressed &= (iou > iou_thresh).to(tl.int32)
    return suppressed


@triton.jit
def settle(alive, by, WORD: tl.constexpr):
    """Bits of those of WORD boxes, best first, that stay: the alive [WORD] that no box suppresses which stays itself.
    ``by`` [WORD] has the bits of those that suppress each."""
    bit = tl.full([WORD], 1, tl.int32) << tl.arange(0, WORD)
    staying = tl.sum(tl.where(alive, bit, 0), axis=0)
    before = ~staying
    while staying != before:  # after n rounds the first n boxes are decided; two or three rounds mostly decide all
        before = staying
        staying = tl.sum(tl.where(alive & ((by & before) == 0), bit, 0), axis=0)
    return staying
