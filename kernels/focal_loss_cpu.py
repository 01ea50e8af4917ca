"""The focal loss of integer labels without a GPU: one tiled pass, its gradient written by hand; see focal_loss.py.

A tile's temporaries stay in the L2 cache, a label touches one element of its row, and nothing of the logits' size is
kept but the finished gradient.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

_IGNORED = -2
_TILE = 1 << 15  # swept 2^13 to 2^20: temporaries stay in L2, and torch splits no op of this size over threads


def at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def weights(alpha: float) -> tuple[float, float]:
    """The weights of a background element and of an anchor's class; a negative alpha weighs both 1."""
    return (1 - alpha, alpha) if alpha >= 0 else (1.0, 1.0)


def refuse_double_backward() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "focal_loss: double backward (create_graph=True) is not supported; "
            "focal_loss_reference can be differentiated twice"
        )


def _tile_pass(x: Tensor, labels: Tensor, alpha: float, gamma: float, grad: Tensor | None, scale: Tensor) -> Tensor:
    """Summed loss of the rows x (n, K) with labels (n,); its gradient times scale goes into grad (n, K) if given."""
    background_weight, class_weight = weights(alpha)
    x = at_least_float32(x)
    p, s = torch.sigmoid(x), F.softplus(x)
    modulation = p.square() if gamma == 2 else p**gamma
    ignored = labels == _IGNORED
    rows = (labels >= 0).nonzero().squeeze(1)
    columns = labels[rows].long()
    q_true = torch.sigmoid(-x[rows, columns])
    s_true = F.softplus(-x[rows, columns])
    modulation_true = class_weight * q_true**gamma

    background = modulation * s
    background[rows, columns] = 0
    background[ignored] = 0
    if grad is not None:
        slope = torch.addcmul(p, 1 - p, s, value=gamma).mul_(modulation).mul_(background_weight)
        slope[rows, columns] = -modulation_true * (gamma * (1 - q_true) * s_true + q_true)
        slope[ignored] = 0
        grad.copy_(slope.mul_(scale))
    return background_weight * background.sum() + (modulation_true * s_true).sum()


def _pass(
    levels: Sequence[Tensor], labels: Tensor, scales: Tensor, alpha: float, gamma: float, with_grads: bool
) -> tuple[Tensor, list[Tensor]]:
    """The loss with image b weighed by scales[b], and its gradients if wanted."""
    grads = [torch.empty_like(level, memory_format=torch.contiguous_format) for level in levels] if with_grads else []
    total = scales.new_zeros((), dtype=torch.float64)
    start = 0
    for i, level in enumerate(levels):
        step = max(1, _TILE // max(1, level.shape[2]))
        for b in range(level.shape[0]):
            for begin in range(0, level.shape[1], step):
                rows = slice(begin, min(begin + step, level.shape[1]))
                tile_labels = labels[b, start + rows.start : start + rows.stop]
                tile_grad = grads[i][b, rows] if with_grads else None
                total += _tile_pass(level[b, rows], tile_labels, alpha, gamma, tile_grad, scales[b]) * scales[b]
        start += level.shape[1]
    return total.to(scales.dtype), grads


class _FocalLoss(torch.autograd.Function):
    """Loss and finished gradient in one pass over the levels, each (B, N_l, K); float16 is read again in backward."""

    @staticmethod
    def forward(ctx, labels: Tensor, normalizers: Tensor, alpha: float, gamma: float, *levels: Tensor) -> Tensor:
        scales = normalizers.to(at_least_float32(levels[0]).dtype).reciprocal()
        ctx.half = levels[0].dtype == torch.float16
        loss, grads = _pass(levels, labels, scales, alpha, gamma, any(ctx.needs_input_grad) and not ctx.half)
        ctx.constants = alpha, gamma
        ctx.save_for_backward(*((labels, scales, *levels) if ctx.half else grads))
        return loss

    @staticmethod
    def backward(ctx, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        grads: Sequence[Tensor]
        if ctx.half:
            labels, scales, *levels = ctx.saved_tensors
            alpha, gamma = ctx.constants
            _, grads = _pass(levels, labels, scales * grad_loss, alpha, gamma, with_grads=True)
        else:
            grads = ctx.saved_tensors
            # a second backward may come, and needs them as they are
            if grad_loss != 1 or torch._C._autograd._get_current_graph_task_keep_graph():
                grads = [grad * grad_loss.to(grad.dtype) for grad in grads]
        return None, None, None, None, *grads


def focal_loss_cpu(levels: Sequence[Tensor], labels: Tensor, normalizers: Tensor, alpha: float, gamma: float) -> Tensor:
    """:func:`retina_fast.kernels.focal_loss.focal_loss` of levels (B, N_l, K)."""
    return _FocalLoss.apply(labels, normalizers, alpha, gamma, *levels)
