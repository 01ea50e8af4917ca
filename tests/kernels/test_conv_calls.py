"""Calls of F.conv2d taken over within a training step: outputs and gradients stay, and so does what a user can see."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from retina_fast.kernels import conv_calls
from retina_fast.kernels.conv_calls import fast_convs
from retina_fast.kernels.conv_winograd import Scratch

X = torch.randn(2, 6, 10, 7, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """Small convs are taken over, too; a list of those that were."""
    seen: list[int] = []
    monkeypatch.setattr(conv_calls, "gains_from_winograd", lambda *_: True)
    run = conv_calls.winograd_conv

    def recorded(*args):
        seen.append(1)
        return run(*args)

    monkeypatch.setattr(conv_calls, "winograd_conv", recorded)
    return seen


def conv(bias=True):
    torch.manual_seed(0)
    return nn.Conv2d(6, 5, 3, padding=1, bias=bias)


def error(ours, exact):
    return float((ours.double() - exact).norm() / exact.norm())


# Equal to the convs of PyTorch


@pytest.mark.parametrize("frozen", [None, "x", "weight", "bias"])
@pytest.mark.parametrize("last", [False, True])
def test_output_and_gradients(last, frozen, calls):
    layer, exact = conv(), conv().double()
    x, x64 = X.clone().requires_grad_(frozen != "x"), X.double().requires_grad_(frozen != "x")
    for model in (layer, exact):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name != frozen)
    with fast_convs(Scratch(), channels_last=last):
        y = layer(x)
        y.square().sum().backward()
    y64 = exact(x64)
    y64.square().sum().backward()
    assert len(calls) == 2 - (frozen == "x")
    assert error(y.detach(), y64.detach()) < 2e-6
    assert y.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    for ours, theirs in zip((x, *layer.parameters()), (x64, *exact.parameters()), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        if ours.grad is not None:
            assert error(ours.grad, theirs.grad) < 5e-6
            assert ours.grad.stride() == ours.stride()


def penalty(layer, x):
    """The gradient of a gradient's norm with respect to the weights."""
    (dx,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    return torch.autograd.grad(dx.square().sum(), layer.weight)[0]


def test_a_gradient_penalty(calls):
    exact = penalty(conv().double(), X.double().requires_grad_())
    with fast_convs(Scratch(), channels_last=True):
        assert error(penalty(conv(), X.clone().requires_grad_()), exact) < 5e-6
    assert calls


def test_several_gradients_at_once():
    x, incoming = X.clone().requires_grad_(), torch.randn(3, 2, 5, 10, 7)
    layer = conv(bias=False)
    with fast_convs(Scratch(), channels_last=True):
        ours = torch.autograd.grad(layer(x), (x, layer.weight), incoming, is_grads_batched=True)
    theirs = torch.autograd.grad(layer(x), (x, layer.weight), incoming, is_grads_batched=True)
    for one, other in zip(ours, theirs, strict=True):
        assert error(one, other.double()) < 1e-5


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpoints(reentrant, calls):
    layer, x = conv(), X.clone().requires_grad_()
    with fast_convs(Scratch(), channels_last=True):
        checkpoint(layer, x, use_reentrant=reentrant).sum().backward()
    assert calls
    again, other = X.clone().requires_grad_(), conv()
    other(again).sum().backward()
    torch.testing.assert_close([x.grad, layer.weight.grad], [again.grad, other.weight.grad], rtol=1e-4, atol=1e-5)


def test_hooks_and_parametrizations_of_the_module(calls):
    layer, seen = nn.utils.parametrizations.weight_norm(conv()), []
    layer.register_forward_hook(lambda *_: seen.append(1))
    expected = layer(X)
    with fast_convs(Scratch(), channels_last=False):
        torch.testing.assert_close(layer(X), expected)
    assert (len(seen), len(calls)) == (2, 1)


# Those that are not taken over


class Subclass(torch.Tensor):
    pass


@pytest.mark.parametrize(
    "call",
    [
        lambda: F.conv2d(X, torch.ones(5, 6, 3, 3)),
        lambda: F.conv2d(X, torch.ones(5, 6, 3, 3), stride=2, padding=1),
        lambda: F.conv2d(X, torch.ones(5, 6, 3, 1), padding="same"),
        lambda: F.conv2d(X, torch.ones(6, 1, 3, 3), padding=1, groups=6),
        lambda: F.conv2d(X[0], torch.ones(5, 6, 3, 3), padding=1),
        lambda: F.conv2d(X.double(), torch.ones(5, 6, 3, 3).double(), padding=1),
        lambda: F.conv2d(X.as_subclass(Subclass), torch.ones(5, 6, 3, 3), padding=1),
        lambda: torch.func.vmap(lambda x: F.conv2d(x, torch.ones(5, 6, 3, 3), padding=1))(X[:, None]),
    ],
    ids=["no padding", "stride", "same", "groups", "3-D", "float64", "subclass", "vmap"],
)
@pytest.mark.parametrize("last", [False, True])
def test_others_are_left(call, last, calls):
    expected = call()
    with fast_convs(Scratch(), channels_last=last):
        ours = call()
    torch.testing.assert_close(ours, expected)
    assert type(ours) is type(expected)
    assert not calls


@pytest.mark.parametrize("one", [np.int64(1), torch.tensor(1), torch.Size([1, 1])], ids=["numpy", "tensor", "size"])
def test_every_kind_of_size_that_pytorch_takes(one, calls):
    weight = torch.ones(5, 6, 3, 3)
    with fast_convs(Scratch(), channels_last=False):
        y = F.conv2d(X, weight, stride=one, padding=one, dilation=one)
    assert calls
    assert error(y, F.conv2d(X.double(), weight.double(), padding=1)) < 2e-6


@pytest.mark.parametrize(
    ("x", "bias"),
    [(X[:, :1], None), (X, torch.ones(1)), (X, torch.ones(7, 5)), (X, torch.ones(5, dtype=torch.float64))],
    ids=["channels", "one bias", "2-D bias", "float64 bias"],
)
def test_errors_are_those_of_pytorch(x, bias):
    weight = torch.ones(5, 6, 3, 3)
    with pytest.raises(RuntimeError) as expected:
        F.conv2d(x, weight, bias, padding=1)
    with fast_convs(Scratch(), channels_last=False), pytest.raises(RuntimeError) as ours:
        F.conv2d(x, weight, bias, padding=1)
    assert str(ours.value) == str(expected.value)


def test_a_compiled_module(calls):
    """Its graph holds the conv of PyTorch."""
    torch._dynamo.reset()
    compiled = torch.compile(conv(), backend="aot_eager", fullgraph=True)
    with fast_convs(Scratch(), channels_last=True):
        ours = compiled(X)
    torch.testing.assert_close(ours, conv()(X))
    assert not calls


def test_autocast_keeps_its_dtype(calls):
    with fast_convs(Scratch(), channels_last=True), torch.autocast("cpu", torch.bfloat16):
        assert conv()(X).dtype == torch.bfloat16
    assert not calls


def test_nothing_stays_after_an_error(calls):
    with pytest.raises(ZeroDivisionError), fast_convs(Scratch(), channels_last=True):
        raise ZeroDivisionError
    conv()(X)
    assert not calls
