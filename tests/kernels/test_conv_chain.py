"""Convs in a row: the kernel against its definition."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from retina_fast.kernels import conv_chain as module
from retina_fast.kernels.conv_chain import conv_chain, conv_chain_reference, serves_chain
from retina_fast.kernels.dispatch import INTERPRETED
from tests.ptx.cases import OTHER_ORDERS, check, names

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


def case(shape=(2, 16, 5, 7), channels=64, following=32, second=0, filtered=0, dtype=BF16, device="cpu"):
    """x, weight, bias, next_weight, next_bias, z or a shortcut of so many channels, and a 3x3 conv from the shape's
    channels to so many."""
    generator = torch.Generator().manual_seed(channels + filtered)

    def made(*shape):
        x = torch.randn(shape, generator=generator).to(device, dtype)
        return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x

    def weight(out, into, side=1):
        return made(out, into, side, side) / (side * into**0.5)

    batch, into, *sides = shape
    z = None if second else made(batch, channels, *sides)
    shortcut = (made(batch, second, *sides), weight(channels, second)) if second else None
    before = (weight(filtered, into, 3), made(filtered)) if filtered else None
    pair = weight(channels, filtered or into), made(channels), weight(following, channels), made(following)
    return made(*shape), *pair, z, shortcut, before


def kernel(x, weight, bias, next_weight, next_bias, z=None, shortcut=None, before=None):
    more = *(shortcut or (None, None)), *(before or (None, None))
    return module._op(x, weight, bias, next_weight, next_bias, z, *more)


def doubles(values):
    return values and [x.double() if isinstance(x, torch.Tensor) else x for x in values]


def in_float64(given, y=None):
    """What float64 gives where a 3x3 conv's output is rounded as it must be; the last conv's output for the y that is
    given, which was rounded before."""
    reference: Any = conv_chain_reference
    x, *tensors = doubles(given[:-2])
    shortcut, before = map(doubles, given[-2:])
    if before is not None:
        x = F.conv2d(x, before[0], before[1], padding=1).relu().to(given[0].dtype).double()
    exact, following = reference(x, *tensors, shortcut)
    if y is not None:
        following = F.conv2d(y.double(), tensors[2], tensors[3]).relu()
    return exact, following


def close(ours, given):
    """One rounding of what is summed in float32; the interpreter's of bfloat16 cuts off. The numbers of a 3x3 conv may
    be rounded to their neighbours."""
    limit = {F32: 2e-6, BF16: 2**-7 if INTERPRETED else 2**-8, F16: 2**-11}[given[0].dtype]
    for found, exact in zip(ours, in_float64(given, ours[0]), strict=True):
        atol = 4e-6 if given[-1] is None else 6 * limit
        torch.testing.assert_close(found.double(), exact, rtol=1.01 * limit, atol=atol, equal_nan=True)


# Matches the reference


@pytest.mark.parametrize(("dtype", "second", "filtered"), [(BF16, 0, 0), (F16, 32, 0), (F16, 0, 16), (BF16, 32, 16)])
@pytest.mark.parametrize(
    ("shape", "channels", "following"), [((2, 16, 5, 7), 64, 32), ((1, 64, 13, 11), 128, 16), ((3, 32, 1, 1), 16, 64)]
)
def test_the_kernel_gives_its_definition(shape, channels, following, second, filtered, dtype, device):
    given = case(shape, channels, following, second, filtered, dtype, device)
    close(kernel(*given), given)
    close(conv_chain(*given), given)
    if device.type == "cuda":
        assert serves_chain(given[0], given[1], given[3], *given[5:])
        for found, expected in zip(conv_chain(*given), kernel(*given), strict=True):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("filtered", [0, 64])
@pytest.mark.parametrize("following", [64, 256])
def test_large_programs(following, filtered, device, monkeypatch):
    """Which many pixels take."""
    monkeypatch.setattr(module, "_FEW", 0)
    given = case((2, 64, 9, 18), 64, following, 0, filtered, device=device)
    close(kernel(*given), given)


def test_without_a_sum(device):
    given = (*case(device=device)[:5], None, None, None)
    close(kernel(*given), given)


def test_nan_and_infinity_go_where_they_belong(device):
    given = case(device=device)
    given[0][1, 3, 2, 4] = float("nan")
    given[5][0, 0, 0, :3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    close(kernel(*given), given)


def test_the_reference_is_torchs_own_operations():
    given = case(second=16, filtered=24, dtype=F64)
    x, weight, bias, next_weight, next_bias, _, (x2, weight2), before = given
    x = F.conv2d(x, before[0], before[1], padding=1).relu()
    y = (F.conv2d(x, weight, bias) + F.conv2d(x2, weight2)).relu()
    for found, expected in zip(
        conv_chain_reference(*given), (y, F.conv2d(y, next_weight, next_bias).relu()), strict=True
    ):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [F32, F64])
def test_biases_of_another_dtype(dtype, device):
    x, *pair, z, _, (weight0, bias0) = case(filtered=16, dtype=dtype, device=device)
    other = {F32: F64, F64: F32}[dtype]
    weight, bias, next_weight, next_bias = pair
    bias, next_bias, bias0 = (bias.to(F32).to(other) for bias in (bias, next_bias, bias0))
    found_all = conv_chain(x, weight, bias, next_weight, next_bias, z, None, (weight0, bias0))
    rounded = [bias.to(dtype) for bias in (bias, next_bias, bias0)]
    expected = conv_chain(x, weight, rounded[0], next_weight, rounded[1], z, None, (weight0, rounded[2]))
    for found, exact in zip(found_all, expected, strict=True):
        assert found.dtype == dtype
        torch.testing.assert_close(found, exact)


def test_gradients():
    inputs = [x.requires_grad_() for x in case((1, 4, 3, 2), 3, 2, dtype=F64)[:6]]
    assert torch.autograd.gradcheck(conv_chain, inputs)


# Edges


def test_other_layouts(device):
    given = case(device=device)[:6]
    pair: Any = conv_chain
    for found, expected in zip(pair(*(x.contiguous() for x in given)), pair(*given), strict=True):
        torch.testing.assert_close(found, expected)
        assert found.is_contiguous(memory_format=torch.channels_last)


def test_no_image(device):
    y, following = conv_chain(*case((0, 16, 5, 7), device=device))
    assert (y.shape, following.shape) == ((0, 64, 5, 7), (0, 32, 5, 7))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(3, 4)}, r"x must be \(B, C_in, H, W\), got \(3, 4\)"),
        ({"weight": torch.zeros(8, 5, 1, 1)}, r"weight must be .* = \(8, 4, 1, 1\), got \(8, 5, 1, 1\)"),
        ({"bias": torch.zeros(4)}, r"bias must be \(C_out,\) = \(8,\), got \(4,\)"),
        ({"next_weight": torch.zeros(4, 4, 1, 1)}, r"next_weight must be .* = \(4, 8, 1, 1\), got \(4, 4, 1, 1\)"),
        ({"next_bias": torch.zeros(8)}, r"next_bias must be \(C_next,\) = \(4,\), got \(8,\)"),
        ({"z": torch.zeros(2, 8, 4, 5)}, r"z must be \(B, C_out, H, W\) = \(2, 8, 5, 5\), got \(2, 8, 4, 5\)"),
        ({"z": torch.zeros(2, 8, 5, 5).double()}, "z must be torch.float32 as x is, got torch.float64"),
        ({"next_bias": torch.zeros(4, device="meta")}, "next_bias must be on cpu as the other arguments are, got meta"),
        (
            {"before": (torch.zeros(6, 5, 3, 3), torch.zeros(6))},
            r"the weight before must be .* = \(6, 4, 3, 3\), got \(6, 5, 3, 3\)",
        ),
        (
            {"before": (torch.zeros(6, 4, 3, 3), torch.zeros(6))},
            r"weight must be \(C_out, C_mid, 1, 1\) = \(8, 6, 1, 1\), got \(8, 4, 1, 1\)",
        ),
        (
            {"shortcut": (torch.zeros(2, 3, 9, 9), torch.zeros(8, 3, 1, 1))},
            r"the shortcut's x must be \(B, C_2, H, W\) = \(2, 3, 5, 5\), got \(2, 3, 9, 9\)",
        ),
        (
            {"shortcut": (torch.zeros(2, 3, 5, 5), torch.zeros(8, 4, 1, 1))},
            r"the shortcut's weight must be .* = \(8, 3, 1, 1\), got \(8, 4, 1, 1\)",
        ),
    ],
)
def test_what_does_not_fit_is_named(changes, message):
    arguments: dict[str, Any] = {
        "x": torch.zeros(2, 4, 5, 5),
        "weight": torch.zeros(8, 4, 1, 1),
        "bias": torch.zeros(8),
    }
    arguments |= {"next_weight": torch.zeros(4, 8, 1, 1), "next_bias": torch.zeros(4)} | changes
    with pytest.raises(ValueError, match=message):
        conv_chain(**arguments)


# Registration


def test_opcheck_and_compiles_whole(device):
    given = case((1, 16, 3, 5), 32, 16, device=device)
    torch.library.opcheck(module._op, (*given[:6], None, None, None, None))
    compiled = torch.compile(conv_chain, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.no_grad():
        for found, expected in zip(compiled(*given), conv_chain(*given), strict=True):
            torch.testing.assert_close(found, expected)


# As compiled code, by addresses and in float32: the emulator knows neither descriptors nor matrix instructions


@pytest.mark.parametrize("name", names("conv_chain"))
def test_compiled(name):
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("order", OTHER_ORDERS)
@pytest.mark.parametrize("name", names("conv_chain"))
def test_compiled_in_other_orders(name, order):
    check(name, **OTHER_ORDERS[order])
