"""Suppression of one image's boxes on a CPU, without a loop over boxes or classes in Python.

A few boxes are compared pair by pair. Of many, the best are compared with all others first: where thousands of boxes
lie on few places, hardly any is left then, and that is repeated. What is left otherwise is sorted by class and left
side, so that a sweep lists the pairs of one class that share an x coordinate. Each IoU is computed step by step as
torchvision computes it, in the dtype of the boxes.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torchvision.ops.boxes import nms as torchvision_nms  # bound now: ours may come to stand in its place

_FEW = 32  # boxes that are compared pair by pair
_LIST, _OF_A_CLASS = 2048, 8  # pairs within classes, in all or for each box, all of which are compared
_MANY = 2048  # boxes of which some are decided on before any are sorted
_PROBE = 16  # boxes that are compared with all others first
_BLOCK = 2**16  # pairs of a block of best boxes with all others, so that they fit a cache
_CHUNK = 2**16  # pairs that a sweep lists in one go
_KNOWN = 2**22  # pairs of overlapping boxes that a sweep has memory for
_SPARSE = 8  # if fewer than one in so many pairs of a block meet, IoUs are computed of a list of them
_LISTED = 6  # pairs of a block take as long as one of a list
_CALLS = 8192  # pairs that take as long as the calls of a block
_LOOPED = 100  # pairs of overlapping boxes that a loop is fastest for
_CALLED = 2**19  # pairs up to which calls of torchvision's are as fast as blocks
_ALONE = 256  # boxes of a class, on average, that are decided on without the others
_ROUNDS = 16  # in which nearly all sets of overlapping boxes are decided


def _settled(above: NDArray[Any], below: NDArray[Any], count: int) -> NDArray[Any]:
    """Which of ``count`` boxes stay, as bool, where those of ``above`` suppress those of ``below`` if they stay."""
    gone = np.zeros(count, bool)
    for _ in range(_ROUNDS):
        if len(above) <= _LOOPED:
            break
        first = np.ones(count, bool)
        first[below] = False  # boxes that no undecided one can suppress
        gone[below[first[above]]] = True
        open = (~(first | gone)[above] & ~gone[below]).nonzero()[0]
        above, below = above[open], below[open]
    order = below.argsort(kind="stable")
    flags = bytearray(gone)
    for a, b in zip(above[order].tolist(), below[order].tolist(), strict=True):
        if not flags[a]:
            flags[b] = 1
    return ~np.frombuffer(flags, bool)


def _exceeds(width: NDArray[Any], height: NDArray[Any], area: Any, other: Any, thresh: float) -> NDArray[Any]:
    """Whether the IoU of boxes exceeds the threshold, from the sides of the intersection and both areas."""
    intersection = np.maximum(width, 0, out=width)
    intersection *= np.maximum(height, 0, out=height)
    union = np.add(area, other, out=height)
    union -= intersection
    return np.divide(intersection, union, out=union) > thresh


def _decide_block(
    boxes: NDArray[Any], areas: NDArray[Any], labels: NDArray[Any] | None, size: int, thresh: float
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Which of the ``size`` best boxes stay, and the positions of those behind that they leave."""
    x1, y1, x2, y2 = boxes.T.copy()
    own = slice(size), None
    meet = x1[own] < x2  # (size, N)
    meet &= x2[own] > x1
    meet &= y1[own] < y2
    meet &= y2[own] > y1
    if labels is not None:
        meet &= labels[own] == labels
    listed = _SPARSE * np.count_nonzero(meet) < meet.size
    i, j = np.divmod(meet.ravel().nonzero()[0], len(boxes)) if listed else (own, slice(None))
    width = np.minimum(x2[i], x2[j])
    width -= np.maximum(x1[i], x1[j])
    height = np.minimum(y2[i], y2[j])
    height -= np.maximum(y1[i], y1[j])
    over = _exceeds(width, height, areas[i], areas[j], thresh)
    if listed:
        above, below = i[over], j[over]
    else:
        over &= meet  # of one class
        above, below = over[:, :size].nonzero()
    later = (above < below) & (below < size)
    stays = _settled(above[later], below[later], size)
    if listed:
        left = np.ones(len(boxes), bool)
        left[below[stays[above]]] = False
    else:
        left = ~over[stays].any(axis=0)
    return stays, size + np.flatnonzero(left[size:])


def _decide_by_class(
    boxes: NDArray[Any], areas: NDArray[Any], order: NDArray[Any], following: NDArray[Any], thresh: float
) -> NDArray[Any]:
    """Which boxes stay, from the order by class and the numbers of worse boxes of the class of each."""
    n = np.arange(len(order))
    i = n.repeat(following)
    j = np.arange(len(i)) + (n + 1 - following.cumsum() + following).repeat(following)
    i, j = order[i], order[j]
    a, b = boxes.take(i, axis=0), boxes.take(j, axis=0)
    side = np.minimum(a[:, 2:], b[:, 2:])
    side -= np.maximum(a[:, :2], b[:, :2])
    over = _exceeds(side[:, 0], side[:, 1], areas[i], areas[j], thresh).nonzero()[0]
    return _settled(i[over], j[over], len(order))


def _swept(boxes: NDArray[Any], labels: NDArray[Any] | None) -> tuple[NDArray[Any], NDArray[Any]]:
    """The order by class and left side, and how many of the next boxes in it may share an x coordinate with each."""
    left, right = boxes[:, 0], boxes[:, 2]
    if labels is not None:
        if int(labels.max()) - int(labels.min()) >= 2**20:
            labels = np.unique(labels, return_inverse=True)[1]
        low, high = float(left.min()), float(right.max())
        if high - low > 1e300:  # of float64, whose sums could overflow
            left, right, low, high = left * 2.0**-30, right * 2.0**-30, low * 2.0**-30, high * 2.0**-30
        # Classes lie apart, and rounding is monotonous: no box comes to lie right of another's right side.
        shift = labels * (2 * (high - low))
        left, right = left - low + shift, right - low + shift
    order = left.argsort()
    return order, left[order].searchsorted(right[order], "right") - np.arange(1, len(order) + 1)


def _decide_by_sweep(
    boxes: NDArray[Any], areas: NDArray[Any], order: NDArray[Any], following: NDArray[Any], thresh: float
) -> NDArray[Any] | None:
    """Which boxes stay, from the order by class and left side, and the numbers of following boxes to look at. None if
    too many pairs overlap."""
    (x1, y1, x2, y2), areas, ends = boxes.take(order, axis=0).T.copy(), areas[order], following.cumsum()
    found, first, done, known = [], 0, 0, 0
    index = np.arange(len(order))
    ahead = index + 1 - (ends - following)  # the first of a box's following, less the place of that pair in the list
    while first < len(order):
        last = max(first + 1, int(ends.searchsorted(done + _CHUNK, "right")))
        total, counts = int(ends[last - 1]), following[first:last]
        i = index[first:last].repeat(counts)
        j = ahead[first:last].repeat(counts)
        j += np.arange(done, total)
        height = np.minimum(y2.take(i), y2.take(j))
        height -= np.maximum(y1.take(i), y1.take(j))
        meet = (height > 0).nonzero()[0]
        i, j = i.take(meet), j.take(meet)
        width = np.minimum(x2.take(i), x2.take(j))
        width -= np.maximum(x1.take(i), x1.take(j))  # one key of the order can stand for several sides
        over = _exceeds(width, height.take(meet), areas.take(i), areas.take(j), thresh).nonzero()[0]
        found.append((order[i[over]], order[j[over]]))
        first, done, known = last, total, known + len(over)
        if known > _KNOWN:
            return None
    i, j = found[0] if len(found) == 1 else map(np.concatenate, zip(*found, strict=True))
    return _settled(np.minimum(i, j), np.maximum(i, j), len(order))


def kept_class_by_class(boxes: NDArray[Any], labels: NDArray[Any] | None, thresh: float) -> NDArray[Any]:
    """The rising positions of the boxes that stay, at any threshold, by one call of torchvision's for each class. The
    boxes lie best first."""
    labels = np.zeros(len(boxes)) if labels is None else labels
    stays = np.zeros(len(boxes), bool)
    for label in np.unique(labels):
        own = (labels == label).nonzero()[0]
        falling = torch.from_numpy(np.arange(len(own), 0, -1).astype(boxes.dtype))
        stays[own[torchvision_nms(torch.from_numpy(boxes[own]), falling, thresh).numpy()]] = True
    return stays.nonzero()[0]


def _stay_of_able(boxes: NDArray[Any], areas: NDArray[Any], labels: NDArray[Any] | None, thresh: float) -> NDArray[Any]:
    """Which boxes stay, as bool: boxes with an area, best first."""
    stays, left = np.zeros(len(boxes), bool), np.arange(len(boxes))
    work = _PROBE * len(boxes) + _CALLS  # pairs of all blocks, if the first leaves nothing
    while len(left):
        count, is_first, compared = len(left), len(left) == len(stays), 0
        if not is_first or count <= _MANY:
            order, following = _swept(boxes, labels)
            if _LISTED * int(following.sum()) <= work:
                decided = _decide_by_sweep(boxes, areas, order, following, thresh)
                if decided is not None:
                    stays[left] = decided
                    break
        classes = np.zeros(1) if labels is None else np.unique(labels)
        if not is_first and len(classes) * _CALLS <= work <= _CALLED:
            stays[left[kept_class_by_class(boxes, labels, thresh)]] = True
            break
        if labels is not None and not is_first and count >= _ALONE * len(classes):
            for label in classes:
                own = (labels == label).nonzero()[0]
                stays[left[own]] = _stay_of_able(boxes[own], areas[own], None, thresh)
            break
        while len(left) > (count - 1 if is_first else count // 2):
            size = min(len(left), _PROBE if is_first else max(_PROBE, _BLOCK // len(left)))
            kept, leaves = _decide_block(boxes, areas, labels, size, thresh)
            stays[left[:size][kept]] = True
            compared += size * len(left)
            left, boxes, areas = left[leaves], boxes[leaves], areas[leaves]
            labels = None if labels is None else labels[leaves]
        work = min(len(left), compared // (count - len(left))) * len(left) + _CALLS
    return stays


def kept_of_image(
    boxes: NDArray[Any], labels: NDArray[Any] | None, thresh: float, most: int | None = None
) -> NDArray[Any]:
    """The rising positions of the boxes that stay, at most ``most``.

    Args:
        boxes: ``(N, 4)`` float xyxy, best first.
        labels: ``(N,)`` integers, or None to suppress across classes.
        thresh: at least 0, and a number of the boxes' dtype: a box goes when its IoU with a better kept one of its
            class is strictly above. Where it is NaN none goes.
    """
    seen = len(boxes) if most is None else min(len(boxes), 2 * most)
    while True:  # worse boxes do not change which of the better ones stay
        kept = _stay(boxes[:seen], None if labels is None else labels[:seen], thresh).nonzero()[0][:most]
        if seen == len(boxes) or len(kept) == most:
            return kept
        # Worse boxes are kept less often: twice as many as the rate so far asks for, but 4 to 16 times as many.
        asked = 2 * seen * (most or 0) // max(len(kept), 1)
        seen = min(len(boxes), max(4 * seen, min(asked, 16 * seen)))


def _stay(boxes: NDArray[Any], labels: NDArray[Any] | None, thresh: float) -> NDArray[Any]:
    """Which boxes stay, as bool."""
    with np.errstate(all="ignore"):
        sides = boxes[:, 2:] - boxes[:, :2]
        areas = sides[:, 0] * sides[:, 1]
        if len(boxes) <= _FEW:
            return _decide_block(boxes, areas, labels, len(boxes), thresh)[0]
        if labels is not None and len(boxes) <= _MANY:
            order = labels.argsort(kind="stable")
            by_class = labels[order]
            following = by_class.searchsorted(by_class, "right") - np.arange(1, len(order) + 1)
            if int(following.sum()) <= max(_LIST, _OF_A_CLASS * len(boxes)):
                return _decide_by_class(boxes, areas, order, following, thresh)
        # The others overlap nothing: they have no area, an infinite one, or a NaN.
        able = (sides[:, 0] > 0) & (areas > 0) & (areas < np.inf)
        if np.count_nonzero(able) == len(able):
            return _stay_of_able(boxes, areas, labels, thresh)
        stays = ~able
        stays[able] = _stay_of_able(boxes[able], areas[able], None if labels is None else labels[able], thresh)
    return stays


def best_first(scores: NDArray[Any]) -> NDArray[Any]:
    """Positions of scores (N,) by falling score, the lower position first on a tie, and NaN before all numbers."""
    if scores.dtype != np.float32 or len(scores) <= 2 * _FEW:
        return len(scores) - 1 - scores[::-1].argsort(kind="stable")[::-1]
    bits = (scores + np.float32(0)).view(np.int32)  # -0.0 becomes 0.0
    rising = ~(bits ^ (bits >> 31 & 0x7FFFFFFF))
    rising[scores != scores] = -(2**31)
    keys = (rising.astype(np.int64) << 32) | np.arange(len(scores))  # distinct, so that any way of sorting is right
    keys.sort()
    return keys & 0xFFFFFFFF
