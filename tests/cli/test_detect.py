"""`retina-fast detect` over folders and lists: every image comes once and in order, and none stays in memory."""

import gc
import io
import json
import os
import tracemalloc
import weakref
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn
from torchvision.io import write_png

from retina_fast.checkpoint import Checkpoint
from retina_fast.commands.detect import print_found
from retina_fast.data.errors import UserError
from retina_fast.data.images import read_image
from retina_fast.predict import detect as module
from retina_fast.predict import pictures as files_module
from retina_fast.predict.batches import read_ahead
from retina_fast.predict.coco_writer import CocoWriter
from retina_fast.predict.detect import detect
from retina_fast.predict.image_files import image_files

CONTENT = Checkpoint("", {}, ["thing"], [7], {})


class Finder(nn.Module):
    """Finds a hundred boxes in every image, the first as wide as the image's first pixel is bright."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, images):
        boxes = torch.tensor([[0.0, 0, 4, 4]]).repeat(100, 1)
        boxes[0, 2] = float(images[0][0, 0, 0]) * 255
        return [{"boxes": boxes, "scores": torch.full((100,), 0.5), "labels": torch.zeros(100, dtype=torch.int64)}]


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Forty images, each of another brightness: 1 to 40."""
    folder = tmp_path_factory.mktemp("photos")
    for i in range(1, 41):
        write_png(torch.full((3, 16, 16), i, dtype=torch.uint8), str(folder / f"{i:02}.png"))
    return folder


def run(inputs: list[Path], output: Path, workers: int = 0) -> dict:
    found = detect(Finder(), CONTENT, inputs, output, 0.1, workers=workers)
    coco = json.loads((output / "detections.json").read_text())
    assert found
    assert found.images == len(coco["images"])
    assert found.objects["thing"] == len(coco["annotations"])
    assert not list(output.glob("*.partial"))
    return coco


def write_list(path: Path, photos: Path, count: int) -> Path:
    path.write_text("".join(f"{photos / f'{1 + i % 40:02}.png'}\n" for i in range(count)))
    return path


def test_inputs_come_in_turn_and_once(photos, tmp_path):
    (tmp_path / "list.txt").write_text(f"{photos / '05.png'}\n\n {photos / '02.png'} \n")
    other = tmp_path / "other.png"
    files = list(image_files([photos / "03.png", photos, other, photos, photos / "04.png", tmp_path / "list.txt"]))
    folder = sorted(photos.glob("*.png"))
    folder.remove(photos / "03.png")
    assert files == [photos / "03.png", *folder, other, photos / "05.png", photos / "02.png"]
    with pytest.raises(UserError, match=r"none\.txt: not a list of image files"):
        list(image_files([tmp_path / "none.txt"]))


@pytest.mark.parametrize("workers", [0, 2])
def test_results_are_those_of_their_image_in_order(photos, tmp_path, workers):
    coco = run([write_list(tmp_path / "list.txt", photos, 40)], tmp_path / "out", workers)
    assert [image["id"] for image in coco["images"]] == list(range(1, 41))
    assert [Path(image["file_name"]).name for image in coco["images"]] == [f"{i:02}.png" for i in range(1, 41)]
    assert [box["id"] for box in coco["annotations"]] == list(range(1, 4001))
    assert [box["bbox"][2] for box in coco["annotations"][::100]] == pytest.approx(range(1, 41))
    assert coco["categories"] == [{"id": 7, "name": "thing"}]


def test_paths_are_taken_as_they_are_needed(photos):
    taken = 0

    def paths():
        nonlocal taken
        for _ in range(50):
            for path in sorted(photos.glob("*.png")):
                taken += 1
                yield path

    ahead = []
    for count, _ in enumerate(read_ahead(read_image, paths(), workers=2), start=1):
        ahead.append(taken - count)
        if count == 200:
            break
    assert max(ahead) <= 2 * 2


@pytest.mark.slow
def test_memory_does_not_grow_with_the_images(photos, tmp_path, monkeypatch):
    """Only names stay in memory: far less than the 100 boxes of each image, or its pixels."""
    alive: weakref.WeakSet = weakref.WeakSet()
    most = 0

    def read(path):
        nonlocal most
        image = read_image(path)
        alive.add(image)
        most = max(most, len(alive))
        return image

    monkeypatch.setattr(files_module, "read_image", read)
    monkeypatch.setattr(module, "draw_detections", lambda image, *args: image)
    run([write_list(tmp_path / "warm.txt", photos, 10)], tmp_path / "out")
    peaks = []
    for count in (20, 120):
        files = write_list(tmp_path / f"{count}.txt", photos, count)
        gc.collect()
        tracemalloc.start()
        detect(Finder(), CONTENT, [files], tmp_path / "out", 0.1, workers=0)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert most <= 3
    assert peaks[1] - peaks[0] < 100 * 1000  # bytes: the hundred results of one image have 40,000


def test_a_run_that_fails_leaves_the_earlier_file(photos, tmp_path):
    before = run([photos / "01.png"], tmp_path)
    with pytest.raises(TypeError), CocoWriter(tmp_path / "detections.json", []) as coco:
        coco.add({"id": object()}, [])
    assert json.loads((tmp_path / "detections.json").read_text()) == before
    assert {name for name in os.listdir(tmp_path) if name.startswith("detections")} == {"detections.json"}


def test_no_image_at_all_is_an_empty_file(tmp_path):
    with CocoWriter(tmp_path / "detections.json", [{"id": 1}]):
        pass
    content = json.loads((tmp_path / "detections.json").read_text())
    assert content == {"info": content["info"], "images": [], "annotations": [], "categories": [{"id": 1}]}


def test_of_many_images_the_first_are_shown(photos, tmp_path):
    found = detect(Finder(), CONTENT, [write_list(tmp_path / "l.txt", photos, 60)], tmp_path, 0.1, workers=0)
    console = Console(file=io.StringIO(), width=200)
    assert found
    print_found(found, console)
    assert len(found.first) < 50
    assert "... all 60" in console.file.getvalue()  # pyrefly: ignore[missing-attribute]
