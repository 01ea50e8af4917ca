"""A 1x1 conv in FP8: rounding against the format's own definition, the reference against `torch._scaled_mm`."""

import math

import pytest
import torch
import torch.nn.functional as F

from retina_fast.device import has_float8
from retina_fast.kernels.conv_float8 import (
    FLOAT8,
    conv_float8,
    conv_float8_reference,
    float8_weight,
    suits_float8,
    to_float8,
)
from tests.instruments.fake_gpu import TorchOp, gpu_work_of

GPU = torch.cuda.is_available() and has_float8(torch.device("cuda"))
SHAPES = {  # batch, channels in and out, height, width, stride
    "a block's": (2, 32, 48, 5, 7, 1),
    "of stride 2": (2, 32, 16, 5, 8, 2),
    "one pixel": (1, 16, 16, 1, 1, 1),
    "many channels": (1, 512, 64, 6, 5, 1),
}


def nearest(value):
    """E4M3 of a number: four significant bits from 2^-6 on, steps of 2^-9 below; at most 448, ties to even."""
    if math.isnan(value):
        return value
    size = min(abs(value), 448.0)
    step = 2.0 ** (max(math.frexp(size)[1] - 1, -6) - 3)
    return math.copysign(round(size / step) * step, value)


def case(name, dtype=torch.bfloat16):
    batch, channels, out, height, width, stride = SHAPES[name]
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (
        torch.randn(*shape, generator=generator).to(dtype)
        for shape in ((batch, channels, height, width), (out, channels, 1, 1), (out,))
    )
    return x.relu(), weight / channels, bias, stride


@pytest.mark.parametrize("factor", [1.0, 2.0**-4, 2.0**9])
def test_an_input_is_rounded_as_the_format_says(factor):
    """At each value of E4M3, halfway between two, beside that, and where it ends."""
    values = torch.arange(256, dtype=torch.uint8).view(FLOAT8).float()
    values = values[values.isfinite()].sort().values
    between = (values[1:] + values[:-1]) / 2
    x = torch.cat([values, between, between * 1.01, torch.tensor([480.0, -5000, torch.inf, -torch.inf, torch.nan])])
    x = (x / factor).to(torch.bfloat16)
    weight = float8_weight(torch.ones(16, 1, 1, 1, dtype=torch.bfloat16), factor)
    found = to_float8(x.view(1, 1, 1, -1), weight).float().flatten()
    expected = torch.tensor([nearest(value * factor) for value in x.tolist()])
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", SHAPES)
def test_the_definition(name):
    """The reference in float64, from rounded inputs and weights; these are near to the given ones."""
    x, weight, bias, stride = case(name, torch.float32)
    made = float8_weight(weight, 2.0)
    scale = weight.abs().max() / 448
    rounded = torch.tensor([nearest(value) for value in (weight / scale).flatten().tolist()]).view_as(weight)
    assert torch.equal(made.values.float(), rounded.flatten(1))
    rounded_x = torch.tensor([nearest(2 * value) / 2 for value in x.flatten().tolist()]).view_as(x)
    exact = F.conv2d(rounded_x.double(), rounded.double() * scale.double(), bias.double(), stride)
    found = conv_float8_reference(x, made, bias, stride)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-6)
    plain = F.conv2d(x, weight, bias, stride)
    assert 1e-3 < (found - plain).norm() / (plain - bias[:, None, None]).norm() < 0.05


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("name", SHAPES)
def test_the_scaled_product_is_the_reference(name, with_bias, last):
    """PyTorch's, on a CPU: apart from the order of float32 sums."""
    x, weight, bias, stride = case(name)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    made = float8_weight(weight, 1.0)
    given = x, made, bias if with_bias else None, stride
    found, expected = conv_float8(*given), conv_float8_reference(*given)
    assert found.dtype == expected.dtype == torch.bfloat16
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert expected.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=1e-6)
    assert (found == expected).float().mean() > 0.98


@pytest.mark.skipif(not GPU, reason="needs a GPU with FP8")
@pytest.mark.parametrize("factor", [1.0, 0.5])
@pytest.mark.parametrize("name", SHAPES)
def test_the_scaled_product_of_a_gpu_is_the_reference(name, factor):
    *tensors, stride = case(name)
    x, weight, bias = (tensor.cuda() for tensor in tensors)
    made = float8_weight(weight, factor)
    assert torch.equal(
        to_float8(x, made).float().cpu(), to_float8(x.cpu(), float8_weight(weight.cpu(), factor)).float()
    )
    found, expected = conv_float8(x, made, bias, stride), conv_float8_reference(x, made, bias, stride)
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=1e-5)


def test_weights_of_zero_and_which_weights_suit():
    made = float8_weight(torch.zeros(16, 16, 1, 1), 1.0)
    bias = torch.arange(16.0)
    for conv in (conv_float8, conv_float8_reference):
        assert torch.equal(conv(torch.ones(1, 16, 1, 1), made, bias).flatten(), bias)
    assert [suits_float8(torch.ones(*shape, 1, 1)) for shape in ((32, 48), (36, 16), (16, 24))] == [True, False, False]


@pytest.mark.parametrize(("factor", "expected"), [(1.0, []), (0.5, ["mul"])])
def test_the_launches_on_a_gpu(factor, expected):
    """On fake CUDA tensors: one pass that rounds, two if there is a factor, and the product. The host does not wait."""

    def prepare():
        x = torch.ones(2, 32, 9, 8, dtype=torch.bfloat16, device="cuda").contiguous(memory_format=torch.channels_last)
        weight = torch.ones(16, 32, 1, 1, dtype=torch.bfloat16, device="cuda")
        return x, float8_weight(weight, factor), torch.ones(16, dtype=torch.bfloat16, device="cuda"), 2

    work = gpu_work_of(lambda given: conv_float8(*given), prepare)
    steps = [step for step in work if isinstance(step, TorchOp)]
    assert len(steps) == len(work)
    assert [step.name for step in steps] == [*expected, "clamp", "_scaled_mm"]
    assert steps[-1].shape == (2 * 5 * 4, 16)
