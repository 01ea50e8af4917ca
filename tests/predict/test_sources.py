"""Every kind of source of docs/predict.md, on real files: what it gives, and what is said of bad input of that kind."""

import re
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, TiffImagePlugin
from torchvision.io import decode_image, write_png

import retina_fast
from retina_fast.data.errors import ImageError
from retina_fast.data.processes import WORKERS
from retina_fast.predict.predict import predict
from retina_fast.predict.results import Results
from retina_fast.predict.sources import open_files, open_source

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model() -> Any:
    return retina_fast.load("trees").cpu()


@pytest.fixture(scope="module")
def photo() -> torch.Tensor:
    """A part of a photograph, (3, 96, 128)."""
    image = decode_image(str(ROOT / "examples" / "photographs" / "yellowstone.jpg"))
    return image[:, 100:196, 300:428].contiguous()


@pytest.fixture(scope="module")
def files(photo, tmp_path_factory) -> Path:
    """A folder with the photograph as two PNG files, a list of them, and a GeoTIFF."""
    folder = tmp_path_factory.mktemp("sources")
    (folder / "photos").mkdir()
    for name in ("a.png", "b.png"):
        write_png(photo, str(folder / "photos" / name))
    (folder / "list.txt").write_text("".join(f"{folder / 'photos' / name}\n" for name in ("b.png", "a.png")))
    write_geotiff(photo, folder / "map.tif")
    return folder


def write_geotiff(image: torch.Tensor, file: Path) -> None:
    """A GeoTIFF of 0.1 m a pixel, whose upper left corner is at 500000 m east and 4100000 m north in EPSG:32611."""
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[33550], tags.tagtype[33550] = (0.1, 0.1, 0.0), 12
    tags[33922], tags.tagtype[33922] = (0.0, 0.0, 0.0, 500000.0, 4100000.0, 0.0), 12
    tags[34735], tags.tagtype[34735] = (1, 1, 0, 3, 1024, 0, 1, 1, 1025, 0, 1, 1, 3072, 0, 1, 32611), 3
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, tiffinfo=tags)


@pytest.fixture(scope="module")
def server(files) -> Iterator[str]:
    """The address of a server of the files on this machine."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(files))) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def array(photo: torch.Tensor) -> np.ndarray:
    return photo.permute(1, 2, 0).numpy()


def write_video(photo: torch.Tensor, file: Path, frames: int = 3) -> Path:
    """A video without losses."""
    av = pytest.importorskip("av")
    with av.open(str(file), "w") as container:
        stream = container.add_stream("ffv1", rate=5)
        stream.height, stream.width, stream.pix_fmt = *photo.shape[1:], "bgr0"
        for _ in range(frames):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(array(photo), format="rgb24")))
        container.mux(stream.encode())
    return file


Make = Callable[[Path, torch.Tensor, str], Any]
KINDS: dict[str, tuple[Make, int | None]] = {  # of sources; how many images it holds, None where it is one image
    "the path of an image": (lambda files, photo, url: str(files / "photos" / "a.png"), None),
    "the URL of an image": (lambda files, photo, url: f"{url}/photos/a.png?size=full", None),
    "a folder": (lambda files, photo, url: files / "photos", 2),
    "a glob": (lambda files, photo, url: f"{files}/**/*.png", 2),
    "a `.txt` list of paths and URLs": (lambda files, photo, url: files / "list.txt", 2),
    "a list, or any iterable, of sources": (lambda files, photo, url: [files / "photos", photo, array(photo)], 4),
    "a Pillow image": (lambda files, photo, url: Image.open(files / "photos" / "a.png"), None),
    "an array (H, W, 3), uint8": (lambda files, photo, url: array(photo), None),
    "an array in OpenCV's order, with `bgr=True`": (lambda files, photo, url: array(photo)[..., ::-1], None),
    "an array of 16 bits, or of floating point": (lambda files, photo, url: array(photo).astype(np.uint16) * 256, None),
    "an array with alpha": (
        lambda files, photo, url: np.dstack([array(photo), np.zeros(photo.shape[1:], np.uint8)]),
        None,
    ),
    "a tensor (3, H, W)": (lambda files, photo, url: photo / 255, None),
    "a batch (B, 3, H, W)": (lambda files, photo, url: photo.expand(3, -1, -1, -1), 3),
    "a GeoTIFF": (lambda files, photo, url: files / "map.tif", None),
    "a video": (lambda files, photo, url: write_video(photo, files / "clip.mkv"), 3),
}


@pytest.fixture(scope="module")
def expected(model, files) -> Results:
    return model.predict(files / "photos" / "a.png")


def assert_same(found: Results, expected: Results) -> None:
    assert found.size == expected.size == (96, 128)
    torch.testing.assert_close(found.boxes, expected.boxes)
    torch.testing.assert_close(found.scores, expected.scores)
    assert torch.equal(found.labels, expected.labels)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_source_gives_the_same_objects(kind, model, files, photo, server, expected):
    make, count = KINDS[kind]
    source, bgr = make(files, photo, server), "bgr=True" in kind
    assert len(expected) >= 3
    found = model.predict(source, bgr=bgr, progress=True)
    if count is None:
        assert isinstance(found, Results)
        assert torch.equal(found.image, photo)
        found = [found]
    assert len(found) == (count or 1)
    assert open_source(source, bgr).count() in (count or 1, None)
    for results in found:
        assert_same(results, expected)
        assert results.plot().size == (128, 96)
        assert (results.georeference is not None) == (kind == "a GeoTIFF")
    pictures = open_source(source, bgr).pictures()  # a second time
    assert [picture.path for picture in pictures] == [results.path for results in found]


def test_the_page_lists_these_kinds_and_no_other():
    rows = re.findall(r"^\| ([^|]+?) \|", (ROOT / "docs" / "predict.md").read_text(), re.MULTILINE)
    first = rows.index("source") + 1
    listed = rows[first : first + len(KINDS) + 1]
    assert listed == [*KINDS, "a camera, or the URL of a stream"]


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "an empty word": (lambda folder: "", "source is an empty word"),
    "the path of an image": (lambda folder: folder / "none.png", r"none\.png: no such image file"),
    "the URL of an image": (lambda folder: "http://127.0.0.1:9/a.png", "a.png: cannot be downloaded .*refused"),
    "another URL": (lambda folder: "ftp://127.0.0.1/a.png", "is of no kind that is known"),
    "a folder": (lambda folder: folder, "holds no image"),
    "a glob": (lambda folder: f"{folder}/*.png", r"\*\.png: no such image file"),
    "a list": (lambda folder: folder / "none.txt", "not a list of image files"),
    "a Pillow image": (lambda folder: Image.new("F", (4, 4)), "the image: its pixels are numbers of 32 bits"),
    "CHW as an array": (lambda folder: np.zeros((3, 8, 8), np.uint8), r"a tensor may be .*got \(3, 8, 8\)"),
    "HWC as a tensor": (lambda folder: torch.zeros(8, 8, 3), r"an array may be .*got \(8, 8, 3\)"),
    "whole numbers": (lambda folder: np.zeros((8, 8, 3), np.int64), "must be uint8, uint16, or .*got int64"),
    "0 to 255 as floating point": (lambda folder: torch.full((3, 8, 8), 200.0), r"in \[0, 1\], got 200 to 200"),
    "NaN": (lambda folder: np.full((8, 8), np.nan), "got nan to nan"),
    "no pixels": (lambda folder: np.zeros((0, 8, 3), np.uint8), "has no pixels"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_alone_is_an_error_that_names_it(kind, model, tmp_path):
    make, message = BAD[kind]
    with pytest.raises(ValueError, match=message):
        model.predict(make(tmp_path))


def test_one_bad_image_of_several_is_named_and_does_not_end_the_run(model, photo, expected, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"not an image")
    sources = [photo, tmp_path / "broken.png", torch.full((3, 8, 8), 2.0), photo[:, :1, :1].expand(-1, 1, 3000), photo]
    with pytest.warns(UserWarning, match=r"broken\.png: not a readable image") as said:
        found = model.predict(sources)
    assert any("image 2: values of floating point" in str(warning.message) for warning in said)
    assert len(said) == 2
    assert len(found) == 5
    assert [bool(results.error) for results in found] == [False, True, True, False, False]
    assert isinstance(found[1].error, ImageError)
    for results in (found[0], found[4]):
        assert_same(results, expected)
    with pytest.raises(ImageError, match=r"broken\.png"):
        found[1].plot()


def test_rasters_that_pillow_cannot_read(model, photo, files, server, expected, tmp_path, monkeypatch):
    rasterio = pytest.importorskip("rasterio")
    profile = {"driver": "GTiff", "height": 96, "width": 128, "count": 3, "dtype": "uint16", "crs": "EPSG:32611"}
    place = rasterio.transform.from_origin(500000, 4100000, 0.1, 0.1)
    with rasterio.open(tmp_path / "deep.tif", "w", **profile, transform=place) as file:
        file.write(photo.numpy().astype(np.uint16) * 256 + 7)
    found = model.predict(tmp_path / "deep.tif")
    assert_same(found, expected)
    assert found.georeference.crs == "EPSG:32611"
    (tmp_path / "cut.tif").write_bytes((tmp_path / "deep.tif").read_bytes()[:5000])
    with pytest.raises(ImageError, match=r"cut\.tif: not a readable image"):
        model.predict(tmp_path / "cut.tif")
    (files / "deep.tif").write_bytes((tmp_path / "deep.tif").read_bytes())
    from_web = model.predict(f"{server}/deep.tif")
    assert from_web.georeference == found.georeference
    assert torch.equal(from_web.image, found.image)
    assert from_web.path == f"{server}/deep.tif"
    for dtype in ("int16", "float32"):
        with rasterio.open(tmp_path / "signed.tif", "w", **profile | {"dtype": dtype}, transform=place) as file:
            file.write(photo.numpy().astype(dtype))
        with pytest.raises(ImageError, match=rf"signed\.tif: its pixels must be uint8 or uint16, got {dtype}"):
            model.predict(tmp_path / "signed.tif")
    monkeypatch.setitem(sys.modules, "rasterio", None)
    with pytest.raises(ImageError, match=r"deep\.tif: .*; rasterio may read it: pip install rasterio"):
        model.predict(tmp_path / "deep.tif")


def test_no_source_at_all(model):
    for source in (None, b"photo.jpg", {"image": 1}, True):
        with pytest.raises(TypeError, match="source must be a path, URL"):
            model.predict(source)


def test_a_camera_is_a_stream_of_frames(model, photo, expected, tmp_path, monkeypatch):
    av = pytest.importorskip("av")
    clip, opened, open_ = write_video(photo, tmp_path / "clip.mkv"), [], av.open

    def open_camera(name, **options):
        opened.append((name, options))
        return open_(str(clip))

    with pytest.raises(ValueError, match="does not end: give stream=True"):
        model.predict(0)
    (missing,) = model.predict(99, stream=True)
    assert "/dev/video99: not a readable video (No such file" in str(missing.error)
    monkeypatch.setattr(av, "open", open_camera)
    stream = model.predict(0, stream=True)
    assert iter(stream) is stream
    first, second = next(stream), next(stream)
    stream.close()
    assert opened == [("/dev/video0", {"format": "v4l2"})]
    assert [first.path, second.path] == ["camera 0#0", "camera 0#1"]
    assert_same(second, expected)
    assert torch.equal(first.image, photo)


class Nothing(torch.nn.Module):
    """Finds nothing, and notes how many images came at once."""

    score_thresh = 0.05

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.batches: list[int] = []

    def forward(self, images):
        self.batches.append(len(images))
        none = torch.zeros(0)
        return [{"boxes": none.reshape(0, 4), "scores": none, "labels": none.long()} for _ in images]


def test_a_stream_keeps_few_images_in_memory_however_many_there_are():
    made: list[weakref.ref] = []

    def images():
        for _ in range(150):
            image = np.zeros((8, 8, 3), np.uint8)
            made.append(weakref.ref(image))
            yield image
            del image

    most = ahead = 0
    for number, _ in enumerate(predict(Nothing().eval(), images(), batch_size=2, stream=True), start=1):
        most = max(most, sum(image() is not None for image in made))
        ahead = max(ahead, len(made) - number)
    assert number == 150
    assert ahead <= 2 * WORKERS + 2
    assert most <= 2 * WORKERS + 2 * 2 + 1


def test_images_of_one_size_share_a_batch(photo):
    model, small, bad = Nothing().eval(), photo[:, :32, :32], torch.full((3, 8, 8), 2.0)
    with pytest.warns(UserWarning, match="image 5"):
        found = predict(model, [photo, photo, photo, small, small, bad, small], batch_size=2)
    assert model.batches == [2, 1, 2, 1]
    assert [results.size for results in found] == [(96, 128)] * 3 + [(32, 32)] * 2 + [(0, 0), (32, 32)]


def test_words_of_a_command_line(files, photo, server, tmp_path, monkeypatch):
    (tmp_path / "in [1]").mkdir()
    write_png(photo, str(tmp_path / "in [1]" / "x.png"))
    words = [f"{files}/photos", f"{files}/photos/*.png", f"{tmp_path}/in [1]/x.png", f"{server}/photos/a.png"]
    source = open_files([*words, f"{tmp_path}/in [1]/none.png"])
    names = [picture.name for picture in source.pictures()]
    last = [words[2], words[3], f"{tmp_path}/in [1]/none.png"]
    assert names == [f"{files}/photos/a.png", f"{files}/photos/b.png", *last]
    assert source.count() == 5
    assert not source.endless
    assert open_files(["0"]).endless
    monkeypatch.chdir(tmp_path)
    (tmp_path / "0").write_bytes((files / "photos" / "a.png").read_bytes())
    assert [picture.name for picture in open_files(["0"]).pictures()] == ["0"]
