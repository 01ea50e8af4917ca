"""What `predict` refuses by a sentence, models of every dtype, and files that change after it."""

import pytest
import torch
from torchvision.io import write_png

import retina_fast
from retina_fast.data.errors import ImageError
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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
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
