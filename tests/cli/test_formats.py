"""The files that `retina-fast detect` writes by --format, and its sources beyond image files."""

import csv
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from retina_fast.data.errors import UserError
from retina_fast.predict import detect as module
from retina_fast.predict import pictures
from retina_fast.predict.detect import KINDS, detect
from tests.cli.test_detect import CONTENT, Finder
from tests.cli.test_outputs import invoke, photo
from tests.predict.test_results import Page
from tests.predict.test_sources import write_geotiff, write_video

EVERY = ("coco", "csv", "html", "yolo")


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    pass


def run(inputs: list, output: Path, kinds=EVERY):
    return detect(Finder(), CONTENT, inputs, output, 0.1, kinds=kinds, workers=0)


def test_every_format_has_every_object(tmp_path):
    for name in ("a/x.png", "b/x.png"):
        photo(tmp_path / name, size=(32, 24))
    (tmp_path / "broken.png").write_bytes(b"no image")
    for _ in range(2):  # the second run replaces what the first one wrote
        found = run([tmp_path / "a", tmp_path / "broken.png", tmp_path / "b"], tmp_path / "out")
        assert found
        assert (found.images, len(found.unreadable), found.objects) == (2, 1, {"thing": 200})
        names = {path.name for path in (tmp_path / "out").rglob("*") if path.is_file()}
        texts = {"about.md", "x.txt", "x_2.txt"}
        assert names == {"detections.json", "detections.csv", "detections.html", "x.jpg", "x_2.jpg", *texts}
    coco = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert [image["id"] for image in coco["images"]] == [1, 3]
    with (tmp_path / "out" / "detections.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert {row["path"] for row in rows} == {image["file_name"] for image in coco["images"]}
    boxes = [[float(row[name]) for name in ("xmin", "ymin", "xmax", "ymax")] for row in rows]
    assert boxes == [[x, y, x + w, y + h] for x, y, w, h in (box["bbox"] for box in coco["annotations"])]
    page = Page((tmp_path / "out" / "detections.html").read_text("utf-8"))
    assert [tag for tag, _ in page.tags].count("rect") == len(rows) == 200
    assert [attrs["alt"] for tag, attrs in page.tags if tag == "img"] == [
        str(tmp_path / name / "x.png") for name in "ab"
    ]
    lines = (tmp_path / "out" / "labels" / "x_2.txt").read_text().splitlines()
    assert lines[1] == "0 0.062500 0.083333 0.125000 0.166667 0.500000"
    assert "- 0: thing" in (tmp_path / "out" / "labels" / "about.md").read_text()


@pytest.mark.parametrize("kind", ["csv", "geojson", "html", "yolo"])
def test_files_of_others_stay(kind, tmp_path):
    photo(tmp_path / "in" / "x.png")
    theirs = tmp_path / "out" / KINDS.get(kind, "labels/x.txt")
    theirs.parent.mkdir(parents=True)
    theirs.write_text("somebody's")
    with pytest.raises(UserError, match="an earlier detection; give another folder as --output"):
        run([tmp_path / "in"], tmp_path / "out", (kind,))
    assert [path.read_text() for path in (tmp_path / "out").rglob("*") if path.is_file()] == ["somebody's"]


def test_geojson_of_maps_alone(tmp_path):
    write_geotiff(torch.full((3, 40, 50), 99, dtype=torch.uint8), tmp_path / "map.tif")
    assert run([tmp_path / "map.tif"], tmp_path / "out", ("geojson",))
    content = json.loads((tmp_path / "out" / "detections.geojson").read_text())
    assert content["crs"]["properties"]["name"].endswith("EPSG::32611")
    (ring,) = content["features"][1]["geometry"]["coordinates"]
    assert ring[2] == pytest.approx([500000.4, 4099999.6])
    photo(tmp_path / "in" / "x.png")
    with pytest.raises(UserError, match=r"x\.png: has no georeference"):
        run([tmp_path / "in"], tmp_path / "new", ("geojson",))
    assert not list((tmp_path / "new").iterdir())
    with pytest.warns(UserWarning, match=r"x\.png: has no georeference.*; it is left out of detections\.geojson"):
        found = run([tmp_path / "map.tif", tmp_path / "in"], tmp_path / "both", ("geojson", "csv", "csv"))
    assert found
    assert found.images == 2
    content = json.loads((tmp_path / "both" / "detections.geojson").read_text())
    assert len(content["features"]) == 100
    assert len((tmp_path / "both" / "detections.csv").read_text().splitlines()) == 201


def test_a_video_has_a_picture_for_each_frame(tmp_path):
    clip = write_video(torch.full((3, 32, 48), 99, dtype=torch.uint8), tmp_path / "clip.mkv")
    found = run([clip], tmp_path / "out")
    assert found
    assert found.images == 3
    assert sorted(path.name for path in (tmp_path / "out").glob("*.jpg")) == [f"clip_00000{i}.jpg" for i in range(3)]
    coco = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert [image["file_name"] for image in coco["images"]] == [f"{clip}#{i}" for i in range(3)]


def test_a_camera_is_watched_until_it_is_interrupted(tmp_path, monkeypatch):
    def frames(camera):
        assert camera == 7
        yield from torch.zeros(2, 3, 32, 48, dtype=torch.uint8)
        raise KeyboardInterrupt

    monkeypatch.setattr(pictures, "frames", frames)
    monkeypatch.chdir(tmp_path)
    found = run(["7"], tmp_path / "out")
    assert found
    assert list(found.first) == ["camera 7#0", "camera 7#1"]
    assert (tmp_path / "out" / "camera 7_000001.jpg").is_file()
    assert not list((tmp_path / "out").glob("*.partial"))


def test_formats_by_the_command(tmp_path):
    photo(tmp_path / "in" / "x.png")
    line = ("detect", f"{tmp_path}/in/*.png", "--output", tmp_path / "out", "--workers", 1, "--score", 0.01)
    result = invoke(*line, "--format", "html", "--format", "csv")
    assert result.exit_code == 0, result.output
    assert f"Wrote {tmp_path}/out/detections.html, {tmp_path}/out/detections.csv and 1 pictures" in result.output
    assert not (tmp_path / "out" / "detections.json").exists()
    assert invoke(*line, "--format", "xml").exit_code == 2


def test_tiles_of_rasters_in_a_small_picture(tmp_path, monkeypatch):
    pytest.importorskip("rasterio")
    monkeypatch.setattr(module, "_LONGEST", 24)
    write_geotiff(torch.full((3, 36, 48), 4, dtype=torch.uint8), tmp_path / "map.tif")
    found = detect(Finder(), CONTENT, [tmp_path / "map.tif"], tmp_path / "out", 0.1, kinds=EVERY, tile=24, overlap=0)
    assert found
    coco = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert (coco["images"][0]["width"], coco["images"][0]["height"]) == (48, 36)
    boxes = {tuple(box["bbox"]) for box in coco["annotations"]}
    assert boxes == {(0, 0, 4, 4), (24, 0, 4, 4), (0, 12, 4, 4), (24, 12, 4, 4)}  # the last row ends at the edge
    with Image.open(tmp_path / "out" / "map.jpg") as picture:
        assert picture.size == (24, 18)
    line = ("detect", tmp_path / "map.tif", "--output", tmp_path / "new", "--tile", 32, "--overlap", 0.5)
    assert invoke(*line).exit_code == 0
    assert invoke(*line, "--tile", 0).exit_code == 2
