"""The first channels of a conv's output: kernels against their definition, and padded convs against plain ones."""

import pytest
import torch
import torch.nn.functional as F

from retina_fast.kernels import first_channels as module
from retina_fast.kernels.first_channels import first_channels, first_channels_reference, padded_weight
from tests.ptx.cases import OTHER_ORDERS, check, names

LAST = torch.channels_last


def case(channels=36, width=40, dtype=torch.float32, device="cpu", batch=2, sides=(5, 7)):
    """x (B, width, H, W) in channels_last memory, and a bias of so many channels."""
    generator = torch.Generator().manual_seed(channels)
    x = torch.randn(batch, width, *sides, generator=generator)
    x[:, channels:] = torch.nan  # no output may depend on these
    bias = torch.randn(channels, generator=generator)
    return x.to(device, dtype).contiguous(memory_format=LAST), bias.to(device, dtype)


def gradients(dy, width):
    """dx and dbias of the definition, by autograd in float64."""
    x = torch.zeros(dy.shape[0], width, *dy.shape[2:], dtype=torch.float64, device=dy.device, requires_grad=True)
    bias = torch.zeros(dy.shape[1], dtype=torch.float64, device=dy.device, requires_grad=True)
    return torch.autograd.grad(first_channels_reference(x, bias), (x, bias), dy.double())


# Matches the reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("channels", "width"), [(36, 40), (819, 824), (9, 16), (1, 8), (16, 16)])
def test_the_kernels_give_their_definition(channels, width, dtype, device):
    x, bias = case(channels, width, dtype, device)
    y, expected = module._op(x, bias), first_channels_reference(x.double(), bias.double())
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    assert y.is_contiguous(memory_format=LAST)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=1e-6)
    dx, dbias = module._backward_op(y, width)
    expected_dx, expected_dbias = gradients(y, width)
    assert dx.is_contiguous(memory_format=LAST)
    assert torch.equal(dx.double(), expected_dx)
    torch.testing.assert_close(dbias.double(), expected_dbias, rtol=1e-5, atol=1e-4)


def test_more_pixels_than_the_programs_take_at_once(monkeypatch, device):
    monkeypatch.setattr(module, "_PROGRAMS", 2)
    monkeypatch.setattr(module, "_GRADIENT_BLOCK", 128)
    x, bias = case(9, 16, device=device, sides=(7, 11))
    y = module._op(x, bias)
    torch.testing.assert_close(y, first_channels_reference(x, bias))
    dx, dbias = module._backward_op(y, 16)
    expected_dx, expected_dbias = gradients(y, 16)
    assert torch.equal(dx.double(), expected_dx)
    torch.testing.assert_close(dbias.double(), expected_dbias, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("channels", [9, 16, 36])
def test_a_padded_conv_is_the_conv(channels):
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2, 4, 6, 5, generator=generator), torch.randn(channels, 4, 3, 3, generator=generator)
    x, weight, bias = x.double(), weight.double(), torch.randn(channels, generator=generator).double()
    inputs = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    wide = padded_weight(weight)
    assert len(wide) % 8 == 0
    assert len(wide) - channels < 8
    found, expected = first_channels(F.conv2d(x, wide, padding=1), bias), F.conv2d(x, weight, bias, padding=1)
    torch.testing.assert_close(found, expected)
    incoming = torch.randn(found.shape, generator=generator).double()
    for ours, theirs in zip(*(torch.autograd.grad(y, inputs, incoming) for y in (found, expected)), strict=True):
        torch.testing.assert_close(ours, theirs)


# Gradients


def test_gradients_of_the_operation(device):
    x, bias = case(9, 16, device=device)
    x, bias = x.nan_to_num(0.0).requires_grad_(), bias.requires_grad_()
    y = module._op(x, bias)
    incoming = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(device)
    found = torch.autograd.grad(y, (x, bias), incoming)
    for ours, expected in zip(found, gradients(incoming, 16), strict=True):
        torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-5)


# Edges


@pytest.mark.parametrize(("shape", "channels"), [((0, 8, 3, 3), 3), ((2, 8, 0, 3), 3), ((2, 8, 3, 3), 0)])
def test_empty(shape, channels, device):
    y = first_channels(torch.zeros(shape, device=device), torch.ones(channels, device=device))
    assert y.shape == (shape[0], channels, *shape[2:])


def test_what_does_not_fit_is_named():
    x = torch.zeros(1, 8, 3, 3)
    message = r"x must be \(B, C', H, W\) and bias \(C,\), C at most C', got \(1, 8, 3, 3\) and \(9,\)"
    with pytest.raises(ValueError, match=message):
        first_channels(x, torch.zeros(9))
    with pytest.raises(ValueError, match=r"got \(8, 3, 3\) and \(3,\)"):
        first_channels(x[0], torch.zeros(3))
    with pytest.raises(ValueError, match="bias must be on cpu as the other arguments are, got meta"):
        first_channels(x, torch.zeros(3, device="meta"))


# Registration


def test_opcheck_and_compiles_whole(device):
    x, bias = case(9, 16, device=device)
    x = x.nan_to_num(0.0)
    torch.library.opcheck(module._op, (x, bias))
    torch.library.opcheck(module._backward_op, (x, 24))
    compiled = torch.compile(first_channels, fullgraph=True, backend="aot_eager", dynamic=True)
    torch.testing.assert_close(compiled(x, bias), first_channels_reference(x, bias))


# As compiled code


@pytest.mark.parametrize("name", names("first_channels"))
def test_compiled(name):
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("order", OTHER_ORDERS)
@pytest.mark.parametrize("name", names("first_channels"))
def test_compiled_in_other_orders(name, order):
    check(name, **OTHER_ORDERS[order])
