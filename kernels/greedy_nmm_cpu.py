"""Greedy non-maximum merging of one image on a CPU, without a loop over boxes in Python.

Only boxes that share a cell of a grid are compared. The best undecided boxes are taken together, as many as have about
130,000 neighbours in all: so memory stays bounded, and fits a cache, and where thousands of boxes lie on one place most
are gone before it is their turn.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

_PAIRS = 2**17  # neighbours that are compared in one go
_CELLS = 2**20  # of the grid, at most, along each axis
_ENTRIES = 6  # the most cells of a box, on average


class _Grid(NamedTuple):
    """Which boxes reach into which cells. An entry is one box in one cell; those of a box follow each other."""

    first: NDArray[Any]  # (N, 2) cell of the box's corner x1, y1
    columns: int
    cells: NDArray[Any]  # (E,) cell of each entry
    begins: NDArray[Any]  # (N + 1,) first entry of each box
    listed: NDArray[Any]  # (E,) boxes by cell
    lows: NDArray[Any]  # (E,) where the boxes of the entry's cell begin in `listed`
    lengths: NDArray[Any]  # (E,) how many these are


def _grid(boxes: NDArray[Any]) -> _Grid:
    """The grid of N boxes with an area, whose cells are about as large as the mean box."""
    corners, opposite = boxes[:, :2].astype(np.float64), boxes[:, 2:].astype(np.float64)
    low = corners.min(axis=0)
    size = np.maximum((opposite - corners).mean(axis=0), (opposite.max(axis=0) - low) / _CELLS)
    while True:
        first, last = np.floor((corners - low) / size), np.floor((opposite - low) / size)
        spans = last - first + 1
        if spans.prod(axis=1).sum() <= _ENTRIES * len(boxes):
            break
        size *= 2
    first, spans = first.astype(np.int64), spans.astype(np.int64)
    begins = np.concatenate(([0], spans.prod(axis=1).cumsum()))
    box, step = _ranges(begins[:-1] * 0, np.diff(begins))
    columns = int(last[:, 0].max()) + 1
    cells = (first[box, 1] + step // spans[box, 0]) * columns + first[box, 0] + step % spans[box, 0]
    order = np.argsort(cells, kind="stable")
    by_cell = cells[order]
    lows = np.searchsorted(by_cell, cells)
    return _Grid(first, columns, cells, begins, box[order], lows, np.searchsorted(by_cell, cells, "right") - lows)


def _ranges(lows: NDArray[Any], lengths: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """The numbers low, low + 1, ... of all ranges in a row, behind the index of the range that each belongs to."""
    index = np.repeat(np.arange(len(lows)), lengths)
    return index, np.arange(len(index)) + np.repeat(lows - (lengths.cumsum() - lengths), lengths)


def _overlaps(a: NDArray[Any], b: NDArray[Any], match_metric: str) -> NDArray[Any]:
    """The metric of pairs of boxes (P, 4), rounded as the reference rounds it."""
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):  # the sum of two areas may be infinite
        width = np.minimum(a[:, 2], b[:, 2]) - np.maximum(a[:, 0], b[:, 0])
        height = np.minimum(a[:, 3], b[:, 3]) - np.maximum(a[:, 1], b[:, 1])
        intersection = np.maximum(width, 0) * np.maximum(height, 0)
        area, other = ((box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1]) for box in (a, b))
        whole = area + other - intersection if match_metric == "IOU" else np.minimum(area, other) + 0 * (area + other)
        return intersection / whole


def _owners(
    boxes: NDArray[Any], labels: NDArray[Any] | None, match_metric: str, threshold: float, most: int
) -> NDArray[Any]:
    """(N,) the box that takes each box in, itself where it is kept; -1 where the search ended before. Best first."""
    with np.errstate(over="ignore", invalid="ignore"):
        area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        able = np.flatnonzero((boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1]) & (area < np.inf))
    owners = np.arange(len(boxes))  # those without an area are alone
    owners[able] = -1
    if not len(able):
        return owners
    grid = _grid(boxes[able])
    boxes, labels = boxes[able], None if labels is None else labels[able]
    found = np.full(len(able), -1)
    neighbours = np.add.reduceat(grid.lengths, grid.begins[:-1])
    at, kept = 0, 0
    alone = np.setdiff1d(np.arange(len(owners)), able, assume_unique=True)
    while at < len(able):
        waiting = at + np.flatnonzero(found[at:] < 0)
        if not len(waiting) or kept + np.searchsorted(alone, able[waiting[0]]) >= most:
            break
        chosen = waiting[: max(1, int(np.searchsorted(neighbours[waiting].cumsum(), _PAIRS)))]
        i, j = _matches(grid, boxes, labels, found, chosen, match_metric, threshold)
        stays, before = np.zeros(len(able), bool), None
        stays[chosen] = True
        while before is None or (stays != before).any():  # after n turns the first n boxes are decided
            before = stays.copy()
            stays[chosen] = True
            stays[j[before[i]]] = False
        i, j = i[stays[i]], j[stays[i]]
        found[j[::-1]] = i[::-1]  # i rises, so the best one is written last
        found[chosen[stays[chosen]]] = chosen[stays[chosen]]
        kept += int(stays[chosen].sum())
        at = int(chosen[-1]) + 1
    owners[able] = np.where(found < 0, -1, able[found])
    return owners


def _matches(
    grid: _Grid,
    boxes: NDArray[Any],
    labels: NDArray[Any] | None,
    found: NDArray[Any],
    chosen: NDArray[Any],
    match_metric: str,
    threshold: float,
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Pairs (i, j), i rising, of a chosen box and an undecided one behind it that it would take in."""
    index, entries = _ranges(grid.begins[chosen], grid.begins[chosen + 1] - grid.begins[chosen])
    which, places = _ranges(grid.lows[entries], grid.lengths[entries])
    i, j, cells = chosen[index[which]], grid.listed[places], grid.cells[entries[which]]
    able = (j > i) & (found[j] < 0)
    if labels is not None:
        able &= labels[i] == labels[j]
    i, j, cells = i[able], j[able], cells[able]
    corner = np.maximum(grid.first[i], grid.first[j])  # two boxes share several cells, but one corner
    once = corner[:, 1] * grid.columns + corner[:, 0] == cells
    i, j = i[once], j[once]
    taken = _overlaps(boxes[i], boxes[j], match_metric) >= threshold
    return i[taken], j[taken]


def _grow(boxes: NDArray[Any], owners: NDArray[Any], match_metric: str, threshold: float) -> NDArray[Any]:
    """(N, 4) the boxes, of which those that own others have grown; each turn finds every owner's next growth."""
    grown = boxes.copy()
    members = np.flatnonzero((owners != np.arange(len(owners))) & (owners >= 0))
    members = members[np.argsort(owners[members], kind="stable")]
    while len(members):
        own, others = grown[owners[members]], boxes[members]
        united = np.concatenate((np.minimum(own[:, :2], others[:, :2]), np.maximum(own[:, 2:], others[:, 2:])), axis=1)
        grows = np.flatnonzero((_overlaps(own, others, match_metric) >= threshold) & (united != own).any(axis=1))
        owner = owners[members[grows]]
        if not len(owner):
            break
        first = grows[np.concatenate(([True], owner[1:] != owner[:-1]))]
        grown[owners[members[first]]] = united[first]
        turn = np.full(len(boxes), len(members))
        turn[owners[members[first]]] = first
        members = members[np.arange(len(members)) > turn[owners[members]]]
    return grown


def merge_image(
    boxes: NDArray[Any], labels: NDArray[Any] | None, match_metric: str, threshold: float, most: int
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """The merged boxes (D, 4), the positions of their best ones (D,), and the group of every box (N,), or -1.

    Args:
        boxes: ``(N, 4)`` float, best first.
        labels: ``(N,)`` integers, or None to merge across classes.
        match_metric, threshold: as :func:`retina_fast.kernels.greedy_nmm.greedy_nmm` takes them, the threshold rounded
            to the boxes' precision.
        most: the most boxes left.

    Example::

        >>> boxes = np.array([[0.0, 0, 8, 8], [4, 0, 12, 8], [20, 20, 28, 28]])
        >>> merge_image(boxes, None, "IOS", 0.4, 9)[1:]
        (array([0, 2]), array([0, 0, 1]))
    """
    owners = _owners(boxes, labels, match_metric, threshold, most)
    kept = np.flatnonzero(owners == np.arange(len(owners)))[:most]
    group = np.full(len(owners) + 1, -1)  # the last place is that of the owner -1
    group[kept] = np.arange(len(kept))
    return _grow(boxes, owners, match_metric, threshold)[kept], kept, group[owners]
