"""Cases of the operations around the convs: scaling, GroupNorm, the convs of the project and what follows a conv, the
batch of images. Expected values are in float64."""

from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Generator, Tensor

from retina_fast.kernels import conv_chain as chain
from retina_fast.kernels import conv_pointwise as pointwise
from retina_fast.kernels.conv_epilogue import conv_epilogue_reference, epilogue_gradients_reference
from retina_fast.kernels.conv_pointwise import conv_pointwise_reference
from retina_fast.kernels.first_channels import first_channels_reference
from retina_fast.kernels.group_norm_relu import group_norm_relu_reference
from retina_fast.kernels.image_batch import batch_shape, image_batch_reference
from retina_fast.kernels.max_pool_relu import max_pool_relu_reference
from retina_fast.kernels.stem_conv import stem_conv_reference
from tests.ptx.inputs import (
    Comparison,
    Run,
    Shapes,
    close,
    doubles,
    equal,
    limit_of,
    shifted,
)

ops = torch.ops.retina_fast


def scale(generator: Generator, dtype: torch.dtype, shift: int = 0) -> Run:
    tensors = [torch.randn(n, generator=generator).to(dtype) for n in (9001, 3, 0)]
    tensors = [shifted(x, shift) for x in tensors]
    expected = [x.double() * 0.3 for x in tensors]

    def run() -> Iterator[Comparison]:
        ops.scale_(tensors, torch.tensor(0.3))
        yield close("product", tensors, expected, limit_of(dtype))

    return run


def group_norm_relu(
    generator: Generator, dtype: torch.dtype, channels: int, groups: int,
    shapes: Shapes = ((9, 8), (13, 5), (1, 1)), shift: int = 0,
) -> Run:  # fmt: skip
    def level(height: int, width: int, shift: int) -> Tensor:
        x = torch.randn(2, channels, height, width, generator=generator) * 2 + 1
        return shifted(x.to(dtype).contiguous(memory_format=torch.channels_last), shift)

    levels, incoming = ([level(h, w, shift) for h, w in shapes] for _ in range(2))
    weight, bias = (shifted(0.5 * torch.randn(channels, generator=generator) + n, shift) for n in (1, 0))
    *exact, exact_weight, exact_bias = doubles([*levels, weight, bias])
    expected = group_norm_relu_reference(exact, exact_weight, exact_bias, groups)
    grads = torch.autograd.grad(expected, [*exact, exact_weight, exact_bias], [x.double() for x in incoming])
    *level_grads, weight_grad, bias_grad = grads

    def run() -> Iterator[Comparison]:
        *ours, stats = ops.group_norm_relu(levels, weight, bias, groups, 1e-5)
        yield close("output", ours, expected, limit_of(dtype))
        *ours, sums = ops.group_norm_relu_backward(incoming, levels, weight, bias, stats)
        yield close("gradients", ours, level_grads, 1.5 * limit_of(dtype))
        ours_bias, ours_weight = sums.sum(dim=(0, 1))
        yield close("gradient of weight and bias", [ours_weight, ours_bias], [weight_grad, bias_grad], 1e-4)

    return run


def conv_epilogue(
    generator: Generator, dtype: torch.dtype, channels: int, activation: str, with_bias: bool = True,
    with_z: bool = True, sides: tuple[int, int] = (9, 7), shift: int = 0,
) -> Run:  # fmt: skip
    """NaN and infinities stay where they are."""
    y, z = (torch.randn(2, channels, *sides, generator=generator) * 2 for _ in range(2))
    y[0, 0, 0, :3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    y, z = (shifted(x.to(dtype).contiguous(memory_format=torch.channels_last), shift) for x in (y, z))
    bias = shifted(torch.randn(channels, generator=generator).to(dtype), shift) if with_bias else None
    rest = bias, z if with_z else None, activation
    expected = conv_epilogue_reference(y.double(), *rest)

    def run() -> Iterator[Comparison]:
        ops.conv_epilogue_(y, *rest)
        yield close("output", [y], [expected], limit_of(dtype))

    return run


def epilogue_gradients(
    generator: Generator, dtype: torch.dtype, channels: int, with_relu: bool = True,
    sides: tuple[int, int] = (9, 7), shift: int = 0,
) -> Run:  # fmt: skip
    dy, y = (torch.randn(8, channels, *sides, generator=generator) for _ in range(2))
    dy, y = (shifted(x.to(dtype).contiguous(memory_format=torch.channels_last), shift) for x in (dy, y))
    output = y if with_relu else None
    dz, expected = epilogue_gradients_reference(dy.double(), None if output is None else output.double(), True)
    assert expected is not None

    def run() -> Iterator[Comparison]:
        ours, sums = ops.epilogue_gradients(dy, output, True)
        if output is not None:
            yield equal("dz", [ours.double()], [dz])
        yield close("gradient of the bias", [sums], [expected], 1e-5)

    return run


def max_pool_relu(
    generator: Generator, dtype: torch.dtype, channels: int, with_bias: bool = True, sides: tuple[int, int] = (9, 37),
    shift: int = 0,
) -> Run:  # fmt: skip
    """Exact, rounding included; NaN and infinities stay where they are."""
    x = torch.randn(2, channels, *sides, generator=generator) * 2
    for i, value in enumerate((float("nan"), float("inf"), -float("inf"))):
        x.view(-1)[i::211] = value
    x = shifted(x.to(dtype).contiguous(memory_format=torch.channels_last), shift)
    bias = shifted(torch.randn(channels, generator=generator).to(dtype), shift) if with_bias else None
    expected = max_pool_relu_reference(x, bias)

    def run() -> Iterator[Comparison]:
        yield close("output", [ops.max_pool_relu(x, bias)], [expected], 0.0)

    return run


def stem_conv(
    generator: Generator, dtype: torch.dtype, channels: int, sides: tuple[int, int], layout: Any = torch.channels_last,
    shift: int = 0,
) -> Run:  # fmt: skip
    """Pixels and weights in memory of any alignment, and the weights in either layout; a program has several tiles."""
    x = torch.randn(2, 3, *sides, generator=generator).to(dtype).contiguous(memory_format=torch.channels_last)
    weight = (torch.randn(channels, 3, 7, 7, generator=generator) / 12).to(dtype).contiguous(memory_format=layout)
    x, weight = (shifted(tensor, shift) for tensor in (x, weight))
    expected = stem_conv_reference(x.double(), weight.double())

    def run() -> Iterator[Comparison]:
        with mock.patch("retina_fast.kernels.stem_conv._PROGRAMS", 2):
            yield close("output", [ops.stem_conv(x, weight)], [expected], limit_of(dtype))

    return run


def conv_pointwise(
    generator: Generator, dtype: torch.dtype, channels: int, activation: str, stride: int = 1,
    z_sides: tuple[int, int] | None = None, second: int = 0, shift: int = 0,
) -> Run:  # fmt: skip
    """Products in float32, by address: the emulator knows neither matrix instructions nor descriptors."""

    def made(*shape: int) -> Tensor:
        x = torch.randn(shape, generator=generator).to(dtype)
        return shifted(x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x, shift)

    sides = [(side - 1) // stride + 1 for side in (9, 7)]
    x, weight, bias = made(2, 24, 9, 7), made(channels, 24, 1, 1), made(channels)
    z = made(2, channels, *(z_sides or sides))
    more = (made(2, second, *(2 * side for side in sides)), made(channels, second, 1, 1), 2) if second else None
    exact = more and (more[0].double(), more[1].double(), 2)
    expected = conv_pointwise_reference(
        x.double(), weight.double(), bias.double(), z.double(), activation, stride, exact
    )

    def run() -> Iterator[Comparison]:
        with mock.patch.multiple(pointwise, _tile=lambda *sizes: (16, 16, 16, 1, 1), _DESCRIBES=False):
            y = ops.conv_pointwise(x, weight, bias, z, activation, stride, *(more or (None, None, 1)))
        yield close("output", [y], [expected], limit_of(dtype))

    return run


def conv_chain(generator: Generator, dtype: torch.dtype, second: int = 0, filtered: int = 0, shift: int = 0) -> Run:
    """The same; 15 pixels where a program has 16."""

    def made(*shape: int) -> Tensor:
        x = torch.randn(shape, generator=generator).to(dtype)
        return shifted(x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x, shift)

    given = made(1, 16, 3, 5), made(32, filtered or 16, 1, 1), made(32), made(16, 32, 1, 1), made(16)
    z = None if second else made(1, 32, 3, 5)
    shortcut = (made(1, second, 3, 5), made(32, second, 1, 1)) if second else (None, None)
    before = (made(filtered, 16, 3, 3) / 4, made(filtered)) if filtered else (None, None)
    reference: Any = conv_pointwise_reference
    exact: list[Any] = [x.double() if isinstance(x, Tensor) else x for x in (*given, z, *shortcut, *before)]
    x = exact[0]
    if filtered:
        x = torch.nn.functional.conv2d(x, exact[-2], exact[-1], padding=1).relu().to(dtype).double()
    y = reference(x, *exact[1:3], exact[5], "relu", 1, (*exact[6:8], 1) if second else None)

    def run() -> Iterator[Comparison]:
        with mock.patch.multiple(chain, _tile=lambda *sizes: (2 if filtered else 1, 16, 16, 1, 1), _DESCRIBES=False):
            found = ops.conv_chain(*given, z, *shortcut, *before)
        following = reference(found[0].double(), *exact[3:5], None, "relu")
        yield close("outputs", found, [y, following], limit_of(dtype))

    return run


def first_channels(
    generator: Generator, dtype: torch.dtype, channels: int, width: int, bias_dtype: torch.dtype = torch.float32,
    sides: tuple[int, int] = (9, 7), shift: int = 0,
) -> Run:  # fmt: skip
    """What is behind the channels is NaN, which shows nowhere; the gradients are those of any values."""
    x = torch.randn(2, width, *sides, generator=generator)
    x[:, channels:] = torch.nan
    dy = torch.randn(2, channels, *sides, generator=generator)
    x, dy = (shifted(t.to(dtype).contiguous(memory_format=torch.channels_last), shift) for t in (x, dy))
    bias = shifted(torch.randn(channels, generator=generator).to(bias_dtype), shift)
    expected = first_channels_reference(x.double(), bias.double())
    padded = torch.nn.functional.pad(dy.double(), (0, 0, 0, 0, 0, width - channels))
    sums = dy.double().sum(dim=(0, 2, 3))

    def run() -> Iterator[Comparison]:
        yield close("output", [ops.first_channels(x, bias)], [expected], limit_of(dtype))
        dx, dbias = ops.first_channels_backward(dy, width)
        yield close("gradient", [dx], [padded], 0)
        yield close("gradient of bias", [dbias], [sums], 1e-6)

    return run


def image_batch(generator: Generator, dtype: torch.dtype, out_dtype: torch.dtype) -> Run:
    images = [torch.randint(0, 256, (3, h, w), generator=generator) for h, w in ((37, 53), (64, 41), (9, 100))]
    images = [image.to(dtype) / 255 if dtype.is_floating_point else image.to(dtype) for image in images]
    images = [image.to(dtype) for image in images]
    images[1] = images[1].permute(1, 2, 0).contiguous().permute(2, 0, 1)
    sizes = [(40, 57), (64, 41), (18, 99)]
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    shape = batch_shape(images, sizes, 3, 32)
    exact = [image.double() / (1 if dtype.is_floating_point else 255) for image in images]
    expected = image_batch_reference(exact, sizes, mean, std, torch.empty(shape, dtype=torch.float64))

    def run() -> Iterator[Comparison]:
        out = torch.full(shape, float("nan"), dtype=out_dtype).contiguous(memory_format=torch.channels_last)
        ops.image_batch_(images, [side for size in sizes for side in size], mean, std, out)
        yield close("batch", [out], [expected], limit_of(out_dtype))

    return run
