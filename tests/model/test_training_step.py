"""The captured training step: on a GPU, or on a CPU with a stand-in for CUDA graphs; and on fake CUDA tensors."""

import copy
import functools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.models.detection.anchor_utils import AnchorGenerator

import retina_fast
from instruments.fake_gpu import launches_of
from retina_fast import TrainingStep, training_step
from tests.model.recorded_graph import RecordedGraph, play_on_cpu

pytestmark = pytest.mark.usefixtures("one_thread")
K = 3


GPU = torch.cuda.is_available()
TOLERANCE = 1e-4 if GPU else 1e-6  # cuDNN may choose another kernel for what is captured
needs_gpu = pytest.mark.skipif(not GPU, reason="needs a GPU")


@pytest.fixture
def graphs(monkeypatch):
    if GPU:
        monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    else:
        play_on_cpu(monkeypatch)


class Trunk(nn.Module):
    """Two small levels, with the norm and the activation of a real trunk."""

    out_channels = 8

    def __init__(self, dropout):
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.stem, self.norm = nn.Conv2d(3, 8, 8, stride=8, bias=False), nn.BatchNorm2d(8)
        self.down = nn.Conv2d(8, 8, 3, stride=2, padding=1)

    def forward(self, x):
        fine = self.norm(self.stem(x)).relu()
        return {"0": fine, "1": self.down(self.dropout(fine))}


def fresh_model(device="cuda" if GPU else "cpu", dropout=0.0) -> Any:
    torch.manual_seed(0)
    anchors = AnchorGenerator(((16,), (32,)), ((0.5, 1.0, 2.0),) * 2)
    return retina_fast.RetinaNet(Trunk(dropout), K, 64, 96, anchor_generator=anchors).train().to(device)


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


def assert_same_state(model, other, tolerance=TOLERANCE):
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


def _move_weights(model, optimizer):
    model.before = [p.data for p in model.parameters()]  # held, lest the new ones come to lie there
    model.double().float()


CHANGES = {
    "loss type": lambda model, optimizer: setattr(model.head.regression_head, "_loss_type", "giou"),
    "focusing exponent": lambda model, optimizer: setattr(model, "focal_gamma", 1.5),
    "threshold": lambda model, optimizer: setattr(model.proposal_matcher, "low_threshold", 0.3),
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
        step(["image", images[1]], batch(0)[1])  # type: ignore[list-item]
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


def test_bad_arguments_are_refused():
    model = fresh_model("cpu")
    optimizer = sgd(model)
    with pytest.raises(TypeError, match=r"model must be a retina_fast.RetinaNet, got .*Linear"):
        TrainingStep(torch.nn.Linear(2, 2), optimizer)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"dtype must be None or torch.bfloat16, got torch.float16"):
        TrainingStep(model, optimizer, dtype=torch.float16)
    with pytest.raises(ValueError, match="max_boxes must be at least 1, got 0"):
        TrainingStep(model, optimizer, max_boxes=0)
    with pytest.raises(ValueError, match="max_grad_norm must be positive, got 0"):
        TrainingStep(model, optimizer, max_grad_norm=0)
    with pytest.raises(ValueError, match="accumulate must be at least 1, got 0"):
        TrainingStep(model, optimizer, accumulate=0)
    step = TrainingStep(model, optimizer)
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(RuntimeError, match="under autocast"):
        step(*batch(0))
    model.eval()
    with pytest.raises(RuntimeError, match=r"call model.train\(\) first"):
        step(*batch(0))


def without_batch_norm(model):
    model.backbone.norm = nn.GroupNorm(2, 8)
    return model


@pytest.mark.parametrize("parts", [2, 3, 9])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_a_batch_in_parts_is_the_batch(parts, as_tensor):
    ours, plain = (without_batch_norm(fresh_model("cpu")).double() for _ in range(2))
    optimizers = sgd(ours), sgd(plain)
    step = TrainingStep(ours, optimizers[0], max_grad_norm=1.0, accumulate=parts)
    for number in range(2):
        images, targets = batch(number, images=5)
        images = [image.double() for image in images]
        losses = step(torch.stack(images) if as_tensor else images, targets)
        expected = plain_step(plain, optimizers[1], (images, targets), max_grad_norm=1.0)
        assert all(losses[name].item() == pytest.approx(value.item()) for name, value in expected.items())
    assert_same_state(ours, plain)
    with pytest.raises(IndexError, match="targets has 4 entries for 5 images"):
        step(images, targets[:4])


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


@pytest.mark.parametrize("parts", [1, 2])
def test_processes_exchange_gradients_once_a_step(parts):
    """In a group of one; tests/test_processes.py has several processes."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        ours, plain = (without_batch_norm(fresh_model("cpu")) for _ in range(2))
        optimizers, exchanged = (sgd(ours), sgd(plain)), []

        def exchange(state, bucket):
            exchanged.append(bucket.index())
            return dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda done: done.value()[0])

        parallel = DistributedDataParallel(ours)
        parallel.register_comm_hook(None, exchange)
        step = TrainingStep(parallel, optimizers[0], accumulate=parts)
        for number in range(3):
            step(*batch(number))
            plain_step(plain, optimizers[1], batch(number))
        assert exchanged.count(0) == 3
        assert step.uncaptured_steps == 3
        assert_same_state(ours, plain)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_on_a_cpu_it_is_the_plain_step(dtype, clip):
    ours, plain = fresh_model("cpu"), fresh_model("cpu")
    optimizers = adamw(ours), adamw(plain)
    step = TrainingStep(ours, optimizers[0], max_grad_norm=clip, dtype=dtype)
    for number in range(2):
        losses = step(*batch(number))
        expected = plain_step(plain, optimizers[1], batch(number), max_grad_norm=clip, dtype=dtype)
        assert all(torch.equal(losses[name], value) for name, value in expected.items())
    assert_same_state(ours, plain, 0)
    assert isinstance(optimizers[0].param_groups[0]["lr"], float)


# On fake CUDA tensors: nothing waits for the device.


def to_fake_gpu(model) -> None:
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = nn.Parameter(torch.empty(p.shape, device="cuda"))
        for name, buffer in module._buffers.items():
            module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cuda")
    model.anchor_generator.cell_anchors = [torch.empty(cell.shape) for cell in model.anchor_generator.cell_anchors]


@pytest.mark.parametrize("where", ["cpu", "cuda"])
@pytest.mark.parametrize("builder", ["retinanet_resnet18_fpn", "retinanet_resnet18_fpn_v2"])
def test_a_training_forward_never_waits_for_the_device(monkeypatch, builder, where):
    """From images and targets on either side to the losses. Fakes cannot be pinned, nor can events be recorded."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr(torch.cuda, "Event", lambda: SimpleNamespace(record=lambda stream: None, query=lambda: False))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    model = getattr(retina_fast, builder)(num_classes=K, weights_backbone=None, min_size=128, max_size=256)

    def forward():
        to_fake_gpu(model)
        model.check_targets = where == "cuda"  # on a CPU the check reads values, as it may
        images = [torch.empty(3, 100, 120, device=where) for _ in range(3)]
        targets = [
            {"boxes": torch.empty(n, 4, device=where), "labels": torch.empty(n, dtype=torch.int64, device=where)}
            for n in (0, 2, 7)
        ]
        inputs = model._inputs(training_step._uploaded(images, torch.device("cuda")), targets)
        losses = model._losses(model._network(inputs))
        assert {loss.device.type for loss in losses.values()} == {"cuda"}

    launched = [launch.kernel.__name__ for launch in launches_of(forward)]
    assert launched.count("_anchor_matching_kernel") == 2
    assert {"_image_batch_kernel", "_focal_loss_kernel", "_box_loss_kernel"} < set(launched)


# On a GPU.


@needs_gpu
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("builder", ["retinanet_resnet18_fpn", "retinanet_resnet18_fpn_v2"])
def test_twenty_captured_steps_equal_uncaptured_ones(graphs, builder, dtype):
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        model = getattr(retina_fast, builder)(num_classes=K, weights_backbone=None, min_size=128, max_size=128)
        models.append(model.train().cuda())
    optimizers = [torch.optim.SGD(model.parameters(), lr=2**-8, momentum=0.9) for model in models]
    step = TrainingStep(models[0], optimizers[0], dtype=dtype)
    for number in range(24):
        losses = step(*batch(number, size=(128, 128)))
        expected = plain_step(models[1], optimizers[1], batch(number, size=(128, 128)), dtype=dtype)
        for name, value in expected.items():
            assert abs(losses[name] - value) <= (1e-3 if dtype is None else 5e-2) * value, (number, name)
    assert step.replayed_steps >= 20
    if dtype is None:
        assert_same_state(models[0], models[1], 1e-3)


@needs_gpu
@pytest.mark.parametrize("where", ["cpu", "cuda"])
def test_neither_a_captured_nor_an_uncaptured_step_waits(graphs, where):
    model = fresh_model()
    optimizer = adamw(model)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 50)
    step = warmed(model, optimizer, max_grad_norm=1.0)
    batches: list[Any] = []
    for kind in ({}, {"size": (64, 80)}) * 3:
        images, targets = batch(len(batches), **kind)
        images = [image.pin_memory() if where == "cpu" else image.cuda() for image in images]
        batches.append((images, [{key: value.to(where) for key, value in target.items()} for target in targets]))
    step(*batches[1])  # the anchors of the other size, and what cuDNN sets up for it
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for given in batches:
            step(*given)
            schedule.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert step.replayed_steps == 4
