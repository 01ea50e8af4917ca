"""A pointwise (1x1) conv in FP8 by PyTorch's scaled product of matrices: y = (q(s x) q(W / t)) t / s + b.

    q rounds to E4M3: 1 bit for the sign, 4 for the exponent, 3 for the mantissa; beyond 448, its largest, it gives 448
    s is a power of two for the whole input, t the weight's largest magnitude over 448

The format is that of Micikevicius et al., "FP8 Formats for Deep Learning" (2022), section 3. Products and sums are
float32, rounded once to the dtype of x. ``torch._scaled_mm`` takes such matrices on NVIDIA GPUs of compute capability
8.9 and newer, and on a CPU, where it serves as a check; it was not run on a GPU. It reads x as rows of pixels and W as
columns, both with channels in multiples of 16. A scale for each output channel would ask for one for each pixel, too.
There is none: E4M3 is equally precise over a range of 2^14, so that it would take off 6% of a conv's error at most, as
measured in trained networks.

Rounding x is a pass of its own, since the layer before has written x in half precision: it reads 2 bytes and writes 1
for each value. With s = 1 it is one kernel, else a product that reads and writes 2 bytes comes before. Then the scaled
product reads 1 byte where the conv in half precision reads 2, and sum and activation are one more pass over y, which
:mod:`retina_fast.kernels.conv_pointwise` saves. So it gains only where the product takes far longer than the memory:
with many channels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

FLOAT8 = torch.float8_e4m3fn
LARGEST = 448.0
"""What E4M3 ends at."""
MULTIPLE = 16
"""Numbers of channels that a scaled product takes."""
_LEAST = 1e-30  # of the weights' largest magnitude, where all are 0


@dataclass(frozen=True)
class Float8Weight:
    """What a conv in FP8 holds.

    Attributes:
        values: ``(C_out, C_in)`` of FP8.
        scale: (), float32: by what the values are multiplied.
        input_factor: the power of two by which the input is multiplied before it is rounded.
        input_scale: (), float32: one over it.
        limits: (2,), of the weight's dtype: -448 and 448.
    """

    values: Tensor
    scale: Tensor
    input_factor: float
    input_scale: Tensor
    limits: Tensor


def float8_weight(weight: Tensor, input_factor: float) -> Float8Weight:
    """Round the weights of a conv to FP8.

    Args:
        weight: ``(C_out, C_in, 1, 1)``, floating point.
        input_factor: a power of two by which inputs are multiplied, so that the largest come near to 448.

    Example::

        >>> made = float8_weight(torch.tensor([[0.5, -7.0]]).view(1, 2, 1, 1), 1.0)
        >>> made.values.float() * made.scale
        tensor([[ 0.5000, -7.0000]])
    """
    matrix = weight.detach().flatten(1).float()
    scale = matrix.abs().amax().clamp(min=_LEAST) / LARGEST
    values = (matrix / scale).clamp(-LARGEST, LARGEST).to(FLOAT8).contiguous()
    limits = torch.tensor([-LARGEST, LARGEST], dtype=weight.dtype, device=weight.device)
    return Float8Weight(values, scale, input_factor, torch.full_like(scale, 1 / input_factor), limits)


def to_float8(x: Tensor, weight: Float8Weight, stride: int = 1) -> Tensor:
    """The input of a conv ``(B, C, H, W)`` in FP8, of each stride-th pixel, in channels_last memory. NaN stays NaN."""
    x = x[:, :, ::stride, ::stride]
    if weight.input_factor != 1:
        x = x * weight.input_factor  # exact
    out = torch.empty(x.shape, dtype=FLOAT8, device=x.device, memory_format=torch.channels_last)
    low, high = weight.limits
    return torch.clamp(x, low, high, out=out)  # one kernel, which writes FP8; it refuses limits that are numbers


def conv_float8_reference(x: Tensor, weight: Float8Weight, bias: Tensor | None, stride: int = 1) -> Tensor:
    """The definition, on any device; see :func:`conv_float8`."""
    pixels = to_float8(x, weight, stride).permute(0, 2, 3, 1)  # (B, H, W, C_in)
    y = pixels.float() @ weight.values.float().t() * (weight.input_scale * weight.scale)
    if bias is not None:
        y = y + bias.float()
    return y.to(x.dtype).permute(0, 3, 1, 2)


def conv_float8(x: Tensor, weight: Float8Weight, bias: Tensor | None, stride: int = 1) -> Tensor:
    """A 1x1 conv of which input and weights are rounded to FP8, and the bias.

    The sums are kept in float32 (``use_fast_accum`` is off), so that they are the reference's.

    Args:
        x: ``(B, C_in, H, W)``; bfloat16 or float16 on a GPU.
        weight: of :func:`float8_weight`.
        bias: ``(C_out,)`` of x's dtype, or None.
        stride: of the conv, the same for height and width.

    Returns:
        ``(B, C_out, H_out, W_out)`` of x's dtype, in channels_last memory.

    Raises:
        RuntimeError: on a GPU without FP8, and for numbers of channels that are no multiple of 16.

    Example::

        >>> weight = float8_weight(torch.ones(16, 16, 1, 1, dtype=torch.bfloat16), 1.0)
        >>> conv_float8(torch.full((1, 16, 1, 1), 1.03, dtype=torch.bfloat16), weight, None)[0, 0]
        tensor([[16.]], dtype=torch.bfloat16)
    """
    pixels = to_float8(x, weight, stride).permute(0, 2, 3, 1)
    scales = weight.input_scale, weight.scale
    y = torch._scaled_mm(pixels.flatten(0, 2), weight.values.t(), *scales, bias=bias, out_dtype=x.dtype)
    return y.view(*pixels.shape[:3], -1).permute(0, 3, 1, 2)


def suits_float8(weight: Tensor) -> bool:
    """Whether a scaled product takes the weight (C_out, C_in, 1, 1) of a 1x1 conv."""
    return weight.shape[0] % MULTIPLE == 0 and weight.shape[1] % MULTIPLE == 0
