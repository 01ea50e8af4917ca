"""Suppression of one image's boxes on a CPU, mostly by passes over lists of pairs.

A few boxes are compared pair by pair. Of more, the best are decided on first, by windows, each at most twice as large
as the one before. The boxes of a window are compared with those that are kept already, then with each other. What is
compared is a list of pairs: boxes lie sorted by class and the middle of their width, and two boxes whose IoU exceeds a
threshold t have their middles close together. The IoU of their intervals of x exceeds t then, too, so the middles lie
less than

    w (1 / t - 1) / 2

apart, where w is the width of either of the two. They also touch, so the middles lie no further apart than half the sum
of w and the widest box's width, which is the bound at thresholds near 0. Likewise in height. Where the image's boxes
are parted better by their y coordinates, both axes are exchanged first. Where most pairs of boxes would be listed,
torchvision's own function is called for each class: it compares each kept box with all that are worse, but takes less
time for a pair. Each IoU is computed step by step as torchvision computes it, in the dtype of the boxes.
"""

import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torchvision.ops.boxes import nms as torchvision_nms  # bound now: ours may come to stand in its place

Array = NDArray[Any]

_FEW = 128  # boxes of which all pairs are compared
_FIRST = 256, 1024  # boxes of the first window, at least and at most; between them twice as many as are asked for
_LARGEST = 2048  # boxes of any window, of which thus two million pairs are listed at most
_NEAR = 2  # kept boxes near each one of a window, on average, up to which pairs are listed whatever else holds
_BEST = 32  # kept boxes that a window is compared with before the others, where these are many
_KEPT = 1 / 8  # the share of a first window that is kept, as a guess
_CHUNK = 2**15  # pairs that are listed in one go, so that they fit a cache
_CALL = 2048  # pairs that are listed in the time of a call of torchvision's
_PAIRS = 2  # that torchvision's function compares in the time in which one is listed
_LOOPED = 100  # pairs of overlapping boxes that a loop is fastest for
_ROUNDS = 16  # in which nearly all sets of overlapping boxes are decided
_SLACK = 1e-5  # of a distance or a width: more than all rounding of an IoU comes to


def _sides(boxes: Array) -> Array:
    """(5, n) x1, y1, x2, y2 and area of boxes (n, 4)."""
    x1, y1, x2, y2 = boxes.T
    return np.stack((x1, y1, x2, y2, (x2 - x1) * (y2 - y1)))


class _Sorted(NamedTuple):
    """Boxes by class and the middle of their extent along the axis that they are sorted by, here called x."""

    ranks: Array
    """(n,) positions among all boxes of the image, best first."""
    sides: Array
    """(5, n) x1, y1, x2, y2 and area."""
    across: Array
    """(2, n) float64: where the middle lies, and how far away that of another box can lie if one suppresses the other.
    Classes lie further apart than that."""
    down: Array
    """(2, n): the same in height, for all classes alike."""

    def take(self, index: Array) -> "_Sorted":
        return _Sorted(*(field.take(index, axis=-1) for field in self))

    def near(self, others: "_Sorted") -> tuple[Array, Array]:
        """Where, among the others, those begin that lie near enough for each box along the axis, and how many."""
        middle, reach = self.across
        start = others.across[0].searchsorted(middle - reach)
        return start, others.across[0].searchsorted(middle + reach, "right") - start

    def best(self, count: int) -> "_Sorted":
        """The ``count`` of them that rank first."""
        return self.take(np.sort(self.ranks.argsort()[:count]))

    def with_others(self, others: "_Sorted") -> "_Sorted":
        """These and others, sorted anew."""
        both = _Sorted(*(np.concatenate(pair, axis=-1) for pair in zip(self, others, strict=True)))
        return both.take(both.across[0].argsort(kind="stable"))


class _Frame:
    """The scale of an image's coordinates, and how far apart boxes can lie of which one suppresses the other.

    Args:
        boxes: (N, 4) best first, all with an area.
        labels: (N,) integers, or None.
        thresh: from 0 to 2.
    """

    def __init__(self, boxes: Array, labels: Array | None, thresh: float) -> None:
        if labels is not None:
            labels = labels.astype(np.int64, copy=False)
            few = int(labels.max()) - int(labels.min()) < 2**20  # so that bits are left for the middle
            labels = labels - labels.min() if few else np.unique(labels, return_inverse=True)[1]
        self.boxes, self.labels, self.thresh = boxes, labels, thresh
        self.low, high = float(boxes.min()), float(boxes.max())
        self.half = high / 2 - self.low / 2
        self.widest, self.highest = (float((boxes[:, i + 2] - boxes[:, i]).max()) for i in (0, 1))
        # Below 1e-5 all boxes are compared whose middles are near enough to touch.
        self.reach = max((1 / thresh - 1) / 2, 0) * (1 + _SLACK) + _SLACK if thresh > 1e-5 else math.inf
        self.farthest = max(-self.low, high)

    def calls_are_faster(self, ranks: Array, listed: float, compared: float) -> bool:
        """Whether calls of torchvision's function for boxes of these ranks are faster than a list of so many pairs, if
        one call for as many of one class compares ``compared`` pairs."""
        if listed <= _CALL:
            return False
        classes = 1 if self.labels is None else np.count_nonzero(np.bincount(self.labels[ranks]))
        return bool(_PAIRS * (listed - classes * _CALL) > compared / classes)

    def kept_by_calls(self, ranks: Array) -> Array:
        """The rising places, among these rising ranks, of the boxes that stay by torchvision's function."""
        labels = None if self.labels is None else self.labels[ranks]
        return kept_class_by_class(self.boxes[ranks], labels, self.thresh)

    def sorted(self, ranks: Array) -> _Sorted:
        """The boxes of these ranks."""
        boxes = self.boxes[ranks]
        kind = np.finfo(boxes.dtype)
        sides = _sides(boxes)
        x1, y1, x2, y2, area = sides
        width, height = x2 - x1, y2 - y1
        # Of smaller areas rounding leaves a few bits, and their IoUs may exceed the true ones by any amount.
        reach = self.reach if area.min(initial=1) > kind.tiny / kind.eps else np.inf
        across = np.array((x1, width), np.float64)
        across /= self.half
        across[0] += across[1] / 2 - self.low / self.half  # from 0 to 2
        # The smaller of two bounds; of no reach and a width that became 0 the first is NaN.
        across[1] = np.fmin(reach * across[1], across[1] / 2 + self.widest / self.half / 2)
        if self.labels is not None:
            across[0] += 8 * self.labels[ranks]
        across[1] += 4 * kind.eps + 2.0**-48 * (across[0].max(initial=0) + self.farthest / self.half)
        down = np.array((y1 / 2 + y2 / 2, np.fmin(reach * height, height / 2 + self.highest / 2)), boxes.dtype)
        down[1] += 8 * kind.eps * self.farthest
        order = across[0].argsort()
        return _Sorted(ranks, sides, across, down).take(order)


def _exceeds(a: Array, i: Array, b: Array, j: Array, thresh: float) -> Array:
    """Which pairs have an IoU above the threshold, as their places in the list, from the sides of their boxes."""
    (x1, y1, x2, y2, area), (u1, v1, u2, v2, other) = a, b
    width = np.minimum(x2.take(i), u2.take(j))
    width -= np.maximum(x1.take(i), u1.take(j))
    height = np.minimum(y2.take(i), v2.take(j))
    height -= np.maximum(y1.take(i), v1.take(j))
    intersection = np.maximum(width, 0, out=width)
    intersection *= np.maximum(height, 0, out=height)
    union = np.add(area.take(i), other.take(j), out=height)
    union -= intersection
    return (np.divide(intersection, union, out=union) > thresh).nonzero()[0]


def _overlapping(a: _Sorted, b: _Sorted, first: Array, counts: Array, thresh: float) -> Iterator[tuple[Array, Array]]:
    """The pairs of a box of ``a`` and one of ``b`` with an IoU above the threshold, by their places there, in parts;
    each box of ``a`` is compared with ``counts`` of ``b``, from ``first`` on."""
    ends = counts.cumsum()
    ahead = first - ends + counts  # of its first pair's place in the list
    start = done = 0
    while start < len(counts):
        stop = max(start + 1, int(ends.searchsorted(done + _CHUNK, "right")))
        own = counts[start:stop]
        j = ahead[start:stop].repeat(own)
        j += np.arange(done, done + len(j))
        apart = b.down[0].take(j)
        apart -= a.down[0, start:stop].repeat(own)
        near = (np.abs(apart, out=apart) <= a.down[1, start:stop].repeat(own)).nonzero()[0]
        i, j = np.arange(start, stop).repeat(own).take(near), j.take(near)
        over = _exceeds(a.sides, i, b.sides, j, thresh)
        yield i.take(over), j.take(over)
        start, done = stop, int(ends[stop - 1])


def _settled(above: Array, below: Array, count: int) -> Array:
    """Which of ``count`` boxes stay, as bool, where those of ``above`` suppress those of ``below`` if they stay."""
    gone = np.zeros(count, bool)
    for _ in range(_ROUNDS):
        if len(above) <= _LOOPED:
            break
        first = np.ones(count, bool)
        first[below] = False  # boxes that no undecided one can suppress
        gone[below[first[above]]] = True
        undecided = (~(first | gone)[above] & ~gone[below]).nonzero()[0]
        above, below = above[undecided], below[undecided]
    order = below.argsort(kind="stable")
    flags = bytearray(gone)
    for a, b in zip(above[order].tolist(), below[order].tolist(), strict=True):
        if not flags[a]:
            flags[b] = 1
    return ~np.frombuffer(flags, bool)


def kept_class_by_class(boxes: Array, labels: Array | None, thresh: float) -> Array:
    """The rising positions of the boxes that stay, at any threshold, by one call of torchvision's for each class. The
    boxes lie best first."""
    order, starts = np.arange(len(boxes)), np.zeros(1, np.int64)
    if labels is not None:
        order = labels.argsort(kind="stable")
        starts = np.unique(labels[order], return_index=True)[1]
    by_class = torch.from_numpy(boxes[order])
    falling = torch.arange(len(boxes), 0, -1, dtype=by_class.dtype)
    stays = np.zeros(len(boxes), bool)
    for start, stop in itertools.pairwise((*starts.tolist(), len(boxes))):
        kept = torchvision_nms(by_class[start:stop], falling[: stop - start], thresh)
        stays[order[start:stop][kept.numpy()]] = True
    return stays.nonzero()[0]


def _near(window: _Sorted, kept: _Sorted) -> tuple[Array, Array]:
    """:meth:`_Sorted.near` of the fewer of the two, whose lists are longer and so take less time."""
    return kept.near(window) if len(kept.ranks) < len(window.ranks) else window.near(kept)


def _not_suppressed(window: _Sorted, kept: _Sorted, near: tuple[Array, Array], thresh: float) -> _Sorted:
    """The boxes of a window that no kept one suppresses, of those ``near`` by :func:`_near`."""
    start, counts = near
    if not counts.any():
        return window
    left, by_kept = np.ones(len(window.ranks), bool), len(kept.ranks) < len(window.ranks)
    for i, j in _overlapping(*((kept, window) if by_kept else (window, kept)), start, counts, thresh):
        left[j if by_kept else i] = False
    return window.take(left.nonzero()[0])


def _staying(window: _Sorted, frame: _Frame, guess: float) -> _Sorted:
    """The boxes of a window that stay if no others suppress them; the ``guess`` is how many they will be."""
    middle, reach = window.across
    first = np.arange(1, len(middle) + 1)
    counts = middle.searchsorted(middle + reach, "right") - first
    if not counts.any():
        return window
    by_rank = window.ranks.argsort()
    if frame.calls_are_faster(window.ranks, int(counts.sum()), min(guess, len(middle)) * len(middle) / 2):
        return window.take(np.sort(by_rank[frame.kept_by_calls(window.ranks[by_rank])]))
    place = np.empty_like(by_rank)
    place[by_rank] = first - 1
    parts = zip(*_overlapping(window, window, first, counts, frame.thresh), strict=True)
    i, j = (place[np.concatenate(part)] for part in parts)
    return window.take(_settled(np.minimum(i, j), np.maximum(i, j), len(place))[place].nonzero()[0])


def _kept_of_able(boxes: Array, labels: Array | None, thresh: float, most: int) -> Array:
    """:func:`kept_of_image` of boxes that all have an area, at a threshold from 0 to 2."""
    if not len(boxes):
        return np.empty(0, np.int64)
    x1, y1, x2, y2 = boxes[: _FIRST[1]].astype(np.float64).T
    across, down = ((high - low).mean() / (high.max() - low.min()) for low, high in ((x1, x2), (y1, y2)))
    if down < across:  # fewer boxes share a y than an x coordinate; IoUs are the same numbers with x and y exchanged
        boxes = boxes[:, [1, 0, 3, 2]]
    frame, share = _Frame(boxes, labels, thresh), _KEPT
    waiting, size = np.arange(len(boxes)), min(max(_FIRST[0], 2 * most), _FIRST[1])
    kept = frame.sorted(waiting[:0])
    while len(waiting) and (count := len(kept.ranks)) < most:
        ranks = waiting[:size]
        window = frame.sorted(ranks)
        near = _near(window, kept)
        if near[1].sum() > 4 * _BEST * len(ranks):
            best = kept.best(_BEST)
            window = _not_suppressed(window, best, _near(window, best), thresh)
            near = _near(window, kept)
        # As many as serve if the same share stays as of the last window, and how many kept ones lie before each. Those
        # that are gone already would not be compared for long.
        many = waiting[: max(size, min(4 * int(waiting[0]), int(2 * (most - count) / max(share, 1e-9))))]
        before, pairs = count + share * len(many) / 2, int(near[1].sum())
        listed = pairs / max(count, 1) / len(ranks) * before * len(many)
        compared = count**2 / 2 + len(window.ranks) / len(ranks) * before * len(many)
        if pairs > _NEAR * len(ranks) and frame.calls_are_faster(many, listed, compared):
            stay = frame.kept_by_calls(np.concatenate((np.sort(kept.ranks), many)))[count:]
            ranks, window = many, frame.sorted(many[stay - count])
        else:
            window = _staying(_not_suppressed(window, kept, near, thresh), frame, share * size)
        kept = kept.with_others(window)
        waiting, size, share = waiting[len(ranks) :], min(2 * size, _LARGEST), len(window.ranks) / len(ranks)
    return np.sort(kept.ranks)[:most]


def kept_of_image(boxes: Array, labels: Array | None, thresh: float, most: int | None = None) -> Array:
    """The rising positions of the boxes that stay, at most ``most``.

    Args:
        boxes: ``(N, 4)`` float xyxy, best first.
        labels: ``(N,)`` integers, or None to suppress across classes.
        thresh: at least 0, and a number of the boxes' dtype: a box goes when its IoU with a better kept one of its
            class is strictly above. Where it is NaN none goes.
    """
    most = len(boxes) if most is None else most
    if not thresh <= 2:  # rounding may lift an IoU a little above 1, but not to 2
        return np.arange(min(most, len(boxes)))
    with np.errstate(all="ignore"):
        if len(boxes) <= _FEW:
            i, j = np.triu_indices(len(boxes), 1)
            if labels is not None:
                same = (labels[i] == labels[j]).nonzero()[0]
                i, j = i[same], j[same]
            over = _exceeds(sides := _sides(boxes), i, sides, j, thresh)
            return _settled(i[over], j[over], len(boxes)).nonzero()[0][:most]
        width = boxes[:, 2] - boxes[:, 0]
        area = width * (boxes[:, 3] - boxes[:, 1])
        # The others overlap nothing: they have no area, an infinite one, or a NaN.
        able = (width > 0) & (area > 0) & (area < np.inf)
        if able.all():
            return _kept_of_able(boxes, labels, thresh, most)
        index = able.nonzero()[0]
        kept = _kept_of_able(boxes[index], None if labels is None else labels[index], thresh, most)
    return np.sort(np.concatenate((index[kept], (~able).nonzero()[0])))[:most]


def rank_keys(scores: NDArray[np.float32]) -> NDArray[np.int64]:
    """Distinct keys of float32 scores (N,), the lowest for the best; the low 32 bits of each are its position."""
    bits = (scores + np.float32(0)).view(np.int32)  # -0.0 becomes 0.0
    rising = ~(bits ^ (bits >> 31 & 0x7FFFFFFF))
    rising[scores != scores] = -(2**31)
    return (rising.astype(np.int64) << 32) | np.arange(len(scores))


def positions_of(keys: NDArray[np.int64]) -> NDArray[np.int64]:
    """The positions of the scores that have these keys."""
    return keys & 0xFFFFFFFF


def best_first(scores: NDArray[Any]) -> NDArray[Any]:
    """Positions of scores (N,) by falling score, the lower position first on a tie, and NaN before all numbers."""
    if scores.dtype != np.float32 or len(scores) <= 64:
        return len(scores) - 1 - scores[::-1].argsort(kind="stable")[::-1]
    keys = rank_keys(scores)
    keys.sort()  # distinct, so that any way of sorting is right
    return positions_of(keys)
