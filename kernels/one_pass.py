"""Losses whose forward pass writes the finished gradient, so that backward only multiplies it by the incoming one.

The incoming gradient is a scalar on the device. One launch reads it there, and returns at once where it is 1, as it is
under ``loss.backward()``. To compare it on the host would mean to wait for the GPU.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from retina_fast.kernels.dispatch import needs_reference, tl, triton
from retina_fast.kernels.levels import decode_size, encode_sizes

_TILE = 4096
_SUMMED = 8192  # numbers that the one program of a sum adds up at a time
_PROGRAMS = 1024  # about as many as an H200 runs at once; where the factor is 1, only their launch costs time


@triton.jit
def _scale_kernel(tensors, sizes, factor_ptr, TILE: tl.constexpr):
    """Multiplies the tensors by factor in place. It reads and writes nothing where the factor is 1."""
    factor = tl.load(factor_ptr)
    if factor != 1:
        i = tl.arange(0, TILE)
        for t in tl.static_range(len(tensors)):
            offset = tl.program_id(0).to(tl.int64) * TILE
            end = decode_size(sizes[t])
            while offset < end:
                ptr = tensors[t] + offset + i
                if offset + TILE <= end:
                    tl.store(ptr, (tl.load(ptr).to(tl.float32) * factor).to(ptr.dtype.element_ty))
                else:
                    mask = i < end - offset
                    tl.store(ptr, (tl.load(ptr, mask=mask).to(tl.float32) * factor).to(ptr.dtype.element_ty), mask=mask)
                offset += tl.num_programs(0) * TILE


@triton.jit(do_not_specialize=["count"])
def _sum_kernel(values_ptr, sum_ptr, count, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, count, BLOCK):
        total += tl.load(values_ptr + first + i, mask=first + i < count, other=0.0)
    tl.store(sum_ptr, tl.sum(total, axis=0))


def sum_of(values: Tensor) -> Tensor:
    """The sum () of contiguous float32 numbers, always in the same order: a program for some ten thousand of them, as
    the tiles of a loss write, takes 2 us less than torch's reduction."""
    total = values.new_empty(())
    with torch.cuda.device_of(values):
        _sum_kernel[(1,)](values, total, values.numel(), BLOCK=_SUMMED, num_warps=16, enable_fp_fusion=False)
    return total


@torch.library.custom_op("retina_fast::scale_", mutates_args=("tensors",))
def scale_op(tensors: list[Tensor], factor: Tensor) -> None:
    """Multiplies contiguous tensors in place by factor (), which is read on the device."""
    sizes = [tensor.numel() for tensor in tensors]
    with torch.cuda.device_of(factor):
        programs = min(_PROGRAMS, triton.cdiv(max(sizes), _TILE))
        _scale_kernel[(programs,)](tuple(tensors), encode_sizes(sizes), factor, TILE=_TILE, enable_fp_fusion=False)


@scale_op.register_fake
def _(tensors, factor):
    return None


def grads_by_reference(
    name: str, reference: Callable[..., Any], inputs: Sequence[Tensor], grad_outputs: Any
) -> list[Tensor | None]:
    """Gradients that can be differentiated again, as backward with create_graph=True asks for, or several at once.

    What the kernels compute is a finished gradient, which has no history, of one loss. So the reference computes the
    operation once more. It is as slow as PyTorch's own, and a warning says so.

    Args:
        name: of the operation, for the warning.
        reference: from the inputs to the output, or to several.
        inputs: as forward was given them, with their history.
        grad_outputs: the gradient of each output.
    """
    again = torch.is_grad_enabled()
    what = "create_graph=True" if again else "is_grads_batched"
    warnings.warn(f"{name}: {what} computes gradients by the PyTorch reference, which is slow", stacklevel=2)
    wanted = [x for x in inputs if x.requires_grad]
    with torch.enable_grad():
        outputs = reference(*inputs)
    grads = iter(torch.autograd.grad(outputs, wanted, grad_outputs, create_graph=again, materialize_grads=True))
    return [next(grads) if x.requires_grad else None for x in inputs]


class OnePass(torch.autograd.Function):
    """``OnePass.apply(name, run, reference, *levels)`` is the loss. ``run(levels)`` returns the loss (), and then the
    gradient of each level; ``reference(*levels)`` is the loss in PyTorch, for backward with create_graph=True.

    It is for eager use only, since in a compiled graph scaling a saved tensor in place becomes a copy. In eager use it
    takes the host half the time of a custom op's own autograd.
    """

    @staticmethod
    def forward(
        ctx: Any,
        name: str,
        run: Callable[[list[Tensor]], list[Tensor]],
        reference: Callable[..., Tensor],
        *levels: Tensor,
    ) -> Tensor:
        ctx.name, ctx.reference = name, reference
        loss, *grads = run(list(levels))
        ctx.save_for_backward(*levels, *grads)
        return loss

    @staticmethod
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        saved = list(ctx.saved_tensors)
        levels, grads = saved[: len(saved) // 2], saved[len(saved) // 2 :]
        if needs_reference(factor):
            return None, None, None, *grads_by_reference(ctx.name, ctx.reference, levels, factor)
        if torch._C._autograd._get_current_graph_task_keep_graph():
            grads = [grad.clone() for grad in grads]  # a second backward needs them unchanged
        scale_op(grads, factor)
        return None, None, None, *grads


def run_one_pass(
    name: str, run: Callable[[list[Tensor], bool], list[Tensor]], reference: Callable[..., Tensor], levels: list[Tensor]
) -> Tensor:
    """The loss that ``run(levels, with_grads)`` returns, before the gradients if they are wanted. They are where
    autograd records the levels, except in a compiled graph, and in float16, where small ones are lost unless a factor
    such as a GradScaler's comes first."""
    wanted = torch.is_grad_enabled() and any(level.requires_grad for level in levels)
    if wanted and levels[0].dtype != torch.float16 and not torch.compiler.is_compiling():
        return OnePass.apply(name, lambda levels: run(levels, True), reference, *levels)
    return run(levels, False)[0]
