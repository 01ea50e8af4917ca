"""Tiles: nothing is lost or doubled at a seam, whatever the order and the batches; and a killed run goes on."""

import warnings
import weakref
from typing import Any
from unittest import mock

import pytest
import torch

from retina_fast.data.errors import UserError
from retina_fast.predict import tiles as module
from retina_fast.predict.tiles import Pixels, Tiles, Window, detect_tiles
from tests.instruments.planted import find, label_of, plant

HEIGHT, WIDTH, TILE, OVERLAP = 290, 360, 100, 0.3  # tiles begin every 70 pixels, and the last ones end at the edge


def seams(length: int) -> list[int]:
    starts = Tiles(length, length, TILE, OVERLAP).rows
    return sorted({edge for start in starts for edge in (start, start + TILE)})


def on_every_seam(side: int) -> list[tuple[int, int, int, int]]:
    """Boxes in the middle of every edge of a tile, and on every corner, cut by it in different ways."""
    placed: list[tuple[int, int, int, int]] = []
    for row, y in enumerate(seams(HEIGHT)):
        for column, x in enumerate(seams(WIDTH)):
            left = min(max(0, x - 3 - 5 * ((row + column) % 4)), WIDTH - side)
            top = min(max(0, y - 3 - 5 * ((row * 3 + column) % 4)), HEIGHT - side)
            box = left, top, left + side, top + side
            if all(box[0] >= b[2] or b[0] >= box[2] or box[1] >= b[3] or b[1] >= box[3] for b in placed):
                placed.append(box)
    return placed


ACROSS = [(60, 10, 140, 25), (200, 20, 215, 105), (5, 120, 80, 200), (130, 130, 195, 220)]
"""Boxes larger than the overlap of 30, of up to three times that: over one seam, and over corners."""


def boxes_of(found: dict[str, Any]) -> list[tuple[float, ...]]:
    rows = zip(found["boxes"].tolist(), found["labels"].tolist(), strict=True)
    return sorted((*box, label) for box, label in rows)


def expected(planted: Any) -> list[tuple[int, ...]]:
    return sorted((*box, label_of(number)) for number, box in enumerate(planted, start=1))


@pytest.mark.parametrize("side", [7, 19, 28])
def test_none_is_lost_or_doubled_at_a_seam(side):
    planted = on_every_seam(side)
    assert len(planted) >= 30
    found = detect_tiles(find, Pixels(plant(HEIGHT, WIDTH, planted)), TILE, OVERLAP)
    assert boxes_of(found) == expected(planted)
    assert (found["scores"].diff() <= 0).all()


def test_objects_that_no_tile_sees_whole():
    found = detect_tiles(find, Pixels(plant(HEIGHT, WIDTH, ACROSS)), TILE, OVERLAP)
    assert boxes_of(found) == expected(ACROSS)


def test_nms_keeps_every_whole_object_once():
    """Where wholes have the higher scores. Their parts may stay beside them, as far as they overlap by too little."""

    def by_area(tiles):
        found = find(tiles)
        for tile in found:
            tile["scores"] = (tile["boxes"][:, 2:] - tile["boxes"][:, :2]).prod(dim=1) / 1000
        return found

    planted = on_every_seam(19)
    left = boxes_of(detect_tiles(by_area, Pixels(plant(HEIGHT, WIDTH, planted)), TILE, OVERLAP, merge="nms"))
    wholes = [box for box in left if box[2] - box[0] == box[3] - box[1] == 19]
    assert wholes == expected(planted)


def test_boxes_of_one_tile_alone_are_not_merged():
    """They overlap, but a single pass keeps them, too; on a seam they become one."""

    def nested(tiles):
        """Two boxes in each other around the first white pixel of a tile."""
        found = []
        for tile in tiles:
            at = tile[0].nonzero().flip(1).float()[:1]
            boxes = torch.cat((at - 9, at + 10), dim=1).repeat(2, 1) + torch.tensor([[0.0], [1.0]])[: 2 * len(at)]
            scores, labels = torch.tensor([0.9, 0.8])[: len(boxes)], torch.zeros(len(boxes)).long()
            found.append({"boxes": boxes, "scores": scores, "labels": labels})
        return found

    image = torch.zeros(3, 100, 170, dtype=torch.uint8)
    image[:, 50, 50] = 255
    image[:, 50, 120] = 255
    assert len(detect_tiles(nested, Pixels(image), TILE, OVERLAP)["boxes"]) == 4
    image[:, 50, 65] = 255  # so near the second tile that its boxes reach into it
    image[:, 50, 50] = 0
    assert len(detect_tiles(nested, Pixels(image), TILE, OVERLAP)["boxes"]) == 3


def test_neither_order_nor_batches_matter():
    planted = [*on_every_seam(19), *ACROSS][::-1]
    raster = Pixels(plant(HEIGHT, WIDTH, planted))
    first = detect_tiles(find, raster, TILE, OVERLAP)
    for batch_size in (3, 100):
        again = detect_tiles(find, raster, TILE, OVERLAP, batch_size=batch_size)
        assert all(torch.equal(again[name], value) for name, value in first.items())
    merged = module._merged

    def shuffled(found, *rest):
        order = torch.randperm(len(found["scores"]), generator=torch.Generator().manual_seed(0))
        return merged({name: value[order] for name, value in found.items()}, *rest)

    for merge in ("nmm", "nms"):
        straight = detect_tiles(find, raster, TILE, OVERLAP, merge)
        with mock.patch.object(module, "_merged", shuffled):
            other = detect_tiles(find, raster, TILE, OVERLAP, merge)
        assert all(torch.equal(other[name], value) for name, value in straight.items())


def test_one_batch_of_tiles_is_in_memory():
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    most = 0

    class Counting(Pixels):
        def read(self, window):
            nonlocal most
            tile = super().read(window).clone()
            alive.add(tile)
            most = max(most, len(alive))
            return tile

    detect_tiles(find, Counting(plant(HEIGHT, WIDTH, ACROSS)), TILE, OVERLAP, batch_size=2)
    assert 2 <= most <= 4  # those of the batch before go when the next one has been read


def test_small_images_are_one_tile():
    for height, width in ((40, 60), (100, 100), (100, 40)):
        planted = [(5, 6, 20, 30)]
        assert Tiles(height, width, TILE, OVERLAP).row(0) == [Window(0, 0, width, height)]
        assert boxes_of(detect_tiles(find, Pixels(plant(height, width, planted)), TILE, OVERLAP)) == expected(planted)


def test_nothing_found():
    found = detect_tiles(find, Pixels(torch.zeros(3, 150, 150, dtype=torch.uint8)), TILE, OVERLAP)
    assert [tuple(found[name].shape) for name in ("boxes", "scores", "labels")] == [(0, 4), (0,), (0,)]


class Killed(BaseException):
    pass


def test_a_killed_run_goes_on(tmp_path):
    planted = on_every_seam(19)
    raster = Pixels(plant(HEIGHT, WIDTH, planted))
    whole = detect_tiles(find, raster, TILE, OVERLAP)
    file, calls = tmp_path / "rows", 0
    tiles = Tiles(HEIGHT, WIDTH, TILE, OVERLAP)
    each, rows = len(tiles.columns), len(tiles.rows)

    def killed(tiles):
        nonlocal calls
        calls += 1
        if calls > 2.5 * each:
            raise Killed
        return find(tiles)

    with pytest.raises(Killed):
        detect_tiles(killed, raster, TILE, OVERLAP, resume=file)
    with file.open("ab") as opened:
        opened.write(b'{"boxes": [[1.0')  # killed while it wrote a line
    calls = -(10**6)
    before = calls
    again = detect_tiles(killed, raster, TILE, OVERLAP, resume=file)
    assert calls - before == (rows - 2) * each
    assert all(torch.equal(again[name], value) for name, value in whole.items())
    assert not file.exists()


def test_rows_of_another_run_are_refused(tmp_path):
    raster, file = Pixels(plant(HEIGHT, WIDTH, ACROSS)), tmp_path / "rows"

    def killed(tiles):
        raise Killed

    with pytest.raises(Killed):
        detect_tiles(killed, raster, TILE, OVERLAP, resume=file, about="a")
    settings: dict[str, Any] = {"tile": TILE, "overlap": OVERLAP, "about": "a", "resume": file}
    others: Any = {"tile": 90}, {"overlap": 0.2}, {"about": "b"}
    for changes in others:
        with pytest.raises(UserError, match="rows: holds no rows of tiles of this image"):
            detect_tiles(find, raster, **settings | changes)
    file.write_text("important\n")
    with pytest.raises(UserError, match="rows: holds no rows of tiles of this image"):
        detect_tiles(find, raster, TILE, OVERLAP, resume=file)
    assert file.read_text() == "important\n"


def test_an_overlap_that_makes_very_many_tiles_is_warned_of():
    raster = Pixels(torch.zeros(3, 60, 90, dtype=torch.uint8))

    def none(tiles):
        return [{"boxes": torch.zeros(0, 4), "scores": torch.zeros(0), "labels": torch.zeros(0).long()} for _ in tiles]

    with pytest.warns(UserWarning, match="an overlap of 0.9 cuts 90x60 pixels into 231 tiles, where 6 would cover"):
        detect_tiles(none, raster, 30, 0.9, batch_size=2000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        detect_tiles(none, raster, 30, 0.75, batch_size=2000)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tile": 0}, "tile must be a whole number of pixels, got 0"),
        ({"tile": 80.5}, "tile must be"),
        ({"overlap": 1.0}, "overlap must be at least 0 and below 1, got 1.0"),
        ({"merge": "union"}, "merge must be one of nmm, nms, got 'union'"),
        ({"merge_thresh": 0}, "merge_thresh must be"),
        ({"batch_size": 0}, "batch_size must be"),
    ],
)
def test_errors(changes, message):
    with pytest.raises(UserError, match=message):
        detect_tiles(find, Pixels(torch.zeros(3, 9, 9, dtype=torch.uint8)), **changes)
