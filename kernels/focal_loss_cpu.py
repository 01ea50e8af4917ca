"""The focal losses of integer labels on a CPU: one pass over tiles, with the gradient written by hand; see
focal_loss.py and soft_focal_loss.py.

The temporaries of a tile stay in the L2 cache. Each tile is first computed as background; then one element is corrected
in each foreground row. The finished gradient is the only tensor of the logits' size that is kept. Tiles are views of
the levels in their own memory format, NCHW or channels_last.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from retina_fast.kernels.arguments import at_least_float32
from retina_fast.kernels.labels import IGNORED
from retina_fast.kernels.levels import count_anchors, flatten
from retina_fast.kernels.one_pass import grads_by_reference

_TILE = 1 << 17  # logits; 2^14 to 2^19 took 112, 88, 55, 44, 47, 49 ms on two cores for 8.9 M logits


def weights(alpha: float) -> tuple[float, float]:
    """The weights of a background element and of an anchor's class; a negative alpha weighs both 1."""
    return (1 - alpha, alpha) if alpha >= 0 else (1.0, 1.0)


class HardTerms(NamedTuple):
    """The focal loss of an element, but for the normalizer. Such a class is what makes one loss differ from another."""

    background_weight: float
    class_weight: float
    gamma: float

    def of_class(self, x: Tensor, quality: Tensor | None) -> tuple[Tensor, Tensor]:
        """The loss of the elements x (F,) of the anchors' own classes, and its slope in x."""
        q, s = torch.sigmoid(-x), F.softplus(-x)
        modulation = self.class_weight * q**self.gamma
        return modulation * s, -modulation * (self.gamma * (1 - q) * s + q)


class _Tile(NamedTuple):
    logits: Tensor  # (n, K), or (K, n) of an NCHW level
    labels: Tensor  # (n,)
    quality: Tensor | None  # (n,)
    grad: Tensor | None  # as the logits
    scale: float  # 1 / the image's normalizer
    class_dim: int  # 1, or 0


def _tile_pass(tile: _Tile, terms: Any) -> Tensor:
    """Scaled loss of a tile; its gradient is written into tile.grad if given."""
    background_weight, gamma = terms.background_weight, terms.gamma
    x = at_least_float32(tile.logits.contiguous())
    p, s = torch.sigmoid(x), F.softplus(x)
    modulation = p.square() if gamma == 2 else p**gamma
    background = modulation * s
    slope = None
    if tile.grad is not None:
        slope = torch.addcmul(p, 1 - p, s, value=gamma).mul_(modulation).mul_(background_weight * tile.scale)
    loss = torch.zeros((), dtype=x.dtype)

    anchors = (tile.labels >= 0).nonzero().squeeze(1)
    if len(anchors):
        classes = tile.labels[anchors].long()
        true = (anchors, classes) if tile.class_dim == 1 else (classes, anchors)
        loss_true, slope_true = terms.of_class(x[true], None if tile.quality is None else tile.quality[anchors])
        loss = loss_true.sum()
        background[true] = 0
        if slope is not None:
            slope[true] = slope_true * tile.scale
    ignored = (tile.labels == IGNORED).nonzero().squeeze(1)
    if len(ignored):
        background.index_fill_(1 - tile.class_dim, ignored, 0)
        if slope is not None:
            slope.index_fill_(1 - tile.class_dim, ignored, 0)

    if tile.grad is not None and slope is not None:
        tile.grad.copy_(slope)
    return (background_weight * background.sum() + loss) * tile.scale


def _laid_out(level: Tensor, num_classes: int) -> Tensor:
    """The level itself. An NCHW level is copied to channels_last memory if its rows, (K, H * W) for one anchor of every
    cell, would make tiles that are too small."""
    if level.dim() == 3:
        return level.contiguous()
    small = level.shape[2:].numel() * num_classes < _TILE // 4
    if level.is_contiguous() and not small:
        return level
    return level.contiguous(memory_format=torch.channels_last)


def _is_nchw(level: Tensor) -> bool:
    return level.dim() == 4 and level.is_contiguous() and not level.is_contiguous(memory_format=torch.channels_last)


def _rows(level: Tensor, num_classes: int) -> Iterator[Tensor]:
    """A level as 2-D views: (K, H * W) for each image and anchor of a cell if it is NCHW, else (N_l, K) an image."""
    if _is_nchw(level):
        yield from level.flatten(2).unflatten(1, (-1, num_classes)).flatten(0, 1)
    else:
        yield from flatten(level, num_classes)


def _tiles(
    level: Tensor, grad: Tensor | None, labels: Tensor, quality: Tensor | None, scales: list[float], num_classes: int
) -> Iterator[_Tile]:
    """The tiles of a level with labels and qualities (B, N_l)."""
    class_dim = 1
    if _is_nchw(level):
        class_dim = 0
        anchors = level.shape[1] // num_classes
        shape = (-1, anchors)  # (B * A, H * W), as the rows
        labels = labels.unflatten(1, shape).transpose(1, 2).flatten(0, 1)
        quality = None if quality is None else quality.unflatten(1, shape).transpose(1, 2).flatten(0, 1)
    rows = list(_rows(level, num_classes))
    grads = [None] * len(rows) if grad is None else list(_rows(grad, num_classes))
    step = max(1, _TILE // num_classes)
    for r, row in enumerate(rows):
        row_grad, scale = grads[r], scales[r * len(scales) // len(rows)]
        for begin in range(0, labels.shape[1], step):
            part = slice(begin, begin + step)
            window = (slice(None), part) if class_dim == 0 else part
            tile_quality = None if quality is None else quality[r, part]
            tile_grad = None if row_grad is None else row_grad[window]
            yield _Tile(row[window], labels[r, part], tile_quality, tile_grad, scale, class_dim)


def _pass(
    levels: Sequence[Tensor],
    labels: Tensor,
    quality: Tensor | None,
    scales: Tensor,
    with_grads: bool,
    num_classes: int,
    terms: Any,
) -> tuple[Tensor, list[Tensor]]:
    """The loss, with image b multiplied by scales[b], and its gradients if wanted."""
    levels = [_laid_out(level.detach(), num_classes) for level in levels]
    grads = [torch.empty_like(level) for level in levels] if with_grads else []
    tiles: list[_Tile] = []
    start = 0
    for i, level in enumerate(levels):
        stop = start + count_anchors(level, num_classes)
        level_quality = None if quality is None else quality[:, start:stop]
        level_grad = grads[i] if with_grads else None
        tiles += _tiles(level, level_grad, labels[:, start:stop], level_quality, scales.tolist(), num_classes)
        start = stop

    losses = [_tile_pass(tile, terms) for tile in tiles]
    total = torch.stack(losses).sum(dtype=torch.float64) if losses else scales.new_zeros(())
    return total.to(scales.dtype), grads


class _FocalLoss(torch.autograd.Function):
    """Loss and finished gradient in one pass over the levels. In float16 backward reads the levels again."""

    @staticmethod
    def forward(
        ctx,
        name: str,
        labels: Tensor,
        quality: Tensor | None,
        normalizers: Tensor,
        num_classes: int,
        terms: Any,
        reference: Callable[..., Tensor],
        *levels: Tensor,
    ) -> Tensor:
        scales = normalizers.reciprocal()
        ctx.name, ctx.reference = name, reference
        ctx.half = levels[0].dtype == torch.float16
        ctx.constants = num_classes, terms
        wanted = any(ctx.needs_input_grad) and not ctx.half
        loss, grads = _pass(levels, labels, quality, scales, wanted, *ctx.constants)
        ctx.save_for_backward(labels, quality, scales, *levels, *grads)
        ctx.count = len(levels)
        return loss

    @staticmethod
    def backward(ctx, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        labels, quality, scales, *saved = ctx.saved_tensors
        levels, grads = saved[: ctx.count], saved[ctx.count :]
        nothing = [None] * 7
        if torch.is_grad_enabled():
            return *nothing, *grads_by_reference(ctx.name, ctx.reference, levels, grad_loss)
        if ctx.half:
            _, grads = _pass(levels, labels, quality, scales * grad_loss, True, *ctx.constants)
        else:
            # a second backward needs the gradients unchanged
            if grad_loss != 1 or torch._C._autograd._get_current_graph_task_keep_graph():
                grads = [grad * grad_loss.to(grad.dtype) for grad in grads]
        return *nothing, *grads


def focal_loss_cpu(
    name: str,
    levels: Sequence[Tensor],
    labels: Tensor,
    normalizers: Tensor,
    num_classes: int,
    terms: Any,
    reference: Callable[..., Tensor],
    quality: Tensor | None = None,
) -> Tensor:
    """The operation ``name`` on a CPU: ``terms`` is its loss by element, ``reference(*levels)`` the loss in PyTorch."""
    return _FocalLoss.apply(name, labels, quality, normalizers, num_classes, terms, reference, *levels)
