import csv
import importlib
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from torchvision.io import decode_image, write_png
from typer.testing import CliRunner, Result

from retina_fast import checkpoint, cli
from retina_fast.data.coco import CocoDataset
from retina_fast.predict.load import TREES
from retina_fast.train import TrainSettings
from tests.conftest import write_shapes


@pytest.fixture(scope="module", autouse=True)
def _one_thread(one_thread):
    pass


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def problem(*arguments: object) -> str:
    """The message of a command that fails, which is one sentence on stderr without a traceback."""
    result = invoke(*arguments)
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit)
    error = result.stderr.splitlines()[-1]
    assert error.startswith("error: ")
    return error


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> tuple[str | Path, ...]:
    json_file, images = write_shapes(tmp_path_factory.mktemp("cli") / "shapes", count=16)
    return ("--json", json_file, "--images", images)


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory) -> Path:
    """The run's folder of a detector of trees that has learnt red and blue rectangles."""
    output = tmp_path_factory.mktemp("cli") / "run"
    size = ("--crop", 96, "--steps", 12, "--every", 4, "--lr", 0.003, "--workers", 1)
    result = invoke("train", *data, "--output", output, "--checkpoint", TREES, *size)
    assert result.exit_code == 0, result.output
    assert "Wrote" in result.output
    return output


def test_training_lowers_the_loss(trained):
    with (trained / "log.csv").open(newline="") as lines:
        losses = [float(row["classification"]) + float(row["bbox_regression"]) for row in csv.DictReader(lines)]
    assert losses[-1] < 0.7 * losses[0]


def test_evaluate_finds_the_objects(data, trained, tmp_path):
    json_file, images = write_shapes(tmp_path / "new", count=8, seed=9)
    result = invoke("evaluate", "--json", json_file, "--images", images, "--checkpoint", trained / "model.pt")
    assert result.exit_code == 0, result.output
    (ap50,) = re.findall(r"^AP50 (\d\.\d\d)$", result.output, re.MULTILINE)
    assert float(ap50) > 0.4
    flat = " ".join(result.output.split())
    assert "over 8 images; at most 1000 detections an image count" in flat


def test_detect_writes_coco_and_pictures_and_passes_over_an_unreadable_image(data, trained, tmp_path):
    good = sorted(Path(data[3]).glob("*.png"))[:3]
    (tmp_path / "bad.png").write_text("no image")
    output = tmp_path / "out"
    output.mkdir()
    (output / "0.jpg").write_text("of an earlier run")
    inputs = [good[0], tmp_path / "bad.png", good[1], good[2], tmp_path / "missing.png"]
    result = invoke("detect", *inputs, "--output", output, "--checkpoint", trained / "model.pt", "--score", 0.25)
    assert result.exit_code == 0, result.output
    assert re.search(r"bad\.png: not a readable image", result.output)
    assert re.search(r"missing\.png: no such image file", result.output)
    assert "2 of 5 images could not be read" in result.output

    coco = json.loads((output / "detections.json").read_text())
    assert [image["file_name"] for image in coco["images"]] == [str(path) for path in good]
    assert coco["categories"] == [{"id": 3, "name": "red"}, {"id": 7, "name": "blue"}]
    assert coco["annotations"]
    assert all(0.25 <= found["score"] <= 1 for found in coco["annotations"])
    for path in good:
        picture = decode_image(str(output / f"{path.stem}.jpg"))
        assert (picture.int() - decode_image(str(path)).int()).abs().max() > 100


def test_detect_takes_a_folder(data, trained, tmp_path):
    result = invoke("detect", data[3], "--output", tmp_path, "--checkpoint", trained / "model.pt")
    assert result.exit_code == 0, result.output
    assert len(list(tmp_path.glob("*.jpg"))) == 16
    assert "16 pictures" in result.output


def test_detect_keeps_pictures_of_the_same_name_apart(trained, tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write_png(torch.zeros(3, 64, 64, dtype=torch.uint8), str(tmp_path / folder / "x.png"))
    invoke("detect", tmp_path / "a", tmp_path / "b", "--output", tmp_path, "--checkpoint", trained / "model.pt")
    assert {path.name for path in tmp_path.glob("*.jpg")} == {"x.jpg", "x_2.jpg"}


def test_evaluate_names_unreadable_and_crowded_images_and_goes_on(trained, tmp_path):
    json_file, images = write_shapes(tmp_path / "data", count=3)
    (images / "1.png").write_text("no image")
    content = json.loads(json_file.read_text())
    content["annotations"] = [content["annotations"][0] | {"id": i} for i in range(1001)]
    json_file.write_text(json.dumps(content))
    result = invoke("evaluate", "--json", json_file, "--images", images, "--checkpoint", trained / "model.pt")
    assert result.exit_code == 0, result.output
    assert "0.png: has 1001 objects, but the model gives at most 1000" in result.output
    assert "1.png: not a readable image" in result.output
    assert "1 images could not be read" in result.output


def test_training_goes_on_past_an_unreadable_image(tmp_path):
    json_file, images = write_shapes(tmp_path / "data", count=2)
    (images / "0.png").write_text("no image")
    run = ("--output", tmp_path / "run", "--steps", 1, "--batch-size", 2, "--crop", 64, "--workers", 0)
    result = invoke("train", "--json", json_file, "--images", images, *run)
    assert result.exit_code == 0, result.output
    assert "0.png: not a readable image" in " ".join(result.stderr.split())


def test_errors_say_what_to_do(data, trained, tmp_path):
    model = ("--checkpoint", trained / "model.pt")
    (tmp_path / "empty").mkdir()
    for name in ("note.txt", "note.json"):
        (tmp_path / name).write_text("a note")
    assert "holds no image" in problem("detect", tmp_path / "empty", "--output", tmp_path, *model)
    assert "not one of the images can be read" in problem("detect", tmp_path / "x.png", "--output", tmp_path, *model)
    assert "is a file" in problem("detect", data[3], "--output", tmp_path / "note.txt", *model)
    assert "no such model file" in problem("detect", data[3], "--checkpoint", tmp_path / "none.pt")
    assert "damaged" in problem("detect", data[3], "--checkpoint", tmp_path / "note.txt")
    assert "cannot be read" in problem("evaluate", "--json", tmp_path / "none.json", "--images", data[3], *model)
    assert "not a JSON file" in problem("evaluate", "--json", tmp_path / "note.json", "--images", data[3], *model)
    assert "already holds a run: add --resume" in problem("train", *data, "--output", trained)
    assert "there is no run to resume" in problem("train", *data, "--output", tmp_path / "new", "--resume")
    assert "give the folder of its images, too" in problem("train", *data, "--val-json", data[1])
    assert "--val-images belongs to --val-json" in problem("train", *data, "--val-images", data[3])
    unknown = problem("train", *data, "--output", tmp_path / "new", "--model", "yolo")
    assert "there is no model 'yolo'; choose one of" in unknown
    assert "retinanet_resnet50_fpn_v2" in unknown


def test_evaluate_refuses_a_model_of_other_classes(trained, tmp_path):
    json_file, images = write_shapes(tmp_path / "data", count=1)
    json_file.write_text(json_file.read_text().replace('"red"', '"cat"').replace('"blue"', '"dog"'))
    message = problem("evaluate", "--json", json_file, "--images", images, "--checkpoint", trained / "model.pt")
    assert "the model finds red, blue" in message
    assert "has only cat, dog" in message


def test_version_and_help():
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", invoke("--version").output)
    for command in ("train", "evaluate", "detect"):
        assert command in invoke("--help").output
        assert invoke(command, "--help").exit_code == 0


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "typer", None)
    monkeypatch.delitem(sys.modules, "retina_fast.cli")
    with pytest.raises(
        SystemExit, match=r"^retina-fast needs typer: pip install '\.\[all\]' in the folder of retina_fast's source$"
    ):
        importlib.import_module("retina_fast.cli")


@pytest.mark.slow
def test_spinenet_by_the_same_commands(data, tmp_path):
    arguments = ("--model", "retinanet_spinenet49s", "--crop", 128, "--batch-size", 2, "--steps", 2, "--workers", 0)
    result = invoke("train", *data, *arguments, "--output", tmp_path / "run", "--image-scale", 1.25)
    assert result.exit_code == 0, result.output
    picture = sorted(Path(data[3]).glob("*.png"))[0]
    file = tmp_path / "run" / "model.pt"
    result = invoke("detect", picture, "--output", tmp_path / "out", "--checkpoint", file, "--score", 0, "--workers", 0)
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "out" / "detections.json").read_text())
    content = checkpoint.load(file)
    assert (content.kwargs["min_size"], content.kwargs["image_scale"]) == (None, 1.25)


def test_a_recipe_sets_what_is_not_given(data, tmp_path, monkeypatch):
    seen = []

    def run(settings, *rest, **more):
        seen.append(settings)
        return tmp_path

    monkeypatch.setattr("retina_fast.train.train", run)
    for options in ((), ("--recipe", "spinenet-b"), ("--recipe", "spinenet-b", "--batch-size", 64, "--steps", 7)):
        assert invoke("train", *data, "--model", "retinanet_spinenet49", *options).exit_code == 0
    assert [(x.recipe, x.steps, x.batch_size, x.lr) for x in seen] == [
        ("default", 6000, 4, 2e-3),
        ("spinenet-b", 350 * 16 // 256 + 1, 256, 0.28),
        ("spinenet-b", 7, 64, 0.07),
    ]
    in_python = TrainSettings("retinanet_spinenet49", recipe="spinenet-b").resolve(CocoDataset(data[1], data[3]))
    assert seen[1] == in_python
    assert "there is no recipe 'best'; choose one of default, torchvision-v1" in problem(
        "train", *data, "--recipe", "best"
    )


@pytest.mark.slow
def test_bench_measures_everyone_on_the_same_images(data, tmp_path):
    images = sorted(Path(data[3]).glob("*.png"))[:2]
    result = invoke(
        "bench", *images, "--batch-sizes", 1, "--batch-sizes", 3, "--rounds", 1, "--output", tmp_path / "bench"
    )
    assert result.exit_code == 0, result.output
    content = json.loads((tmp_path / "bench" / "bench.json").read_text())
    assert "images of 96x96" in content["title"]
    names = [speed["name"] for speed in content["speeds"] if speed["batch"] == 3]
    assert names[0] == "torchvision"
    assert {"model", names[-1]} <= set(names)
    assert names[-1].startswith("engine, ")
    assert [speed["batch"] for speed in content["speeds"]] == [1] * len(names) + [3] * len(names)
    for speed in content["speeds"]:
        assert speed["images_per_second"] == pytest.approx(1000 * speed["batch"] / speed["ms"])
    assert "BatchNorm folded into convs: 15 of 15" in result.output
    assert decode_image(str(tmp_path / "bench" / "bench.png")).float().std() > 10


def test_bench_on_noise_with_random_weights_beside_others(tmp_path, monkeypatch):
    found = [{"scores": torch.ones(1)}]
    monkeypatch.setattr("retina_fast.deploy.bench.other_runtimes", lambda *_: {"another": lambda images: found})
    options = "--size", 64, "--batch-sizes", 1, "--rounds", 1, "--output", tmp_path, "--device", "cpu", "--others"
    result = invoke("bench", "--model", "retinanet_resnet18_fpn_lite", "--classes", 7, *options)
    assert result.exit_code == 0, result.output
    assert "retinanet_resnet18_fpn_lite, 7 classes, images of 64x64" in " ".join(result.output.split())
    names = [speed["name"] for speed in json.loads((tmp_path / "bench.json").read_text())["speeds"]]
    assert names[-1] == "another"
    assert "engine, float32" in names


def test_bench_says_what_is_wrong(tmp_path, data):
    assert "exclude each other" in problem("bench", "--model", "retinanet_resnet18_fpn", "--checkpoint", "model.pt")
    assert "there is no model 'yolo'" in problem("bench", "--model", "yolo")
    assert "--device abacus" in problem("bench", "--device", "abacus")
    assert "--classes 7" in problem("bench", "--classes", 7)
    (tmp_path / "file").touch()
    assert "is a file" in problem("bench", *sorted(Path(data[3]).glob("*.png"))[:1], "--output", tmp_path / "file")
