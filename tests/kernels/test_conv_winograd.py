"""3x3 convs by Winograd's algorithm, against float64 convs and their gradients."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch.nn.grad import conv2d_weight

from retina_fast.kernels import conv_winograd
from retina_fast.kernels.conv_winograd import (
    Scratch,
    gains_from_winograd,
    suits_winograd,
    transform_weight,
    winograd_conv,
    winograd_weight_gradient,
)

SHAPES = {  # batch, channels in and out, height, width
    "whole tiles": (1, 16, 8, 8, 12),
    "part of a tile": (2, 5, 7, 11, 13),
    "one pixel": (1, 3, 4, 1, 1),
    "a row": (3, 4, 4, 1, 9),
    "several bands": (2, 8, 3, 61, 97),
}
ONCE = (1, 1), (1, 1), (1, 1), 1


def case(name, last=True):
    """x, weight, bias, z and the gradient of the output."""
    batch, channels, out, height, width = SHAPES[name]
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        values = torch.randn(*shape, generator=generator)
        return values.contiguous(memory_format=torch.channels_last) if last and len(shape) == 4 else values

    output = batch, out, height, width
    kernel = out, channels, 3, 3
    return random(batch, channels, height, width), random(*kernel), random(out), random(*output), random(*output)


def error(ours, exact):
    return float((ours.double() - exact).norm() / exact.norm())


ACTIVATIONS = {"none": lambda x: x, "relu": F.relu, "swish": F.silu}


@pytest.fixture(params=[None, 1], ids=["chunks of many rows", "chunks of one row"])
def chunk(request, monkeypatch):
    if request.param:
        monkeypatch.setattr(conv_winograd, "_CHUNK", request.param)


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("with_z", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", SHAPES)
def test_within_2e_6_of_float64(name, activation, with_z):
    x, weight, bias, z, _ = case(name)
    ours = winograd_conv(x, transform_weight(weight), bias, z if with_z else None, activation, Scratch())
    exact = F.conv2d(x.double(), weight.double(), bias.double(), padding=1)
    assert error(ours, ACTIVATIONS[activation](exact + z if with_z else exact)) < 2e-6
    assert ours.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("name", SHAPES)
def test_the_weights_gradient(name):
    x, weight, _, _, dy = case(name)
    exact = conv2d_weight(x.double(), list(weight.shape), dy.double(), padding=1)
    # Of the most pixels, 11,834, the products are added up in another order on other processors: 2.5e-6 on an AMD EPYC.
    assert error(winograd_weight_gradient(x, dy, Scratch()), exact) < 5e-6


def test_nchw_no_bias_and_memory_that_held_nan():
    x, weight, _, _, dy = case("part of a tile", last=False)
    scratch = Scratch()
    (memory,) = scratch.take((1 << 16,))
    memory.fill_(torch.nan)
    ours = winograd_conv(x, transform_weight(weight), None, None, "none", scratch)
    assert error(ours, F.conv2d(x.double(), weight.double(), padding=1)) < 2e-6
    memory.fill_(torch.nan)
    assert winograd_weight_gradient(x, dy, scratch).isfinite().all()


def test_under_another_default_dtype():
    x, weight, bias, _, dy = case("part of a tile")
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        ours = winograd_conv(x, transform_weight(weight), bias, None, "none", Scratch())
        gradient = winograd_weight_gradient(x, dy, Scratch())
    finally:
        torch.set_default_dtype(before)
    assert ours.dtype == gradient.dtype == torch.float32


@pytest.mark.parametrize("last", [False, True])
def test_the_memory_of_z_is_taken_where_it_is_laid_out_as_the_output(last):
    x, weight, bias, z, _ = case("several bands", last)
    expected = winograd_conv(x, transform_weight(weight), bias, z, "relu", Scratch())
    ours = winograd_conv(x, transform_weight(weight), bias, z, "relu", Scratch(), overwrite_z=True)
    assert torch.equal(ours, expected)
    assert (ours.data_ptr() == z.data_ptr()) == last


def test_real_sizes_are_as_exact():
    """256 channels, as in the heads: a product sums as many values in float32."""
    torch.manual_seed(0)
    x, weight = torch.randn(1, 256, 25, 25).relu(), torch.randn(256, 256, 3, 3)
    ours = winograd_conv(x, transform_weight(weight), None, None, "none", Scratch())
    assert error(ours, F.conv2d(x.double(), weight.double(), padding=1)) < 1.5e-6


def test_what_it_computes():
    x, weight = torch.ones(1, 4, 9, 9), torch.ones(4, 4, 3, 3)
    assert suits_winograd(x, weight, *ONCE)
    assert not suits_winograd(x.double(), weight.double(), *ONCE)
    assert not suits_winograd(x.bfloat16(), weight, *ONCE)
    assert not suits_winograd(x[:0], weight, *ONCE)
    assert not suits_winograd(x[:, :1], weight, *ONCE)  # PyTorch says what is wrong
    assert not suits_winograd(x, weight[:, :, :1, :1], *ONCE)
    assert not suits_winograd(x, torch.ones(4, 2, 3, 3), (1, 1), (1, 1), (1, 1), 2)
    one, two = (1, 1), (1, 2)
    for geometry in ((two, one, one), (one, two, one), (one, one, two)):
        assert not suits_winograd(x, weight, *geometry, 1)


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_not_in_the_lower_precision_that_the_user_allows_matrix_products(precision):
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        assert not suits_winograd(torch.ones(1, 4, 9, 9), torch.ones(4, 4, 3, 3), *ONCE)
    finally:
        torch.set_float32_matmul_precision(before)


def test_not_for_few_channels_or_tiles():
    weight = torch.ones(256, 256, 3, 3)
    assert gains_from_winograd(torch.ones(1, 256, 25, 25), weight)
    assert gains_from_winograd(torch.ones(4, 256, 13, 13), weight)
    assert not gains_from_winograd(torch.ones(1, 256, 13, 13), weight)
    assert not gains_from_winograd(torch.ones(1, 256, 100, 100), weight[:36])
    assert not gains_from_winograd(torch.ones(1, 64, 100, 100), weight[:, :64])


def test_scratch_grows_is_shared_and_is_not_copied():
    scratch = Scratch()
    first, second = scratch.take((3, 5), (7,))
    assert (first.shape, second.shape) == ((3, 5), (7,))
    first.fill_(1)
    second.fill_(2)
    assert (first == 1).all()
    assert scratch.take((3, 5))[0].data_ptr() == first.data_ptr()
    assert scratch.take((1000,))[0].data_ptr() % 4 == 0
    with torch.inference_mode():
        (inside,) = Scratch().take((4,))
    inside.add_(1)  # memory from within inference mode can be written outside of it
    for other in (copy.deepcopy(scratch), pickle.loads(pickle.dumps(scratch))):
        assert other.take((3,))[0].data_ptr() != scratch.take((3,))[0].data_ptr()
