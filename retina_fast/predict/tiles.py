"""Detecting in images of any size, tile by tile, in bounded memory.

The image is cut into tiles of one size that overlap, row by row; the last ones of a row or column end at the image's
edge. So an object no larger than the overlap lies whole in at least one tile. The boxes are moved to their places in
the image, and those that more than one tile may have seen are merged:

    nmm     :func:`retina_fast.ops.greedy_nmm`, until no box takes in another: the parts of an object that a seam cuts
            become one box. Along one seam this holds up to three times the overlap, at intersection over the smaller
            area of 0.5.
    nms     batched NMS, which keeps the better of two sightings, but does not join parts.

Boxes that lie where one tile alone looks are those of that tile. Nothing depends on the order of the tiles or on how
many are detected in at once, unless the detector's own rounding does.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from math import ceil, floor
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from retina_fast.data.errors import UserError, whole, within
from retina_fast.data.progress import tracked
from retina_fast.kernels.batched_nms import batched_nms
from retina_fast.kernels.greedy_nmm import best_first, greedy_nmm
from retina_fast.predict.tile_rows import TileRows

MERGES = ("nmm", "nms")

Found = dict[str, Tensor]
Run = Callable[[list[Tensor]], Sequence[Found]]


class Window(NamedTuple):
    """A rectangle of pixels."""

    x: int
    y: int
    width: int
    height: int


class Raster(Protocol):
    """An image that is read in parts."""

    height: int
    width: int

    def read(self, window: Window) -> Tensor:
        """The pixels of a window, RGB (3, height, width) uint8."""


class Pixels:
    """A raster in memory.

    Args:
        image: (3, H, W) uint8.

    Example::

        >>> Pixels(torch.zeros(3, 40, 60, dtype=torch.uint8)).read(Window(50, 10, 10, 20)).shape
        torch.Size([3, 20, 10])
    """

    def __init__(self, image: Tensor) -> None:
        self.image = image
        self.height, self.width = image.shape[1:]

    def read(self, window: Window) -> Tensor:
        """The pixels of a window."""
        return self.image[:, window.y : window.y + window.height, window.x : window.x + window.width]


class Tiles:
    """The tiles of an image, row by row.

    Args:
        height, width: of the image, in pixels.
        tile: the sides of a tile, at most; an image that is smaller has one tile.
        overlap: the part of a side that neighbours share, rounded down to whole pixels.

    Raises:
        UserError: if tile is not a whole number of at least 1, or overlap does not lie in [0, 1).

    Example::

        >>> tiles = Tiles(100, 250, tile=100, overlap=0.2)
        >>> tiles.columns, tiles.rows
        ([0, 80, 150], [0])
    """

    def __init__(self, height: int, width: int, tile: int, overlap: float) -> None:
        check_tiling(tile, overlap)
        tile, overlap = int(tile), float(overlap)
        self.height, self.width, self.overlap = height, width, overlap
        self.size = min(tile, height), min(tile, width)
        self.rows, self.columns = (_starts(length, tile, overlap) for length in (height, width))
        self._alone = [
            _seen_once(starts, side, length)
            for starts, side, length in ((self.columns, self.size[1], width), (self.rows, self.size[0], height))
        ]

    def warn_of_many(self) -> None:
        """Warn of an overlap for which every pixel is looked at more than some 25 times."""
        count = len(self.rows) * len(self.columns)
        enough = ceil(self.height / self.size[0]) * ceil(self.width / self.size[1])
        if count > 25 * enough:
            warnings.warn(
                f"an overlap of {self.overlap} cuts {self.width}x{self.height} pixels into {count} tiles, where "
                f"{enough} would cover them: it takes {count // enough} times as long",
                stacklevel=3,
            )

    def row(self, number: int) -> list[Window]:
        """The windows of a row of tiles, from left to right."""
        height, width = self.size
        return [Window(x, self.rows[number], width, height) for x in self.columns]

    def shared(self, boxes: Tensor, columns: Tensor, row: int) -> Tensor:
        """(N,) whether other tiles look at a box (N, 4) of the image, too, that was found in these columns of a row."""
        (left, right), (top, bottom) = self._alone
        own = torch.tensor([left, right], device="cpu")[:, columns]
        x_alone = (boxes[:, 0] >= own[0]) & (boxes[:, 2] <= own[1])
        return ~(x_alone & (boxes[:, 1] >= top[row]) & (boxes[:, 3] <= bottom[row]))


def check_tiling(tile: Any, overlap: Any, merge: Any = MERGES[0], merge_thresh: Any = 0.5) -> None:
    """Raise a UserError for options of :func:`detect_tiles` outside what they may be.

    Example::

        >>> check_tiling(800, 0.2)
    """
    if not whole(1, tile):
        raise UserError(f"tile must be a whole number of pixels, got {tile!r}")
    if not within(0, overlap, 1) or overlap == 1:
        raise UserError(f"overlap must be at least 0 and below 1, got {overlap!r}")
    if merge not in MERGES:
        raise UserError(f"merge must be one of {', '.join(MERGES)}, got {merge!r}")
    if not within(0, merge_thresh, 1) or merge_thresh == 0:
        raise UserError(f"merge_thresh must be above 0 and at most 1, got {merge_thresh!r}")


def _starts(length: int, tile: int, overlap: float) -> list[int]:
    """Where tiles begin along one axis."""
    step = tile - floor(tile * overlap)
    return [min(k * step, length - tile) for k in range(1 + ceil((length - tile) / step))] if length > tile else [0]


def _seen_once(starts: list[int], side: int, length: int) -> tuple[list[int], list[int]]:
    """Begin and end of what only the k-th tile sees along one axis; if that is nothing, the end lies before."""
    begins = [0, *(start + side for start in starts[:-1])]
    return begins, [*starts[1:], length]


def detect_tiles(
    run: Run,
    raster: Raster,
    tile: int = 800,
    overlap: float = 0.2,
    merge: str = "nmm",
    merge_thresh: float = 0.5,
    batch_size: int = 1,
    resume: Path | None = None,
    about: str = "",
    console: Any = None,
    keep_rows: bool = False,
) -> Found:
    """Find objects in a raster tile by tile.

    Args:
        run: from at most ``batch_size`` tiles (3, h, w) uint8 of one size to a dict for each: ``boxes`` (D, 4) xyxy in
            pixels of the tile, ``scores`` (D,) and ``labels`` (D,).
        raster: what is looked at. One batch of tiles is in memory at a time, and all boxes.
        tile, overlap: see :class:`Tiles`.
        merge: "nmm" or "nms", see above.
        merge_thresh: the intersection over the smaller area from which boxes of one class are merged; with "nms", the
            IoU above which the lower-scored one goes.
        batch_size: the most tiles at once.
        resume: a file that takes up each finished row of tiles. If it is there, the rows in it are not detected in
            again. It is deleted in the end.
        about: what the rows in ``resume`` depend on beside size, tile and overlap; a file of another is refused.
        console: of rich, where a bar over the rows of tiles is shown; nowhere by default.
        keep_rows: whether the file ``resume`` stays in the end, for a caller that may be cut short after this call.

    Returns:
        ``boxes`` (N, 4) float32 in pixels of the raster, ``scores`` (N,) and ``labels`` (N,), best first; of equal
        scores the smaller x1, y1, x2, y2 comes first.

    Raises:
        UserError: for tile, overlap, merge, merge_thresh or batch_size outside what they may be, or if ``resume``
            cannot be written or is not of this run.

    Example::

        >>> def bright(tiles):
        ...     places = [(tile[0] > 200).nonzero() for tile in tiles]
        ...     boxes = [torch.cat((at.amin(0).flip(0), at.amax(0).flip(0) + 1))[None] if len(at) else torch.zeros(0, 4)
        ...              for at in places]
        ...     return [{"boxes": b, "scores": torch.ones(len(b)), "labels": torch.zeros(len(b)).long()} for b in boxes]
        >>> image = torch.zeros(3, 90, 200, dtype=torch.uint8)
        >>> image[:, 40:60, 75:95] = 255
        >>> detect_tiles(bright, Pixels(image), tile=100, overlap=0.3)["boxes"]
        tensor([[75., 40., 95., 60.]])
    """
    check_tiling(tile, overlap, merge, merge_thresh)
    if not whole(1, batch_size):
        raise UserError(f"batch_size must be a whole number of at least 1, got {batch_size!r}")
    tiles = Tiles(raster.height, raster.width, tile, overlap)
    tiles.warn_of_many()
    header = {"size": [raster.height, raster.width], "tile": int(tile), "overlap": float(overlap), "about": about}
    with TileRows(resume, header, keep_rows) as rows:
        left = range(rows.finished, len(tiles.rows))
        for number in tracked(left, "Detecting", len(left), console if len(left) > 1 else None):
            rows.add(_row(run, raster, tiles, number, batch_size))
        return _merged(rows.found(), merge, merge_thresh)


def _row(run: Run, raster: Raster, tiles: Tiles, number: int, batch_size: int) -> Found:
    """What is found in a row of tiles, in pixels of the raster, with ``shared`` (N,) bool beside it."""
    windows = tiles.row(number)
    parts = []
    for column, (window, found) in enumerate(_each(run, raster, windows, batch_size)):
        boxes = found["boxes"].cpu().float() + torch.tensor([window.x, window.y] * 2, device="cpu")
        columns = torch.full((len(boxes),), column, device="cpu")
        shared = tiles.shared(boxes, columns, number)
        scores, labels = found["scores"].cpu().float(), found["labels"].cpu()
        parts.append({"boxes": boxes, "scores": scores, "labels": labels, "shared": shared})
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _each(run: Run, raster: Raster, windows: list[Window], batch_size: int) -> Iterator[tuple[Window, Found]]:
    for start in range(0, len(windows), batch_size):
        batch = windows[start : start + batch_size]
        yield from zip(batch, run([raster.read(window) for window in batch]), strict=True)


def _merged(found: Found, merge: str, threshold: float) -> Found:
    """Of what rows of tiles have found, the boxes that are left, best first."""
    shared = found.pop("shared")
    inside = {name: value[~shared] for name, value in found.items()}
    on_seams = {name: value[shared] for name, value in found.items()}
    on_seams = _suppressed(on_seams, threshold) if merge == "nms" else _joined(on_seams, threshold)
    whole = {name: torch.cat((value, on_seams[name])) for name, value in inside.items()}
    return _sorted(whole)


def _sorted(found: Found) -> Found:
    """The same boxes best first; equal ones by their class."""
    by_label = found["labels"].sort(stable=True).indices
    found = {name: value[by_label] for name, value in found.items()}
    order = best_first(found["boxes"], found["scores"])
    return {name: value[order] for name, value in found.items()}


def _suppressed(found: Found, threshold: float) -> Found:
    found = _sorted(found)
    count = len(found["scores"])
    boxes, labels = found["boxes"][None], found["labels"][None]
    kept = batched_nms(boxes, None, labels, torch.tensor([count], device="cpu"), threshold, count)
    return {name: value[kept.positions[0, : int(kept.counts[0])]] for name, value in found.items()}


def _joined(found: Found, threshold: float) -> Found:
    """Merged again and again, since a box that has grown may reach parts that no box reached before."""
    while True:
        count = len(found["scores"])
        boxes, scores, labels = (found[name][None] for name in ("boxes", "scores", "labels"))
        merged = greedy_nmm(boxes, scores, labels, torch.tensor([count], device="cpu"), "IOS", threshold, count)
        left = int(merged.counts[0])
        positions = merged.positions[0, :left]
        found = {name: value[positions] for name, value in found.items()} | {"boxes": merged.boxes[0, :left]}
        if left == count:
            return found
