"""What `predict` refuses by a sentence, models of every dtype, and files that change after it."""

import os

import pytest
import torch
from PIL import Image
from torchvision.io import write_png
from torchvision.transforms.v2 import functional as transforms

import retina_fast
from retina_fast.data.errors import ImageError
from retina_fast.predict import again
from tests.predict.test_sources import model, photo  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_file_that_has_changed_since_is_not_drawn(model, photo, tmp_path):  # noqa: F811
    for name in "ab":
        write_png(photo, str(tmp_path / f"{name}.png"))
    first, second = model.predict(tmp_path, progress=False)
    assert torch.equal(first.image, photo)
    write_png(photo.flip(2)[:, :50], str(tmp_path / "a.png"))
    with pytest.raises(ImageError, match=r"a\.png: has changed since objects were found in it; detect in it again"):
        first.plot()
    second.plot()
    (tmp_path / "b.png").unlink()
    with pytest.raises(ImageError, match=r"b\.png: no such image file"):
        second.plot()


@pytest.mark.parametrize("tile", [None, 64])
def test_a_file_that_was_only_touched_is_drawn(model, photo, tmp_path, tile):  # noqa: F811
    """Or copied, or written again with the same bytes: its content decides, not its time."""
    file = tmp_path / "a.png"
    write_png(photo, str(file))
    (found,) = model.predict([file], progress=False, tile=tile)
    before = found.plot().tobytes()
    os.utime(file, (1, 1))
    assert found.plot().tobytes() == before
    content = file.read_bytes()
    file.unlink()
    file.write_bytes(content)
    assert found.plot().tobytes() == before


def test_another_picture_of_the_same_size_and_time_is_not_drawn(model, photo, tmp_path):  # noqa: F811
    file = tmp_path / "a.bmp"
    draw = transforms.to_pil_image(photo)
    draw.save(file)
    (found,) = model.predict([file], progress=False)
    status = file.stat()
    draw.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(file)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert file.stat().st_size == status.st_size
    with pytest.raises(ImageError, match=r"a\.bmp: has changed since"):
        found.plot()


def test_of_a_very_large_file_the_time_decides(tmp_path, monkeypatch):
    """Reading a raster of gigabytes twice would cost as much as detecting in it."""
    monkeypatch.setattr(again, "_COMPARED", 5)
    file = tmp_path / "a.tif"
    file.write_bytes(b"123456")
    os.utime(file, ns=(1, 1))
    stamp = again.stamp_of(file)
    again.check_unchanged(file, stamp)
    os.utime(file, ns=(2, 2))
    with pytest.raises(ImageError, match="has changed"):
        again.check_unchanged(file, stamp)
    assert again.stamp_of(tmp_path) is None
    assert again.stamp_of(None) is None


@pytest.mark.parametrize("dtype", [pytest.param(torch.float16, marks=pytest.mark.slow), torch.bfloat16, torch.float64])
def test_without_an_engine_a_model_of_another_dtype(dtype, photo):  # noqa: F811
    model = retina_fast.load("trees").cpu()  # noqa: F811
    exact = model.predict(photo, engine=False)
    found = model.to(dtype).predict(photo, engine=False)
    assert len(found) == len(exact) > 0
    torch.testing.assert_close(found.boxes.float(), exact.boxes, atol=3, rtol=0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"score": "0.5"}, "score must be at least 0 and at most 1, got '0.5'"),
        ({"score": None}, "score must be at least 0 and at most 1, got None"),
        ({"score": [0.5]}, r"score must be at least 0 and at most 1, got \[0.5\]"),
        ({"batch_size": "8"}, "batch_size must be a whole number of at least 1, got '8'"),
        ({"batch_size": 2.5}, "batch_size must be a whole number of at least 1, got 2.5"),
        ({"tile": 32, "overlap": "0.2"}, "overlap must be at least 0 and below 1, got '0.2'"),
        ({"tile": 32, "merge_thresh": None}, "merge_thresh must be above 0 and at most 1, got None"),
    ],
)
def test_numbers_that_are_none_are_named(given, message, model, photo):  # noqa: F811
    with pytest.raises(ValueError, match=message):
        model.predict(photo, **given)
