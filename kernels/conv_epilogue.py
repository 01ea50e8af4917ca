"""What follows a conv in one pass over its output: y = activation(y + bias + z), in place.

    relu   max(y, 0), where a NaN stays one
    swish  y * sigmoid(y)

PyTorch adds a conv's bias on a GPU by a pass of its own, a residual sum and an activation by one more each: seven reads
and writes of the output's size. Here they are three, computed in float32 and rounded once.
"""

import torch
from torch import Tensor

from retina_fast.kernels.arguments import at_least_float32, check_devices, check_shape
from retina_fast.kernels.dispatch import is_differentiated, runs_triton, tl, triton

ACTIVATIONS = ("none", "relu", "swish")

_BLOCK = 2048  # elements of a program: 16 a thread


def conv_epilogue_reference(y: Tensor, bias: Tensor | None, z: Tensor | None, activation: str) -> Tensor:
    """The definition, not in place and differentiable; see :func:`conv_epilogue_`."""
    out = at_least_float32(y)
    if bias is not None:
        out = out + at_least_float32(bias)[:, None, None]
    if z is not None:
        out = out + at_least_float32(z)
    if activation == "relu":
        out = out.relu()
    elif activation == "swish":
        out = out * out.sigmoid()
    return out.to(y.dtype)


@triton.jit
def _conv_epilogue_kernel(y_ptr, bias_ptr, z_ptr, size, C: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    """Program t handles BLOCK elements of y, whose channels lie next to each other."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    i = tl.arange(0, BLOCK)
    inside = i < size - start
    channel = ((start % C).to(tl.int32) + i) % C
    y = tl.load(y_ptr + start + i, mask=inside).to(tl.float32)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + channel).to(tl.float32)
    if z_ptr is not None:
        y += tl.load(z_ptr + start + i, mask=inside).to(tl.float32)
    if ACTIVATION == "relu":
        y = tl.where(y < 0, 0.0, y)
    elif ACTIVATION == "swish":
        y = y / (1 + tl.exp(-y))
    tl.store(y_ptr + start + i, y.to(y_ptr.dtype.element_ty), mask=inside)


@torch.library.custom_op("retina_fast::conv_epilogue_", mutates_args=("y",))
def _op(y: Tensor, bias: Tensor | None, z: Tensor | None, activation: str) -> None:
    """See :func:`conv_epilogue_`; y and z in channels_last memory, bias contiguous."""
    with torch.cuda.device_of(y):
        _conv_epilogue_kernel[(triton.cdiv(y.numel(), _BLOCK),)](
            y, bias, z, y.numel(), C=y.shape[1], ACTIVATION=activation, BLOCK=_BLOCK, enable_fp_fusion=True
        )


@_op.register_fake
def _(y, bias, z, activation):
    return None


def serves_epilogue(y: Tensor) -> bool:
    """Whether the kernel runs on a conv's output: on a GPU, in channels_last memory."""
    return runs_triton(y) and y.is_contiguous(memory_format=torch.channels_last)


def conv_epilogue_(y: Tensor, bias: Tensor | None, z: Tensor | None, activation: str) -> Tensor:
    """Add a bias and another tensor to a conv's output and apply an activation, in place.

    Args:
        y: ``(B, C, H, W)`` of a floating-point dtype, in channels_last memory; it is overwritten. Where a gradient may
            be asked for, the reference runs.
        bias: ``(C,)``, or None.
        z: of y's shape, or None.
        activation: "none", "relu" or "swish".

    Returns:
        y.

    Raises:
        ValueError: if y is not in channels_last memory, bias or z does not fit or lies on another device, or activation
            is none of these.

    Example::

        >>> y = torch.tensor([1.0, -3.0]).view(1, 2, 1, 1)
        >>> conv_epilogue_(y, torch.tensor([1.0, 1.0]), None, "relu").flatten()
        tensor([2., 0.])
    """
    if y.dim() != 4 or not y.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(f"y must be (B, C, H, W) in channels_last memory, got {tuple(y.shape)}, strides {y.stride()}")
    if bias is not None:
        check_shape("bias", bias, "(C,)", (y.shape[1],))
    if z is not None:
        check_shape("z", z, "(B, C, H, W)", tuple(y.shape))
    check_devices(y.device, bias=bias, z=z)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if not runs_triton(y, bias, z) or is_differentiated(y, bias, z):
        return y.copy_(conv_epilogue_reference(y, bias, z, activation))
    if y.numel():
        bias = None if bias is None else bias.contiguous()
        z = None if z is None else z.contiguous(memory_format=torch.channels_last)
        _op(y, bias, z, activation)
    return y
