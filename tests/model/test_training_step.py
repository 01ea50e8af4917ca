"""The captured training step: on a GPU, or on a CPU with a stand-in for CUDA graphs."""

import copy
import functools
from typing import Any

import pytest
import torch
from torch import nn

from retina_fast import AtssMatcher, TaskAlignedMatcher, TrainingStep
from retina_fast.heads import give_distributions
from tests.model.recorded_graph import RecordedGraph
from tests.model.steps import (
    TOLERANCE,
    K,
    adamw,
    assert_same_state,
    batch,
    fresh_model,
    moved,
    plain_step,
    sgd,
    warm,
    warmed,
)

pytestmark = pytest.mark.usefixtures("one_thread")

# What each step is given: kinds that the graph holds, and others between them.
OTHERS: list[dict[str, Any]] = [{"size": (64, 80)}, {"boxes": 9}, {}, {"images": 1}, {"boxes": 0}, {"boxes": 1}]
BATCHES: list[dict[str, Any]] = [{}] * 6 + OTHERS + [{"size": (50, 70)}, {}, {}]


@pytest.mark.parametrize("make_optimizer", [adamw, sgd])
def test_a_captured_run_equals_a_plain_one(graphs, make_optimizer):
    ours, plain = fresh_model(), fresh_model()
    optimizers = make_optimizer(ours), make_optimizer(plain)
    schedules = [torch.optim.lr_scheduler.StepLR(optimizer, 3, gamma=0.5) for optimizer in optimizers]
    step = TrainingStep(ours, optimizers[0], max_boxes=10, max_grad_norm=1.0)
    kept = []
    for number, kind in enumerate(BATCHES):
        losses = step(*batch(number, **kind))
        expected = plain_step(plain, optimizers[1], batch(number, **kind), max_grad_norm=1.0)
        kept.append((losses, {name: value.clone() for name, value in losses.items()}))
        for name, value in expected.items():
            assert abs(losses[name] - value) <= 10 * TOLERANCE * value, (number, name)
        assert all(p.grad is None for p in ours.parameters())
        for schedule in schedules:
            schedule.step()
    # AdamW makes its state in the first step, which the second is not alike; SGD's momentum is made before
    assert (step.replayed_steps, step.uncaptured_steps) == ((7, 8) if make_optimizer is adamw else (8, 7))
    assert_same_state(ours, plain)
    assert all(torch.equal(now[name], then[name]) for now, then in kept for name in now)
    assert optimizers[0].param_groups[0]["lr"].item() == pytest.approx(optimizers[1].param_groups[0]["lr"])


def test_the_stand_in_executes_nothing_while_it_captures_and_freezes_python():
    value, seen = torch.zeros(2), []
    graph = RecordedGraph()
    factor = 2.0
    with graph:
        value += 1
        seen.append(value * factor)
    assert value.tolist() == [0, 0]
    factor = 5.0
    for expected in ([2, 2], [4, 4]):
        graph.replay()
        assert seen[0].tolist() == expected


def test_learning_rates_set_between_replays_count(graphs):
    model = fresh_model()
    optimizer = sgd(model)
    step = warmed(model, optimizer)
    replayed = step.replayed_steps
    assert moved(model, step) > 0
    optimizer.param_groups[0]["lr"] = 0.0
    assert moved(model, step) == 0
    optimizer.param_groups[0]["lr"] = torch.tensor([0.01])
    assert moved(model, step) > 0
    optimizer.param_groups[0]["lr"].zero_()
    assert moved(model, step) == 0
    assert step.replayed_steps == replayed + 4


def _move_weights(model, optimizer):
    model.before = [p.data for p in model.parameters()]  # held, lest the new ones come to lie there
    model.double().float()


CHANGES = {
    "loss type": lambda model, optimizer: setattr(model.head.regression_head, "_loss_type", "giou"),
    "focusing exponent": lambda model, optimizer: setattr(model, "focal_gamma", 1.5),
    "threshold": lambda model, optimizer: setattr(model.proposal_matcher, "low_threshold", 0.3),
    "matcher": lambda model, optimizer: setattr(model, "proposal_matcher", AtssMatcher()),
    "matcher by predictions": lambda model, optimizer: setattr(model, "proposal_matcher", TaskAlignedMatcher()),
    "classification loss": lambda model, optimizer: setattr(model, "classification_loss", "varifocal"),
    "box weights": lambda model, optimizer: setattr(model, "box_weights", "quality"),
    "a frozen norm": lambda model, optimizer: model.backbone.norm.eval(),
    "a frozen weight": lambda model, optimizer: model.backbone.stem.requires_grad_(False),
    "another last layer": lambda model, optimizer: model.set_num_classes(K),
    "anchors": lambda model, optimizer: model.anchor_generator.cell_anchors[0].mul_(2),
    "weight decay": lambda model, optimizer: optimizer.param_groups[0].update(weight_decay=0.5),
    "loaded optimizer": lambda model, optimizer: optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict())),
    "moved weights": _move_weights,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_the_graph_holds_fast_is_captured_anew(graphs, change):
    ours, plain = fresh_model(), fresh_model()
    optimizers = adamw(ours), adamw(plain)
    step = warmed(ours, optimizers[0])
    for number in range(step.uncaptured_steps + 1):
        plain_step(plain, optimizers[1], batch(number))
    change(ours, optimizers[0])
    torch.manual_seed(1)
    plain.load_state_dict(ours.state_dict())
    change(plain, optimizers[1])
    plain.load_state_dict(ours.state_dict())
    replayed, uncaptured = step.replayed_steps, step.uncaptured_steps
    for number in range(6):
        step(*batch(number))
        plain_step(plain, optimizers[1], batch(number))
    assert step.uncaptured_steps > uncaptured
    assert step.replayed_steps > replayed
    assert_same_state(ours, plain, 10 * TOLERANCE)


def test_boxes_of_distributions(graphs):
    ours, plain = fresh_model(), fresh_model()
    for model in (ours, plain):
        torch.manual_seed(2)
        give_distributions(model, 4)
    optimizers = adamw(ours), adamw(plain)
    step = warmed(ours, optimizers[0])
    for number in range(step.uncaptured_steps + 4):
        if number > step.uncaptured_steps:
            step(*batch(number))
        plain_step(plain, optimizers[1], batch(number))
    assert step.replayed_steps >= 3
    assert_same_state(ours, plain, 10 * TOLERANCE)


def test_new_weights_need_no_new_graph(graphs):
    model = fresh_model()
    step = warmed(model, adamw(model))
    uncaptured = step.uncaptured_steps
    model.load_state_dict({name: value.clone() for name, value in fresh_model().state_dict().items()})
    model.eval()
    model([image.to(next(model.parameters()).device) for image in batch(0)[0]])
    model.train()
    step(*batch(1))
    assert step.uncaptured_steps == uncaptured


def test_weights_of_losses_are_those_of_what_is_minimised(graphs):
    ours, plain = fresh_model(), fresh_model()
    optimizers = sgd(ours), sgd(plain)
    step = TrainingStep(ours, optimizers[0], loss_weights={"bbox_regression": 3.0})
    device = next(plain.parameters()).device
    for number in range(6):
        losses = step(*batch(number))
        images, targets = batch(number)
        optimizers[1].zero_grad()
        targets = [{key: value.to(device) for key, value in target.items()} for target in targets]
        expected = plain([image.to(device) for image in images], targets)
        (expected["classification"] + 3 * expected["bbox_regression"]).backward()
        optimizers[1].step()
        for name, value in expected.items():
            assert abs(losses[name] - value.detach()) <= 10 * TOLERANCE * value.detach()
    assert step.replayed_steps == 3
    assert_same_state(ours, plain)


def _own_loss(model, optimizer):
    original = model.compute_loss
    model.compute_loss = lambda targets, outputs, anchors: original(targets, outputs, anchors)


def _tensor_hook(model, optimizer):
    next(model.parameters()).register_hook(lambda grad: grad)


OUTSIDE = {
    "forward hook": lambda model, optimizer: model.backbone.register_forward_hook(lambda *args: None),
    "gradient hook": _tensor_hook,
    "optimizer hook": lambda model, optimizer: optimizer.register_step_post_hook(lambda *args: None),
    "own loss": _own_loss,
    "own matcher": lambda model, optimizer: setattr(model, "proposal_matcher", lambda iou: iou.max(dim=0).indices),
    "own forward": lambda model, optimizer: setattr(model, "forward", functools.partial(model.forward)),
}


@pytest.mark.parametrize("change", OUTSIDE.values(), ids=OUTSIDE)
def test_parts_of_the_users_own_run_uncaptured(graphs, change):
    ours, plain = fresh_model(), fresh_model()
    optimizers = sgd(ours), sgd(plain)
    for both in zip((ours, plain), optimizers, strict=True):
        change(*both)
    step = TrainingStep(ours, optimizers[0])
    for number in range(5):
        step(*batch(number))
        plain_step(plain, optimizers[1], batch(number))
    assert (step.replayed_steps, step.uncaptured_steps) == (0, 5)
    assert_same_state(ours, plain)


def test_an_optimizer_without_a_capturable_form_runs_uncaptured(graphs):
    model = fresh_model()
    step = TrainingStep(model, torch.optim.Adagrad(model.parameters()))
    for number in range(5):
        step(*batch(number))
    assert (step.replayed_steps, step.uncaptured_steps) == (0, 5)


def test_an_optimizer_that_already_stepped(graphs):
    ours, plain = fresh_model(), fresh_model()
    optimizers = adamw(ours), adamw(plain)
    for both in zip((ours, plain), optimizers, strict=True):
        plain_step(*both, batch(0))
    step = TrainingStep(ours, optimizers[0])
    for number in range(1, 7):
        step(*batch(number))
        plain_step(plain, optimizers[1], batch(number))
    assert step.replayed_steps == 3
    assert_same_state(ours, plain)


@pytest.mark.parametrize("late", ["first gradient", "layout"])
def test_sgd_whose_state_is_late_or_lies_otherwise(graphs, late):
    ours, plain = fresh_model(), fresh_model()
    optimizers = sgd(ours), sgd(plain)
    step = TrainingStep(ours, optimizers[0])
    for model in (ours, plain):
        model.backbone.stem.requires_grad_(late != "first gradient")
    for number in range(8):
        if number == 4 and late == "first gradient":
            for model in (ours, plain):
                model.backbone.stem.requires_grad_(True)
        if number == 4 and late == "layout":
            state = optimizers[0].state[ours.backbone.stem.weight]
            state["momentum_buffer"] = state["momentum_buffer"].transpose(2, 3).contiguous().transpose(2, 3)
        step(*batch(number))
        plain_step(plain, optimizers[1], batch(number))
    momentum = optimizers[0].state[ours.backbone.stem.weight]["momentum_buffer"]
    assert momentum.stride() == ours.backbone.stem.weight.stride()
    assert step.replayed_steps == 2
    assert_same_state(ours, plain)


@pytest.mark.parametrize("captured", [True, False])
def test_bad_targets_are_refused_and_change_nothing(graphs, captured):
    model = fresh_model()
    optimizer = adamw(model)
    step = warmed(model, optimizer) if captured else TrainingStep(model, optimizer)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images, targets = batch(0)
    targets[1]["labels"][2] = K
    with pytest.raises(IndexError, match=r"targets\[1\]\['labels'\]\[2\] is 3, must be in \[0, 3\)"):
        step(images, targets)
    with pytest.raises(TypeError, match=r"images\[0\] must be a Tensor"):
        step(["image", images[1]], batch(0)[1])  # pyrefly: ignore[bad-argument-type]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_part_that_cannot_be_captured_is_an_error_that_says_so(graphs, monkeypatch):
    def refused(*args, **kwargs):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "graph", refused)
    model = fresh_model()
    step = TrainingStep(model, sgd(model))
    with pytest.raises(RuntimeError, match="could not be captured as a CUDA graph: a part of the model"):
        warm(step)


def test_random_numbers_of_replays_follow_the_seed(graphs):
    model = fresh_model(dropout=0.5)
    for module in model.modules():  # else the loss hardly shows the input
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    optimizer = sgd(model)
    optimizer.param_groups[0]["lr"] = 0.0
    step = warmed(model, optimizer)
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(step(*batch(0))["classification"])
    torch.testing.assert_close(losses[0], losses[1])
    assert abs(losses[0] - losses[2]) > 1e-4 * losses[0]
