"""The captured training step: on a CPU with a stand-in for CUDA graphs, on fake CUDA tensors, and on a GPU."""

import copy
import functools
from typing import Any

import pytest
import torch
from torch import nn
from torchvision.models.detection.anchor_utils import AnchorGenerator

import retina_fast
from retina_fast import TrainingStep
from tests.recorded_graph import RecordedGraph, play_on_cpu

pytestmark = pytest.mark.usefixtures("one_thread")
K = 3


@pytest.fixture
def graphs(monkeypatch):
    play_on_cpu(monkeypatch)


class Trunk(nn.Module):
    """Two small levels, with the norm and the activation of a real trunk."""

    out_channels = 8

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 8, stride=8, bias=False), nn.BatchNorm2d(8)
        self.down = nn.Conv2d(8, 8, 3, stride=2, padding=1)

    def forward(self, x):
        fine = self.norm(self.stem(x)).relu()
        return {"0": fine, "1": self.down(fine)}


def fresh_model(device="cpu") -> retina_fast.RetinaNet:
    torch.manual_seed(0)
    anchors = AnchorGenerator(((16,), (32,)), ((0.5, 1.0, 2.0),) * 2)
    return retina_fast.RetinaNet(Trunk(), K, 64, 96, anchor_generator=anchors).train().to(device)


def batch(step: int, size=(64, 64), images=2, boxes=3):
    generator = torch.Generator().manual_seed(step)
    targets = []
    for _ in range(images):
        corner = torch.rand(boxes, 2, generator=generator) * 30
        side = 8 + torch.rand(boxes, 2, generator=generator) * 20
        labels = torch.randint(0, K, (boxes,), generator=generator)
        targets.append({"boxes": torch.cat((corner, corner + side), dim=1), "labels": labels})
    return [torch.rand(3, *size, generator=generator) for _ in range(images)], targets


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=2**-10, fused=True)  # exact in float32, in which a graph reads it


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=2**-6, momentum=0.9, weight_decay=1e-4)


def plain_step(model, optimizer, batch, max_grad_norm=None, dtype=None):
    """The step as everyone writes it."""
    images, targets = batch
    optimizer.zero_grad()
    device = next(model.parameters()).device
    images = [image.to(device) for image in images]
    targets = [{key: value.to(device) for key, value in target.items()} for target in targets]
    with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
        losses = model(images, targets)
    (losses["classification"] + losses["bbox_regression"]).backward()
    if max_grad_norm is not None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
    optimizer.step()
    return {key: value.detach() for key, value in losses.items()}


def assert_same_state(model, other, tolerance=1e-6):
    for (name, value), expected in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert (value.double() - expected.double()).norm() <= tolerance * (1 + expected.double().norm()), name


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
            assert abs(losses[name] - value) <= 1e-5 * value, (number, name)
        assert all(p.grad is None for p in ours.parameters())
        for schedule in schedules:
            schedule.step()
    assert (step.replayed_steps, step.uncaptured_steps) == (7, 8)
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


def warmed(model, optimizer, **kwargs) -> TrainingStep:
    """A step whose graph is captured and replayed once."""
    step = TrainingStep(model, optimizer, **kwargs)
    warm(step)
    return step


def warm(step: TrainingStep) -> None:
    while not step.replayed_steps:
        step(*batch(step.uncaptured_steps))


def moved(model, step, number=50) -> float:
    """How far one step moves the weights."""
    before = [p.detach().clone() for p in model.parameters()]
    step(*batch(number))
    return float(sum((p.detach() - q).abs().sum() for p, q in zip(model.parameters(), before, strict=True)))


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


CHANGES = {
    "loss type": lambda model, optimizer: setattr(model.head.regression_head, "_loss_type", "giou"),
    "threshold": lambda model, optimizer: setattr(model.proposal_matcher, "low_threshold", 0.3),
    "a frozen norm": lambda model, optimizer: model.backbone.norm.eval(),
    "a frozen weight": lambda model, optimizer: model.backbone.stem.requires_grad_(False),
    "another last layer": lambda model, optimizer: model.set_num_classes(K),
    "anchors": lambda model, optimizer: model.anchor_generator.cell_anchors[0].mul_(2),
    "weight decay": lambda model, optimizer: optimizer.param_groups[0].update(weight_decay=0.5),
    "loaded optimizer": lambda model, optimizer: optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict())),
    "moved weights": lambda model, optimizer: model.double().float(),
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
    assert_same_state(ours, plain, 1e-5)


def test_new_weights_need_no_new_graph(graphs):
    model = fresh_model()
    step = warmed(model, adamw(model))
    uncaptured = step.uncaptured_steps
    model.load_state_dict({name: value.clone() for name, value in fresh_model().state_dict().items()})
    model.eval()
    model(batch(0)[0])
    model.train()
    step(*batch(1))
    assert step.uncaptured_steps == uncaptured


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
        step(["image", images[1]], batch(0)[1])  # type: ignore[list-item]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_part_that_cannot_be_captured_is_an_error_that_says_so(graphs, monkeypatch):
    model = fresh_model()
    step = TrainingStep(model, sgd(model))
    monkeypatch.setattr(RecordedGraph, "__enter__", lambda self: (_ for _ in ()).throw(RuntimeError("capture: no")))
    with pytest.raises(RuntimeError, match="could not be captured as a CUDA graph: a part of the model"):
        warm(step)


def test_bad_arguments_are_refused():
    model = fresh_model()
    optimizer = sgd(model)
    with pytest.raises(TypeError, match=r"model must be a retina_fast.RetinaNet, got .*Linear"):
        TrainingStep(torch.nn.Linear(2, 2), optimizer)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"dtype must be None or torch.bfloat16, got torch.float16"):
        TrainingStep(model, optimizer, dtype=torch.float16)
    with pytest.raises(ValueError, match="max_boxes must be at least 1, got 0"):
        TrainingStep(model, optimizer, max_boxes=0)
    with pytest.raises(ValueError, match="max_grad_norm must be positive, got 0"):
        TrainingStep(model, optimizer, max_grad_norm=0)
    step = TrainingStep(model, optimizer)
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(RuntimeError, match="under autocast"):
        step(*batch(0))
    model.eval()
    with pytest.raises(RuntimeError, match=r"call model.train\(\) first"):
        step(*batch(0))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_on_a_cpu_it_is_the_plain_step(dtype, clip):
    ours, plain = fresh_model(), fresh_model()
    optimizers = adamw(ours), adamw(plain)
    step = TrainingStep(ours, optimizers[0], max_grad_norm=clip, dtype=dtype)
    for number in range(2):
        losses = step(*batch(number))
        expected = plain_step(plain, optimizers[1], batch(number), max_grad_norm=clip, dtype=dtype)
        assert all(torch.equal(losses[name], value) for name, value in expected.items())
    assert_same_state(ours, plain, 0)
    assert isinstance(optimizers[0].param_groups[0]["lr"], float)
