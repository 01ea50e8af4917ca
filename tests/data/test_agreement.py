"""check, the loader of train and evaluate give one answer to any data; and what they say beside it."""

import json
import random
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from retina_fast import cli
from retina_fast.data.check import warn_of_other_classes
from retina_fast.data.coco import CocoDataset
from retina_fast.data.errors import ImageError, UserError
from retina_fast.data.metrics import coco_metrics
from tests.data import fuzz
from tests.data.fuzz import SIZE, sound_coco, write_pictures
from tests.data.three import Answer, agreed


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("agreement") / "img"
    write_pictures(folder, 3)
    return folder


def write(content: Any, folder: Path) -> Path:
    (folder / "data.json").write_text(json.dumps(content))
    return folder / "data.json"


SCALARS: st.SearchStrategy = (
    st.none() | st.booleans() | st.integers() | st.integers(-3, 9) | st.floats() | st.text(max_size=3)
    | st.integers(-3, 9).map(str) | st.sampled_from(["", "nan", "1e3", "true", "Tree", "p0.png", "\ud800"])
)  # fmt: skip
VALUES: st.SearchStrategy = (
    SCALARS | st.lists(SCALARS, min_size=4, max_size=4) | st.lists(SCALARS, max_size=3) | st.just({})
)
FIELDS = {
    "images": ["id", "file_name", "width", "height"],
    "annotations": ["id", "image_id", "category_id", "bbox", "area", "iscrowd"],
    "categories": ["id", "name"],
}
CHANGES = st.sampled_from(list(FIELDS)).flatmap(
    lambda key: st.tuples(st.just(key), st.integers(0, 5), st.sampled_from(FIELDS[key]), VALUES)
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(CHANGES, min_size=1, max_size=3), renamed=st.sampled_from([None, str, "id {}".format, float]))
def test_one_answer_to_any_values(images, tmp_path, changes, renamed):
    content: dict[str, list] = sound_coco()
    if renamed:
        for key, name in (("images", "id"), ("annotations", "image_id"), ("annotations", "id")):
            for entry in content[key]:
                entry[name] = renamed(entry[name])
    for key, index, field, value in changes:
        content[key][index % len(content[key])][field] = value
    agreed(write(content, tmp_path), images)


@pytest.mark.parametrize("seed", range(25))
def test_one_answer_to_random_damage(seed):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fuzz.run(seed)


def test_the_fuzzer_says_what_differs(monkeypatch):
    """It must be able to fail: here evaluate alone would take every file."""
    monkeypatch.setattr("tests.data.three.by_evaluate", lambda *_: (Answer("", 0, 6), float("nan")))
    with pytest.raises(AssertionError):
        [fuzz.run(seed) for seed in range(10)]


@pytest.mark.slow
def test_the_fuzzer_runs_from_the_command_line():
    done = subprocess.run([sys.executable, "-m", "tests.data.fuzz", "0", "2"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "failed" not in done.stdout


def test_no_id_changes_a_figure():
    """With a detector that is not perfect: among equal scores, the order of the images decides, not that of the ids."""
    r = random.Random(0)
    content = sound_coco()
    found = [
        {"image_id": a["image_id"], "category_id": a["category_id"], "score": r.choice([0.5, 0.7]),
         "bbox": [x + r.choice([0, 0, 1, 12]) for x in a["bbox"]]}
        for a in content["annotations"] * 3
    ]  # fmt: skip
    image_ids = [image["id"] for image in content["images"]]
    expected = coco_metrics(content, found, image_ids, 100)
    assert 0.1 < expected.values["AP"] < 0.9
    for image, category, box in (
        (lambda i: i - 1, lambda i: i - 1, lambda i: i - 1),
        (lambda i: -i, lambda i: 10**20 + i, lambda i: 0),
        ("{}.jpg".format, "class {}".format, lambda i: None),
        (lambda i: "x" if i == 2 else 9 - i, lambda i: i + 7, "uuid-{}".format),
    ):
        other = {key: [dict(entry) for entry in entries] for key, entries in content.items()}
        for entry in other["images"]:
            entry["id"] = image(entry["id"])
        for entry in other["categories"]:
            entry["id"] = category(entry["id"])
        for entry in other["annotations"]:
            entry |= {"image_id": image(entry["image_id"]), "category_id": category(entry["category_id"])}
            entry["id"] = box(entry["id"])
        results = [x | {"image_id": image(x["image_id"]), "category_id": category(x["category_id"])} for x in found]
        same = coco_metrics(other, results, [image(i) for i in image_ids], 100)
        assert str(same) == str(expected)  # NaN is not equal to itself


def test_category_ids_that_are_no_numbers_are_numbered_in_the_order_of_the_file(images, tmp_path):
    content = sound_coco()
    for entry in content["categories"]:
        entry["id"] = {1: "b", 2: "a"}[entry["id"]]
    for entry in content["annotations"]:
        entry["category_id"] = {1: "b", 2: "a"}[entry["category_id"]]
    data = CocoDataset(write(content, tmp_path), images)
    assert (data.classes, data.category_ids) == (["Tree", "Bush"], [1, 2])
    assert data[0][1]["labels"].tolist() == [0, 1]


@pytest.mark.parametrize(
    ("key", "field", "value", "message"),
    [
        (
            "images",
            "id",
            [1],
            r"an entry of 'images' has the id \[1\], where a number or a word is expected: {.*p0.png",
        ),
        ("images", "file_name", None, "an entry of 'images' has the file_name None, where the name of a file is"),
        ("images", "width", "wide", "image 1 has the width 'wide', where a whole number of pixels is expected"),
        ("categories", "name", None, "an entry of 'categories' has the name None, where the name of a class is"),
        ("categories", "name", "Bush", "categories have the name 'Bush' more than once"),
        ("annotations", "iscrowd", "maybe", "annotation 1 has the iscrowd 'maybe', where 0 or 1 is expected"),
        ("annotations", "image_id", "x", "annotation 1 belongs to image x, which the file does not list"),
        ("annotations", "bbox", ["1", "b", 3, 4], r"annotation 1 has bbox \['1', 'b', 3, 4\]; four numbers"),
    ],
)
def test_what_is_refused_is_named_with_its_value(images, tmp_path, key, field, value, message):
    content = sound_coco()
    content[key][0][field] = value
    with pytest.raises(UserError, match=rf"data\.json: {message}"):
        CocoDataset(write(content, tmp_path), images)


def test_an_annotation_without_an_id_is_named_by_its_place(images, tmp_path):
    content: dict = sound_coco()
    del content["annotations"][2]["id"]
    content["annotations"][2]["category_id"] = 9
    with pytest.raises(UserError, match="annotation number 3 of the list has category 9"):
        CocoDataset(write(content, tmp_path), images)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", [1, 3, 5, 6, 7, 8])
def test_a_size_from_before_turning_is_explained(suffix, orientation, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content: dict = sound_coco(1)
    content["images"][0]["file_name"] = f"p.{suffix}"
    Image.new("RGB", SIZE).save(tmp_path / f"p.{suffix}", exif=exif)
    data = CocoDataset(write(content, tmp_path), tmp_path)
    if orientation < 5:
        assert data[0][0].shape == (3, 48, 64)
        return
    with pytest.raises(ImageError, match=r"is 48x64 once its EXIF orientation has turned it .* before turning, 64x48"):
        data[0]
    content["images"][0] |= {"width": 48, "height": 64}
    assert CocoDataset(write(content, tmp_path), tmp_path)[0][0].shape == (3, 64, 48)
    del content["images"][0]["width"]
    unsized = CocoDataset(write(content, tmp_path), tmp_path)
    assert (unsized.sizes, unsized[0][0].shape) == ({1: (64, 48)}, (3, 64, 48))


def test_another_size_without_an_orientation_is_not_put_down_to_exif(images, tmp_path):
    content: dict = sound_coco()
    content["images"][0] |= {"width": 48, "height": 64}
    with pytest.raises(ImageError, match=r"p0\.png: is 64x48, but .*data\.json says 48x64$"):
        CocoDataset(write(content, tmp_path), images)[0]


def test_classes_that_model_and_data_do_not_share_are_named(images, tmp_path):
    data = CocoDataset(write(sound_coco(), tmp_path), images)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_other_classes(["__background__", "Tree", "N/A", "bush", "Car"], data)
    said = [str(warning.message) for warning in caught]
    assert "does not find" in said[0]
    assert said[0].endswith("count as missed: Bush (3 boxes)")
    assert said[1].endswith("do not count: bush, Car")
    assert said[2] == "the model's 'bush' and the data's 'Bush' are probably one class"
    assert len(said) == 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_other_classes(["Bush", "Tree"], data)


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def test_the_commands_say_so(images, tmp_path):
    """The detector of trees on data with a class more, whose ids are words and whose sizes are unknown."""
    content: dict = sound_coco()
    for image in content["images"]:
        image |= {"id": f"img_{image['id']}", "width": None, "height": -1}
    for box in content["annotations"]:
        box |= {"image_id": f"img_{box['image_id']}", "id": f"uuid-{box['id']}", "iscrowd": "0"}
    file = write(content, tmp_path)
    checked = invoke("check", file, "--images", images, "--workers", 0)
    assert checked.exit_code == 0, checked.output
    assert "3 images, 6 boxes, 0 faults" in checked.output
    evaluated = invoke("evaluate", "--json", file, "--images", images, "--workers", 0)
    assert evaluated.exit_code == 0, evaluated.output
    assert "count as missed: Bush (3 boxes)" in " ".join(evaluated.stderr.split())


def test_training_takes_what_check_takes(one_thread, images, tmp_path):
    content: dict = sound_coco()
    for image in content["images"]:
        image |= {"id": f"img_{image['id']}", "width": str(image["width"])}
    for box in content["annotations"]:
        box |= {"image_id": f"img_{box['image_id']}", "category_id": float(box["category_id"]), "iscrowd": "0"}
        del box["id"]
    data = ("--json", write(content, tmp_path), "--images", images)
    run = ("--output", tmp_path / "run", "--steps", 1, "--batch-size", 2, "--crop", 0, "--workers", 0)
    trained = invoke("train", *data, "--val-json", data[1], "--val-images", images, *run)
    assert trained.exit_code == 0, trained.output
    assert torch.load(tmp_path / "run" / "model.pt", weights_only=True)["category_ids"] == [1, 2]
    content["annotations"][0]["iscrowd"] = "some"
    write(content, tmp_path)
    for command in (("check", data[1], "--images", images), ("evaluate", *data), ("train", *data, *run)):
        refused = invoke(*command, *(() if command[0] == "train" else ("--workers", 0)))
        assert refused.exit_code == 1
        assert "annotation number 1 of the list" in refused.output
        assert "has the iscrowd 'some', where 0 or 1 is expected" in refused.output


def test_check_says_what_follows_from_a_fault(images, tmp_path):
    content: dict = sound_coco()
    content["annotations"][0] |= {"bbox": [900, 900, 9, 9]}
    content["annotations"][1] |= {"bbox": [50, 10, 30, 20]}
    content["annotations"][2] |= {"category_id": 9}
    words = invoke("check", write(content, tmp_path), "--images", images, "--workers", 0).output
    assert "1 x box outside its image: left out" in words
    assert "1 x box that reaches out of its image: kept" in words
    assert "1 x wrong label: training and evaluation refuse the file" in words
