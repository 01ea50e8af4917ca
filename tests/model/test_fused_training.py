"""Convs in training take along what follows them: the same outputs and gradients, and what steps aside."""

import copy
import functools
from collections import Counter
from typing import Any
from unittest import mock

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models._utils import IntermediateLayerGetter

import retina_fast
from retina_fast.backbones import fused_training
from retina_fast.backbones.frozen_norm import FrozenBatchNorm2d
from retina_fast.backbones.fused_training import convs_fused, lay_out_weights
from retina_fast.backbones.resnet_fpn import resnet_fpn
from retina_fast.forward import run_convs
from retina_fast.kernels import fused_conv as operation
from retina_fast.kernels.first_channels import padded_weight
from tests.instruments.fake_gpu import Launch, TorchOp, gpu_work_of


def with_norms() -> torch.nn.Module:
    """A ResNet's stages with random frozen norms; the conv of the stem has a bias."""
    torch.manual_seed(0)
    trunk = torchvision.models.resnet50(norm_layer=FrozenBatchNorm2d)
    trunk.conv1 = torch.nn.Conv2d(3, 64, 7, 2, 3)
    for module in trunk.modules():
        if isinstance(module, FrozenBatchNorm2d):
            for name, buffer in module.named_buffers():
                buffer.uniform_(0.5, 1.5) if "bias" not in name and "mean" not in name else buffer.uniform_(-0.2, 0.2)
    return IntermediateLayerGetter(trunk, {"layer1": "0", "layer2": "1"})


def outputs_and_gradients(model, x):
    outputs = [*model(x).values()]
    return outputs, torch.autograd.grad(torch.stack([y.square().mean() for y in outputs]).sum(), [*model.parameters()])


def test_outputs_and_gradients_are_those_of_the_norms():
    model, x = with_norms(), torch.rand(2, 3, 48, 64)
    exact = outputs_and_gradients(copy.deepcopy(model).double(), x.double())
    names = [vars(module).keys() for module in model.modules()]
    before = outputs_and_gradients(model, x)
    with convs_fused(model) as count:
        ours = outputs_and_gradients(model, x)
    assert count == len([module for module in model.modules() if isinstance(module, FrozenBatchNorm2d)]) == 24
    for mine, theirs, right in zip(*([*outputs, *grads] for outputs, grads in (ours, before, exact)), strict=True):
        assert (mine - theirs).abs().max() > 0
        assert (mine.double() - right).norm() <= 2e-6 * right.norm() + 1e-12
    with pytest.raises(ZeroDivisionError), convs_fused(model):
        raise ZeroDivisionError
    assert all(torch.equal(a, b) for a, b in zip(outputs_and_gradients(model, x)[1], before[1], strict=True))
    assert [vars(module).keys() for module in model.modules()] == names


class OwnNorm(FrozenBatchNorm2d):
    def forward(self, x):
        return -super().forward(x)


def test_what_is_not_folded():
    """Norms with hooks, of another class or dtype, that are not frozen, or whose conv stands in two places."""
    conv, norm = functools.partial(torch.nn.Conv2d, 4, 4, 3, padding=1), functools.partial(FrozenBatchNorm2d, 4)
    shared, seen = conv(), []
    parts: list[tuple[Any, ...]] = [
        (conv(), OwnNorm(4)), (conv(), torch.nn.BatchNorm2d(4)), (conv(), torch.nn.ReLU(), norm()), (shared, norm()),
        (shared,), (conv(), norm()), (conv(), norm()),
    ]  # fmt: skip
    model: Any = torch.nn.Sequential(*(torch.nn.Sequential(*part) for part in parts)).eval()
    model[-1][0].register_forward_hook(lambda *args: seen.append(args[-1]))
    model[-2][1].register_forward_pre_hook(lambda *args: seen.append(args[-1][0]))
    x = torch.rand(1, 4, 9, 9)
    expected, kept = model(x), [*seen]
    with convs_fused(model) as count:
        assert count == 0
        assert torch.equal(model(x), expected)
    assert all(map(torch.equal, kept, seen[2:]))
    half = torch.nn.Sequential(conv().bfloat16(), norm())
    with convs_fused(half) as count:
        assert count == 0


def detector() -> Any:
    """A RetinaNet of a ResNet-18 with frozen norms, every weight of which is trained."""
    torch.manual_seed(0)
    trunk = torchvision.models.resnet18(norm_layer=FrozenBatchNorm2d)
    return retina_fast.RetinaNet(resnet_fpn(trunk, 5, p6_from_c5=False), 3)


def head_outputs_and_gradients(model, x):
    outputs = [level for levels in run_convs(model, x)[1].values() for level in levels]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [*outputs, *torch.autograd.grad(torch.stack([y.square().mean() for y in outputs]).sum(), trained)]


@pytest.mark.parametrize("frozen", [False, True])
def test_a_whole_detector(frozen, monkeypatch, device):
    """Pyramid and heads, too: their convs run at several levels, and their weights' gradients add up."""
    calls = mock.Mock(side_effect=operation.F.conv2d)
    monkeypatch.setattr(operation.F, "conv2d", calls)
    model, x = detector().to(device), torch.rand(1, 3, 64, 64).to(device)
    model.backbone.body.conv1.requires_grad_(not frozen)
    exact = head_outputs_and_gradients(copy.deepcopy(model).double(), x.double())
    calls.reset_mock()
    with convs_fused(model):
        ours = head_outputs_and_gradients(model, x)
    assert frozen or device.type == "cuda" or calls.call_count == 20 + 8 + 50
    # Whether a ReLU keeps a value near 0 is decided by rounding; here it is not, on a GPU it may be.
    tolerance = 1e-2 if device.type == "cuda" else 1e-5
    for mine, right in zip(ours, exact, strict=True):
        assert (mine.double() - right).norm() <= tolerance * right.norm() + 1e-12


@pytest.mark.parametrize("frozen", [False, True])
def test_the_passes_of_a_step_on_a_gpu(frozen):
    """Recorded on fake CUDA tensors in mixed precision: behind each conv stands one pass, and nothing else but weights
    that are made ready, pooling and the pyramid's upsampling."""
    model = detector()
    model.backbone.body.conv1.requires_grad_(not frozen)

    def prepare():
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                for name, value in tensors.items():
                    if value is not None:
                        fake = torch.empty(value.shape, dtype=value.dtype, device="cuda")
                        tensors[name] = fake.requires_grad_(value.requires_grad)
        lay_out_weights(model)
        pixels = torch.empty(2, 3, 64, 64, dtype=torch.bfloat16, device="cuda")
        return pixels.contiguous(memory_format=torch.channels_last)

    def forward(pixels):
        torch.set_autocast_enabled("cuda", True)  # torch.autocast would ask for a GPU
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        try:
            with convs_fused(model):
                run_convs(model, pixels)
        finally:
            torch.set_autocast_enabled("cuda", False)

    work = gpu_work_of(forward, prepare)
    convs = [step for step in work if isinstance(step, TorchOp) and step.name == "convolution"]
    passes = [step for step in work if isinstance(step, Launch)]
    names = Counter(step.kernel.__name__ for step in passes)
    stem = {"_stem_conv_kernel": 1, "_max_pool_relu_kernel": 1} if frozen else {}
    pyramid = {"_conv_pointwise_kernel": 2}  # whose sum is with a smaller map
    last = {"_first_channels_kernel": 10}  # of two heads at five levels
    assert names == {**stem, **pyramid, **last, "_conv_epilogue_kernel": len(convs) - 10}
    assert len(convs) == 20 + 8 + 50 - 2 - frozen
    others = {step.name for step in work if isinstance(step, TorchOp)} - {"convolution"}
    assert others <= {
        "mul",
        "copy_",
        "cat",
        "add",
        "rsqrt",
        "sub",
        "max_pool2d_with_indices",
        "upsample_nearest2d",
        "relu",
        "constant_pad_nd",
    }


def test_channels_of_a_last_conv_may_be_padded(monkeypatch):
    """As on a GPU in half precision; the weights once for all calls of a step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 9, 3, padding=1), nn.ReLU(), nn.Conv2d(9, 5, 3, stride=2))
    x, made = torch.rand(2, 3, 9, 8), mock.Mock(side_effect=padded_weight)
    monkeypatch.setattr(fused_training, "suits_padding", lambda *_: True)
    monkeypatch.setattr(fused_training, "padded_weight", made)

    def run() -> list[torch.Tensor]:
        outputs = [model(x), model(x + 1)]
        total = torch.stack([y.square().sum() for y in outputs]).sum()
        return [*outputs, *torch.autograd.grad(total, [*model.parameters()])]

    expected = run()
    with convs_fused(model):
        found = run()
    made.assert_called_once()
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_weights_in_channels_last():
    model: Any = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.Linear(3, 3))
    before, parameters = copy.deepcopy(model.state_dict()), [*model.parameters()]
    lay_out_weights(model)
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert all(p is q for p, q in zip(model.parameters(), parameters, strict=True))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
