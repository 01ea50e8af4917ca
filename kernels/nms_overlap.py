"""What both ways of suppression share: the place of a box, whether boxes overlap, and who of 32 boxes stays."""

from retina_fast.kernels.dispatch import tl, triton
from retina_fast.kernels.key_sort import unpack_index

POSITION_BITS = tl.constexpr(31)  # of a key
WORD = tl.constexpr(32)  # boxes that are decided together, one bit each
_CLOSE = tl.constexpr(2.0**-20)  # of a union: far more than the roundings of an IoU


@triton.jit
def count_of(counts_ptr, image, width):
    """How many boxes of an image count: as many as there are, if the count is larger."""
    return tl.minimum(tl.load(counts_ptr + image), width).to(tl.int32)


@triton.jit
def position_of(keys_ptr, i, mask):
    """Position of the i-th best box of an image; 0 where masked. ``keys_ptr`` has sorted keys, or positions as int32;
    without it the boxes lie best first."""
    if keys_ptr is None:
        position = tl.where(mask, i, 0)
    elif keys_ptr.dtype.element_ty == tl.int32:
        position = tl.load(keys_ptr + i, mask=mask, other=0)
    else:
        key = tl.load(keys_ptr + i, mask=mask, other=-1)
        position = unpack_index(key, POSITION_BITS)
    return position


@triton.jit
def load_box(boxes_ptr, labels_ptr, position):
    """The four sides, the area and the class of boxes. Without labels all are of class 0."""
    ptr = boxes_ptr + position * 4
    x1, y1, x2, y2 = tl.load(ptr), tl.load(ptr + 1), tl.load(ptr + 2), tl.load(ptr + 3)
    label = position * 0
    if labels_ptr is not None:
        label = tl.load(labels_ptr + position)
    return x1, y1, x2, y2, (x2 - x1) * (y2 - y1), label


@triton.jit
def overlap(better, box, iou_thresh, above_thresh, SMALLER: tl.constexpr = False):
    """A number above 0 where a ``better`` box suppresses a ``box``, else not. The boxes are as ``load_box`` returns
    them, and their shapes broadcast.

    A division costs as much as all of the rest, and mostly a product tells. With a, the next float32 number above the
    threshold, a rounded I / U is above the threshold if it is at least a. I > round(a U) implies I > a U, and only
    where I is so close to a U that roundings could decide is the quotient needed. Where U is negative, I is 0. With
    ``SMALLER`` the overlap is intersection over the smaller area, in place of the union.
    """
    x1, y1, x2, y2, area, label = better
    u1, v1, u2, v2, other_area, other_label = box
    width = tl.maximum(tl.minimum(x2, u2) - tl.maximum(x1, u1), 0.0)
    height = tl.maximum(tl.minimum(y2, v2) - tl.maximum(y1, v1), 0.0)
    intersection = width * height
    # Of an infinite area both are NaN.
    whole = area + other_area
    union = tl.minimum(area, other_area) + 0.0 * whole if SMALLER else whole - intersection
    margin = intersection - above_thresh * tl.abs(union)
    distance = tl.abs(margin) - tl.abs(union) * _CLOSE
    if (tl.min(distance) <= 0) | (iou_thresh <= 0):
        # The quotient of the other pairs is not looked at: 1 instead of mostly 0, which would take the slow path.
        open = (distance <= 0) | (iou_thresh <= 0)
        iou = tl.div_rn(tl.where(open, intersection, union), union)
        margin = tl.where(open, tl.where(iou > iou_thresh, 1.0, -1.0), margin)
    return tl.where(label == other_label, margin, -1.0)


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


@triton.jit
def before(n):
    """An int32 of which the n lowest bits are 1: none for n < 0, and all from 32 on."""
    return tl.where(n >= 32, -1, (1 << tl.minimum(tl.maximum(n, 0), 31)) - 1)


@triton.jit
def count_bits(x):
    """How many bits of an int32 are 1."""
    x = x.to(tl.uint32, bitcast=True)
    x -= (x >> 1) & 0x55555555
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    x += x >> 8
    return ((x + (x >> 16)) & 63).to(tl.int32)
