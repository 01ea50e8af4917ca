"""`retina-fast check`: every planted fault is found, and nothing else is reported."""

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision.io import write_png
from typer.testing import CliRunner, Result

from retina_fast import cli
from retina_fast.anchors import batch_anchors
from retina_fast.checkpoint import build
from retina_fast.data.anchor_fit import AnchorFit, proposed_anchors
from retina_fast.data.check import warn_of_faults
from retina_fast.data.coco import CocoDataset
from retina_fast.data.faults import twins
from retina_fast.kernels.pair_iou import pairwise_iou
from tests.conftest import write_shapes
from tests.data.test_voc import write_voc


@pytest.fixture(scope="module", autouse=True)
def _one_thread(one_thread):
    pass


def check(*arguments: object) -> Result:
    result = CliRunner().invoke(cli.app, ["check", *map(str, arguments), "--workers", "0"])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def faults(result: Result, source: object) -> list[str]:
    """The lines that name a fault, without the name of the annotation file."""
    lines = result.output.splitlines()
    return [line.removeprefix(f"{source}: ") for line in lines if line.startswith(str(Path(str(source)).parent))]


def annotation(number: int, image_id: int, box: list[float], **changes: object) -> dict:
    return {"id": number, "image_id": image_id, "category_id": 3, "bbox": box, "iscrowd": 0} | changes


# Each one beside the twelve good boxes of the shapes; what is reported of it, and nothing else.
PLANTED = [
    (annotation(101, 0, [5, 5, 0, 8]), r"annotation 101 \(0.png\) has bbox \[5, 5, 0, 8\], which has no extent"),
    (annotation(102, 0, [5, 5, 8, -3]), r"annotation 102 \(0.png\) has bbox .* no extent"),
    (annotation(103, 0, [5, 5, float("nan"), 3]), r"annotation 103 \(0.png\) has bbox .* no extent"),
    (annotation(104, 0, [90, 5, 1e-9, 3]), r"annotation 104 \(0.png\) has bbox .* no extent"),  # in float32
    (annotation(105, 1, [80, 5, 20, 9]), r"annotation 105 \(1.png\) with bbox .* reaches out of its image of 96x96"),
    (annotation(106, 1, [-4, 5, 20, 9]), r"annotation 106 \(1.png\) .* reaches out"),
    (annotation(107, 1, [96, 5, 20, 9]), r"annotation 107 \(1.png\) .* lies outside its image of 96x96"),
    (annotation(108, 2, [1, 1, 9, 9], category_id=4), r"annotation 108 \(2.png\) has category 4, which the file does"),
    (annotation(109, 77, [1, 1, 9, 9]), r"annotation 109 belongs to image 77, which the file does not list"),
    (annotation(110, 2, [1, 1, 9]), r"annotation 110 \(2.png\) has bbox \[1, 1, 9\]; four numbers"),
    ({"id": 111, "image_id": 2, "category_id": 3}, r"annotation 111 \(2.png\) has bbox None; four numbers"),
]


def planted(folder: Path, extra: list[dict]) -> tuple[Path, Path]:
    json_file, images = write_shapes(folder, count=4)
    content = json.loads(json_file.read_text())
    content["annotations"] += extra
    json_file.write_text(json.dumps(content))
    return json_file, images


def test_a_sound_data_set_has_no_fault(shapes):
    result = check(shapes[0], "--images", shapes[1])
    assert result.exit_code == 0
    assert faults(result, shapes[0]) == []
    assert "6 images, 12 boxes, 0 faults" in result.output
    assert re.search(r"16 to 32 +(\d+) +0\.\d\d", result.output)


@pytest.mark.parametrize(("planted_one", "message"), PLANTED, ids=[str(one["id"]) for one, _ in PLANTED])
def test_a_planted_box_is_named_and_nothing_else(planted_one, message, tmp_path):
    json_file, images = planted(tmp_path, [planted_one])
    result = check(json_file, "--images", images)
    assert result.exit_code == 1
    (found,) = faults(result, json_file)
    assert re.match(message, found)
    assert "1 faults" in result.output


def test_all_of_them_together(tmp_path):
    """The planted boxes with duplicates, a box far outside, bad images, repeated ids and names, and similar names."""
    json_file, images = planted(tmp_path, [one for one, _ in PLANTED])
    content = json.loads(json_file.read_text())
    first = content["annotations"][0]
    content["annotations"] += [
        first | {"id": 201},
        first | {"id": 202, "bbox": [first["bbox"][0] + 0.4, *first["bbox"][1:]]},
        first | {"id": 203, "category_id": 10 - first["category_id"]},
        annotation(204, 3, [5000, 5000, 20, 20]),
        annotation(205, 3, [10, 10, 200, 200], iscrowd=1),
        annotation(101, 3, [3, 3, 60, 60]),
    ]
    content["images"] += [
        {"id": 50, "file_name": "missing.png"},
        {"id": 51, "file_name": "damaged.png", "width": 96, "height": 96},
        {"id": 52, "file_name": "other.png", "width": 30, "height": 20},
        {"id": 53, "file_name": "0.png", "width": 96, "height": 96},
        {"id": 3, "file_name": "sizeless.png"},
        {"id": 54, "file_name": "sizeless.png"},
        {"file_name": "no id.png"},
    ]
    content["categories"] += [{"id": 8, "name": "red"}, {"id": 9, "name": "Red "}]
    content["annotations"].append(annotation(206, 54, [30, 10, 20, 5]))
    json_file.write_text(json.dumps(content))
    (images / "damaged.png").write_bytes((images / "0.png").read_bytes()[:300])
    write_png(torch.zeros(3, 30, 20, dtype=torch.uint8), str(images / "other.png"))
    write_png(torch.zeros(3, 30, 40, dtype=torch.uint8), str(images / "sizeless.png"))

    expected = [message for _, message in PLANTED] + [
        r"annotation 201 \(0.png\) with bbox .* is the same box as .*: annotation 1$",
        r"annotation 202 \(0.png\) .* is the same box as .*: annotation 1$",
        r"annotation 203 \(0.png\) .* is the same box as .*: annotation 1, of another class$",
        r"annotation 204 \(.*\) .* lies outside its image",
        r"annotation 204 \(.*\) .* touches no anchor",
        r"annotation 205 \(.*\) .* reaches out of its image",
        r"annotation 206 \(sizeless.png\) .* reaches out of its image of 40x30",
        r"annotations have the id 101 more than once",
        r"an entry of 'images' has no 'id': .*no id.png",
        r"images have the id 3 more than once",
        r"images have the file name '0.png' more than once",
        r"images have the file name 'sizeless.png' more than once",
        r"categories have the name 'red' more than once",
        r"class 'Red ' is spelled almost as 'red'",
        rf"{images / 'missing.png'}: no such image file",
        rf"{images / 'damaged.png'}: not a readable image \(",
        rf"{images / 'other.png'}: is 20x30, but .* says 30x20",
    ]
    result = check(json_file, "--images", images, "--plot", tmp_path / "boxes.png")
    assert result.exit_code == 1
    found = faults(result, json_file)
    for message in expected:
        assert sum(bool(re.match(message, line)) for line in found) == 1, (message, found)
    assert len(found) == len(expected), [line for line in found if not any(re.match(m, line) for m in expected)]
    assert f"{len(expected)} faults" in result.output
    assert (tmp_path / "boxes.png").read_bytes().startswith(b"\x89PNG")


def test_faults_of_pascal_voc_files(tmp_path):
    objects: dict[str, list] = {
        "good": [("cat", (1, 1, 40, 40))],
        "bad": [("cat", (60, 10, 20, 30)), ("Cat", (1, 1, 30, 30)), ("cat", (1, 1, 90, 30)), ("cat", (1, 1, "x", 30))],
    }
    folder = write_voc(tmp_path / "voc", objects)
    (folder / "Annotations" / "broken.xml").write_text("<annotation>")
    (folder / "JPEGImages" / "good.png").unlink()
    result = check(folder)
    assert result.exit_code == 1
    bad = folder / "Annotations" / "bad.xml"
    found = [line for line in result.output.splitlines() if line.startswith(str(folder))]
    expected = [
        rf"{folder}: class 'cat' is spelled almost as 'Cat'",
        rf"{folder / 'Annotations' / 'broken.xml'}: not an XML file",
        rf"{bad}: object 1 \(bad.png\) has bbox .* no extent",
        rf"{bad}: object 3 \(bad.png\) .* reaches out of its image of 64x48",
        rf"{bad}: object 4 has no numbers as xmin, ymin, xmax, ymax",
        rf"{folder / 'JPEGImages' / 'good.jpg'}: no such image file",
    ]
    for message in expected:
        assert sum(bool(re.match(message, line)) for line in found) == 1, (message, found)
    assert len(found) == len(expected), [line for line in found if not any(re.match(m, line) for m in expected)]


def test_workers_find_the_same(tmp_path):
    json_file, images = planted(tmp_path, [one for one, _ in PLANTED])
    (images / "1.png").write_text("no image")
    alone = CliRunner().invoke(cli.app, ["check", str(json_file), "--images", str(images), "--workers", "0"])
    several = CliRunner().invoke(cli.app, ["check", str(json_file), "--images", str(images), "--workers", "2"])
    assert faults(alone, json_file) == faults(several, json_file)
    assert len(faults(alone, json_file)) == len(PLANTED) + 1


def test_errors(tmp_path, shapes):
    assert "give the folder of its images, too" in check(shapes[0]).stderr
    assert "there is no model 'yolo'" in check(shapes[0], "--images", shapes[1], "--model", "yolo").stderr
    (tmp_path / "empty").mkdir()
    assert "holds no .xml file" in check(tmp_path / "empty").stderr


def test_training_data_leaves_out_what_lies_outside(tmp_path):
    """torchvision's rule would make every anchor foreground for a box that touches none."""
    json_file, images = planted(tmp_path, [annotation(107, 1, [96, 5, 20, 9]), annotation(105, 1, [80, 5, 20, 9])])
    with pytest.warns(
        UserWarning, match="1 boxes without an extent or outside their image are left out: annotation 107"
    ):
        dataset = CocoDataset(json_file, images)
    assert dataset[1][1]["boxes"].tolist()[2:] == [[80, 5, 100, 14]]


def test_twins_are_those_of_all_pairs():
    """The boxes lie on a coarse grid, so that many are the same, near each other, or in rows."""
    rng = random.Random(0)
    boxes = [
        annotation(
            i, rng.randrange(5), [rng.randrange(3) + rng.random() / 2, rng.randrange(3), 9, 9], iscrowd=i % 19 == 0
        )
        for i in range(200)
    ]
    expected: dict[int, int] = {}
    for i, later in enumerate(boxes):
        for earlier in boxes[:i]:
            pair = later["bbox"], earlier["bbox"]
            same = later["image_id"] == earlier["image_id"] and not later["iscrowd"] and not earlier["iscrowd"]
            if same and max(abs(a - b) for a, b in zip(*pair, strict=True)) <= 0.5:
                expected.setdefault(later["id"], earlier["id"])
    found = {later["id"]: earlier["id"] for _, later, earlier in twins(boxes)}
    assert found == expected
    assert 100 < len(found) < 190


def test_training_begins_with_a_word_about_faults(tmp_path):
    json_file, images = planted(tmp_path, [annotation(105, 1, [80, 5, 20, 9]), annotation(106, 1, [80, 5, 20, 9])])
    run = ("--output", tmp_path / "run", "--steps", "1", "--batch-size", "1", "--crop", "64", "--workers", "0")
    arguments = ("train", "--json", json_file, "--images", images, *run)
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    words = "2 x box that reaches out of its image, 1 x duplicate box: `retina-fast check` names them"
    assert words in " ".join(result.stderr.split())


@pytest.mark.parametrize("crowds", [False, True])
def test_data_without_a_box_to_find_are_warned_of(tmp_path, crowds):
    json_file, images = write_shapes(tmp_path / "shapes", count=1)
    content = json.loads(json_file.read_text())
    content["annotations"] = [box | {"iscrowd": 1} for box in content["annotations"] if crowds]
    json_file.write_text(json.dumps(content))
    with pytest.warns(UserWarning, match="not one box, but for crowds: there is nothing to find"):
        warn_of_faults(CocoDataset(json_file, images))


@pytest.mark.parametrize(
    ("model", "size"),
    [
        ("retinanet_resnet18_fpn_lite", (96, 96)),
        ("retinanet_resnet18_fpn_lite", (333, 500)),
        ("retinanet_resnet18_fpn", (90, 31)),  # padded, with strides that are no powers of 2
    ],
)
def test_best_ious_are_those_of_all_anchors(model, size):
    network: Any = build(model, 1).eval()
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(200, 2, generator=generator) * torch.tensor(size).flip(0) * 1.4 - 20
    boxes = torch.cat((corner, corner + torch.exp(torch.rand(200, 2, generator=generator) * 6)), dim=1)
    boxes[0] = torch.tensor([9000.0, 0, 9010, 10])
    with torch.inference_mode():
        batch, _ = network.transform([torch.zeros(3, *size)])
        features = list(network.backbone(batch.tensors).values())
        anchors = batch_anchors(network.anchor_generator, batch.tensors, batch.image_sizes, features)
    fit = AnchorFit(network)
    expected = pairwise_iou(fit.resized(boxes, size), anchors).amax(dim=1)
    found = fit.best_ious(boxes, size)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    assert torch.equal(found == 0, expected == 0)
    assert found[0] == 0


@pytest.mark.parametrize("ratio", [0.5, 1.0, 2.0])
def test_proposed_anchors_are_those_that_the_boxes_were_made_of(ratio):
    generator = torch.Generator().manual_seed(0)
    side = torch.tensor([24.0, 48, 96, 192])[torch.randint(0, 4, (300,), generator=generator)]
    shapes = torch.stack((side / ratio**0.5, side * ratio**0.5), dim=1)
    shapes = shapes * (1 + 0.1 * torch.rand(300, 2, generator=generator) - 0.05)
    proposed = proposed_anchors(shapes, [4, 8, 16, 32])
    assert proposed["ratios"] == [ratio]
    for (size,), fitting in zip(proposed["sizes"], (24, 48, 96, 192), strict=True):
        assert abs(size - fitting) <= 0.1 * fitting


def test_proposed_anchors_of_a_model():
    """The IoU that check prints is that of the anchors that a model makes of the proposal."""
    network = build("retinanet_resnet18_fpn_lite", 1)
    fit = AnchorFit(network)
    boxes = torch.tensor([[10.0, 10, 42, 46], [60, 20, 90, 52], [5, 50, 80, 120]])
    proposed = proposed_anchors(boxes[:, 2:] - boxes[:, :2], fit.strides((128, 128)))
    made: Any = build("retinanet_resnet18_fpn_lite", 1, anchors=proposed)
    assert made.anchor_generator.num_anchors_per_location() == [1] * 4
    grids = [torch.zeros(1, 1, 128 // stride, 128 // stride) for stride in (4, 8, 16, 32)]
    anchors = batch_anchors(made.anchor_generator, torch.zeros(1, 3, 128, 128), [(128, 128)], grids)
    expected = pairwise_iou(boxes, anchors).amax(dim=1)
    torch.testing.assert_close(fit.with_anchors(proposed).best_ious(boxes, (128, 128)), expected)
    assert fit.generator is network.anchor_generator
