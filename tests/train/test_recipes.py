"""The published recipes: their hyper-parameters, and short runs by them."""

import csv
from dataclasses import replace

import pytest
import torch
from torchvision import tv_tensors

from retina_fast import checkpoint
from retina_fast.data.augment import Flips, scale_jitter
from retina_fast.data.coco import CocoDataset
from retina_fast.data.errors import UserError
from retina_fast.data.processes import ALONE
from retina_fast.losses import AtssMatcher, TaskAlignedMatcher
from retina_fast.train import TrainSettings, train
from retina_fast.train.detector import Detector
from retina_fast.train.recipes import RECIPES, recipe_named
from retina_fast.train.start import starting_network

NAMES = ["spinenet-b", "spinenet-c", "spinenet-c-143", "spinenet-c-190"]
TINY = [[3, "residual", [0, 1], True], *([level, "residual", [level - 3, level - 2], True] for level in range(4, 8))]


@pytest.fixture(scope="module", autouse=True)
def _one_thread(one_thread):
    pass


@pytest.fixture
def data(shapes) -> CocoDataset:
    return CocoDataset(*shapes)


def test_another_batch_sees_as_many_images():
    recipe = recipe_named("spinenet-b")
    assert recipe.lr_at(64) == pytest.approx(0.07)
    total = recipe.steps_for(118_287, 64)
    assert total == pytest.approx(4 * 162_050, rel=0.003)  # 463 steps of 256 are 118,528 images
    assert (
        recipe.schedule(7900, total=total) < 1 == recipe.schedule(8000, total=total)
    )  # as the ports to PyTorch have it
    default = recipe_named("default")
    assert (default.lr_at(4), default.lr_at(64), default.steps_for(118_287, 64)) == (2e-3, 8e-3, 6000)


def test_decay_clipping_crops_and_models():
    for name in NAMES:
        recipe = recipe_named(name)
        (optimizer,) = [recipe.optimizer([torch.nn.Parameter(torch.zeros(1))], lr=1.0)]
        assert type(optimizer) is torch.optim.SGD
        assert (optimizer.defaults["momentum"], recipe.weight_decay, recipe.gradient_norm) == (0.9, 4e-5, 10)
        assert (recipe.average, recipe.focal_gamma, recipe.kwargs["bg_iou_thresh"]) == (0, 1.5, 0.5)
    scales = [recipe_named(name).augmentation.keywords["scales"] for name in NAMES]  # pyrefly: ignore[missing-attribute]
    assert scales == [(0.5, 2.0), (0.5, 2.0), (0.1, 1.9), (0.1, 1.9)]
    assert [recipe_named(name).kwargs.get("stochastic_depth") for name in NAMES] == [None, 0.2, 0.16, 0.2]
    assert [recipe_named(name).kwargs.get("activation") for name in NAMES] == [None, "silu", "silu", "silu"]


def test_the_box_loss_pulls_as_the_published_one_beyond_its_delta():
    """Published is 50 times Huber's loss with delta 0.1, a mean over 4 coordinates; ours is torchvision's L1 loss."""
    errors = torch.tensor([0.1, 0.3, 2.0], requires_grad=True)
    published = 50 * torch.nn.functional.huber_loss(errors, torch.zeros(3), reduction="sum", delta=0.1) / 4
    (slopes,) = torch.autograd.grad(published, errors)
    assert slopes.tolist() == pytest.approx([recipe_named("spinenet-b").box_weight] * 3)


def test_conv_kernels_alone_decay(data):
    settings = settings_of("spinenet-b", crop=128).resolve(data)
    optimizer = Detector(*starting_network(settings, data), settings, ALONE).configure_optimizers()["optimizer"]
    decayed, free = optimizer.param_groups
    assert (decayed["weight_decay"], free["weight_decay"]) == (4e-5, 0)
    assert {p.ndim for p in decayed["params"]} == {4}
    assert {p.ndim for p in free["params"]} == {1}


@pytest.mark.parametrize(
    ("shape", "scales"), [((300, 400), (0.5, 2.0)), ((90, 40), (0.1, 1.9)), ((64, 64), (1.0, 1.0))]
)
def test_scale_jitter(shape, scales):
    image = tv_tensors.Image(torch.full((3, *shape), 200, dtype=torch.uint8))
    corners = torch.tensor([[0.0, 0, shape[1], shape[0]], [1, 1, 9, 9]])
    target = {
        "boxes": tv_tensors.BoundingBoxes(corners, format="XYXY", canvas_size=shape),
        "labels": torch.tensor([4, 5]),
    }
    sides = set()
    for seed in range(40):
        torch.manual_seed(seed)
        picture, found = scale_jitter(64, Flips.HORIZONTAL, scales)(image, target)
        assert picture.shape == (3, 64, 64)
        assert len(found["boxes"]) == len(found["labels"])
        x1, y1, x2, y2 = found["boxes"][0].tolist()
        assert 0 <= x1 < x2 <= 64
        assert 0 <= y1 < y2 <= 64
        inside = picture[:, round(y1) + 1 : round(y2) - 1, round(x1) + 1 : round(x2) - 1]
        assert (inside == 200).all()  # the whole image is its first box
        outside = picture.clone()
        outside[:, int(y1) : int(y2 + 1), int(x1) : int(x2 + 1)] = 0
        assert not outside.any()
        sides.add(round(max(x2 - x1, y2 - y1)))
    least = round(64 * scales[0])
    assert min(sides) <= least + 12
    assert max(sides) == 64
    if scales == (1, 1):
        assert sides == {64}


def settings_of(recipe: str, crop: int) -> TrainSettings:
    return TrainSettings("retinanet_spinenet49s", steps=4, batch_size=2, crop=crop, recipe=recipe)


@pytest.mark.parametrize("name", [pytest.param("spinenet-b", marks=pytest.mark.slow), "spinenet-c"])
def test_a_short_run_by_a_published_recipe(data, tmp_path, monkeypatch, name):
    small = {**RECIPES[name].kwargs, "specification": TINY}
    monkeypatch.setitem(RECIPES, name, replace(RECIPES[name], kwargs=small))
    seen: set[tuple[int, ...]] = set()
    original = Detector.training_step

    def training_step(self, batch, batch_idx):
        seen.update(tuple(image.shape) for image in batch[0])
        assert self.model.focal_gamma == 1.5
        return original(self, batch, batch_idx)

    monkeypatch.setattr(Detector, "training_step", training_step)
    file = train(settings_of(name, crop=128), data, output=tmp_path, workers=0)
    content = checkpoint.load(file)
    model = content.build()
    assert seen == {(3, 128, 128)}
    assert content.kwargs["min_size"] == content.kwargs["max_size"] == 128
    assert (model.proposal_matcher.low_threshold, model.detections_per_img) == (0.5, 100)
    assert type(model.backbone.act).__name__ == {"spinenet-b": "ReLU", "spinenet-c": "SiLU"}[name]
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert all(torch.equal(value, state["current_model_state"][key]) for key, value in state["state_dict"].items())
    with (tmp_path / "log.csv").open(newline="") as lines:
        assert all(float(row["classification"]) < 10 for row in csv.DictReader(lines))


@pytest.mark.parametrize("name", ["atss-1x", "gfl-1x", "gfl-2x", "vfnet-1x", "vfnet-2x", "tood-1x", "tood-2x"])
def test_the_network_of_a_recipe_with_another_matcher(data, name):
    settings = TrainSettings("retinanet_resnet18_fpn", recipe=name, weights_backbone="none").resolve(data)
    model, _ = starting_network(settings, data)
    method = name.partition("-")[0]
    assert type(model.proposal_matcher) is (TaskAlignedMatcher if method == "tood" else AtssMatcher)
    assert model.classification_loss == {"atss": "focal", "vfnet": "varifocal"}.get(method, "quality_focal")
    assert model.box_weights == (None if method == "atss" else "quality")
    assert model.head.regression_head._loss_type == "giou"
    assert model.head.regression_head.bbox_reg.out_channels == (4 * 17 if method == "gfl" else 4)
    assert [anchors.tolist() for anchors in model.anchor_generator.cell_anchors] == [
        [[-side / 2, -side / 2, side / 2, side / 2]] for side in (64, 128, 256, 512, 1024)
    ]
    assert (model.nms_thresh, model.detections_per_img, RECIPES[name].box_weight) == (0.6, 100, 2)
    sizes = model.transform.min_size
    assert sizes[-1] == 800  # by which the model is evaluated
    ranges = {"gfl-2x": (480, 800), "tood-2x": (480, 800), "vfnet-2x": (480, 960)}
    assert (min(sizes), max(sizes)) == ranges.get(name, (800, 800))


@pytest.mark.slow
def test_a_short_run_with_another_matcher(data, tmp_path, monkeypatch):
    small = {**RECIPES["tood-1x"].kwargs, "min_size": 96}
    monkeypatch.setitem(RECIPES, "tood-1x", replace(RECIPES["tood-1x"], kwargs=small))
    seen = []
    monkeypatch.setattr(Detector, "on_train_batch_end", lambda self, *_: seen.append(type(self.model.proposal_matcher)))
    model = "retinanet_resnet18_fpn"
    settings = TrainSettings(model, recipe="tood-1x", steps=3, batch_size=2, weights_backbone="none", bf16=False)
    file = train(settings, data, output=tmp_path, workers=0)
    assert seen == [AtssMatcher, TaskAlignedMatcher, TaskAlignedMatcher]  # the first third is by ATSS
    assert type(checkpoint.load(file).build().proposal_matcher) is TaskAlignedMatcher
    with (tmp_path / "log.csv").open(newline="") as lines:
        assert all(float(row["classification"]) < 10 for row in csv.DictReader(lines))


def test_a_recipe_and_losses_that_do_not_fit_each_other():
    with pytest.raises(UserError, match="reg_max"):
        TrainSettings("retinanet_resnet50_fpn", recipe="gfl-1x", arguments={"box_loss": "l1"})
    TrainSettings("retinanet_resnet50_fpn", recipe="gfl-1x", arguments={"box_loss": "ciou", "matcher": "task_aligned"})


def test_a_recipe_that_does_not_fit_is_named():
    for there_is_none in (recipe_named, lambda name: TrainSettings("retinanet_spinenet49", recipe=name)):
        with pytest.raises(UserError, match=r"there is no recipe 'spinenet-d'; choose one of default, torchvision-v1"):
            there_is_none("spinenet-d")
    with pytest.raises(UserError, match=r"spinenet-c is for models retinanet_spinenet\*, not"):
        TrainSettings("retinanet_resnet18_fpn_lite", recipe="spinenet-c")
