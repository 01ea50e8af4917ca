"""Calls of the kernels around convs on fake CUDA tensors, for the list of :mod:`tests.instruments.kernel_calls`."""

import torch

from retina_fast.kernels import conv_chain, conv_epilogue, conv_pointwise, first_channels, max_pool_relu, stem_conv


def call_conv_epilogue(channels: int, activation: str, with_z: bool) -> None:
    layout = torch.channels_last
    y, z = (
        torch.empty(8, channels, 100, 100, dtype=torch.bfloat16, device="cuda", memory_format=layout) for _ in range(2)
    )
    bias = torch.empty(channels, dtype=torch.bfloat16, device="cuda")
    conv_epilogue.conv_epilogue_(y, bias, z if with_z else None, activation)


def call_epilogue_gradients(channels: int, with_relu: bool) -> None:
    layout = torch.channels_last
    dy, y = (
        torch.empty(16, channels, 100, 100, dtype=torch.bfloat16, device="cuda", memory_format=layout) for _ in range(2)
    )
    conv_epilogue.epilogue_gradients(dy, y if with_relu else None, True)


def call_max_pool_relu(dtype: torch.dtype) -> None:
    """Pools what the first conv of a ResNet gives of eight images of 800x800."""
    x = torch.empty(8, 64, 400, 400, dtype=dtype, device="cuda", memory_format=torch.channels_last)
    max_pool_relu.max_pool_relu(x, torch.empty(64, dtype=dtype, device="cuda"))


def call_stem_conv() -> None:
    """The first conv of a ResNet on eight images of 800x800."""
    layout = torch.channels_last
    x, weight = (
        torch.empty(shape, dtype=torch.bfloat16, device="cuda", memory_format=layout)
        for shape in ((8, 3, 800, 800), (64, 3, 7, 7))
    )
    stem_conv.stem_conv(x, weight)


def call_conv_pointwise(second: bool) -> None:
    """Ends of residual blocks, of ResNet-50's first stage and, with a shortcut of stride 2, of its second."""
    layout = torch.channels_last

    def made(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=torch.bfloat16, device="cuda", memory_format=layout)

    bias = torch.empty(256, dtype=torch.bfloat16, device="cuda")
    x, weight = made(8, 64, 100, 100), made(256, 64, 1, 1)
    if second:
        shortcut = made(8, 128, 200, 200), made(256, 128, 1, 1), 2
        conv_pointwise.conv_pointwise(x, weight, bias, made(8, 256, 50, 50), "relu", shortcut=shortcut)
    else:
        conv_pointwise.conv_pointwise(x, weight, bias, made(8, 256, 100, 100), "relu")


def call_conv_chain(whole: bool) -> None:
    """Between blocks of ResNet-50: of its first stage, with the 3x3 conv, or of its second."""
    narrow, size = (64, 200) if whole else (128, 100)

    def made(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=torch.bfloat16, device="cuda", memory_format=torch.channels_last)

    def bias(channels: int) -> torch.Tensor:
        return torch.empty(channels, dtype=torch.bfloat16, device="cuda")

    x, z = made(8, narrow, size, size), made(8, 4 * narrow, size, size)
    weights = made(4 * narrow, narrow, 1, 1), bias(4 * narrow), made(narrow, 4 * narrow, 1, 1), bias(narrow)
    before = (made(narrow, narrow, 3, 3), bias(narrow)) if whole else None
    conv_chain.conv_chain(x, *weights, z, before=before)


def call_first_channels(channels: int, width: int) -> None:
    """Forward and backward."""
    x = torch.empty(8, width, 100, 100, dtype=torch.bfloat16, device="cuda", memory_format=torch.channels_last)
    y = first_channels.first_channels(x, torch.empty(channels, dtype=torch.bfloat16, device="cuda"))
    torch.ops.retina_fast.first_channels_backward(y, width)
