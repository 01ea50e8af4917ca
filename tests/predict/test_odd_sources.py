"""Sources as people have them: buffers that are filled again, columns of tables, links in circles, odd addresses."""

import io
import os
import threading
import warnings
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePath
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence
from torch import nn

from retina_fast.data.errors import ImageError
from retina_fast.predict.method import Predicts

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 17, 3), dtype=np.uint8)
IMAGE = torch.from_numpy(PIXELS.transpose(2, 0, 1).copy())


class Nothing(Predicts, nn.Module):
    """Finds nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.training = False

    def forward(self, images):
        none = torch.zeros(0)
        return [{"boxes": none.reshape(0, 4), "scores": none, "labels": none.long()} for _ in images]


model = Nothing()


@pytest.fixture
def photo(tmp_path):
    """The path of an image file."""
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    return tmp_path / "a.png"


def read_only() -> np.ndarray:
    array = PIXELS.copy()
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    "array",
    [(PIXELS.astype(np.uint16) << 8).astype(">u2"), (PIXELS / 255).astype(">f8"), read_only()],
    ids=["16 bits, big-endian", "64 bits, big-endian", "read-only"],
)
def test_arrays_from_files(array):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(model.predict(array).image, IMAGE)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.full((4, 4), 1 + 1e-6), r"must be in \[0, 1\], got 1.000001 to 1.000001"),
        (IMAGE.float().div(255).to_sparse(), "dense and have data, got one that is a torch.sparse_coo"),
        (IMAGE.to("meta"), "got one that is on the device meta"),
        (torch.nested.as_nested_tensor([IMAGE[None], IMAGE[None]]), "got one that is nested"),
        (Image.new("RGB", (0, 5)), "the image: it has no pixels: its size is 0x5"),
    ],
    ids=["over 1", "sparse", "meta", "nested", "Pillow"],
)
def test_images_without_pixels_to_read_are_refused(image, message):
    with pytest.raises(ImageError, match=message):
        model.predict(image)


def test_a_pillow_image_that_is_closed(photo):
    with Image.open(photo) as closed:
        pass
    with pytest.raises(ImageError, match=r"a\.png: "):
        model.predict(closed)


def test_results_do_not_share_memory_with_a_tensor():
    mine = IMAGE.clone()
    found = model.predict(mine)
    mine.zero_()
    assert torch.equal(found.image, IMAGE)


def test_paths_of_other_kinds(photo):
    (entry,) = os.scandir(photo.parent)
    for path in (entry, PurePath(photo), os.fspath(photo)):
        assert model.predict(path).path == str(photo)
    for column in (np.array([str(photo)] * 2), np.array([photo] * 2, dtype=object)):
        assert [results.path for results in model.predict(column)] == [str(photo)] * 2


@pytest.mark.parametrize("source", [bytearray(b"a.png"), io.BytesIO(b"a.png")], ids=["bytes", "file"])
def test_bytes_are_no_source(source):
    with pytest.raises(TypeError, match="source must be a path, URL"):
        model.predict(source)


def test_what_is_no_source_among_others_does_not_end_the_run(photo):
    """As in a column of a table in which a path is missing."""
    with pytest.warns(UserWarning, match=r"^image 1: source must be a path, URL.* got builtins\.float"):
        found = model.predict([photo, float("nan"), "\0.png"])
    assert [results.path for results in found] == [str(photo), None, "\0.png"]
    assert repr(found[1]).startswith("<Results: image 1: source must be")
    assert repr(found[2]) == r"<Results \x00.png: no such image file>"


def test_a_pipe_is_no_image(photo):
    """It would never open."""
    for name in ("a", "a.tif"):
        os.mkfifo(photo.parent / name)
        for tile in (None, 8):
            with pytest.raises(ImageError, match=f"{name}: no such image file"):
                model.predict(photo.parent / name, tile=tile)


@pytest.mark.parametrize(
    "source", [np.int64(0), [[0]], ("a.png", ["rtsp://127.0.0.1/a"])], ids=["NumPy", "list", "URL"]
)
def test_a_camera_is_noticed_wherever_it_is(source):
    with pytest.raises(ValueError, match="does not end: give stream=True"):
        model.predict(source)


def filled_again(count: int = 9) -> Iterator[np.ndarray]:
    """One array, in which each image replaces the one before, as `VideoCapture.read(frame)` does."""
    frame = np.zeros((4, 6, 3), np.uint8)
    for number in range(count):
        frame[:] = number
        yield frame


@pytest.mark.parametrize("stream", [False, True])
def test_an_iterator_may_fill_one_buffer_again_and_again(stream, tmp_path):
    batches = (torch.from_numpy(frame).permute(2, 0, 1)[None] for frame in filled_again())
    for source in (filled_again(), batches):
        images = [results.image for results in model.predict(source, stream=stream)]
        assert [{*image.unique().tolist()} for image in images] == [{number} for number in range(9)]
    frames = [Image.new("L", (6, 4), 20 * number) for number in range(9)]
    frames[0].save(tmp_path / "a.tif", save_all=True, append_images=frames[1:])
    with Image.open(tmp_path / "a.tif") as pages:
        images = [results.image for results in model.predict(ImageSequence.Iterator(pages), stream=stream)]
    assert [int(image[0, 0, 0]) for image in images] == [20 * number for number in range(9)]


def test_what_one_of_several_lacks_does_not_end_the_run(photo, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank.txt").write_text(" \n\n")
    places = [tmp_path / "none.txt", tmp_path / "blank.txt"]
    bad = [tmp_path / "empty", "ftp://example.org/a.png", "x" * 5000, *places]
    with pytest.warns(UserWarning, match="holds no image") as said:
        found = model.predict([*bad, photo], progress=False)
    assert [bool(results.error) for results in found] == [True] * 5 + [False]
    reasons = ("holds no image", "is of no kind", "no such image file", "not a list of image files", "names no image")
    for name, reason, results in zip(bad, reasons, found, strict=False):
        assert results.path == str(name)
        assert reason in str(results.error)
    assert len(said) == 5
    (tmp_path / "list.txt").write_text(f"ftp://example.org/a.png\n{photo}\n")
    with pytest.warns(UserWarning, match="ftp://example.org/a.png: is of no kind"):
        assert [bool(results.error) for results in model.predict(tmp_path / "list.txt")] == [True, False]


def test_links_that_go_round_in_circles(photo):
    folder = photo.parent
    os.symlink("itself.png", folder / "itself.png")
    os.symlink(".", folder / "again")
    os.symlink("a.png", folder / "b.png")
    with pytest.warns(UserWarning, match=r"itself\.png: no such image file|1 folders in it are passed over"):
        found = model.predict(folder)
    assert [results.path for results in found if not results.error] == [
        str(folder / name) for name in ("a.png", "b.png")
    ]
    found = model.predict(f"{folder}/**/*.png")
    assert [results.path for results in found] == [str(folder / name) for name in ("a.png", "b.png")]


def test_relative_paths_are_those_of_the_folder_that_predict_was_called_in(photo, tmp_path, monkeypatch):
    """What is shown stays as it was given; what is read later, or is not to be replaced, is found from anywhere."""
    folder, elsewhere = photo.parent / "in", tmp_path / "elsewhere"
    for place in (folder, elsewhere):
        place.mkdir()
    photo.rename(folder / "a.png")
    Image.fromarray(PIXELS).save(folder / "b.tif")
    (folder / "broken.png").write_bytes(b"no image")
    (folder.parent / "list.txt").write_text("in/a.png\nin/broken.png\nin/b.tif\n")
    names = ["in/a.png", "in/b.tif", "in/broken.png"]
    sources = [("in", names), ("in/*.*", names), ("list.txt", [names[0], names[2], names[1]]), (names, names)]
    for source, expected in sources:
        monkeypatch.chdir(folder.parent)
        streams = [model.predict(source, stream=True, tile=tile) for tile in (None, 8)]
        with pytest.warns(UserWarning, match=r"^in/broken\.png: not a readable image"):
            found = model.predict(source, progress=False)
        monkeypatch.chdir(elsewhere)
        for stream in streams:
            with pytest.warns(UserWarning, match=r"^in/broken\.png: not a readable"):
                found += stream
        assert [results.path for results in found] == 3 * expected
        for results in found:
            if not results.error:
                assert torch.equal(results.image, IMAGE)
                assert results.file == folder.parent / results.path
    good = found[0]
    good.save("a.png")  # another folder's
    assert good.to_coco()["images"][0]["file_name"] == "in/a.png"
    with pytest.raises(ValueError, match="would replace the image itself"):
        good.save(folder / "a.png")


@pytest.fixture
def server(photo) -> Iterator[str]:
    """The address of a server that knows one image by an odd name, and ends another answer too early."""
    content = photo.read_bytes()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            self.send_response(200 if self.path in ("/%C3%BC%20%E6%A0%91.png?q=a%20b", "/short.png") else 404)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: 40 if "short" in self.path else None])

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def test_addresses(server):
    for name in ("ü 树.png?q=a b", "%C3%BC%20%E6%A0%91.png?q=a%20b"):
        found = model.predict(f"{server}/{name}")
        assert torch.equal(found.image, IMAGE)
        assert found.path == f"{server}/{name}"
    for url, reason in (
        (f"{server}/short.png", r"short\.png: cannot be downloaded \(IncompleteRead"),
        (f"{server}/none.png", r"none\.png: cannot be downloaded \(Not Found"),
        ("http://127.0.0.1:port/a.png", "a.png: cannot be downloaded .*port"),
        ("http://[::1/a.png", r"http://\[::1/a\.png: is no address"),
    ):
        with pytest.raises(ValueError, match=reason):
            model.predict(url)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"overlap": 1}, "overlap must be at least 0 and below 1, got 1"),
        ({"merge": "wbf"}, "merge must be one of nmm, nms, got 'wbf'"),
        ({"merge_thresh": 0}, "merge_thresh must be above 0"),
        ({"tile": 0, "stream": True}, "tile must be a whole number of pixels, got 0"),
        ({"batch_size": True}, "batch_size must be a whole number of at least 1, got True"),
    ],
)
def test_options_are_checked_before_anything_is_read(options, message):
    with pytest.raises(ValueError, match=message):
        model.predict(["none.png"], **options)


def test_numbers_of_numpy(tmp_path):
    numbers: dict[str, Any] = {"tile": np.int64(8), "overlap": np.float32(0.25), "batch_size": np.int32(2)}
    numbers["score"] = np.float32(0.5)
    assert len(model.predict(IMAGE, resume=tmp_path / "rows", **numbers)) == 0
