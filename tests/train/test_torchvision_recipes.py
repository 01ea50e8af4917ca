"""torchvision's recipes have the rates, parameter groups, batches and steps of torchvision's training script."""

import json
import os
import signal
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch
import torch.nn.functional as F
from torchvision.io import decode_image, write_png
from torchvision.models import ResNet18_Weights, resnet18, resnet50
from torchvision.models import detection as torchvision_models
from torchvision.models._api import WeightsEnum
from torchvision.ops._utils import split_normalization_params
from typer.testing import CliRunner

from retina_fast import checkpoint, cli
from retina_fast.checkpoint import Checkpoint
from retina_fast.data.augment import mixed_seed
from retina_fast.data.coco import CocoDataset
from retina_fast.data.errors import UserError
from retina_fast.data.processes import ALONE, Processes
from retina_fast.train import Stopped, TrainSettings, train
from retina_fast.train import run as module
from retina_fast.train.detector import Detector
from retina_fast.train.loaders import StepSampler
from retina_fast.train.recipes import RECIPES, recipe_named
from retina_fast.train.settings import ResolvedSettings
from retina_fast.train.start import starting_network
from tests.cli.commands import Forked, finish, forked_by_srun
from tests.conftest import imagenet, write_shapes
from tests.train.test_schedules import published_rates

V1, V2 = "torchvision-v1", "torchvision-v2"
SIZES: dict[str, Any] = {V1: {"min_size": 96, "max_size": 160}, V2: {"min_size": [64, 80, 96], "max_size": 160}}


@pytest.fixture(scope="module", autouse=True)
def _one_thread(one_thread):
    pass


@pytest.fixture
def _published(monkeypatch):
    """Random weights in place of those that torchvision would download, and pictures of 96 px."""
    for recipe, kwargs in SIZES.items():
        monkeypatch.setitem(RECIPES, recipe, replace(RECIPES[recipe], kwargs=kwargs))

    def weights(self, *args, **kwargs):
        return imagenet(resnet18 if isinstance(self, ResNet18_Weights) else resnet50)

    monkeypatch.setattr(WeightsEnum, "get_state_dict", weights)


def write_oblong(folder: Path, count: int) -> tuple[Path, Path]:
    """Pictures higher than wide, wider than high, and square; one of them has no object."""
    json_file, images = write_shapes(folder, count)
    content = json.loads(json_file.read_text())
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] != 3]
    for record in content["images"]:
        right, bottom = ((0, 32), (32, 0), (0, 0), (32, 0))[record["id"] % 4]
        file = str(images / record["file_name"])
        write_png(F.pad(decode_image(file), (0, right, 0, bottom)), file)
        record |= {"width": 96 + right, "height": 96 + bottom}
    json_file.write_text(json.dumps(content))
    return json_file, images


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> tuple[Path, Path]:
    return write_oblong(tmp_path_factory.mktemp("recipes") / "shapes", count=12)


@pytest.fixture(scope="module")
def data(files) -> CocoDataset:
    return CocoDataset(*files).with_objects()


def settings_of(recipe: str, model: str, batch_size: int, data: CocoDataset, **changes: Any) -> ResolvedSettings:
    chosen: dict[str, Any] = {"batch_size": batch_size, "recipe": recipe, "bf16": False, "seed": 5}
    return TrainSettings(model, **chosen | changes).resolve(data)


def published_optimizer(recipe: str, model: torch.nn.Module) -> torch.optim.Optimizer:
    """The optimizer of torchvision's reference for `--lr 0.01`, or for `--opt adamw ... --norm-weight-decay 0`."""
    if recipe == V1:
        trained = [p for p in model.parameters() if p.requires_grad]
        return torch.optim.SGD(trained, lr=0.01, momentum=0.9, weight_decay=1e-4)
    groups = zip(split_normalization_params(model), (0.0, 0.05), strict=True)
    return torch.optim.AdamW([{"params": p, "weight_decay": w} for p, w in groups], lr=1e-4, weight_decay=0.05)


def published_model(recipe: str, **kwargs: Any) -> Any:
    if recipe == V1:
        return torchvision_models.retinanet_resnet50_fpn(weights_backbone="IMAGENET1K_V1", **kwargs)
    return torchvision_models.retinanet_resnet50_fpn_v2(weights_backbone="IMAGENET1K_V2", **kwargs)


def name_of(recipe: str) -> str:
    return "retinanet_resnet50_fpn" if recipe == V1 else "retinanet_resnet50_fpn_v2"


@pytest.mark.usefixtures("_published")
def test_the_rate_goes_by_whole_epochs_also_where_a_run_ends_with_a_whole_interval(data):
    settings = settings_of(V1, "retinanet_resnet18_fpn", 2, data, every=100)
    assert settings.total_steps == settings.steps == 26 * 5
    settings = replace(settings, every=9)
    assert settings.total_steps > settings.steps
    configured = Detector(*starting_network(settings, data), settings, ALONE).configure_optimizers()
    optimizer, scheduler = configured["optimizer"], configured["lr_scheduler"]
    rates = []
    for _ in range(settings.total_steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step(lambda: None)
        scheduler.step()
    assert rates[: settings.steps] == pytest.approx(list(published_rates(0.01 * 2 / 16, 5)))
    assert rates[settings.steps :] == [rates[settings.steps - 1]] * (settings.total_steps - settings.steps)


@pytest.mark.usefixtures("_published")
@pytest.mark.parametrize("recipe", [V1, V2])
def test_parameter_groups_are_torchvisions(recipe, data):
    settings = settings_of(recipe, name_of(recipe), 16, data)
    detector = Detector(*starting_network(settings, data), settings, ALONE)
    ours = detector.configure_optimizers()["optimizer"]
    ours.param_groups[0]["lr"] = settings.lr  # without the first step's warm-up
    model = published_model(recipe, num_classes=2)
    theirs = published_optimizer(recipe, model)

    def by_decay(optimizer: torch.optim.Optimizer, network: torch.nn.Module) -> dict[float, set[str]]:
        names = {p: name for name, p in network.named_parameters()}
        return {group["weight_decay"]: {names[p] for p in group["params"]} for group in optimizer.param_groups}

    assert by_decay(ours, detector.model) == by_decay(theirs, model)
    assert sum(map(len, by_decay(ours, detector.model).values())) == sum(p.requires_grad for p in model.parameters())
    assert isinstance(ours, type(theirs))
    for name in ("momentum", "betas", "eps", "amsgrad", "dampening", "nesterov"):
        assert ours.defaults.get(name) == theirs.defaults.get(name), name
    assert (recipe_named(recipe).gradient_norm, recipe_named(recipe).average) == (None, 0)
    frozen = [type(m).__name__ for m in detector.model.modules()].count("FrozenBatchNorm2d")
    assert frozen == (53 if recipe == V1 else 0)


@pytest.mark.slow
@pytest.mark.usefixtures("_published")
@pytest.mark.parametrize("recipe", [V1, V2])
def test_a_step_is_torchvisions(recipe, data, tmp_path, monkeypatch):
    """The step is in float64, where a difference would not be rounding."""
    seen: list[tuple[Any, Any, Any]] = []
    original = Detector.training_step

    def training_step(self, batch, batch_idx):
        losses = original(self, batch, batch_idx)
        seen.append((batch, losses, self.model.state_dict()))
        raise InterruptedError

    monkeypatch.setattr(Detector, "training_step", training_step)
    monkeypatch.setattr(module, "Detector", lambda *arguments: Detector(*arguments).double())
    settings = settings_of(recipe, name_of(recipe), 2, data, steps=1, lr=recipe_named(recipe).lr)
    with pytest.raises(InterruptedError):
        train(settings, data, output=tmp_path, workers=0)
    (((images, targets), losses, ours),) = seen

    torch.manual_seed(settings.seed)
    begin = starting_network(settings, data)[0].state_dict()
    model = published_model(recipe, num_classes=2, **SIZES[recipe])
    model.load_state_dict(begin)
    model = model.double().train()
    optimizer = published_optimizer(recipe, model)
    torch.manual_seed(mixed_seed(settings.seed, 0, 0))  # of the sizes that v2 draws
    published = model([image.double() / 255 for image in images], targets)
    torch.stack([*published.values()]).sum().backward()
    optimizer.step()

    for name, loss in published.items():
        torch.testing.assert_close(losses[name], loss.detach(), rtol=1e-6, atol=0)
    moved = set()
    for name, value in model.state_dict().items():
        way = (value - begin[name]).abs().max().item()
        error = (ours[name] - value).abs().max().item()
        assert error <= 1e-5 * way, (name, error, way)
        moved |= {name} if way else set()
    assert {name for name, p in model.named_parameters() if p.requires_grad} <= moved


def keys_of(data: CocoDataset, settings: ResolvedSettings, processes: Processes = ALONE) -> list[list[tuple[int, int]]]:
    detector = Detector(*starting_network(settings, data), settings, processes)
    return list(StepSampler(detector, data))


@pytest.mark.usefixtures("_published")
def test_each_process_has_pictures_of_one_shape_and_every_picture_is_seen_once_an_epoch(data):
    assert len(data) == 11  # odd, so that epochs begin in the middle of a step
    settings = settings_of(V1, "retinanet_resnet18_fpn", 4, data, steps=33)
    whole = keys_of(data, settings)
    shares = [keys_of(data, settings, Processes(rank, 2)) for rank in range(2)]
    assert [list(chain(*step)) for step in zip(*shares, strict=True)] == whole
    seen = list(chain(*whole))
    assert len(seen) == 12 * 11
    for epoch in range(12):
        assert sorted(seen[11 * epoch :][:11]) == [(epoch, index) for index in range(11)]
    kinds = data.aspects()
    assert len(set(kinds)) == 3
    alike = [kinds[a] == kinds[b] for share in chain(*shares) for (_, a), (_, b) in [share]]
    assert sum(alike) / len(alike) > 0.7  # at random: 0.3; each epoch leaves up to three that fill no pair
    assert keys_of(data, replace(settings, seed=6)) != whole


def state(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "last.ckpt", weights_only=True)


@pytest.mark.slow
@pytest.mark.usefixtures("_published")
def test_a_run_stopped_within_an_epoch_and_resumed_gives_the_same_weights(data, tmp_path, monkeypatch):
    settings = settings_of(V2, "retinanet_resnet18_fpn_v2", 2, data, steps=6, weights_backbone="IMAGENET1K_V1")
    original = Detector.training_step

    def training_step(self, batch, batch_idx):
        if self.global_step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batch, batch_idx)

    def run(folder: str, resume: bool = False) -> Path:
        return train(settings, data, output=tmp_path / folder, resume=resume, workers=0)

    run("whole")
    with monkeypatch.context() as patch:
        patch.setattr(Detector, "training_step", training_step)
        with pytest.raises(Stopped):
            run("stopped")
    assert state(tmp_path / "stopped")["global_step"] == 4

    def unreachable(self, *args, **kwargs):
        raise URLError("no network")

    monkeypatch.setattr(WeightsEnum, "get_state_dict", unreachable)
    file = run("stopped", resume=True)
    one, other = state(tmp_path / "whole"), state(tmp_path / "stopped")
    assert all(torch.equal(value, other["state_dict"][name]) for name, value in one["state_dict"].items())
    assert one["optimizer_states"][0]["param_groups"] == other["optimizer_states"][0]["param_groups"]
    content = checkpoint.load(file)  # is built without a download, too
    model = content.build().eval()
    assert content.kwargs["weights_backbone"] == "IMAGENET1K_V1"
    assert model.transform.min_size == [64, 80, 96]
    assert sum(not p.requires_grad for p in model.parameters()) > 0


@pytest.mark.slow
def test_two_processes_give_the_weights_of_one_that_pads_as_they_do(files, tmp_path):
    """They start from weights in the folder of torchvision's downloads. Only one process warns of faulty data."""
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save(imagenet(resnet18), folder / ResNet18_Weights.IMAGENET1K_V1.url.rpartition("/")[2])
    content = json.loads(files[0].read_text())
    content["annotations"].append(content["annotations"][0] | {"id": 99, "bbox": [5, 5, 0, 3]})
    json_file = tmp_path / "shapes.json"
    json_file.write_text(json.dumps(content))
    recipe = ("--model", "retinanet_resnet18_fpn", "--recipe", V1, "--image-scale", 0.2, "--batch-size", 4)
    size = ("--steps", 4, "--every", 4, "--workers", 0, "--no-bf16")

    def line(output: Path, *more: object) -> tuple[object, ...]:
        return ("train", "--json", json_file, "--images", files[1], *recipe, *size, "--output", output, *more)

    torch_home: dict[str, Any] = {"module": "tests.train.double", "TORCH_HOME": tmp_path / "torch"}
    finish(Forked(line(tmp_path / "one", "--accumulate", 2), **torch_home))
    output = finish(*forked_by_srun(*line(tmp_path / "two"), processes=2, **torch_home))
    said = " ".join(output.split())
    assert said.count("1 of 12 images have no object: the recipe leaves them out") == 1
    assert said.count("boxes without an extent or outside their image are left out") == 1
    one, two = state(tmp_path / "one")["state_dict"], state(tmp_path / "two")["state_dict"]
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-7, atol=1e-9, msg=name)
    begin = imagenet(resnet18)
    stem, last = (f"model.backbone.body.{name}.weight" for name in ("conv1", "layer4.1.conv2"))
    assert torch.equal(one[stem], begin["conv1.weight"].double())  # frozen
    assert not torch.equal(one[last], begin["layer4.1.conv2.weight"].double())


def test_what_does_not_go_together_is_named(files, tmp_path, monkeypatch):
    def unreachable(self, *args, **kwargs):
        raise URLError("no network")

    monkeypatch.setattr(WeightsEnum, "get_state_dict", unreachable)

    def problem(*options: object) -> str:
        line = ("train", "--json", files[0], "--images", files[1], "--output", tmp_path / "run", "--workers", 0)
        result = CliRunner().invoke(cli.app, list(map(str, (*line, *options))))
        assert result.exit_code == 1
        return " ".join(result.stderr.split())

    v1 = ("--recipe", V1, "--model", "retinanet_resnet18_fpn")
    assert "could not be downloaded (no network): put the file into" in problem(*v1)
    assert "resnet18_fpn with the backbone's weights IMAGENET1K_V2: there are none of that name" in problem(
        *v1, "--weights-backbone", "IMAGENET1K_V2"
    )
    assert "--weights-backbone and --checkpoint exclude each other" in problem(
        *v1, "--weights-backbone", "IMAGENET1K_V1", "--checkpoint", "model.pt"
    )
    without = "--recipe", V2, "--model", "retinanet_resnet18_fpn_v2", "--weights-backbone", "none"
    assert "model.pt: no such model file" in problem(*without, "--checkpoint", "model.pt")
    assert "is for models retinanet_resn*_fpn, not retinanet_resnet18_fpn_v2" in problem(*v1[:3], v1[3] + "_v2")
    assert "there are no weights of retinanet_spinenet49" in problem(
        "--model", "retinanet_spinenet49", "--weights-backbone", "IMAGENET1K_V1"
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("_published")
def test_whole_images_alone(data, tmp_path):
    settings = settings_of(V1, "retinanet_resnet18_fpn", 2, data, steps=1, crop=64)
    with pytest.raises(UserError, match="trains on whole images: leave out --crop 64"):
        train(settings, data, output=tmp_path, workers=0)


@pytest.mark.slow
@pytest.mark.usefixtures("_published")
def test_a_run_from_a_model_file_is_resumed_without_it(data, tmp_path):
    """The run has the builder's arguments of the file, here those that freeze all stages of the ResNet."""
    frozen: dict[str, Any] = {"trainable_backbone_layers": 0}
    weights = checkpoint.build("retinanet_resnet18_fpn", 2, weights_backbone="IMAGENET1K_V1", **frozen).state_dict()
    file = tmp_path / "model.pt"
    checkpoint.save(Checkpoint("retinanet_resnet18_fpn", frozen, data.classes, data.category_ids, weights), file)
    settings = settings_of(V1, "retinanet_resnet18_fpn", 2, data, steps=1)
    train(settings, data, start_from=file, output=tmp_path / "run", workers=0)
    before = state(tmp_path / "run")["state_dict"]
    resumed = train(settings, data, output=tmp_path / "run", resume=True, workers=0)
    content = checkpoint.load(resumed)
    assert content.kwargs["trainable_backbone_layers"] == 0
    assert not [p for p in content.build().backbone.body.parameters() if p.requires_grad]
    after = state(tmp_path / "run")["state_dict"]
    assert all(torch.equal(value, after[name]) for name, value in before.items())
