"""A raster shows the same pixels whole and in tiles, with or without a place on the earth."""

import sys
import warnings

import numpy as np
import pytest
import torch

from retina_fast.predict import geotiff
from retina_fast.predict.geotiff import RasterFile
from tests.predict.test_odd_sources import model

rasterio = pytest.importorskip("rasterio")

BANDS = np.random.default_rng(0).integers(1, 256, (3, 21, 34), dtype=np.uint8)
BANDS[BANDS == 200] = 201
BANDS[:, :8] = 200
HOLE = np.where(np.arange(21)[:, None] < 8, 0, 255).repeat(34, 1).astype(np.uint8)


def write(file, bands, names=None, mask=None, colours=None, **options):
    profile = {"driver": "GTiff", "height": 21, "width": 34, "count": len(bands), "dtype": str(bands.dtype)}
    place = {"crs": "EPSG:32611", "transform": rasterio.transform.from_origin(500000, 4100000, 0.1, 0.1)}
    with rasterio.open(file, "w", **profile | place | options) as opened:
        if names:
            opened.colorinterp = [rasterio.enums.ColorInterp[name] for name in names]
        if colours:
            opened.write_colormap(1, colours)
        opened.write(bands)
        if mask is not None:
            opened.write_mask(mask)
    return file


COLOURS = {value: (value, 255 - value, 7, 255) for value in range(256)}
BLACK = np.where(HOLE == 0, 0, BANDS)
KINDS: dict[str, tuple[tuple, dict, np.ndarray]] = {
    "as it is": ((BANDS,), {}, BANDS),
    "nodata": ((BANDS,), {"nodata": 200}, BLACK),
    "mask": ((BANDS, None, HOLE), {}, BLACK),
    "alpha": ((np.concatenate([BANDS, HOLE[None]]),), {"photometric": "rgb", "alpha": "yes"}, BLACK),
    "other order": ((BANDS, ["blue", "green", "red"]), {}, BANDS[::-1]),
    "palette": ((BANDS[:1], None, None, COLOURS), {}, np.stack([BANDS[0], 255 - BANDS[0], np.full_like(HOLE, 7)])),
    "0 is white": ((BANDS[:1],), {"photometric": "miniswhite"}, 255 - BANDS[:1].repeat(3, 0)),
    "16 bits": ((BANDS[:1].astype(np.uint16) * 257,), {"nodata": 200 * 257}, BLACK[:1].repeat(3, 0)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_whole_and_in_tiles(kind, tmp_path):
    given, options, expected = KINDS[kind]
    file = write(tmp_path / "a.tif", *given, **options)
    whole, in_tiles = model.predict(file), model.predict(file, tile=16)
    assert torch.equal(whole.image, torch.from_numpy(expected.copy()))
    assert torch.equal(in_tiles.image, whole.image)
    assert whole.georeference == in_tiles.georeference
    assert whole.georeference.crs == "EPSG:32611"


def test_nowhere(tmp_path):
    """A TIFF without a place, and one whose transform says nothing, are not warned of."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        identity = rasterio.Affine.identity()
        file = write(tmp_path / "a.tif", BANDS, transform=identity)
        bare = write(tmp_path / "bare.tif", BANDS, transform=identity, crs=None)
    with warnings.catch_warnings():
        warnings.simplefilter("error", rasterio.errors.NotGeoreferencedWarning)
        for name in (file, bare):
            for tile in (None, 16):
                assert model.predict(name, tile=tile).georeference is None


def test_without_rasterio_pillow_reads_it(tmp_path, monkeypatch):
    file = write(tmp_path / "a.tif", BANDS, nodata=200)
    monkeypatch.setitem(sys.modules, "rasterio", None)
    found = model.predict(file)
    assert torch.equal(found.image, torch.from_numpy(BANDS))
    assert found.georeference.crs == "EPSG:32611"


@pytest.mark.parametrize("size", [(10, 17), (7, 5), (1, 1), (21, 34)])
def test_a_reduced_picture_is_read_strip_by_strip(size, tmp_path, monkeypatch):
    """It takes the pixel in the middle of each part, as GDAL does, and holds few rows at once."""
    file = write(tmp_path / "a.tif", BANDS)
    heights = []
    read = RasterFile.read

    def noted(self, window):
        heights.append(window.height)
        return read(self, window)

    monkeypatch.setattr(RasterFile, "read", noted)
    monkeypatch.setattr(geotiff, "_STRIP", 4 * 34)
    with RasterFile(file) as raster:
        small = raster.reduced(size)
    with rasterio.open(file) as opened:
        assert np.array_equal(small.numpy(), opened.read(out_shape=(3, *size)))
    assert max(heights) <= 4


VRT = """<VRTDataset rasterXSize="34" rasterYSize="21"><VRTRasterBand dataType="Byte" band="1"><SimpleSource>
<SourceFilename relativeToVRT="1">{}.tif</SourceFilename><SourceBand>1</SourceBand></SimpleSource></VRTRasterBand>
</VRTDataset>"""


@pytest.mark.parametrize("tile", [None, 16])
def test_a_glob_of_rasters_that_pillow_does_not_read(tile, tmp_path):
    write(tmp_path / "there.tif", BANDS[:1])
    for name in ("there", "gone"):
        (tmp_path / f"{name}.vrt").write_text(VRT.format(name))
    with pytest.warns(UserWarning, match=r"gone\.vrt: not readable at .*gone\.tif: No such file"):
        gone, there = model.predict(f"{tmp_path}/*.vrt", tile=tile, progress=False)
    assert gone.error
    assert torch.equal(there.image, torch.from_numpy(BANDS[:1]).expand(3, -1, -1))
