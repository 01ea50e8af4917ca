"""Rasters on disk, read in windows: bands in any order, nodata, masks, 16 bits, palettes."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from retina_fast.data.errors import ImageError
from retina_fast.predict.georeference import georeference
from retina_fast.predict.geotiff import RasterFile
from retina_fast.predict.tiles import Pixels, Window, detect_tiles
from tests.instruments.planted import find, plant

rasterio = pytest.importorskip("rasterio")
from rasterio.enums import ColorInterp  # noqa: E402

BOXES = [(60, 10, 85, 25), (95, 95, 120, 120), (3, 140, 20, 149)]
IMAGE = plant(150, 170, BOXES)
WINDOW = Window(50, 5, 60, 40)
PART = IMAGE[:, 5:45, 50:110]


def write(path: Path, bands: Any, names: tuple[str, ...] = (), **options: Any) -> Path:
    count, height, width = bands.shape
    profile = {"driver": "GTiff", "height": height, "width": width, "count": count, "dtype": bands.dtype.name}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        with rasterio.open(path, "w", **profile | options) as file:
            if names:
                file.colorinterp = [ColorInterp[name] for name in names]
            file.write(bands)
    return path


def read(path: Path, window: Window = WINDOW) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        with RasterFile(path) as raster:
            return raster.read(window)


RGB = IMAGE.numpy()
GREY = np.arange(150 * 170, dtype=np.uint16).reshape(1, 150, 170)


@pytest.mark.parametrize(
    ("bands", "names", "expected"),
    [
        (RGB, ("red", "green", "blue"), PART),
        (RGB[::-1], ("blue", "green", "red"), PART),
        (RGB[[1, 2, 1, 0]], ("green", "blue", "undefined", "red"), PART),
        (RGB.astype(np.uint16) * 256 + 77, ("red", "green", "blue"), PART),
        (RGB, ("undefined",) * 3, PART),
        (GREY, ("gray",), torch.from_numpy((GREY[:, 5:45, 50:110] >> 8).astype(np.uint8)).expand(3, -1, -1)),
    ],
)
def test_bands_are_shown_as_rgb(bands, names, expected, tmp_path):
    assert torch.equal(read(write(tmp_path / "a.tif", bands, names)), expected)


def test_without_data_is_black(tmp_path):
    bands = RGB.copy()
    bands[:, 10:20, 60:70] = 9
    black = IMAGE.clone()
    black[:, 10:20, 60:70] = 0
    bands[bands == 0] = 1
    black[black == 0] = 1
    black[:, 10:20, 60:70] = 0
    by_value = read(write(tmp_path / "nodata.tif", bands, nodata=9))
    alpha = np.full((1, 150, 170), 255, np.uint8)
    alpha[:, 10:20, 60:70] = 0
    names = ("alpha", "red", "green", "blue")
    by_alpha = read(write(tmp_path / "alpha.tif", np.concatenate((alpha, bands)), names))
    for found in (by_value, by_alpha):
        assert torch.equal(found, black[:, 5:45, 50:110])


def test_a_palette_is_shown_in_its_colours(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        profile = {"driver": "GTiff", "height": 4, "width": 5, "count": 1, "dtype": "uint8"}
        with rasterio.open(tmp_path / "p.tif", "w", **profile) as file:
            file.write_colormap(1, {0: (10, 20, 30), 1: (40, 50, 60)})
            file.write(np.eye(4, 5, dtype=np.uint8)[None])
    found = read(tmp_path / "p.tif", Window(1, 1, 2, 1))
    assert found.tolist() == [[[40, 10]], [[50, 20]], [[60, 30]]]


def test_windows_give_what_the_whole_gives(tmp_path):
    path = write(tmp_path / "a.tif", RGB, ("red", "green", "blue"), tiled=True, blockxsize=64, blockysize=64)
    expected = detect_tiles(find, Pixels(IMAGE), 100, 0.3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        with RasterFile(path) as raster:
            found = detect_tiles(find, raster, 100, 0.3)
    assert sorted(found["boxes"].tolist()) == sorted(map(list, BOXES))
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_georeference(tmp_path):
    place = rasterio.Affine(0.1, 0, 500000, 0, -0.1, 4600000)
    path = write(tmp_path / "a.tif", RGB, transform=place, crs="EPSG:32611")
    with RasterFile(path) as raster:
        assert raster.georeference == ((0.1, 0, 500000, 0, -0.1, 4600000), "EPSG:32611")
        assert raster.georeference == georeference(path)  # as it is read without rasterio


def test_refused(tmp_path):
    for path, message in (
        (write(tmp_path / "f.tif", RGB.astype(np.float32)), "f.tif: its pixels must be uint8 or uint16, got float32"),
        (tmp_path / "none.tif", "none.tif: not a readable raster"),
    ):
        with pytest.raises(ImageError, match=message):
            read(path)
    (tmp_path / "text.tif").write_text("no raster")
    with pytest.raises(ImageError, match=r"text\.tif: not a readable raster"):
        read(tmp_path / "text.tif")
    cut = write(tmp_path / "cut.tif", np.random.default_rng(0).integers(0, 255, (3, 150, 170), np.uint8))
    cut.write_bytes(cut.read_bytes()[:9000])
    with pytest.raises(ImageError, match=r"cut\.tif: not re"):
        read(cut, Window(0, 100, 170, 50))
