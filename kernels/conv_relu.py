"""A conv, its bias, a residual sum and ReLU as one operation.

    y = max(conv(x, W) + b + z, 0)      dz = dy where y > 0, else 0      db = sum dz      dx, dW: the conv's of dz

In eager PyTorch the bias (on a GPU), the sum and the ReLU are passes over the conv's output: four reads and four writes
of its size, the conv's own included. Here the conv writes y once, and z is read once. Backward saves x, W and y; it
makes dz in one pass and gives it to the conv's own backward.

On CUDA the forward pass is cuDNN's. On a CPU it is oneDNN's, where no gradient is asked for: its ReLU makes 0 of NaN,
which would hide from a training that it has diverged.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from retina_fast.kernels.arguments import check_devices, check_shape
from retina_fast.kernels.conv_onednn import onednn_conv, runs_onednn
from retina_fast.kernels.dispatch import is_transformed

Pair = int | Sequence[int]


def conv_relu_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
) -> Tensor:
    """The definition, differentiable by autograd; see :func:`conv_relu`."""
    return F.relu(F.conv2d(x, weight, bias, stride, padding, dilation, groups))


def conv_add_relu_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
) -> Tensor:
    """The definition, differentiable by autograd; see :func:`conv_add_relu`."""
    return F.relu(F.conv2d(x, weight, bias, stride, padding, dilation, groups) + z)


def _runs_cudnn(x: Tensor) -> bool:
    served = x.is_cuda and torch.version.hip is None and x.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return served and torch.backends.cudnn.is_acceptable(x)


def _eager(x: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor | None, *geometry) -> Tensor:
    if z is None:
        return conv_relu_reference(x, weight, bias, *geometry)
    return conv_add_relu_reference(x, weight, bias, z, *geometry)


def output_format(x: Tensor, weight: Tensor) -> torch.memory_format:
    """The format of a conv's output: channels_last if that of its input or of its weight is."""
    last = torch.channels_last
    is_last = any(t.is_contiguous(memory_format=last) and not t.is_contiguous() for t in (x, weight))
    return last if is_last else torch.contiguous_format


@torch.library.custom_op("retina_fast::conv_relu", mutates_args=())
def _op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """y in the memory format of :func:`output_format`."""
    layout, geometry = output_format(x, weight), (stride, padding, dilation, groups)
    if not _runs_cudnn(x):
        return _eager(x, weight, bias, z, *geometry).contiguous(memory_format=layout)
    x, weight = (tensor.contiguous(memory_format=layout) for tensor in (x, weight))
    if z is None:
        return torch.cudnn_convolution_relu(x, weight, bias, *geometry).contiguous(memory_format=layout)
    z = z.contiguous(memory_format=layout)
    if z.untyped_storage()._cdata == x.untyped_storage()._cdata:  # cuDNN asks for separate memory
        z = z.clone()
    return torch.cudnn_convolution_add_relu(x, weight, z, 1.0, bias, *geometry).contiguous(memory_format=layout)


@_op.register_fake
def _(x, weight, bias, z, stride, padding, dilation, groups):
    shape = output_shape(x, weight, stride, padding, dilation)
    return x.new_empty(shape).contiguous(memory_format=output_format(x, weight))


def _setup_context(ctx, inputs, output):
    x, weight, bias, z, *ctx.geometry = inputs
    ctx.bias_sizes = None if bias is None else list(bias.shape)
    ctx.has_z = z is not None
    ctx.save_for_backward(x, weight, output)


def _backward(ctx, dy):
    x, weight, y = ctx.saved_tensors
    *geometry, groups = ctx.geometry
    wanted = [*ctx.needs_input_grad[:2], ctx.bias_sizes is not None and ctx.needs_input_grad[2]]
    dz = torch.ops.aten.threshold_backward(dy, y, 0)
    dx = dw = db = None
    if any(wanted):
        dx, dw, db = torch.ops.aten.convolution_backward(
            dz, x, weight, ctx.bias_sizes, *geometry, False, [0, 0], groups, wanted
        )
    return dx, dw, db, dz if ctx.has_z else None, None, None, None, None


_op.register_autograd(_backward, setup_context=_setup_context)


def conv_relu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
) -> Tensor:
    """ReLU of a 2-D conv, as ``F.relu(F.conv2d(...))``.

    Args:
        x: ``(B, C_in, H, W)``. Under autocast, x, weight and bias are brought into autocast's dtype.
        weight: ``(C_out, C_in / groups, kH, kW)``.
        bias: ``(C_out,)``.
        stride, padding, dilation: an int or a pair, as of ``F.conv2d``.
        groups: as of ``F.conv2d``.

    Returns:
        ``(B, C_out, H_out, W_out)``. Where no gradient is asked for, NaN may become 0.

    Raises:
        ValueError: if shapes, dtypes or devices do not fit, with the argument's name.

    Example::

        >>> y = conv_relu(torch.randn(1, 8, 9, 9), torch.randn(4, 8, 3, 3), torch.zeros(4), stride=2, padding=1)
        >>> tuple(y.shape), bool((y >= 0).all())
        ((1, 4, 5, 5), True)
    """
    return _conv_relu(x, weight, bias, None, _pair(stride), _pair(padding), _pair(dilation), groups)


def conv_add_relu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
) -> Tensor:
    """ReLU of the sum of a 2-D conv and another tensor, as ``F.relu(F.conv2d(...) + z)``: the end of a residual block.

    Args:
        x, weight, bias, stride, padding, dilation, groups: as of :func:`conv_relu`.
        z: of the output's shape, ``(B, C_out, H_out, W_out)``.

    Returns:
        ``(B, C_out, H_out, W_out)``. Where no gradient is asked for, NaN may become 0.

    Raises:
        ValueError: if shapes, dtypes or devices do not fit, with the argument's name.

    Example::

        >>> x, weight = torch.randn(1, 8, 9, 9), torch.randn(8, 8, 3, 3)
        >>> torch.equal(conv_add_relu(x, weight, None, x, padding=1), F.relu(F.conv2d(x, weight, padding=1) + x))
        True
    """
    return _conv_relu(x, weight, bias, z, _pair(stride), _pair(padding), _pair(dilation), groups)


def _pair(value: Pair) -> list[int]:
    return [value] * 2 if isinstance(value, int) else list(value)


def output_shape(
    x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> tuple[int, int, int, int]:
    """The shape (B, C_out, H_out, W_out) of a conv's output."""
    high, wide = (
        (x.shape[2 + i] + 2 * padding[i] - dilation[i] * (weight.shape[2 + i] - 1) - 1) // stride[i] + 1 for i in (0, 1)
    )
    return x.shape[0], weight.shape[0], high, wide


def _conv_relu(x: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor | None, *geometry) -> Tensor:
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        bias, z = (None if tensor is None else tensor.to(dtype) for tensor in (bias, z))
        with torch.autocast(kind, enabled=False):
            return _conv_relu(x.to(dtype), weight.to(dtype), bias, z, *geometry)
    _check(x, weight, bias, z, *geometry)
    if x.is_cuda and not is_transformed(x, weight, bias, z):
        return _op(x, weight, bias, z, *geometry)
    if runs_onednn(x, weight, bias, z):
        return onednn_conv(x, weight, bias, z, "relu", *geometry)
    return _eager(x, weight, bias, z, *geometry)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor | None, *geometry) -> None:
    """Raises ValueError, with the name, for arguments that the libraries would read wrongly."""
    *sizes, groups = geometry
    if x.dim() != 4 or weight.dim() != 4 or x.shape[1] != weight.shape[1] * groups or weight.shape[0] % groups:
        raise ValueError(f"weight {tuple(weight.shape)} in {groups} groups does not fit x {tuple(x.shape)}")
    if bias is not None:
        check_shape("bias", bias, "(C_out,)", (weight.shape[0],))
    if z is not None:
        check_shape("z", z, "(B, C_out, H_out, W_out)", output_shape(x, weight, *sizes))
    check_devices(x.device, weight=weight, bias=bias, z=z)
    for name, tensor in (("weight", weight), ("bias", bias), ("z", z)):
        if tensor is not None and tensor.dtype != x.dtype:
            raise ValueError(f"{name} must be {x.dtype} as x is, got {tensor.dtype}")
