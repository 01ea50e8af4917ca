"""The training step on a GPU, and on fake CUDA tensors: nothing waits for the device."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import retina_fast
from retina_fast import TrainingStep, forward
from retina_fast.device import uploaded
from tests.instruments.fake_gpu import launches_of
from tests.model.steps import K, adamw, assert_same_state, batch, fresh_model, needs_gpu, plain_step, warmed

pytestmark = pytest.mark.usefixtures("one_thread")

# On fake CUDA tensors: nothing waits for the device.


def to_fake_gpu(model) -> None:
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = nn.Parameter(torch.empty(p.shape, device="cuda"))
        for name, buffer in module._buffers.items():
            module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cuda")
    model.anchor_generator.cell_anchors = [torch.empty(cell.shape) for cell in model.anchor_generator.cell_anchors]


@pytest.mark.skipif(torch.cuda.is_available(), reason="fakes stand in for a GPU; below a real one shows the same")
@pytest.mark.parametrize("where", ["cpu", "cuda"])
@pytest.mark.parametrize("builder", ["retinanet_resnet18_fpn", "retinanet_resnet18_fpn_v2"])
def test_a_training_forward_never_waits_for_the_device(monkeypatch, builder, where):
    """From images and targets on either side to the losses. Fakes cannot be pinned, nor can events be recorded."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr(torch.cuda, "Event", lambda: SimpleNamespace(record=lambda stream: None, query=lambda: False))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    model = getattr(retina_fast, builder)(num_classes=K, weights_backbone=None, min_size=128, max_size=256)

    def step():
        to_fake_gpu(model)
        model.check_targets = where == "cuda"  # on a CPU the check reads values, as it may
        images = [torch.empty(3, 100, 120, device=where) for _ in range(3)]
        targets = [
            {"boxes": torch.empty(n, 4, device=where), "labels": torch.empty(n, dtype=torch.int64, device=where)}
            for n in (0, 2, 7)
        ]
        made = model.make_batch(uploaded(images, torch.device("cuda")), targets)
        losses = model.losses_of(made, forward.run(model, made))
        assert {loss.device.type for loss in losses.values()} == {"cuda"}

    launched = [launch.kernel.__name__ for launch in launches_of(step)]
    assert {
        "_anchor_matching_kernel",
        "_match_kernel",
        "_image_batch_kernel",
        "_focal_loss_kernel",
        "_box_loss_kernel",
    } < set(launched)


# On a GPU.


@needs_gpu
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("builder", ["retinanet_resnet18_fpn", "retinanet_resnet18_fpn_v2"])
def test_twenty_captured_steps_equal_uncaptured_ones(graphs, builder, dtype):
    """Each step begins with the weights, buffers and momentum of the captured run: left to themselves, two uncaptured
    runs drift apart, too, since atomic sums come in any order, and norms over a batch of two images enlarge what
    differs in the last bits at each step.

    With other roundings, as a CPU's Winograd convs have them, losses of a step from one state differ by 1e-6 and what
    it adds to the weights by 1e-2, in bfloat16 by 4e-3 and 0.3. Images of the batch before differ by 2e-3 and 0.3,
    ground truths by 2e-2 and 0.3, a learning rate that is 10% less by 0.1, a momentum that is lost by 0.9."""
    loss_tolerance, tolerance, state_tolerance = (1e-5, 0.03, 1e-4) if dtype is None else (0.02, 0.5, 0.02)
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        model = getattr(retina_fast, builder)(num_classes=K, weights_backbone=None, min_size=128, max_size=128)
        models.append(model.train().cuda())
    optimizers = [torch.optim.SGD(model.parameters(), lr=2**-14, momentum=0.9) for model in models]
    step = TrainingStep(models[0], optimizers[0], dtype=dtype)
    for number in range(24):
        begin = _flat(models[0].parameters())
        models[1].load_state_dict(models[0].state_dict())
        if number:
            for momentum, captured in zip(_momenta(optimizers[1]), _momenta(optimizers[0]), strict=True):
                momentum.copy_(captured)
        losses = step(*batch(number, size=(128, 128)))
        expected = plain_step(models[1], optimizers[1], batch(number, size=(128, 128)), dtype=dtype)
        for name, value in expected.items():
            assert abs(losses[name] - value) <= loss_tolerance * value, (number, name)
        moved, wanted = (_flat(model.parameters()) - begin for model in models)
        assert (moved - wanted).norm() <= tolerance * wanted.norm(), number
        assert_same_state(models[0], models[1], state_tolerance)
    assert step.replayed_steps >= 20


def _momenta(optimizer) -> list[torch.Tensor]:
    return [optimizer.state[p]["momentum_buffer"] for p in optimizer.param_groups[0]["params"]]


def _flat(tensors) -> torch.Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


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
