"""Calls of ``F.conv2d`` on a CPU taken over for a training step: by Winograd's algorithm where it is faster.

The modules that make the calls, their parameters and their hooks stay what they are.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from retina_fast.kernels.conv_winograd import (
    Scratch,
    gains_from_winograd,
    suits_winograd,
    transform_weight,
    winograd_conv,
    winograd_weight_gradient,
)
from retina_fast.kernels.dispatch import is_transformed
from retina_fast.kernels.fused_conv import output_format


class _Winograd(torch.autograd.Function):
    """A 3x3 conv with stride 1 and padding 1. Its backward pass is differentiable."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, scratch: Scratch) -> Tensor:
        ctx.save_for_backward(x, weight)  # as F.conv2d does, which an activation checkpoint runs in its place
        ctx.bias_sizes, ctx.scratch = None if bias is None else list(bias.shape), scratch
        return winograd_conv(x, transform_weight(weight), bias, None, "none", scratch)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (dy,), (x, weight) = gradients, ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        if torch.is_grad_enabled() or is_transformed(dy):  # somebody differentiates once more, or several at once
            wanted, one = [needs_x, needs_weight, needs_bias], [1, 1]
            return *torch.ops.aten.convolution_backward(
                dy, x, weight, ctx.bias_sizes, one, one, one, False, [0, 0], 1, wanted
            ), None  # fmt: skip
        dx = dw = db = None
        if needs_x:
            flipped = transform_weight(weight.flip(2, 3).transpose(0, 1))
            dx = winograd_conv(dy, flipped, None, None, "none", ctx.scratch)
        if needs_weight:
            dw = winograd_weight_gradient(x, dy, ctx.scratch)
        if needs_bias:
            db = dy.sum((0, 2, 3))
        return dx, dw, db, None


class _Mode(TorchFunctionMode):
    def __init__(self, scratch: Scratch, channels_last: bool) -> None:
        super().__init__()
        self._scratch, self._channels_last = scratch, channels_last

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.conv2d and not torch.compiler.is_compiling():
            return self._conv(*args, **kwargs)
        return func(*args, **kwargs)

    def _conv(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Tensor:
        """``F.conv2d``, whose arguments have these names."""
        if not _is_plain(input, weight, bias) or input.dim() != 4:
            return F.conv2d(input, weight, bias, stride, padding, dilation, groups)
        if self._channels_last:
            input = input.contiguous(memory_format=torch.channels_last)
        pairs = (size if isinstance(size, Sequence) else [size] * 2 for size in (stride, padding, dilation))
        geometry: Any = *pairs, groups
        suits = not torch.is_autocast_enabled("cpu") and suits_winograd(input, weight, *geometry)
        if bias is not None and (bias.dtype != weight.dtype or bias.shape != weight.shape[:1]):
            suits = False  # PyTorch says what is wrong
        if not (suits and gains_from_winograd(input, weight)):
            return F.conv2d(input, weight, bias, stride, padding, dilation, groups)
        y = _Winograd.apply(input, weight, bias, self._scratch)
        return y if self._channels_last else y.contiguous(memory_format=output_format(input, weight))


def _is_plain(*tensors: Tensor | None) -> bool:
    """Whether nothing but autograd and autocast looks at what is done with the tensors: they lie on a CPU, are of no
    subclass, and torch.func does not trace them."""
    given = [tensor for tensor in tensors if tensor is not None]
    known = all(type(tensor) in (Tensor, nn.Parameter) and tensor.device.type == "cpu" for tensor in given)
    return known and not is_transformed(*given)


@contextlib.contextmanager
def fast_convs(scratch: Scratch, channels_last: bool) -> Iterator[None]:
    """Within it, large 3x3 convs in float32 on a CPU run by Winograd's algorithm, and so do their gradients.

    PyTorch suspends such a context during a backward pass. There, an activation checkpoint computes its convs as usual.

    Args:
        scratch: lends memory while a conv runs.
        channels_last: whether convs bring their input, and so their output, into channels_last.

    Example::

        >>> conv, x = nn.Conv2d(128, 128, 3, padding=1), torch.randn(1, 128, 24, 24)
        >>> with fast_convs(Scratch(), channels_last=True):
        ...     y = conv(x)
        >>> torch.equal(y, conv(x)), torch.allclose(y, conv(x), atol=1e-4)
        (False, True)
    """
    with _Mode(scratch, channels_last):
        yield
