"""`predict(..., tile=...)`: every kind of image is cut, rasters are read in windows, results know where they lie."""

import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from retina_fast.data.errors import ImageError, UserError
from retina_fast.predict.method import Predicts
from tests.instruments.planted import find, label_of, plant

HEIGHT, WIDTH = 190, 260
BOXES = [(60, 10, 85, 25), (95, 95, 120, 120), (3, 140, 20, 149), (60, 150, 130, 180)]
IMAGE = plant(HEIGHT, WIDTH, BOXES)
OPTIONS = {"tile": 100, "overlap": 0.3}


class Planted(Predicts, nn.Module):
    """Finds what was planted, as a network: in floating-point images, after it was made."""

    classes = ("circle", "square", "star")

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.training = False
        self.shapes = []

    def forward(self, images):
        self.shapes += [tuple(image.shape) for image in images]
        return find([(image * 255).round().to(torch.uint8) for image in images])


@pytest.fixture
def model():
    return Planted()


def check(results):
    rows = zip(results.boxes.tolist(), results.labels.tolist(), strict=True)
    assert sorted((tuple(map(int, box)), label) for box, label in rows) == sorted(
        (box, label_of(number)) for number, box in enumerate(BOXES, start=1)
    )
    assert results.size == (HEIGHT, WIDTH)
    assert torch.equal(results.image, IMAGE)


def test_arrays_tensors_and_pictures(model, tmp_path):
    pixels = IMAGE.permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(tmp_path / "a.png")
    for source in (IMAGE, IMAGE.float() / 255, pixels, Image.fromarray(pixels), tmp_path / "a.png"):
        check(model.predict(source, **OPTIONS))
    check(model.predict(pixels[..., ::-1], bgr=True, **OPTIONS))
    assert {*model.shapes} == {(3, 100, 100)}
    for results in model.predict([IMAGE, tmp_path / "a.png"], batch_size=3, **OPTIONS):
        check(results)
    check(next(model.predict([IMAGE], stream=True, **OPTIONS)))


def test_a_raster_is_read_in_windows(model, tmp_path):
    rasterio = pytest.importorskip("rasterio")
    place = rasterio.Affine(0.1, 0, 500000, 0, -0.1, 4600000)
    profile = {"driver": "GTiff", "height": HEIGHT, "width": WIDTH, "count": 3, "dtype": "uint8"}
    with rasterio.open(tmp_path / "a.tif", "w", crs="EPSG:32611", transform=place, **profile) as file:
        file.write(IMAGE.numpy())
    results = model.predict(tmp_path / "a.tif", **OPTIONS)
    check(results)
    assert results.georeference.crs == "EPSG:32611"
    feature = results.to_geojson()["features"][0]
    assert 500000 < feature["geometry"]["coordinates"][0][0][0] < 500000 + WIDTH / 10
    (tmp_path / "b.tif").write_text("no raster")
    with pytest.warns(UserWarning, match=r"b\.tif: not a readable raster"):
        first, second = model.predict([tmp_path / "a.tif", tmp_path / "b.tif"], **OPTIONS)
    check(first)
    assert "b.tif" in str(second.error)
    with pytest.raises(ImageError, match=r"b\.tif: not a readable raster"):
        model.predict(tmp_path / "b.tif", **OPTIONS)


def test_a_turned_tiff_is_upright_in_tiles_too(model, tmp_path):
    """Read as a whole it is turned by its EXIF orientation, which GDAL's windows are not."""
    picture = Image.fromarray(IMAGE.permute(1, 2, 0).numpy()).transpose(Image.Transpose.ROTATE_90)
    exif = picture.getexif()
    exif[0x0112] = 6
    picture.save(tmp_path / "a.tif", exif=exif)
    check(model.predict(tmp_path / "a.tif", **OPTIONS))
    exif[0x0112] = 1
    Image.fromarray(IMAGE.permute(1, 2, 0).numpy()).save(tmp_path / "a.tif", exif=exif)
    check(model.predict(tmp_path / "a.tif", **OPTIONS))


def test_nothing_in_tiles_is_one_result_like_any_other(model):
    results = model.predict(np.zeros((HEIGHT, WIDTH, 3), np.uint8), **OPTIONS)
    assert repr(results) == f"<Results {WIDTH}x{HEIGHT} pixels: nothing>"


def test_a_run_that_was_cut_short_goes_on(model, tmp_path, monkeypatch):
    file = tmp_path / "rows"
    forward = Planted.forward

    def stops(self, images):
        if len(self.shapes) == 5:
            raise KeyboardInterrupt
        return forward(self, images)

    monkeypatch.setattr(Planted, "forward", stops)
    with pytest.raises(KeyboardInterrupt):
        model.predict(IMAGE, resume=file, **OPTIONS)
    with pytest.raises(UserError, match="rows: holds no rows of tiles"):
        model.predict(IMAGE, 0.4, resume=file, **OPTIONS)
    with pytest.raises(UserError, match="rows: holds no rows of tiles"):
        model.predict(IMAGE.flip(2), resume=file, **OPTIONS)
    with torch.no_grad():
        model.weight += 1
    with pytest.raises(UserError, match="rows: holds no rows of tiles"):
        model.predict(IMAGE, resume=file, **OPTIONS)
    with torch.no_grad():
        model.weight -= 1
    monkeypatch.undo()
    model.shapes.clear()
    check(model.predict(IMAGE, resume=file, **OPTIONS))
    assert len(model.shapes) == 8  # of three rows with four tiles each, one was finished
    assert not file.exists()


def test_errors(model, tmp_path):
    with pytest.raises(ValueError, match="resume is for one image in tiles"):
        model.predict([IMAGE], resume=tmp_path / "rows", **OPTIONS)
    with pytest.raises(ValueError, match="resume is for one image in tiles"):
        model.predict(IMAGE, resume=tmp_path / "rows")
    with pytest.raises(UserError, match="tile must be a whole number of pixels, got 0"):
        model.predict(IMAGE, tile=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserError, match="merge must be one of"):
            model.predict(IMAGE, merge="union", **OPTIONS)
