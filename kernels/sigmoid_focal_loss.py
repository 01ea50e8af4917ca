"""Focal loss of a dense target, hard or soft (Lin et al. 2017, https://arxiv.org/abs/1708.02002, equation 5).

With p = sigmoid(x), a target t in [0, 1], c = softplus(x) - x t the cross entropy, w = p (1-t) + (1-p) t the
probability of the wrong answer, a = alpha t + (1-alpha) (1-t) and g = gamma,

    L = a w^g c              dL/dx = a w^g (g (1-2t) p (1-p) c / w + p - t)

torchvision makes 87 passes over tensors of the logits' size, forward and backward, and saves eight of them. Here the
forward pass reads the two inputs, and writes the losses only if they are not reduced. Backward reads the inputs again
and writes the gradient. That makes 5 passes for a sum, and 7 without reduction.
"""

import torch
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss as sigmoid_focal_loss_reference

from retina_fast.kernels.dispatch import PTX, needs_reference, runs_triton, tl, triton
from retina_fast.kernels.fast_math import exp2, log2, reciprocal, sigmoid
from retina_fast.kernels.one_pass import grads_by_reference

_TILE = 2048


@triton.jit
def _tile(
    x_ptr, target_ptr, out_ptr, incoming_ptr, left, background_weight, class_weight, GAMMA: tl.constexpr,
    OUTPUT: tl.constexpr, INCOMING_STRIDE: tl.constexpr, TILE: tl.constexpr, MASKED: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    i = tl.arange(0, TILE)
    mask = i < left if MASKED else None
    x = tl.load(x_ptr + i, mask=mask).to(tl.float32)
    t = tl.load(target_ptr + i, mask=mask).to(tl.float32)
    q, log1p = sigmoid(-tl.abs(x), PTX)  # the smaller of p and 1 - p, exact where the larger has rounded to 1
    p = tl.where(x > 0, 1 - q, q)
    not_p = tl.where(x > 0, q, 1 - q)
    entropy = tl.maximum(x, 0.0) - x * t + log1p
    wrong = p * (1 - t) + not_p * t
    if GAMMA == 2:
        modulation = wrong * wrong
    elif GAMMA == 0:
        modulation = 1.0
    else:
        modulation = exp2(GAMMA * log2(wrong, PTX), PTX)
    modulation *= background_weight + t * (class_weight - background_weight)
    if OUTPUT == "gradients":
        incoming = tl.load(incoming_ptr + i * INCOMING_STRIDE, mask=mask).to(tl.float32)
        decay = (1 - 2 * t) * p * not_p * reciprocal(tl.maximum(wrong, 1e-37), PTX)
        slope = modulation * (GAMMA * decay * entropy + p * (1 - t) - not_p * t)
        tl.store(out_ptr + i, (slope * incoming).to(out_ptr.dtype.element_ty), mask=mask)
    elif OUTPUT == "losses":
        tl.store(out_ptr + i, (modulation * entropy).to(out_ptr.dtype.element_ty), mask=mask)
    else:
        tl.store(out_ptr, tl.sum(tl.where(i < left, modulation * entropy, 0.0), axis=0))


@triton.jit(do_not_specialize=["size"])
def _sigmoid_focal_loss_kernel(
    x_ptr, target_ptr, out_ptr, incoming_ptr, size, background_weight, class_weight, GAMMA: tl.constexpr,
    OUTPUT: tl.constexpr, INCOMING_STRIDE: tl.constexpr, TILE: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Writes the losses, the sum of each tile's, or the gradients times incoming."""
    offset = tl.program_id(0).to(tl.int64) * TILE
    x_ptr += offset
    target_ptr += offset
    if OUTPUT == "gradients":
        incoming_ptr += offset * INCOMING_STRIDE
    out_ptr += tl.program_id(0) if OUTPUT == "sums" else offset
    left = size - offset
    if left >= TILE:
        _tile(x_ptr, target_ptr, out_ptr, incoming_ptr, left, background_weight, class_weight, GAMMA, OUTPUT,
              INCOMING_STRIDE, TILE, False, PTX)  # fmt: skip
    else:
        _tile(x_ptr, target_ptr, out_ptr, incoming_ptr, left, background_weight, class_weight, GAMMA, OUTPUT,
              INCOMING_STRIDE, TILE, True, PTX)  # fmt: skip


@torch.library.custom_op("retina_fast::sigmoid_focal_loss", mutates_args=())
def _op(
    inputs: Tensor,
    targets: Tensor,
    incoming: Tensor | None,
    alpha: float,
    gamma: float,
    output: str,
    dtype: torch.dtype,
) -> Tensor:
    """One output of two contiguous tensors: the "losses", their "sums" over each tile, (T,), or the "gradients" times
    incoming."""
    tiles = triton.cdiv(inputs.numel(), _TILE)
    out = inputs.new_empty((tiles,) if output == "sums" else inputs.shape, dtype=dtype)
    background_weight, class_weight = (1 - alpha, alpha) if alpha >= 0 else (1.0, 1.0)
    with torch.cuda.device_of(inputs):
        _sigmoid_focal_loss_kernel[(tiles,)](
            inputs, targets, out, incoming, inputs.numel(), background_weight, class_weight, GAMMA=float(gamma),
            OUTPUT=output, INCOMING_STRIDE=int(incoming is not None and incoming.numel() > 1), TILE=_TILE, PTX=PTX,
            num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return out


@_op.register_fake
def _(inputs, targets, incoming, alpha, gamma, output, dtype):
    tiles = (inputs.numel() + _TILE - 1) // _TILE
    return inputs.new_empty((tiles,) if output == "sums" else inputs.shape, dtype=dtype)


def _setup_context(ctx, inputs, output):
    logits, targets, _, *ctx.constants, ctx.output, _ = inputs
    ctx.save_for_backward(logits, targets)


def _backward(ctx, grad_output):
    logits, targets = ctx.saved_tensors
    if needs_reference(grad_output):
        if ctx.output == "sums":  # of tiles
            grad_output = grad_output.repeat_interleave(_TILE)[: logits.numel()].view_as(logits)
        (grad,) = grads_by_reference(
            "sigmoid_focal_loss",
            lambda x: sigmoid_focal_loss_reference(x, targets, *ctx.constants),
            [logits],
            grad_output.to(torch.promote_types(logits.dtype, targets.dtype)),
        )
        return grad, *[None] * 6
    # a gradient that a sum or mean has spread over all elements is one number
    incoming = grad_output.contiguous() if any(grad_output.stride()) else grad_output.as_strided((1,), (1,))
    grad = _op(logits, targets, incoming, *ctx.constants, "gradients", logits.dtype)
    return grad, *[None] * 6


_op.register_autograd(_backward, setup_context=_setup_context)


def _sigmoid_focal_loss_triton(inputs: Tensor, targets: Tensor, alpha: float, gamma: float, reduction: str) -> Tensor:
    dtype = torch.promote_types(inputs.dtype, targets.dtype)
    if torch.is_autocast_enabled(inputs.device.type):
        dtype = torch.float32  # torchvision's logarithms and powers are, under autocast
    inputs, targets = inputs.contiguous(), targets.contiguous()
    if reduction == "none":
        return _op(inputs, targets, None, alpha, gamma, "losses", dtype)
    total = _op(inputs, targets, None, alpha, gamma, "sums", torch.float32).sum()
    return (total if reduction == "sum" else total / inputs.numel()).to(dtype)


def sigmoid_focal_loss(
    inputs: Tensor, targets: Tensor, alpha: float = 0.25, gamma: float = 2, reduction: str = "none"
) -> Tensor:
    """torchvision.ops.sigmoid_focal_loss in one pass each way.

    Args:
        inputs: logits of any shape.
        targets: of the same shape, 1 for the class of an element, 0 for the others, or anything between.
        alpha: weight of a target of 1 in [0, 1], 1 - alpha of one of 0; -1 for no weights.
        gamma: focusing exponent.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.

    Raises:
        ValueError: for an alpha outside [0, 1] that is not -1, an unknown reduction, or shapes that differ.

    Example::

        >>> sigmoid_focal_loss(torch.zeros(3), torch.tensor([0.0, 1.0, 0.5]), reduction="sum")
        tensor(0.2599)
    """
    if not torch.jit.is_scripting():  # noqa: SIM102 - this very form is what TorchScript leaves out
        if _kernel_serves(inputs, targets, alpha, reduction):
            return _sigmoid_focal_loss_triton(inputs, targets, alpha, gamma, reduction)
    return sigmoid_focal_loss_reference(inputs, targets, alpha, gamma, reduction)  # torchvision's own, with its errors


def _kernel_serves(inputs: Tensor, targets: Tensor, alpha: float, reduction: str) -> bool:
    return (
        isinstance(inputs, Tensor)
        and isinstance(targets, Tensor)
        and runs_triton(inputs, targets)
        and inputs.device == targets.device
        and inputs.shape == targets.shape
        and not targets.requires_grad
        and (0 <= alpha <= 1 or alpha == -1)
        and reduction in ("none", "mean", "sum")
    )
