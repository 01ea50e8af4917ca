"""Convs on a CPU by oneDNN, which adds a bias and another tensor and applies the activation as it writes the output.

These are the operations into which torch.compile fuses convs. In eager PyTorch the sum and the activation are passes of
their own, and each call rearranges the weights into oneDNN's memory format; ``pack_weight`` does that once.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from retina_fast.kernels.dispatch import is_differentiated

_OPS = torch.ops.mkldnn
_NAMES = ("_convolution_pointwise", "_convolution_pointwise_", "_reorder_convolution_weight")


@functools.cache
def serves_dtype(dtype: torch.dtype) -> bool:
    """Whether oneDNN's fused convs are in this build of PyTorch, and run in the dtype on this processor.

    Example::

        >>> serves_dtype(torch.float64)
        False
    """
    if dtype not in (torch.float32, torch.bfloat16, torch.float16) or not torch.backends.mkldnn.is_available():
        return False
    if not all(hasattr(_OPS, name) for name in _NAMES):
        return False
    x = torch.ones(1, 16, 2, 2, dtype=dtype, device="cpu").contiguous(memory_format=torch.channels_last)
    unit = (1, 1), (0, 0), (1, 1), 1
    try:
        packed = pack_weight(torch.ones(16, 16, 1, 1, dtype=dtype, device="cpu"), x.shape, *unit)
        outputs = [onednn_conv(x, packed, None, z, "relu", *unit) for z in (None, x)]
    except RuntimeError:  # of a processor without the dtype's instructions
        return False
    return [float(output.flatten()[0]) for output in outputs] == [16, 17]


def runs_onednn(x: Tensor, *others: Tensor | None) -> bool:
    """Whether a conv of x runs by oneDNN's fused convs: on a CPU, outside torch.compile, which fuses convs itself, and
    where nobody asks for derivatives with respect to x or the other tensors. None stands for an argument not given.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling() or type(x) not in (Tensor, nn.Parameter):
        return False
    return not is_differentiated(x, *others) and serves_dtype(x.dtype)


def pack_weight(
    weight: Tensor,
    input_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """The weight of a conv in oneDNN's own memory format, which only :func:`onednn_conv` can read.

    Args:
        weight: ``(C_out, C_in / groups, kH, kW)``.
        input_shape: for which the format is chosen; inputs of other shapes are taken, too.
        stride, padding, dilation, groups: the conv's; pairs.

    Example::

        >>> pack_weight(torch.ones(16, 16, 1, 1), (1, 16, 8, 8), (1, 1), (0, 0), (1, 1), groups=1).is_mkldnn
        True
    """
    return _OPS._reorder_convolution_weight(weight.detach(), padding, stride, dilation, groups, list(input_shape))


def onednn_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None,
    activation: str,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    *,
    overwrite_z: bool = False,
) -> Tensor:
    """``activation(conv(x) + bias + z)``, not differentiable; the ReLU makes 0 of NaN, where PyTorch's keeps NaN.

    Args:
        x: ``(B, C_in, H, W)`` on a CPU, of a dtype that :func:`serves_dtype` confirms.
        weight: ``(C_out, C_in / groups, kH, kW)``, or what :func:`pack_weight` made of it. The output of packed weights
            is channels_last.
        bias: ``(C_out,)``.
        z: of the output's shape.
        activation: ``none``, ``relu``, or without z ``swish``.
        stride, padding, dilation, groups: the conv's; pairs.
        overwrite_z: whether the output may take the memory of z. The page faults of new memory, where it is tens of
            megabytes, take longer than the sum itself.

    Example::

        >>> x, weight = torch.ones(1, 16, 2, 2), torch.ones(16, 16, 1, 1)
        >>> onednn_conv(x, weight, None, -x, "relu", (1, 1), (0, 0), (1, 1), groups=1)[0, 0, 0, 0]
        tensor(15.)
    """
    geometry = padding, stride, dilation, groups
    if z is None:
        return _OPS._convolution_pointwise(x, weight, bias, *geometry, activation, [], "")
    if z.shape[2:].numel() == 1:  # of a single pixel PyTorch 2.11 takes no sum
        y = _OPS._convolution_pointwise(x, weight, bias, *geometry, "none", [], "").add_(z)
        return y if activation == "none" else y.relu_()
    after_sum = None if activation == "none" else activation
    if overwrite_z and z.is_contiguous(memory_format=torch.channels_last):
        return _OPS._convolution_pointwise_.binary(z, x, weight, bias, *geometry, "add", 1.0, after_sum, [], "")
    return _OPS._convolution_pointwise.binary(x, z, weight, bias, *geometry, "add", 1.0, after_sum, [], "")
