"""Inputs: images are found by content, those that do not fit are skipped aloud, and numbers are obeyed or refused."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from retina_fast import checkpoint
from retina_fast.data.errors import UserError
from retina_fast.predict.detect import detect
from retina_fast.predict.image_files import image_files
from tests.cli.test_detect import CONTENT, Finder
from tests.cli.test_outputs import invoke, photo, problem, run
from tests.conftest import write_shapes


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    pass


def test_what_a_folder_holds_is_found_by_content_or_said(tmp_path, recwarn):
    for name, kind in {"a.jpg": "JPEG", "B.TIF": "TIFF", "c.Bmp": "BMP", "d.webp": "WEBP", "e.GIF": "GIF"}.items():
        Image.new("RGB", (8, 8)).save(tmp_path / name, format=kind)
    Image.new("RGB", (8, 8)).save(tmp_path / "no_suffix", format="PNG")
    Image.new("RGB", (8, 8)).save(tmp_path / "wrong.dat", format="TIFF")
    (tmp_path / "notes.md").write_text("BM, a text that begins like a bitmap")
    (tmp_path / "f.heic").write_bytes(b"\0\0\0\x18ftypheic")
    (tmp_path / "below.jpg").mkdir()
    os.mkfifo(tmp_path / "pipe")
    said: list[str] = []
    names = [file.name for file in image_files([tmp_path], said.append)]
    assert sorted(names) == ["B.TIF", "a.jpg", "c.Bmp", "d.webp", "e.GIF", "no_suffix", "wrong.dat"]
    (message,) = said
    assert message == f"{tmp_path}: 3 other files (.heic, .md, no suffix) and 1 folders in it are passed over"
    found = run([tmp_path], tmp_path / "out")
    assert found is not None
    assert found.images == 7
    assert not found.unreadable
    assert "3 other files" in str(recwarn.pop(UserWarning).message)


def test_a_file_named_in_two_ways_comes_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    photo(tmp_path / "in" / "x.png")
    (tmp_path / "link").symlink_to("in")
    inputs = [Path("in/x.png"), tmp_path / "in" / "x.png", Path("link"), Path("in/../in")]
    assert list(image_files(inputs)) == [Path("in/x.png")]
    photo(tmp_path / "in" / "below" / "y.png")
    (tmp_path / "in" / "list.txt").write_text("z.png")
    (tmp_path / "in" / "unknown.heic").touch()
    inside = [Path("in/below"), Path("in/list.txt"), Path("in/unknown.heic")]  # a scan of the folder passes them over
    found = [Path("in/x.png"), Path("in/below/y.png"), Path("z.png"), Path("in/unknown.heic")]
    assert list(image_files([Path("in"), *inside])) == found
    (tmp_path / "list.TXT").write_bytes(b"\xef\xbb\xbfin/x.png\r\n")
    assert list(image_files([Path("list.TXT")])) == [Path("in/x.png")]


def test_scores_are_obeyed_or_refused(tmp_path):
    photo(tmp_path / "in" / "x.png")
    model = Finder()
    model.score_thresh = 0.9  # pyrefly: ignore[bad-argument-type]
    detect(model, CONTENT, [tmp_path / "in"], tmp_path / "out", 0.2, workers=0)
    assert model.score_thresh == 0.9
    for score in (float("nan"), -0.1, 1.5):
        with pytest.raises(UserError, match="score must be at least 0 and at most 1, got"):
            detect(model, CONTENT, [tmp_path / "in"], tmp_path / "out", score, workers=0)
    found = [0, 0]
    for i, score in enumerate((0.04, 0.001)):  # the model's own threshold is 0.05
        assert not invoke("detect", tmp_path / "in", "--output", tmp_path, "--score", score, "--workers", 0).exit_code
        scores = [box["score"] for box in json.loads((tmp_path / "detections.json").read_text())["annotations"]]
        found[i] = len(scores)
        assert all(value >= score for value in scores)
    assert found[1] > found[0]


def test_numbers_that_are_none_are_refused(tmp_path):
    train = ("train", "--json", tmp_path / "x.json", "--images", tmp_path)
    for line in (
        ("detect", tmp_path, "--score", "nan"),
        (*train, "--lr", "nan"),
        (*train, "--lr", "inf"),
        (*train, "--image-scale", "nan"),
        (*train, "--image-scale", "1e300"),
        (*train, "--seed", 2**64),
        (*train, "--batch-size", 10**20),
        (*train, "--workers", 10**6),
        ("search", "--output", tmp_path / "s", "--seed", 2**32),
        ("bench", "--batch-sizes", 10**20),
        ("evaluate", "--json", tmp_path / "x.json", "--images", tmp_path, "--max-detections", 5),
    ):
        result = invoke(*line)
        assert result.exit_code == 2, line
        assert "Invalid value" in result.stderr


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (("export", "--size", "100000000x100000000", "--output", "m.onnx"), "the memory is too small for this"),
        (("bench", "--size", 10**11), "the memory is too small for this"),
        (("bench", "--device", "meta"), "--device meta: holds no numbers"),
        (("export", "--size", "64x64", "--float32-share", 0.5), "--float32-share is of a model in eight bits"),
        (("search", "--max-gmacs", 0, "--output", "s"), "--max-gmacs must be above 0, got 0"),
        (("search", "--max-gmacs", 1, "--min-gmacs", 5, "--output", "s"), "--max-gmacs must be above 5, got 1"),
        (("search", "--max-mparams", 0, "--output", "s"), "--max-mparams must be above 0, got 0"),
        (
            ("detect", "x.jpg", "--model", "retinanet_resnet50_fpn", "--weights", "COCO_V9"),
            "with the weights COCO_V9: there are none of that name",
        ),
    ],
)
def test_what_no_machine_can_do_is_said_in_a_sentence(line, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert words in problem(*line)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", [(3000, 1), (1, 3000)])
def test_an_image_that_would_be_resized_to_nothing_is_named_and_skipped(size, tmp_path):
    settings: dict[str, Any] = {"min_size": 64, "max_size": 100}
    model = checkpoint.build("retinanet_resnet18_fpn_lite", 2, **settings)
    content = checkpoint.Checkpoint(
        "retinanet_resnet18_fpn_lite", settings, ["red", "blue"], [3, 7], model.state_dict()
    )
    checkpoint.save(content, tmp_path / "m.pt")
    json_file, images = write_shapes(tmp_path / "shapes", count=2)
    photo(images / "0.png", size=size)
    data = json.loads(json_file.read_text())
    data["images"][0] |= {"width": size[0], "height": size[1]}
    json_file.write_text(json.dumps(data))
    said = f"0.png: its {size[0]}x{size[1]} pixels would be resized to "
    result = invoke("detect", images, "--output", tmp_path / "out", "--workers", 0, "--checkpoint", tmp_path / "m.pt")
    assert result.exit_code == 0, result.output
    assert said in result.output
    assert "1 of 2 images do not fit the model" in result.output
    assert len(json.loads((tmp_path / "out" / "detections.json").read_text())["images"]) == 1
    result = invoke(
        "evaluate", "--json", json_file, "--images", images, "--workers", 0, "--checkpoint", tmp_path / "m.pt"
    )
    assert result.exit_code == 0, result.output
    assert said in result.output
    alone = problem(
        "detect", images / "0.png", "--output", tmp_path / "o", "--workers", 0, "--checkpoint", tmp_path / "m.pt"
    )
    assert "not one of the images fits the model" in alone


def test_training_goes_on_past_an_image_that_would_be_resized_to_nothing(tmp_path):
    json_file, images = write_shapes(tmp_path / "shapes", count=2)
    photo(images / "0.png", size=(3000, 1))
    data = json.loads(json_file.read_text())
    data["images"][0] |= {"width": 3000, "height": 1}
    data["annotations"] = [box for box in data["annotations"] if box["image_id"] != data["images"][0]["id"]]
    json_file.write_text(json.dumps(data))
    scale = ("--crop", 0, "--image-scale", 0.25, "--steps", 1, "--batch-size", 2, "--workers", 0)
    validation = ("--val-json", json_file, "--val-images", images)
    line = ("train", "--json", json_file, "--images", images, *validation, *scale, "--output", tmp_path / "run")
    result = invoke(*line)
    assert result.exit_code == 0, result.output
    said = " ".join(result.stderr.split())
    assert "0.png: its 3000x1 pixels would be resized to 750x0: cut it into parts; another image" in said
    assert "validation goes on without it" in said
