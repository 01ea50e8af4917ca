"""What follows a conv in one pass: the kernel against its definition."""

import pytest
import torch

from retina_fast.kernels import conv_epilogue as module
from retina_fast.kernels.conv_epilogue import (
    ACTIVATIONS,
    conv_epilogue_,
    conv_epilogue_reference,
    epilogue_gradients,
    epilogue_gradients_reference,
)
from tests.ptx.cases import OTHER_ORDERS, check, names


def case(channels=12, dtype=torch.float32, device="cpu", with_bias=True, with_z=True):
    """y and z (2, C, 5, 7) in channels_last memory, and a bias."""
    generator = torch.Generator().manual_seed(channels)
    y, z = (2 * torch.randn(2, channels, 5, 7, generator=generator) for _ in range(2))
    y[0, 0, 0, :3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    y, z = (x.to(device, dtype).contiguous(memory_format=torch.channels_last) for x in (y, z))
    bias = torch.randn(channels, generator=generator).to(device, dtype)
    return y, bias if with_bias else None, z if with_z else None


# Matches the reference


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("channels", "with_bias", "with_z"), [(64, True, True), (36, True, False), (819, False, True)])
def test_the_kernel_gives_its_definition(channels, with_bias, with_z, dtype, activation, device):
    y, bias, z = case(channels, dtype, device, with_bias, with_z)
    expected = conv_epilogue_reference(y, bias, z, activation)
    public = y.clone(memory_format=torch.preserve_format)
    module._op(y, bias, z, activation)
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    assert conv_epilogue_(public, bias, z, activation) is public
    for ours in (y, public):
        torch.testing.assert_close(ours, expected, rtol=tolerance, atol=1e-6, equal_nan=True)


def test_the_reference_is_torchs_own_operations():
    y, bias, z = case(dtype=torch.float64)
    total = y + bias[:, None, None] + z
    for activation, expected in {"none": total, "relu": total.relu(), "swish": torch.nn.functional.silu(total)}.items():
        torch.testing.assert_close(conv_epilogue_reference(y, bias, z, activation), expected, equal_nan=True)


def test_gradients():
    y, bias, z = case(dtype=torch.float64)
    y = y.nan_to_num(0.5, 0.5, 0.5)
    inputs = [x.requires_grad_() for x in (y, bias, z)]
    for activation in ACTIVATIONS:
        assert torch.autograd.gradcheck(lambda y, b, z, a=activation: conv_epilogue_(y.clone(), b, z, a), inputs)


# The gradients' kernel


@pytest.mark.parametrize(("with_relu", "with_bias"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("channels", "batch"), [(64, 3), (36, 8), (300, 2), (5, 1)])
def test_the_gradients_kernel_gives_its_definition(channels, batch, dtype, with_relu, with_bias, device):
    """Rows of 36 or 5 channels are handled several at a time where their number allows it."""
    generator = torch.Generator().manual_seed(channels)
    dy, y = (torch.randn(batch, channels, 6, 7, generator=generator).to(device, dtype) for _ in range(2))
    dy, y = (t.contiguous(memory_format=torch.channels_last) for t in (dy, y.relu()))
    y[0, 0, 0, :2] = torch.tensor([float("nan"), float("inf")])
    output, exact = (y, y.double()) if with_relu else (None, None)
    dz, dbias = module._gradients_op(dy, output, with_bias)
    expected, sums = epilogue_gradients_reference(dy.double(), exact, with_bias)
    assert torch.equal(dz.double(), expected) if with_relu else not dz.numel()
    if with_bias:
        torch.testing.assert_close(dbias.double(), sums, rtol=1e-5, atol=1e-5)
    public, public_bias = epilogue_gradients(dy, output, with_bias)
    assert torch.equal(public.double(), expected)
    assert public_bias is None or public_bias.dtype == torch.float32


def test_gradients_of_an_empty_batch(device):
    y = torch.zeros(0, 4, 3, 3, device=device)
    dz, dbias = epilogue_gradients(y, y, True)
    assert dz.shape == y.shape
    assert dbias is not None
    assert dbias.tolist() == [0.0] * 4


# Edges


def test_rows_of_a_bias_and_other_layouts_of_z(device):
    y, bias, z = case(device=device)
    expected = conv_epilogue_reference(y, bias, z, "relu")
    strided = torch.stack((bias, -bias), dim=1)[:, 0]
    torch.testing.assert_close(conv_epilogue_(y, strided, z.contiguous(), "relu"), expected, equal_nan=True)


@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (2, 0, 3, 3), (1, 4, 0, 3)])
def test_empty(shape, device):
    y = torch.zeros(shape, device=device).contiguous(memory_format=torch.channels_last)
    assert conv_epilogue_(y, torch.ones(shape[1], device=device), y.clone(), "relu").shape == shape


def test_what_does_not_fit_is_named():
    y = torch.zeros(1, 4, 3, 3).contiguous(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match=r"y must be \(B, C, H, W\) in channels_last memory, got \(1, 4, 3, 3\)"):
        conv_epilogue_(torch.zeros(1, 4, 3, 3), None, None, "relu")
    with pytest.raises(ValueError, match=r"bias must be \(C,\) = \(4,\), got \(3,\)"):
        conv_epilogue_(y, torch.zeros(3), None, "relu")
    with pytest.raises(ValueError, match=r"z must be \(B, C, H, W\) = \(1, 4, 3, 3\), got \(1, 4, 3, 2\)"):
        conv_epilogue_(y, None, torch.zeros(1, 4, 3, 2), "relu")
    with pytest.raises(ValueError, match="bias must be on cpu as the other arguments are, got meta"):
        conv_epilogue_(y, torch.zeros(4, device="meta"), None, "relu")
    with pytest.raises(ValueError, match="activation must be one of none, relu, swish, got 'gelu'"):
        conv_epilogue_(y, None, None, "gelu")


# Registration


def test_opcheck_and_compiles_whole(device):
    y, bias, z = case(device=device)
    torch.library.opcheck(module._op, (y.nan_to_num(0.0, 0.0, 0.0), bias, z, "relu"))
    for output in (z, None):
        torch.library.opcheck(module._gradients_op, (y.nan_to_num(0.0, 0.0, 0.0), output, True))
    compiled = torch.compile(conv_epilogue_, fullgraph=True, backend="aot_eager", dynamic=True)
    expected = conv_epilogue_reference(y, bias, z, "swish")
    torch.testing.assert_close(compiled(y, bias, z, "swish"), expected, equal_nan=True)


# As compiled code


@pytest.mark.parametrize("name", [*names("conv_epilogue"), *names("epilogue_gradients")])
def test_compiled(name):
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("order", OTHER_ORDERS)
@pytest.mark.parametrize("name", [*names("conv_epilogue"), *names("epilogue_gradients")])
def test_compiled_in_other_orders(name, order):
    check(name, **OTHER_ORDERS[order])
