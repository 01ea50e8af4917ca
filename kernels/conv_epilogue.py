"""What follows a conv in one pass over its output: y = activation(y + bias + z), in place.

    relu   max(y, 0), where a NaN stays one
    swish  y * sigmoid(y)

PyTorch adds a conv's bias on a GPU by a pass of its own, a residual sum and an activation by one more each. Here they
are one, computed in float32 and rounded once.
"""

import torch
from torch import Tensor

from retina_fast.kernels.dispatch import runs_triton, tl, triton

ACTIVATIONS = ("none", "relu", "swish")

_BLOCK = 2048  # elements of a program: 16 a thread


@triton.jit
def _epilogue_kernel(y_ptr, bias_ptr, z_ptr, size, C: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
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


def conv_epilogue_reference(y: Tensor, bias: Tensor | None, z: Tensor | None, activation: str) -> Tensor:
    """The definition; see :func:`conv_epilogue_`."""
    out = y.float()
    if bias is not None:
        out = out + bias.float()[:, None, None]
    if z is not None:
        out = out + z.float()
    if activation == "relu":
        out = out.relu()
    elif activation == "swish":
        out = out * out.sigmoid()
    return out.to(y.dtype)


def serves_epilogue(y: Tensor) -> bool:
    """Whether the kernel runs on a conv's output: on a GPU, in channels_last memory."""
    return runs_triton(y) and y.is_contiguous(memory_format=torch.channels_last)


def _conv_epilogue_triton(y: Tensor, bias: Tensor | None, z: Tensor | None, activation: str) -> Tensor:
    z = None if z is None else z.contiguous(memory_format=torch.channels_last)
    with torch.cuda.device_of(y):
        _epilogue_kernel[(triton.cdiv(y.numel(), _BLOCK),)](
            y, bias, z, y.numel(), C=y.shape[1], ACTIVATION=activation, BLOCK=_BLOCK
        )
    return y


def conv_epilogue_(y: Tensor, bias: Tensor | None, z: Tensor | None, activation: str) -> Tensor:
    """Add a bias and another tensor to a conv's output and apply an activation, in place and without gradients.

    Args:
        y: ``(B, C, H, W)`` float32, bfloat16 or float16, in channels_last memory; it is overwritten.
        bias: ``(C,)``, or None.
        z: of y's shape, or None.
        activation: "none", "relu" or "swish".

    Returns:
        y.

    Raises:
        ValueError: if y is not in channels_last memory, bias or z does not fit, or activation is none of these.

    Example::

        >>> y = torch.tensor([1.0, -3.0]).view(1, 2, 1, 1)
        >>> conv_epilogue_(y, torch.tensor([1.0, 1.0]), None, "relu").flatten()
        tensor([2., 0.])
    """
    if y.dim() != 4 or not y.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(f"y must be (B, C, H, W) in channels_last memory, got {tuple(y.shape)}, strides {y.stride()}")
    if bias is not None and bias.shape != y.shape[1:2]:
        raise ValueError(f"bias must be ({y.shape[1]},), got {tuple(bias.shape)}")
    if z is not None and z.shape != y.shape:
        raise ValueError(f"z must be {tuple(y.shape)}, got {tuple(z.shape)}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if runs_triton(y) and y.numel():
        return _conv_epilogue_triton(y, bias, z, activation)
    return y.copy_(conv_epilogue_reference(y, bias, z, activation))
