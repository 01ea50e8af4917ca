"""Focal loss from integer labels (Lin et al. 2017, https://arxiv.org/abs/1708.02002, equation 5).

With p = sigmoid(x), s = softplus(x) = -log(1 - p), a = alpha, g = gamma, an element that is background costs

    L = (1-a) p^g s              dL/dx = (1-a) p^g (g (1-p) s + p)

and the one element of a foreground anchor that is its class costs the mirrored a (1-p)^g softplus(-x). A label >= 0 is
that class (0 is a real class: there is no background channel), -1 is background, -2 drops the anchor.

torchvision makes 87 passes over the logits (one-hot targets, eight saved tensors). Here the forward pass reads them
once and writes the finished gradient once; backward only scales it.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from retina_fast.kernels.levels import flatten_all

BACKGROUND = -1
IGNORED = -2

_TILE = 1 << 16  # elements of a CPU tile: its temporaries stay in the L2 cache


def focal_loss_reference(
    logits: Sequence[Tensor],
    labels: Tensor,
    normalizers: Tensor,
    num_classes: int,
    alpha: float = 0.25,
    gamma: float = 2.0,
) -> Tensor:
    """The definition, differentiable by autograd; see :func:`focal_loss`."""
    x = torch.cat(flatten_all(logits, num_classes), dim=1)  # (B, N, K)
    x = _at_least_float32(x)
    target = labels[..., None] == torch.arange(num_classes, device=x.device)  # (B, N, K)
    x = torch.where(target, -x, x)  # the logit of the wrong answer
    weight = torch.where(target, alpha, 1 - alpha)
    loss = weight * torch.sigmoid(x) ** gamma * -F.logsigmoid(-x)
    loss = torch.where((labels == IGNORED)[..., None], 0, loss)
    return (loss.sum(dim=(1, 2)) / normalizers).sum()


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _cpu_tile(x: Tensor, labels: Tensor, alpha: float, gamma: float, grad: Tensor | None, scale: Tensor) -> Tensor:
    """Summed loss of the rows x (n, K) with labels (n,); its gradient times scale goes into grad (n, K) if given."""
    x = _at_least_float32(x)
    p, s = torch.sigmoid(x), F.softplus(x)
    modulation = p.square() if gamma == 2 else p**gamma
    ignored = labels == IGNORED
    rows = (labels >= 0).nonzero().squeeze(1)
    columns = labels[rows].long()
    q_true = torch.sigmoid(-x[rows, columns])
    s_true = F.softplus(-x[rows, columns])
    modulation_true = alpha * q_true**gamma

    background = modulation * s
    background[rows, columns] = 0
    background[ignored] = 0
    if grad is not None:
        slope = torch.addcmul(p, 1 - p, s, value=gamma).mul_(modulation).mul_(1 - alpha)
        slope[rows, columns] = -modulation_true * (gamma * (1 - q_true) * s_true + q_true)
        slope[ignored] = 0
        grad.copy_(slope.mul_(scale))
    return (1 - alpha) * background.sum() + (modulation_true * s_true).sum()


class _FocalLossCPU(torch.autograd.Function):
    """Loss and finished gradient in one tiled pass over the levels, each (B, N_l, K)."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx, labels: Tensor, normalizers: Tensor, alpha: float, gamma: float, *levels: Tensor
    ) -> Tensor:
        wanted = any(ctx.needs_input_grad)
        grads = [torch.empty_like(level, memory_format=torch.contiguous_format) if wanted else None for level in levels]
        total = labels.new_zeros((), dtype=torch.float64)
        scales = _at_least_float32(normalizers).reciprocal()
        starts = [0]
        for level in levels:
            starts.append(starts[-1] + level.shape[1])
        for level, grad, start in zip(levels, grads, starts, strict=False):
            step = max(1, _TILE // max(1, level.shape[2]))
            for b in range(level.shape[0]):
                for i in range(0, level.shape[1], step):
                    rows = slice(i, min(i + step, level.shape[1]))
                    tile_labels = labels[b, start + rows.start : start + rows.stop]
                    tile_grad = None if grad is None else grad[b, rows]
                    loss = _cpu_tile(level[b, rows], tile_labels, alpha, gamma, tile_grad, scales[b])
                    total += loss * scales[b]
        if wanted:
            ctx.save_for_backward(*grads)
        return total.to(torch.float64 if levels[0].dtype == torch.float64 else torch.float32)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grads = ctx.saved_tensors
        if grad_output != 1:
            grads = [grad * grad_output.to(grad.dtype) for grad in grads]
        return None, None, None, None, *grads


def focal_loss(
    logits: Sequence[Tensor],
    labels: Tensor,
    normalizers: Tensor,
    num_classes: int,
    alpha: float = 0.25,
    gamma: float = 2.0,
) -> Tensor:
    """Focal loss of a batch: the sum over images b of (the summed loss of b's anchors) / normalizers[b], a scalar.

    Args:
        logits: the levels as the heads wrote them, each ``(B, A*K, H, W)`` or ``(B, N_l, K)``; any float dtype.
        labels: ``(B, N)`` integers, N the anchors of all levels: a class in [0, K), -1 background, -2 ignored.
        normalizers: ``(B,)``, the foreground counts (at least 1) times B for torchvision's mean over images.
        num_classes: K.
        alpha: weight of the positive class, 1 - alpha of the background.
        gamma: focusing exponent, at least 0.

    Raises:
        ValueError: if the levels do not hold B*N*K logits.

    Example::

        >>> logits = [torch.randn(2, 9 * 91, 8, 8), torch.randn(2, 9 * 91, 4, 4)]
        >>> labels = torch.full((2, 9 * 80), -1)
        >>> labels[0, 7] = 17
        >>> focal_loss(logits, labels, torch.tensor([2.0, 2.0]), num_classes=91).shape
        torch.Size([])
    """
    levels = flatten_all(logits, num_classes)
    if tuple(labels.shape) != (levels[0].shape[0], sum(level.shape[1] for level in levels)):
        raise ValueError(f"labels {tuple(labels.shape)} do not fit levels {[tuple(level.shape) for level in levels]}")
    if labels.device.type != "cpu":
        return focal_loss_reference(levels, labels, normalizers, num_classes, alpha, gamma)
    return _FocalLossCPU.apply(labels, normalizers, alpha, gamma, *levels)
