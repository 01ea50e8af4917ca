"""A pointwise conv with what follows it: the kernel against its definition."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from retina_fast.kernels import conv_pointwise as module
from retina_fast.kernels.conv_epilogue import ACTIVATIONS
from retina_fast.kernels.conv_pointwise import conv_pointwise, conv_pointwise_reference
from retina_fast.kernels.dispatch import INTERPRETED
from tests.ptx.cases import OTHER_ORDERS, check, names

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


def case(shape=(2, 40, 5, 7), channels=24, dtype=BF16, device="cpu", stride=1, z_sides=None, second=None):
    """x of the shape, a weight and a bias for so many channels, z of the output's sides or others, and a shortcut."""
    generator = torch.Generator().manual_seed(channels)

    def made(*shape):
        x = torch.randn(shape, generator=generator).to(device, dtype)
        return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x

    sides = [(side - 1) // stride + 1 for side in shape[2:]]
    shortcut = None
    if second is not None:
        more, stride2 = second
        x2 = made(shape[0], more, *(stride2 * side for side in sides))
        shortcut = x2, made(channels, more, 1, 1) / more**0.5, stride2
    z = made(shape[0], channels, *(z_sides or sides))
    return made(*shape), made(channels, shape[1], 1, 1) / shape[1] ** 0.5, made(channels), z, shortcut


def kernel(x, weight, bias, z, activation, stride=1, shortcut=None):
    return module._op(x, weight, bias, z, activation, stride, *(shortcut or (None, None, 1)))


def close(ours, exact):
    """One rounding of what is summed in float32; the interpreter's of bfloat16 cuts off."""
    limit = {F32: 2e-6, BF16: 2**-7 if INTERPRETED else 2**-8, F16: 2**-11}[ours.dtype]
    torch.testing.assert_close(ours.double(), exact, rtol=1.01 * limit, atol=3e-6, equal_nan=True)


def doubles(values):
    return [x.double() if isinstance(x, torch.Tensor) else x for x in values]


def in_float64(tensors, *rest):
    reference: Any = conv_pointwise_reference
    return reference(*doubles(tensors), *rest)


# Matches the reference


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize(
    ("shape", "channels"), [((2, 64, 5, 7), 32), ((1, 80, 13, 11), 264), ((3, 24, 1, 1), 8), ((1, 7, 3, 5), 5)]
)
def test_the_kernel_gives_its_definition(shape, channels, dtype, activation, device):
    x, weight, bias, z, _ = case(shape, channels, dtype, device)
    exact = in_float64((x, weight, bias, z), activation)
    close(kernel(x, weight, bias, z, activation), exact)
    close(
        kernel(x, weight, None, None, activation),
        conv_pointwise_reference(x.double(), weight.double(), None, None, activation),
    )
    if device.type == "cuda":
        assert torch.equal(conv_pointwise(x, weight, bias, z, activation), kernel(x, weight, bias, z, activation))


def test_large_programs(device):
    """Which long products of many pixels take."""
    assert module._tile(53 * 54, 264, 272) != module._tile(53 * 54, 264, 256) == module._tile(53 * 40, 264, 272)
    x, weight, bias, z, _ = case((1, 272, 53, 54), 264, device=device)
    close(kernel(x, weight, bias, z, "relu"), in_float64((x, weight, bias, z), "relu"))


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("second", [None, (24, 1), (72, 2)])
def test_strides_and_a_second_conv(stride, second, device):
    x, weight, bias, z, shortcut = case((2, 40, 9, 8), stride=stride, second=second, device=device)
    exact_shortcut = None if shortcut is None else doubles(shortcut)
    exact = in_float64((x, weight, bias, z), "relu", stride, exact_shortcut)
    close(kernel(x, weight, bias, z, "relu", stride, shortcut), exact)


@pytest.mark.parametrize("z_sides", [(7, 5), (4, 3), (13, 1), (20, 9), (1, 1), (13, 9), (6, 4)])
def test_z_of_other_sides_is_resized_as_torch_does(z_sides, device):
    """To the bit: a product with zeros leaves z's own values."""
    x, weight, _, z, _ = case((2, 16, 13, 9), z_sides=z_sides, device=device)
    expected = F.interpolate(z, (13, 9), mode="nearest")
    assert torch.equal(kernel(torch.zeros_like(x), weight, None, z, "none"), expected)
    assert torch.equal(conv_pointwise_reference(torch.zeros_like(x), weight, None, z, "none"), expected)


def test_every_source_pixel_is_torchs(device):
    """Scales whose float32 product falls on either side of an integer."""
    for size in (1, 10, 41, 49):
        for source in (3, (size + 1) // 2, size - 1 or 1, 2 * size + 1):
            z = torch.arange(source, dtype=F16, device=device).view(1, 1, 1, source)
            x, weight = z.new_zeros(1, 1, 1, size), z.new_zeros(1, 1, 1, 1)
            assert torch.equal(kernel(x, weight, None, z, "none"), F.interpolate(z, (1, size), mode="nearest"))


def test_nan_and_infinity_go_where_they_belong(device):
    x, weight, bias, z, _ = case(device=device)
    z[0, 0, 0, :3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    x[1, 3, 2, 4] = float("nan")
    for activation in ("none", "relu"):
        close(kernel(x, weight, bias, z, activation), in_float64((x, weight, bias, z), activation))


def test_the_reference_is_torchs_own_operations():
    x, weight, bias, z, shortcut = case(dtype=F64, z_sides=(3, 4), second=(16, 2))
    y = (
        F.conv2d(x, weight, bias)
        + F.interpolate(z, (5, 7), mode="nearest")
        + F.conv2d(shortcut[0], shortcut[1], stride=2)
    )
    for activation, expected in {"none": y, "relu": y.relu(), "swish": F.silu(y)}.items():
        torch.testing.assert_close(conv_pointwise_reference(x, weight, bias, z, activation, 1, shortcut), expected)


def test_gradients():
    inputs = [x.requires_grad_() for x in case((1, 4, 3, 2), 3, F64, z_sides=(2, 2))[:4]]
    for activation in ACTIVATIONS:
        assert torch.autograd.gradcheck(lambda x, w, b, z, a=activation: conv_pointwise(x, w, b, z, a), inputs)


# Edges


def test_other_layouts(device):
    x, weight, bias, z, _ = case(device=device)
    expected = conv_pointwise(x, weight, bias, z, "relu")
    strided = torch.stack((bias, -bias), dim=1)[:, 0]
    ours = conv_pointwise(x.contiguous(), weight.contiguous(), strided, z.contiguous(), "relu")
    torch.testing.assert_close(ours, expected)
    assert ours.is_contiguous(memory_format=torch.channels_last)


def test_no_image(device):
    x, weight, bias, z, _ = case((0, 40, 5, 7), device=device)
    assert conv_pointwise(x, weight, bias, z, "relu").shape == (0, 24, 5, 7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(3, 4)}, r"x must be \(B, C_in, H, W\), got \(3, 4\)"),
        (
            {"weight": torch.zeros(3, 4, 3, 3)},
            r"weight must be \(C_out, C_in, 1, 1\) = \(3, 4, 1, 1\), got \(3, 4, 3, 3\)",
        ),
        ({"bias": torch.zeros(2)}, r"bias must be \(C_out,\) = \(3,\), got \(2,\)"),
        ({"z": torch.zeros(2, 2, 5, 5)}, r"z must be \(2, 3, H_z, W_z\), got \(2, 2, 5, 5\)"),
        ({"z": torch.zeros(2, 3, 0, 5)}, r"z must be \(2, 3, H_z, W_z\), got \(2, 3, 0, 5\)"),
        ({"z": torch.zeros(2, 3, 5, 5).double()}, "z must be torch.float32 as x is, got torch.float64"),
        ({"bias": torch.zeros(3, device="meta")}, "bias must be on cpu as the other arguments are, got meta"),
        ({"activation": "gelu"}, "activation must be one of none, relu, swish, got 'gelu'"),
        ({"stride": 0}, "stride must be at least 1, got 0"),
        (
            {"shortcut": (torch.zeros(2, 4, 9, 9), torch.zeros(3, 4, 1, 1), 1)},
            r"the shortcut's output must be of \(5, 5\) pixels, got x \(2, 4, 9, 9\), stride 1",
        ),
        (
            {"shortcut": (torch.zeros(2, 4, 9, 9), torch.zeros(3, 5, 1, 1), 2)},
            r"the shortcut's weight must be \(C_out, C_2, 1, 1\) = \(3, 4, 1, 1\), got \(3, 5, 1, 1\)",
        ),
    ],
)
def test_what_does_not_fit_is_named(changes, message):
    arguments = {"x": torch.zeros(2, 4, 5, 5), "weight": torch.zeros(3, 4, 1, 1)} | changes
    with pytest.raises(ValueError, match=message):
        conv_pointwise(**arguments)


# Registration


def test_opcheck_and_compiles_whole(device):
    x, weight, bias, z, shortcut = case(device=device, z_sides=(3, 4), second=(16, 2))
    torch.library.opcheck(module._op, (x, weight, bias, z, "relu", 1, *shortcut))
    compiled = torch.compile(conv_pointwise, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.no_grad():
        ours, expected = (call(x, weight, bias, z, "swish", 1, shortcut) for call in (compiled, conv_pointwise))
    torch.testing.assert_close(ours, expected)


# As compiled code, by addresses and in float32: the emulator knows neither descriptors nor matrix instructions


@pytest.mark.parametrize("name", names("conv_pointwise"))
def test_compiled(name):
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("order", OTHER_ORDERS)
@pytest.mark.parametrize("name", names("conv_pointwise"))
def test_compiled_in_other_orders(name, order):
    check(name, **OTHER_ORDERS[order])
