import csv
import json
import math
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from retina_fast import AtssMatcher, TaskAlignedMatcher, checkpoint
from retina_fast.data.augment import Flips
from retina_fast.data.coco import CocoDataset
from retina_fast.data.errors import UserError
from retina_fast.data.processes import ALONE
from retina_fast.train import Stopped, TrainSettings, detector, train
from retina_fast.train.detector import Detector
from retina_fast.train.settings import ResolvedSettings
from retina_fast.train.start import starting_network
from retina_fast.training_step import TrainingStep
from tests.conftest import write_shapes
from tests.model.recorded_graph import play_on_cpu

SETTINGS = TrainSettings(
    "retinanet_resnet18_fpn_lite", steps=6, batch_size=2, lr=1e-3, crop=64, flips=Flips.NONE, seed=3, every=3
)


@pytest.fixture(scope="module", autouse=True)
def _one_thread(one_thread):
    pass


def run(data, output: Path, settings=SETTINGS, **more: Any) -> Path:
    more = {"workers": 0, **more}
    return train(settings, data, output=output, **more)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> CocoDataset:
    return CocoDataset(*write_shapes(tmp_path_factory.mktemp("train") / "shapes", count=6))


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> Path:
    """The folder of a run that was never stopped."""
    output = tmp_path_factory.mktemp("train") / "whole"
    run(data, output, validation=data)
    return output


def interrupt(patch: pytest.MonkeyPatch, step: int, how) -> None:
    """Has `how` called during that step."""
    original = Detector.training_step

    def training_step(self, batch, batch_idx):
        if self.global_step == step:
            how()
        return original(self, batch, batch_idx)

    patch.setattr(Detector, "training_step", training_step)


def state(folder: Path) -> dict:
    return torch.load(folder / "last.ckpt", weights_only=True)


def assert_same_run(one: Path, other: Path) -> None:
    a, b = state(one), state(other)
    assert a["global_step"] == b["global_step"] == SETTINGS.steps
    for key in ("state_dict", "current_model_state", "averaging_state"):
        assert a[key].keys() == b[key].keys()
        assert all(torch.equal(value, b[key][name]) for name, value in a[key].items()), key
    moments = zip(a["optimizer_states"][0]["state"].values(), b["optimizer_states"][0]["state"].values(), strict=True)
    assert all(torch.equal(x[name], y[name]) for x, y in moments for name in x)
    weights = checkpoint.load(one / "model.pt").state_dict, checkpoint.load(other / "model.pt").state_dict
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


@pytest.mark.parametrize(
    ("step", "number"),
    [
        (4, signal.SIGTERM),
        # of an interval of three: the first, the middle one, the last; and the run's last
        *(pytest.param(step, signal.SIGINT, marks=pytest.mark.slow) for step in (0, 1, 2, 5)),
    ],
)
def test_a_run_stopped_and_resumed_gives_the_same_weights(data, whole, tmp_path, monkeypatch, step, number):
    output = tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupt(patch, step, lambda: os.kill(os.getpid(), number))
        with pytest.raises(Stopped):
            run(data, output)
    assert state(output)["global_step"] == step + 1
    run(data, output, resume=True, workers=1)
    assert_same_run(whole, output)
    steps = [row["step"] for row in rows(output)]
    assert steps == sorted(set(steps))


def test_a_run_that_died_goes_on_from_its_last_interval(data, whole, tmp_path, monkeypatch):
    def die():
        raise RuntimeError("power cut")

    with monkeypatch.context() as patch:
        interrupt(patch, 4, die)
        with pytest.raises(RuntimeError, match="power cut"):
            run(data, tmp_path)
    assert state(tmp_path)["global_step"] == 3
    run(data, tmp_path, resume=True)
    assert_same_run(whole, tmp_path)


def test_a_finished_run_that_is_resumed_stays_as_it_is(data, whole):
    before = state(whole)["state_dict"]
    run(data, whole, resume=True)
    assert all(torch.equal(value, before[name]) for name, value in state(whole)["state_dict"].items())


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "log.csv").open(newline="") as lines:
        return list(csv.DictReader(lines))


def test_what_a_run_writes(whole, data):
    assert {path.name for path in whole.iterdir()} == {
        *("last.ckpt", "model.pt", "best.pt", "log.csv", "loss.png", "precision_recall.png", "tensorboard")
    }
    assert [row["step"] for row in rows(whole) if row["AP50"]] == ["3", "6"]
    model = checkpoint.load(whole / "model.pt")
    assert (model.classes, model.category_ids, model.builder) == (["red", "blue"], [3, 7], SETTINGS.model)
    assert float(rows(whole)[-1]["AP50"]) == model.metrics["AP50"]


def test_the_averaged_weights_are_written_and_validated(whole):
    saved = state(whole)
    model = checkpoint.load(whole / "model.pt").state_dict
    name = "backbone.body.conv1.weight"
    assert torch.equal(model[name], saved["state_dict"][f"model.{name}"].half().float())
    assert not torch.equal(model[name], saved["current_model_state"][f"model.{name}"].half().float())
    assert model["backbone.body.bn1.num_batches_tracked"] == SETTINGS.steps


def test_crops_of_one_size_are_trained_by_replays(data, tmp_path, monkeypatch):
    settings = replace(SETTINGS, bf16=False)  # float32, in which two runs stay together
    run(data, tmp_path / "plain", settings=settings)
    play_on_cpu(monkeypatch)
    original, steps = TrainingStep, list[TrainingStep]()

    def kept(*args, **kwargs):
        steps.append(original(*args, **kwargs))
        return steps[0]

    monkeypatch.setattr(detector, "TrainingStep", kept)
    run(data, tmp_path / "captured", settings=settings)
    assert (steps[0].replayed_steps, steps[0].uncaptured_steps) == (2, 4)
    assert state(tmp_path / "captured")["global_step"] == settings.steps
    for row, other in zip(rows(tmp_path / "captured"), rows(tmp_path / "plain"), strict=True):
        assert (row["step"], row["lr"]) == (other["step"], other["lr"])
        for name in ("classification", "bbox_regression"):
            assert float(row[name]) == pytest.approx(float(other[name]), rel=1e-3)


def resolved(**choices: Any) -> ResolvedSettings:
    given: Any = None  # data, which matters only to a recipe of epochs
    return TrainSettings("retinanet_resnet18_fpn_lite", **choices).resolve(given)


def test_steps_are_split_into_equal_intervals():
    for steps, interval, total in ((1, 1, 1), (60, 60, 60), (500, 500, 500), (1001, 334, 1002), (9000, 500, 9000)):
        settings = resolved(steps=steps)
        assert (settings.interval, settings.total_steps) == (interval, total)


def test_norms_and_biases_do_not_decay(data):
    settings = SETTINGS.resolve(data)
    optimizer = Detector(*starting_network(settings, data), settings, ALONE).configure_optimizers()["optimizer"]
    decayed, free = optimizer.param_groups
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.05, 0.0)
    assert all(p.ndim == 4 for p in decayed["params"])
    assert all(p.ndim == 1 for p in free["params"])


@pytest.mark.parametrize(("step", "kept"), [(4, "The weights of the last interval are"), (1, "no weights are")])
def test_a_loss_that_is_not_finite_names_step_and_images(step, kept, data, tmp_path, monkeypatch):
    original = Detector.training_step

    def training_step(self, batch, batch_idx):
        if self.global_step == step:
            batch[0][0] = torch.full((3, 64, 64), math.nan)
        return original(self, batch, batch_idx)

    monkeypatch.setattr(Detector, "training_step", training_step)
    message = rf"not finite at step {step} .*images: .*\d\.png, .*\d\.png\. Look at .*{kept} in the output folder"
    with pytest.raises(UserError, match=message):
        run(data, tmp_path)
    assert (tmp_path / "last.ckpt").exists() == (tmp_path / "model.pt").exists() == (step > 3)
    assert step < 3 or state(tmp_path)["global_step"] == 3


def test_an_existing_run_is_not_overwritten_and_settings_must_agree(data, whole, tmp_path):
    with pytest.raises(UserError, match="already holds a run: add --resume"):
        run(data, whole)
    with pytest.raises(UserError, match="there is no run to resume"):
        run(data, tmp_path, resume=True)
    with pytest.raises(UserError, match=r"has lr 0\.001, not 0\.5"):
        run(data, whole, resume=True, settings=replace(SETTINGS, lr=0.5))


def test_a_run_goes_on_with_the_annotations_that_it_was_begun_with(data, whole, shapes):
    content = json.loads(shapes[0].read_text())
    assert data.images == content["images"]  # the same pictures
    content["annotations"][3]["bbox"][2] += 1
    shapes[0].write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"shapes\.json: is not what the run in .* was begun with"):
        run(CocoDataset(*shapes), whole, resume=True)


@pytest.mark.slow
def test_the_newest_checkpoints_and_the_best_model_stay(data, tmp_path):
    settings = replace(SETTINGS, steps=4, every=1)
    run(data, tmp_path, settings, validation=data, keep=3)
    kept = sorted(path.name for path in tmp_path.glob("step-*.ckpt"))
    assert kept == ["step-00000002.ckpt", "step-00000003.ckpt", "step-00000004.ckpt"]
    assert [torch.load(tmp_path / name, weights_only=True)["global_step"] for name in kept] == [2, 3, 4]
    assert (tmp_path / kept[-1]).samefile(tmp_path / "last.ckpt")
    measured = [float(row["AP50"]) for row in rows(tmp_path) if row["AP50"]]
    assert checkpoint.load(tmp_path / "best.pt").metrics["AP50"] == max(measured)
    assert not list(tmp_path.glob("*.partial"))
    (tmp_path / "last.ckpt").write_bytes((tmp_path / "last.ckpt").read_bytes()[:1000])
    with pytest.raises(UserError, match=r"last\.ckpt: damaged; copy an older one in its place .*step-00000003\.ckpt"):
        run(data, tmp_path, resume=True, settings=settings)


@pytest.mark.slow
def test_a_disk_that_fills_up_costs_one_interval(data, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt(patch, 5, lambda: (tmp_path / f"last.ckpt.{os.getpid()}.partial").symlink_to("/dev/full"))
        with pytest.raises(UserError, match=r"last\.ckpt: cannot be written .*what it held before is unharmed"):
            run(data, tmp_path, validation=data)
    assert state(tmp_path)["global_step"] == 3
    run(data, tmp_path, resume=True, validation=data)
    assert_same_run(whole, tmp_path)


def test_tensorboard_shows_what_the_log_has(whole):
    found = EventAccumulator(str(whole / "tensorboard")).Reload()
    for name in (
        "classification",
        "bbox_regression",
        "lr",
        "images_per_second",
        "waiting",
        "val_classification",
        "AP50",
    ):
        logged = [(int(row["step"]), float(row[name])) for row in rows(whole) if row[name]]
        shown = [(event.step, event.value) for event in found.Scalars(name)]
        assert [step for step, _ in shown] == [step for step, _ in logged]
        assert [value for _, value in shown] == pytest.approx([value for _, value in logged], rel=1e-6)
        assert logged


def test_validation_data_must_have_the_same_classes(data, shapes, tmp_path):
    content = json.loads(shapes[0].read_text())
    content["categories"][0]["name"] = "green"
    shapes[0].write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"has the classes \['red', 'green'\]"):
        run(data, tmp_path / "run", validation=CocoDataset(*shapes))


def test_starting_from_a_model_keeps_its_last_layer_only_for_the_same_classes(data, whole, shapes):
    settings, weights = SETTINGS.resolve(data), checkpoint.load(whole / "model.pt").state_dict
    same, _ = starting_network(settings, data, whole / "model.pt")
    assert all(torch.equal(value, weights[name]) for name, value in same.state_dict().items())
    content = json.loads(shapes[0].read_text())
    content["categories"].append({"id": 9, "name": "green"})
    shapes[0].write_text(json.dumps(content))
    network, about = starting_network(settings, CocoDataset(*shapes), whole / "model.pt")
    assert about.classes == ["red", "blue", "green"]
    changed = [name for name, value in network.state_dict().items() if not torch.equal(value, weights[name])]
    assert changed == [f"head.classification_head.cls_logits.{kind}" for kind in ("weight", "bias")]
    assert network.head.classification_head.num_classes == 3


def test_the_network_is_built_once(data, tmp_path, monkeypatch):
    built = []
    original = checkpoint.build

    def build(*args, **kwargs):
        built.append(args)
        return original(*args, **kwargs)

    monkeypatch.setattr(checkpoint, "build", build)
    run(data, tmp_path, replace(SETTINGS, steps=1))
    run(data, tmp_path, replace(SETTINGS, steps=1), resume=True)
    assert built == 2 * [(SETTINGS.model, 2)]


def test_a_run_that_was_begun_with_earlier_settings_is_resumed(data, whole, tmp_path):
    """There, None stands for random weights of the backbone; the first runs have no such setting, and no bf16."""
    for missing in ((), ("weights_backbone", "bf16", "accumulate")):
        saved = state(whole)
        saved["settings"] |= {"weights_backbone": None}
        saved["settings"] = {name: value for name, value in saved["settings"].items() if name not in missing}
        torch.save(saved, tmp_path / "last.ckpt")
        run(data, tmp_path, resume=True)
        with pytest.raises(UserError, match=r"has weights_backbone none, not IMAGENET1K_V1: give it the same"):
            run(data, tmp_path, replace(SETTINGS, weights_backbone="IMAGENET1K_V1"), resume=True)


@pytest.mark.parametrize("chosen", ["task_aligned", pytest.param("atss", marks=pytest.mark.slow)])
def test_task_aligned_assignment_begins_with_atss(data, tmp_path, monkeypatch, chosen):
    original, matchers = Detector.training_step, []

    def training_step(self, batch, batch_idx):
        matchers.append(type(self.model.proposal_matcher))
        return original(self, batch, batch_idx)

    monkeypatch.setattr(Detector, "training_step", training_step)
    own = {"task_aligned": TaskAlignedMatcher, "atss": AtssMatcher}[chosen]
    file = run(data, tmp_path, replace(SETTINGS, every=6, arguments={"matcher": chosen}))
    assert matchers == 2 * [AtssMatcher] + 4 * [own]
    assert checkpoint.load(file).kwargs["matcher"] == chosen
