"""The focal losses of integer labels on a CPU: one pass over tiles, with the gradient written by hand; see
focal_loss.py and soft_focal_loss.py.

With e = exp(x), s = log(1 + e) = softplus(x), p = e / (1 + e) = sigmoid(x) and g = gamma, a background element has

    loss = p^g s        slope = g p^g (s + p (1/g - s))

which are eight operations over a tile, whose tensors stay in the L2 cache. Setting e = 0 removes an element from loss
and gradient. That is done for the class of each foreground anchor and for the rows of ignored anchors; the foreground
elements of a level are then computed together. A tile in which exp overflows is computed once more, by sigmoid and
softplus, which are slower. The finished gradient is the only tensor of the logits' size that is made. Tiles are views
of the levels in their own memory format, NCHW or channels_last.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from retina_fast.kernels.arguments import at_least_float32
from retina_fast.kernels.dispatch import needs_reference
from retina_fast.kernels.labels import BACKGROUND, IGNORED
from retina_fast.kernels.levels import count_anchors, flatten
from retina_fast.kernels.one_pass import grads_by_reference

_TILE = 1 << 17  # logits that each thread takes of a tile


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


class _Memory:
    """Three tensors in which one tile after the other is computed, and two constants."""

    def __init__(self, dtype: torch.dtype, size: int, gamma: float) -> None:
        dtype = torch.promote_types(dtype, torch.float32)
        self._rows = torch.empty(3, size, dtype=dtype, device="cpu")
        self._taken: dict[torch.Size, list[Tensor]] = {}
        self.zero, self.inverse = (torch.tensor(x, dtype=dtype, device="cpu") for x in (0, 1 / gamma if gamma else 0))

    def take(self, shape: torch.Size) -> list[Tensor]:
        """The three as contiguous tensors of a shape."""
        if shape not in self._taken:
            self._taken[shape] = [row[: shape.numel()].view(shape) for row in self._rows]
        return self._taken[shape]


class _Tile(NamedTuple):
    logits: Tensor  # (n, K), or (K, n) of an NCHW level
    grad: Tensor | None  # as the logits
    scale: float  # 1 / the image's normalizer
    foreground: tuple[Tensor, Tensor]  # anchors and their classes, or the other way round, as the logits
    ignored: Tensor  # anchors
    anchor_dim: int  # 0, or 1

    def without_others(self, values: Tensor) -> Tensor:
        """The values, in which what is not background is made 0."""
        if len(self.foreground[0]):
            values.index_put_(self.foreground, values.new_zeros(()))
        if len(self.ignored):
            values.index_fill_(self.anchor_dim, self.ignored, 0)
        return values


def _background(tile: _Tile, terms: Any, memory: _Memory) -> float:
    """The scaled loss of a tile's background. Its gradient is written into tile.grad if given."""
    x, gamma = at_least_float32(tile.logits), terms.gamma
    s, p, modulation = memory.take(x.shape)
    e = tile.without_others(torch.exp(x, out=s))
    torch.div(e, torch.add(e, 1, out=p), out=p)
    torch.log1p(e, out=s)
    loss = _modulated(p, s, modulation, gamma)
    if not math.isfinite(loss):
        tile.without_others(torch.sigmoid(x, out=p))
        tile.without_others(s.copy_(F.softplus(x)))
        loss = _modulated(p, s, modulation, gamma)
    scale = terms.background_weight * tile.scale
    if tile.grad is not None and gamma == 0:
        torch.mul(p, scale, out=tile.grad)
    elif tile.grad is not None:
        torch.lerp(s, memory.inverse, p, out=s)
        torch.addcmul(memory.zero, modulation, s, value=gamma * scale, out=tile.grad)
    return loss * scale


def _modulated(p: Tensor, s: Tensor, modulation: Tensor, gamma: float) -> float:
    """The sum of p^gamma s; p^gamma is written into ``modulation``."""
    torch.mul(p, p, out=modulation) if gamma == 2 else torch.pow(p, gamma, out=modulation)
    return float(torch.dot(modulation.view(-1), s.view(-1)))


def _level_pass(
    level: Tensor,
    grad: Tensor | None,
    labels: Tensor,
    quality: Tensor | None,
    scales: Tensor,
    num_classes: int,
    terms: Any,
    memory: _Memory,
) -> float:
    """The loss of a level with labels and qualities (B, N_l); its gradient is written into ``grad`` if given."""
    anchor_dim = int(_is_nchw(level))
    rows, row_grads = _rows(level, num_classes), None if grad is None else _rows(grad, num_classes)
    if anchor_dim:
        cell = level.shape[1] // num_classes
        shape = (-1, cell)  # (B * A, H * W), as the rows
        labels = labels.unflatten(1, shape).transpose(1, 2).flatten(0, 1)
        quality = None if quality is None else quality.unflatten(1, shape).transpose(1, 2).flatten(0, 1)
        scales = scales.repeat_interleave(cell)

    step = _anchors_of_tile(num_classes)
    tiles_a_row = -(-labels.shape[1] // step)
    row, anchor = (labels != BACKGROUND).nonzero(as_tuple=True)
    classes = labels[row, anchor].long()
    if len(classes) and int(classes.max()) >= num_classes:
        raise ValueError(f"labels must be below num_classes = {num_classes}, got {int(classes.max())}")
    tile, place = row * tiles_a_row + anchor // step, anchor % step
    is_true, is_ignored = classes >= 0, classes == IGNORED
    counts = [tile[which].bincount(minlength=len(rows) * tiles_a_row).tolist() for which in (is_true, is_ignored)]
    row, anchor, classes, true_place = (values[is_true] for values in (row, anchor, classes, place))

    def by_tile(tensor: Tensor) -> list[Tensor]:
        return [part for one in tensor for part in one.split(step, dim=anchor_dim)]

    tiles = zip(
        by_tile(rows),
        itertools.repeat(None) if row_grads is None else by_tile(row_grads),
        scales.repeat_interleave(tiles_a_row).tolist(),
        zip(*(values.split(counts[0]) for values in _ordered(true_place, classes, anchor_dim)), strict=True),
        place[is_ignored].split(counts[1]),
        itertools.repeat(anchor_dim),
        strict=False,
    )
    loss = sum(_background(_Tile(*fields), terms, memory) for fields in tiles)

    elements = row, *_ordered(anchor, classes, anchor_dim)
    own_quality = None if quality is None else quality[row, anchor]
    losses, slopes = terms.of_class(at_least_float32(rows[elements]), own_quality)
    if row_grads is not None:
        row_grads[elements] = (slopes * scales[row]).to(row_grads.dtype)
    return loss + float((losses * scales[row]).sum(dtype=torch.float64))


def _ordered(anchors: Tensor, classes: Tensor, anchor_dim: int) -> tuple[Tensor, Tensor]:
    return (classes, anchors) if anchor_dim else (anchors, classes)


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


def _rows(level: Tensor, num_classes: int) -> Tensor:
    """A view of a level: (B * A, K, H * W) if it is NCHW, else (B, N_l, K)."""
    if _is_nchw(level):
        return level.flatten(2).unflatten(1, (-1, num_classes)).flatten(0, 1)
    return flatten(level, num_classes)


def _anchors_of_tile(num_classes: int) -> int:
    return max(1, torch.get_num_threads() * _TILE // num_classes)


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
    size = num_classes * _anchors_of_tile(num_classes)
    memory, loss, start = _Memory(levels[0].dtype, size, terms.gamma), 0.0, 0
    for i, level in enumerate(levels):
        stop = start + count_anchors(level, num_classes)
        level_quality = None if quality is None else quality[:, start:stop]
        level_grad = grads[i] if with_grads else None
        level_labels = labels[:, start:stop]
        loss += _level_pass(level, level_grad, level_labels, level_quality, scales, num_classes, terms, memory)
        start = stop
    return scales.new_tensor(loss), grads


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
        if needs_reference(grad_loss):
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
