"""A conv with what follows it, in training too: y = conv(x, W) + bias + z, and with ReLU max(0, y).

    forward     the conv, then bias, sum and ReLU in one pass over its output; only x, W and the output are kept
    backward    dz = dy where y > 0, else 0, and dbias = the sum of dz by channel, in one pass; then dx and dW

PyTorch makes a pass for the bias, one for the sum and one for the ReLU, and backward one for the ReLU and one for the
bias. On CUDA the convs themselves are cuDNN's, here as there, except for 1x1 convs with a sum in half precision, which
one kernel of ours computes. On a CPU, where no gradient is asked for, oneDNN takes all along as it writes a conv's
output; its ReLU makes 0 of NaN, which would hide from a training that it has diverged.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from retina_fast.kernels.arguments import check_devices, check_shape
from retina_fast.kernels.conv_epilogue import conv_epilogue_, epilogue_gradients
from retina_fast.kernels.conv_onednn import onednn_conv, runs_onednn
from retina_fast.kernels.conv_pointwise import conv_pointwise, serves_pointwise
from retina_fast.kernels.dispatch import is_transformed, runs_triton

Pair = int | Sequence[int]


def fused_conv_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, z: Tensor | None = None, relu: bool = False, *geometry: Any
) -> Tensor:
    """The definition, differentiable by autograd; see :func:`fused_conv`. ``geometry`` is stride, padding, ..."""
    y = F.conv2d(x, weight, None if bias is None else bias.to(x.dtype), *geometry)
    y = y if z is None else y + _resized(z, y.shape)
    return F.relu(y) if relu else y


def _eager(x: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor | None, relu: bool, *geometry) -> Tensor:
    """The same with less memory: what a conv has written is overwritten."""
    if is_transformed(x, weight, bias, z):
        return fused_conv_reference(x, weight, bias, z, relu, *geometry)
    y = F.conv2d(x, weight, None if bias is None else bias.to(x.dtype), *geometry)
    y = y if z is None else y.add_(_resized(z, y.shape))
    return y.relu_() if relu else y


def _resized(z: Tensor, shape: Sequence[int]) -> Tensor:
    """z with the height and width of an output, by nearest neighbours."""
    return z if z.shape[2:] == tuple(shape[2:]) else F.interpolate(z, size=list(shape[2:]), mode="nearest")


def output_format(x: Tensor, weight: Tensor) -> torch.memory_format:
    """The format of a conv's output: channels_last if that of its input or of its weight is."""
    last = torch.channels_last
    is_last = any(t.is_contiguous(memory_format=last) and not t.is_contiguous() for t in (x, weight))
    return last if is_last else torch.contiguous_format


@torch.library.custom_op("retina_fast::fused_conv", mutates_args=())
def _op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None,
    relu: bool,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """y in channels_last memory."""
    activation, others = "relu" if relu else "none", (*padding, *(size - 1 for size in dilation), groups - 1)
    with torch.no_grad():
        if z is not None and stride[0] == stride[1] and not any(others) and serves_pointwise(x, weight, z):
            return conv_pointwise(x, weight, bias, z, activation, stride[0])
        y = torch.convolution(x, weight, None, stride, padding, dilation, False, [0, 0], groups)
        if not y.is_contiguous(memory_format=torch.channels_last):
            y = y.contiguous(memory_format=torch.channels_last)
        return conv_epilogue_(y, bias, None if z is None else _resized(z, y.shape), activation)


@_op.register_fake
def _(x, weight, bias, z, relu, stride, padding, dilation, groups):
    shape = output_shape(x, weight, stride, padding, dilation)
    return x.new_empty(shape).contiguous(memory_format=torch.channels_last)


def _setup_context(ctx, inputs, output):
    x, weight, bias, z, ctx.relu, *ctx.geometry = inputs
    ctx.bias_sizes = None if bias is None else list(bias.shape)
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.z_shape = None if z is None else list(z.shape)
    ctx.save_for_backward(x, weight, output if ctx.relu else None)


def _backward(ctx, dy):
    x, weight, y = ctx.saved_tensors
    *geometry, groups = ctx.geometry
    needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
    needs_bias = needs_bias and ctx.bias_sizes is not None
    dz, db = epilogue_gradients(dy, y, needs_bias)
    dx = dw = None
    if needs_x or needs_weight:
        wanted = [needs_x, needs_weight, False]
        dx, dw, _ = torch.ops.aten.convolution_backward(dz, x, weight, None, *geometry, False, [0, 0], groups, wanted)
    db = None if db is None else db.to(ctx.bias_dtype)
    of_z = None if ctx.z_shape is None else dz
    if of_z is not None and ctx.z_shape != list(dz.shape):
        of_z = torch.ops.aten.upsample_nearest2d_backward(dz, list(dz.shape[2:]), ctx.z_shape)
    return dx, dw, db, of_z, None, None, None, None, None


_op.register_autograd(_backward, setup_context=_setup_context)


def fused_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    z: Tensor | None = None,
    relu: bool = False,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
) -> Tensor:
    """A 2-D conv with a sum and ReLU, as ``F.relu(F.conv2d(...) + z)``: a residual block ends so.

    Args:
        x: ``(B, C_in, H, W)``. Under autocast, x, weight and z are brought into autocast's dtype.
        weight: ``(C_out, C_in / groups, kH, kW)``.
        bias: ``(C_out,)``, of x's dtype or float32.
        z: ``(B, C_out, H_z, W_z)``, which is added, or None. Where its height and width are not the output's, it is
            resized by nearest neighbours.
        relu: whether ReLU follows.
        stride, padding, dilation: an int or a pair, as of ``F.conv2d``.
        groups: as of ``F.conv2d``.

    Returns:
        ``(B, C_out, H_out, W_out)``. Where no gradient is asked for, a ReLU on a CPU may make 0 of NaN.

    Raises:
        ValueError: if shapes, dtypes or devices do not fit, with the argument's name.

    Example::

        >>> x, weight = torch.randn(1, 8, 9, 9), torch.randn(8, 8, 3, 3)
        >>> y = fused_conv(x, weight, z=x, relu=True, padding=1)
        >>> torch.equal(y, F.relu(F.conv2d(x, weight, padding=1) + x))
        True
    """
    kind = x.device.type
    geometry = _pair(stride), _pair(padding), _pair(dilation), groups
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        z = None if z is None else z.to(dtype)
        with torch.autocast(kind, enabled=False):
            return fused_conv(x.to(dtype), weight.to(dtype), bias, z, relu, *geometry)
    _check(x, weight, bias, z, *geometry)
    if runs_triton(x, weight, bias, z) and output_format(x, weight) == torch.channels_last:
        return _op(x, weight, bias, z, relu, *geometry)
    if relu and (bias is None or bias.dtype == x.dtype) and runs_onednn(x, weight, bias, z):
        return onednn_conv(x, weight, bias, z, "relu", *geometry)
    return _eager(x, weight, bias, z, relu, *geometry)


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


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor | None, *geometry) -> None:
    """Raises ValueError, with the name, for arguments that the libraries would read wrongly."""
    *sizes, groups = geometry
    if x.dim() != 4 or weight.dim() != 4 or x.shape[1] != weight.shape[1] * groups or weight.shape[0] % groups:
        raise ValueError(f"weight {tuple(weight.shape)} in {groups} groups does not fit x {tuple(x.shape)}")
    if bias is not None:
        check_shape("bias", bias, "(C_out,)", (weight.shape[0],))
    if z is not None:
        shape = output_shape(x, weight, *sizes)
        given = (*shape[:2], *z.shape[2:]) if z.dim() == 4 else shape
        check_shape("z", z, "(B, C_out, H_z, W_z)", given)
    check_devices(x.device, weight=weight, bias=bias, z=z)
    for name, tensor, others in (("weight", weight, ()), ("bias", bias, (torch.float32,)), ("z", z, ())):
        if tensor is not None and tensor.dtype not in (x.dtype, *others):
            raise ValueError(f"{name} must be {x.dtype} as x is, got {tensor.dtype}")
