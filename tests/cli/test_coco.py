"""The commands of docs/coco.md on a miniature of COCO with its folders and category ids, and with other weights."""

import functools
import json
import math
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from torchvision.io import write_jpeg
from torchvision.models import ResNet50_Weights, resnet50
from torchvision.models._api import WeightsEnum
from torchvision.models.detection import RetinaNet_ResNet50_FPN_Weights
from typer.testing import CliRunner, Result

from retina_fast import checkpoint, cli
from retina_fast.builders import MODELS
from retina_fast.predict.load import load_published
from retina_fast.train.recipes import RECIPES
from tests.conftest import imagenet

# Of COCO's 80 categories in 1 to 90, some from either side of each gap.
COCO = {
    **{1: "person", 11: "fire hydrant", 13: "stop sign", 17: "cat", 25: "giraffe", 27: "backpack", 44: "bottle"},
    **{65: "bed", 67: "dining table", 70: "toilet", 72: "tv", 82: "refrigerator", 84: "book", 90: "toothbrush"},
}
CAT = 17
IMAGENET_STEM = 0.25
MODEL = ("--model", "retinanet_resnet50_fpn", "--weights", "COCO_V1")


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    pass


@pytest.fixture
def published(monkeypatch):
    """Weights in place of the published ones, which detect a cat of the anchor's size at every anchor.

    And pictures resized to 96 px instead of 800, which is 70 times less to compute.
    """

    def weights(self, *args, **kwargs):
        if isinstance(self, ResNet50_Weights):
            return imagenet(resnet50) | {"conv1.weight": torch.full((64, 3, 7, 7), IMAGENET_STEM)}
        name = self.url.rpartition("/")[2].partition("_coco")[0]
        state = MODELS[name](weights=None, weights_backbone=None).state_dict()
        for key, value in state.items():
            if "cls_logits" in key or "bbox_reg" in key:
                value.zero_()
        state["head.classification_head.cls_logits.bias"].view(9, 91).fill_(-9)[:, CAT] = 2
        return state

    monkeypatch.setattr(WeightsEnum, "get_state_dict", weights)
    for name in ("retinanet_resnet50_fpn", "retinanet_resnet50_fpn_v2"):
        monkeypatch.setitem(MODELS, name, functools.partial(MODELS[name], min_size=96, max_size=160))
    small = replace(RECIPES["torchvision-v2"], kwargs={"min_size": [64, 80, 96]})
    monkeypatch.setitem(RECIPES, "torchvision-v2", small)


@pytest.fixture
def coco(tmp_path) -> Path:
    """Two pictures in COCO's layout, whose true boxes are where the weights of `published` detect cats."""
    (tmp_path / "val2017").mkdir()
    (tmp_path / "annotations").mkdir()
    images: list[dict] = []
    annotations: list[dict] = []
    model, _ = load_published("retinanet_resnet50_fpn", "COCO_V1")
    for image_id, (height, width) in ((139, (43, 64)), (285, (64, 59))):
        name = f"{image_id:012}.jpg"
        picture = torch.full((3, height, width), 90, dtype=torch.uint8)
        write_jpeg(picture, str(tmp_path / "val2017" / name))
        images.append({"id": image_id, "file_name": name, "height": height, "width": width})
        with torch.inference_mode():
            (found,) = model([picture / 255])
        for x1, y1, x2, y2 in found["boxes"].tolist():
            box = {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1), "iscrowd": 0}
            mask = {"segmentation": [[x1, y1, x2, y1, x2, y2]]}
            annotations.append(box | mask | {"id": 900 + len(annotations), "image_id": image_id, "category_id": CAT})
    categories = [{"id": number, "name": name, "supercategory": "thing"} for number, name in COCO.items()]
    content = {"info": {}, "licenses": [], "images": images, "annotations": annotations, "categories": categories}
    for split in ("val2017", "train2017"):
        (tmp_path / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    shutil.copytree(tmp_path / "val2017", tmp_path / "train2017")
    return tmp_path


def test_labels_are_cocos_category_ids():
    categories = RetinaNet_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    assert {number: categories[number] for number in COCO} == COCO
    assert len([name for name in categories if name not in ("__background__", "N/A")]) == 80


@pytest.mark.slow
def test_evaluate_and_detect_with_published_weights(published, coco, tmp_path):
    data = ("--json", coco / "annotations" / "instances_val2017.json", "--images", coco / "val2017")
    objects = len(json.loads(data[1].read_text())["annotations"])

    result = invoke("evaluate", *data, *MODEL, "--workers", 0)
    assert result.exit_code == 0, result.output
    assert re.search(r"^ *AP +1\.000", result.output, re.MULTILINE)

    few = max(10, objects // 8)  # of about equally many boxes in both images, a quarter
    result = invoke("evaluate", *data, *MODEL, "--max-detections", few, "--workers", 0)
    (recall,) = re.findall(r"^ *AR +(\d\.\d+)", result.output, re.MULTILINE)
    assert float(recall) == pytest.approx(2 * few / objects, abs=0.002)
    assert f"at most {few} detections an image count" in " ".join(result.output.split())

    result = invoke("detect", coco / "val2017", *MODEL, "--output", tmp_path / "out", "--workers", 0)
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert {box["category_id"] for box in found["annotations"]} == {CAT}
    assert found["categories"][CAT] == {"id": CAT, "name": "cat"}


def test_both_published_models_load(published):
    for name in ("retinanet_resnet50_fpn", "retinanet_resnet50_fpn_v2"):
        model, content = load_published(name, "COCO_V1")
        assert not model.training
        assert model.classes == content.classes
        assert content.classes[CAT] == "cat"
        assert content.category_ids[CAT] == CAT
        assert math.isclose(model.head.classification_head.cls_logits.bias[CAT].item(), 2)


COMMANDS = {"v1": ["evaluate", "train", "evaluate"], "v2": ["evaluate", "check", "train", "evaluate"]}


@pytest.mark.slow
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_the_commands_of_the_page(version, published, coco, monkeypatch):
    """They run in their order, on the miniature and without torchrun, for two steps of two images."""
    page = (Path(__file__).parents[2] / "docs" / "coco.md").read_text()
    blocks = re.findall(r"```sh\n(.*?)```", page, re.DOTALL)
    lines = list(filter(None, "".join(blocks).replace("\\\n", " ").splitlines()))
    of_version = [line for line in lines if ("v2" in line) == (version == "v2")]
    assert len(lines) == sum(map(len, COMMANDS.values()))
    small = ("--steps", "2", "--batch-size", "2")
    commands = []
    (coco / "coco").symlink_to(coco)
    monkeypatch.chdir(coco)
    for line in of_version:
        program = "torchrun --nproc-per-node 8 -m retina_fast.cli " if "torchrun" in line else "retina-fast "
        assert line.startswith(program)
        arguments = shlex.split(line.removeprefix(program))
        result = invoke(*arguments, "--workers", 0, *(small if arguments[0] == "train" else ()))
        assert result.exit_code == 0, result.output
        commands.append((arguments[0], result.output))
    assert [command for command, _ in commands] == COMMANDS[version]
    assert all("AP50" in output for command, output in commands if command == "evaluate")
    assert all("0 faults" in output for command, output in commands if command == "check")
    trained = checkpoint.load(f"runs/coco-{version}/model.pt")
    assert (trained.classes, trained.category_ids) == (list(COCO.values()), list(COCO))
    assert trained.kwargs["weights_backbone"] == f"IMAGENET1K_{version.upper()}"
    assert (trained.state_dict["backbone.body.conv1.weight"] == IMAGENET_STEM).all()  # frozen


def test_errors(monkeypatch, shapes):
    def evaluate(*arguments: object) -> str:
        return invoke("evaluate", "--json", shapes[0], "--images", shapes[1], *arguments).stderr

    def unreachable(*args, **kwargs):
        raise URLError("no network")

    monkeypatch.setattr(WeightsEnum, "get_state_dict", unreachable)
    assert "could not be downloaded (no network): put the file into" in evaluate(*MODEL)
    assert "belong together" in evaluate("--model", "retinanet_resnet50_fpn")
    assert "belong together" in evaluate(*MODEL, "--checkpoint", "model.pt")
    assert "there is no model 'yolo'" in evaluate("--model", "yolo", "--weights", "COCO_V1")
    assert "there are no COCO weights" in evaluate("--model", "retinanet_resnet18_fpn", "--weights", "COCO_V1")
    assert "COCO_V9" in evaluate("--model", "retinanet_resnet50_fpn", "--weights", "COCO_V9")
