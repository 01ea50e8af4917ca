"""The training step where nothing is captured: in parts, in processes, on a CPU; and what it refuses."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.models.resnet import BasicBlock, resnet18

from retina_fast import RetinaNet, TrainingStep
from retina_fast.backbones.frozen_norm import FrozenBatchNorm2d
from retina_fast.backbones.resnet_fpn import resnet_fpn
from retina_fast.kernels import conv_calls
from tests.model.steps import K, adamw, assert_same_state, batch, fresh_model, plain_step, sgd

pytestmark = pytest.mark.usefixtures("one_thread")


def test_bad_arguments_are_refused():
    model = fresh_model("cpu")
    optimizer = sgd(model)
    with pytest.raises(TypeError, match=r"model must be a retina_fast.RetinaNet, got .*Linear"):
        TrainingStep(torch.nn.Linear(2, 2), optimizer)
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
    with pytest.raises(AssertionError, match="targets should not be none"):
        step(images, None)  # pyrefly: ignore[bad-argument-type]


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


# Convs of a step on a CPU


@pytest.fixture
def winograd(monkeypatch):
    """Small convs run by Winograd's algorithm, too; a list of their calls."""
    calls, run = [], conv_calls.winograd_conv

    def recorded(*args):
        calls.append(1)
        return run(*args)

    monkeypatch.setattr(conv_calls, "gains_from_winograd", lambda *_: True)
    monkeypatch.setattr(conv_calls, "winograd_conv", recorded)
    return calls


def pretrained():
    """A model with frozen norms, in which nothing amplifies rounding, of which a stage and the stem are frozen."""
    torch.manual_seed(0)
    trunk = resnet18(norm_layer=FrozenBatchNorm2d)
    return RetinaNet(resnet_fpn(trunk, 3, p6_from_c5=False), K, 64, 96).train()


def viewing(model):
    """A part of the user's own that needs contiguous maps."""

    class Viewing(nn.ReLU):
        def forward(self, x):
            return super().forward(x.view(-1)).view(x.shape)

    for block in model.modules():
        if isinstance(block, BasicBlock):
            block.relu = Viewing()
    return model


def recorded_sgd(model, gradients):
    """An optimizer that keeps the gradients of its steps."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-3)
    optimizer.register_step_pre_hook(lambda *_: gradients.extend(p.grad.clone() for p in trained))
    return optimizer


@pytest.mark.parametrize(
    "change", [lambda model: model, pytest.param(viewing, marks=pytest.mark.slow)], ids=["stock", "own part"]
)
def test_gradients_by_winograds_algorithm(change, winograd):
    """On one of three batches: now and then a value is so near to 0 that rounding decides whether ReLU keeps it, which
    moves the gradients before it by 4e-4 to 2e-2; in which batch depends on the processor."""
    for step in (1, 2, 5):
        ours, plain = change(pretrained()), change(pretrained())
        gradients: list[list[torch.Tensor]] = [[], []]
        optimizers = [recorded_sgd(model, kept) for model, kept in zip((ours, plain), gradients, strict=True)]
        winograd.clear()
        losses = TrainingStep(ours, optimizers[0])(*batch(step))
        expected = plain_step(plain, optimizers[1], batch(step))
        assert len(winograd) > 60
        for name, value in expected.items():
            assert abs(losses[name] - value) <= 1e-5 * value
        assert len(gradients[0]) > 40
        assert all(mine.is_contiguous() for mine in gradients[0])
        pairs = zip(*gradients, strict=True)
        changes = [float((mine - other).norm() / other.norm()) for mine, other in pairs]
        if max(changes) <= 1e-4:
            return
    pytest.fail("the gradients of no batch agree to 1e-4")
