"""Max pooling with its bias and ReLU: the kernel against its definition."""

import pytest
import torch
import torch.nn.functional as F

from retina_fast.kernels import max_pool_relu as module
from retina_fast.kernels.max_pool_relu import max_pool_relu, max_pool_relu_reference
from tests.ptx.cases import OTHER_ORDERS, check, names


def case(shape=(2, 12, 9, 14), dtype=torch.float32, device="cpu", with_bias=True):
    """x of this shape in channels_last memory, with NaN and infinities, and a bias."""
    generator = torch.Generator().manual_seed(shape[1])
    x = 2 * torch.randn(shape, generator=generator)
    x.flatten()[:3] = torch.tensor([float("nan"), float("inf"), -float("inf")])[: x.numel()]
    bias = torch.randn(shape[1], generator=generator).to(device, dtype)
    return x.to(device, dtype).contiguous(memory_format=torch.channels_last), bias if with_bias else None


# Matches the reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(2, 12, 9, 14), (1, 64, 8, 37), (1, 130, 3, 5), (3, 1, 1, 1)], ids=str)
def test_the_kernel_gives_its_definition(shape, dtype, device):
    """To the last bit; but the interpreter does not round to bfloat16, so that there no bias is added."""
    x, bias = case(shape, dtype, device, with_bias=dtype != torch.bfloat16)
    expected = max_pool_relu_reference(x, bias)
    for ours in (module._op(x, bias), max_pool_relu(x, bias)):
        assert ours.shape == expected.shape
        torch.testing.assert_close(ours, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_reference_is_torchs_own_operations(dtype):
    """The bias added and rounded before pooling, as PyTorch does it, gives the same to the last bit."""
    x, bias = case(dtype=dtype)
    expected = F.max_pool2d((x + bias[:, None, None]).relu(), kernel_size=3, stride=2, padding=1)
    torch.testing.assert_close(max_pool_relu_reference(x, bias), expected, rtol=0, atol=0, equal_nan=True)


def test_gradients():
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((1, 2, 4, 5), (2,))]
    assert torch.autograd.gradcheck(max_pool_relu, [tensor.requires_grad_() for tensor in inputs])


# Edges


def test_windows_without_a_number_greater_than_minus_infinity(device):
    x = torch.full((1, 2, 3, 3), -float("inf"), device=device).contiguous(memory_format=torch.channels_last)
    assert torch.equal(module._op(x, None), torch.zeros(1, 2, 2, 2, device=device))


def test_other_layouts_and_no_images(device):
    x, bias = case(device=device)
    expected = max_pool_relu_reference(x, bias)
    torch.testing.assert_close(max_pool_relu(x.contiguous(), bias), expected, equal_nan=True)
    strided = torch.stack((bias, -bias), dim=1)[:, 0]
    torch.testing.assert_close(max_pool_relu(x, strided), expected, equal_nan=True)
    assert max_pool_relu(x[:0], bias).shape == (0, 12, 5, 7)


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match=r"x must be \(B, C, H, W\) with at least one pixel and channel, got \(4, 3\)"):
        max_pool_relu(torch.zeros(4, 3))
    with pytest.raises(ValueError, match=r"x must be .* got \(1, 4, 0, 3\)"):
        max_pool_relu(torch.zeros(1, 4, 0, 3))
    x = torch.zeros(1, 4, 3, 3)
    with pytest.raises(ValueError, match=r"bias must be \(C,\) = \(4,\), got \(3,\)"):
        max_pool_relu(x, torch.zeros(3))
    with pytest.raises(ValueError, match="bias must be on cpu as the other arguments are, got meta"):
        max_pool_relu(x, torch.zeros(4, device="meta"))


# Registration


def test_opcheck_and_compiles_whole(device):
    x, bias = case((1, 4, 3, 5), device=device)
    torch.library.opcheck(module._op, (x.nan_to_num(0.0, 0.0, 0.0), bias))
    compiled = torch.compile(max_pool_relu, fullgraph=True, backend="aot_eager", dynamic=True)
    torch.testing.assert_close(compiled(x, bias), max_pool_relu_reference(x, bias), equal_nan=True)


# As compiled code


@pytest.mark.parametrize("name", names("max_pool_relu"))
def test_compiled(name):
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("order", OTHER_ORDERS)
@pytest.mark.parametrize("name", names("max_pool_relu"))
def test_compiled_in_other_orders(name, order):
    check(name, **OTHER_ORDERS[order])
