"""The focal losses of integer labels on a CPU: one pass over tiles, with the gradient written by hand; see
focal_loss.py and soft_focal_loss.py.

With e = exp(x), s = log(1 + e) = softplus(x), p = e / (1 + e) = sigmoid(x) and g = gamma, a background element has

    loss = p^g s        slope = (1 - p) g p^g s + p p^g

which are thirteen operations over a tile, whose tensors stay in the L2 cache. PyTorch's exp and log1p take long on some
processors: on an AMD EPYC with AVX-512, 2.6 times as long as exp2, and 8 times as long as log. So e is 2^(x / log(2)),
whose relative error grows with |x|, to 6e-7 at -10; that of the loss is up to 1 + g times as large. And s is
log(u) + (e - (u - 1)) / u, with u for the rounded sum of 1 and e, where log(u) alone would be wrong by 6e-6 at -4.6.
Setting e = 0 removes an element from loss and gradient. That is done for the class of each foreground anchor and for
the rows of ignored anchors; the foreground elements of all levels are then computed together. A tile whose loss is not
finite, since e overflows, is computed once more, by sigmoid and softplus, which are slower. The finished gradient is
the only tensor of the logits' size that is made. Tiles are views of the levels in their own memory format, NCHW or
channels_last.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
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
_LOG2_E = 1 / math.log(2)


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
    """Three tensors in which one tile after the other is computed, and a 0 of their dtype."""

    def __init__(self, dtype: torch.dtype, size: int) -> None:
        dtype = torch.promote_types(dtype, torch.float32)
        self._rows = torch.empty(3, size, dtype=dtype, device="cpu")
        self._taken: dict[torch.Size, list[Tensor]] = {}
        self.zero = torch.zeros((), dtype=dtype, device="cpu")

    def take(self, shape: torch.Size) -> list[Tensor]:
        """The three as contiguous tensors of a shape."""
        if shape not in self._taken:
            self._taken[shape] = [row[: shape.numel()].view(shape) for row in self._rows]
        return self._taken[shape]


class _Level(NamedTuple):
    """A level and its gradient as they lie in memory."""

    rows: Tensor  # (B, N_l, K), or (B * A, K, H * W) of an NCHW level
    grads: Tensor | None  # as the rows
    anchor_dim: int  # of a row: 0, or 1

    @classmethod
    def of(cls, level: Tensor, grad: Tensor | None, num_classes: int) -> "_Level":
        is_nchw = level.dim() == 4 and not level.is_contiguous(memory_format=torch.channels_last)

        def rows(level: Tensor) -> Tensor:
            if is_nchw:
                return level.flatten(2).unflatten(1, (-1, num_classes)).flatten(0, 1)
            return flatten(level, num_classes)

        return cls(rows(level), None if grad is None else rows(grad), int(is_nchw))

    @property
    def width(self) -> int:
        """The anchors of a row."""
        return self.rows.shape[1 + self.anchor_dim]

    def in_order(self, of_anchors: Tensor) -> Tensor:
        """Values (B, N_l), flat in the order in which the rows have their anchors."""
        if self.anchor_dim:
            of_anchors = of_anchors.unflatten(1, (self.width, -1)).transpose(1, 2)
        return of_anchors.reshape(-1)

    def elements(self, anchors: Tensor, classes: Tensor) -> Tensor:
        """Where the classes of anchors lie in ``rows``, flat."""
        k = self.rows.shape[2 - self.anchor_dim]
        if not self.anchor_dim:
            return anchors * k + classes
        place = anchors % self.width
        return (anchors - place) * k + classes * self.width + place


class _Tile(NamedTuple):
    logits: Tensor  # (n, K), or (K, n) of an NCHW level
    grad: Tensor | None  # as the logits
    scale: float  # 1 / the image's normalizer
    own: Tensor | None  # the elements of the foreground anchors' own classes, flat
    ignored: Tensor | None  # anchors
    anchor_dim: int  # 0, or 1

    def without_others(self, values: Tensor) -> Tensor:
        """The contiguous values, in which what is not background is made 0."""
        if self.own is not None:
            values.view(-1).index_fill_(0, self.own, 0)
        if self.ignored is not None:
            values.index_fill_(self.anchor_dim, self.ignored, 0)
        return values


def _background(tile: _Tile, terms: Any, memory: _Memory) -> float:
    """The scaled loss of a tile's background. Its gradient is written into tile.grad if given."""
    x, gamma, scale = at_least_float32(tile.logits), terms.gamma, terms.background_weight * tile.scale
    p, s, modulation = memory.take(x.shape)
    e = tile.without_others(torch.mul(x, _LOG2_E, out=p).exp2_())
    u = torch.add(e, 1, out=s)
    lost = torch.sub(e, torch.sub(u, 1, out=modulation), out=modulation).div_(u)
    torch.div(e, u, out=p)
    torch.log(u, out=s).add_(lost)
    loss, left = _modulated(p, s, modulation, gamma, scale, memory.zero), 1.0
    if not math.isfinite(loss):  # by e, or by the scale of a normalizer of 0
        tile.without_others(torch.sigmoid(x, out=p))
        tile.without_others(s.copy_(F.softplus(x)))
        loss, left = _modulated(p, s, modulation, gamma, 1.0, memory.zero) * scale, scale
    if tile.grad is not None and gamma == 0:
        torch.mul(p, scale, out=tile.grad)
    elif tile.grad is not None:
        slope = torch.lerp(s, modulation, p, out=tile.grad if tile.grad.dtype == p.dtype else s)
        if slope is not tile.grad or left != 1:
            torch.mul(slope, left, out=tile.grad)
    return loss


def _modulated(p: Tensor, s: Tensor, modulation: Tensor, gamma: float, scale: float, zero: Tensor) -> float:
    """The sum of scale p^gamma s. Unless gamma is 0, scale p^gamma is written into ``modulation``, and gamma times the
    summands into ``s``."""
    if gamma == 0:
        return float(s.sum()) * scale
    if gamma == 2:
        torch.addcmul(zero, p, p, value=scale, out=modulation)
    else:
        torch.pow(p, gamma, out=modulation).mul_(scale)
    return float(torch.addcmul(zero, modulation, s, value=gamma, out=s).sum()) / gamma


def _by_tile(values: Tensor, counts: list[int]) -> list[Tensor | None]:
    return [part if count else None for part, count in zip(values.split(counts), counts, strict=True)]


def _tiles(levels: Sequence[_Level], marked: Tensor, classes: Tensor, scales: Tensor, k: int) -> Iterator[_Tile]:
    """The tiles of all levels. Anchors are counted level by level, each in the order of its rows; ``marked``
    (S,) are those that are not background, in ascending order, and ``classes`` (S,) theirs."""
    step, offset = _anchors_of_tile(k), 0
    starts: list[int] = []
    strides: list[tuple[int, int]] = []  # in a tile, between anchors and between classes
    for level in levels:
        for row in range(len(level.rows)):
            for begin in range(0, level.width, step):
                starts.append(offset + row * level.width + begin)
                strides.append((1, min(step, level.width - begin)) if level.anchor_dim else (k, 1))
        offset += len(level.rows) * level.width
    first = torch.tensor(starts, dtype=torch.int64, device="cpu")
    tile = torch.bucketize(marked, first, right=True) - 1
    place = marked - first[tile]
    stride = torch.tensor(strides, dtype=torch.int64, device="cpu").view(-1, 2)[tile]
    element = place * stride[:, 0] + classes * stride[:, 1]
    own, ignored = (
        iter(_by_tile(values[which], tile[which].bincount(minlength=len(starts)).tolist()))
        for values, which in ((element, classes >= 0), (place, classes == IGNORED))
    )
    for level in levels:
        if not level.width:
            continue
        repeats = len(level.rows) // max(1, len(scales))
        scale_of_row = scales.repeat_interleave(repeats).tolist()
        row_grads = itertools.repeat(None) if level.grads is None else level.grads
        for row, row_grad, scale in zip(level.rows, row_grads, scale_of_row, strict=False):
            of_tiles = row.split(step, dim=level.anchor_dim)
            tile_grads = itertools.repeat(None) if row_grad is None else row_grad.split(step, dim=level.anchor_dim)
            for logits, grad in zip(of_tiles, tile_grads, strict=False):
                yield _Tile(logits, grad, scale, next(own), next(ignored), level.anchor_dim)


def _own_classes(
    levels: Sequence[_Level], foreground: Tensor, classes: Tensor, quality: Tensor | None, scales: Tensor, terms: Any
) -> float:
    """The scaled loss of the elements (F,) of the foreground anchors' own classes, with anchors counted as for
    :func:`_tiles`. Their gradients are written if the levels have some."""
    starts = [*itertools.accumulate((len(level.rows) * level.width for level in levels), initial=0)]
    counts = torch.bucketize(torch.tensor(starts, device="cpu"), foreground).diff().tolist()
    parts = zip(levels, starts, foreground.split(counts), classes.split(counts), strict=False)
    elements, scale = [], []
    for level, start, anchors, own in parts:
        elements.append(level.elements(anchors - start, own))
        of_image = len(level.rows) * level.width // max(1, len(scales))
        scale.append(scales[(anchors - start) // max(1, of_image)])
    x = [level.rows.view(-1)[element] for level, element in zip(levels, elements, strict=True)]
    losses, slopes = terms.of_class(at_least_float32(torch.cat(x)), quality)
    all_scales = torch.cat(scale)
    for level, element, slope in zip(levels, elements, (slopes * all_scales).split(counts), strict=True):
        if level.grads is not None:
            level.grads.view(-1)[element] = slope.to(level.grads.dtype)
    return float((losses * all_scales).sum(dtype=torch.float64))


def _laid_out(level: Tensor, num_classes: int) -> Tensor:
    """The level itself. An NCHW level is copied to channels_last memory if its rows, (K, H * W) for one anchor of every
    cell, would make tiles that are too small."""
    if level.dim() == 3:
        return level.contiguous()
    small = level.shape[2:].numel() * num_classes < _TILE // 4
    if level.is_contiguous() and not small:
        return level
    return level.contiguous(memory_format=torch.channels_last)


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
    laid_out = [_laid_out(level.detach(), num_classes) for level in levels]
    grads = [torch.empty_like(level) for level in laid_out] if with_grads else []
    of_levels = [_Level.of(*pair, num_classes) for pair in itertools.zip_longest(laid_out, grads)]
    sizes = [count_anchors(level, num_classes) for level in levels]

    def in_order(of_anchors: Tensor) -> Tensor:
        parts = of_anchors.split(sizes, dim=1)
        return torch.cat([level.in_order(part) for level, part in zip(of_levels, parts, strict=True)])

    ordered = in_order(labels)
    marked = (ordered != BACKGROUND).nonzero().squeeze(1)
    classes = ordered[marked].long()
    if len(classes) and int(classes.max()) >= num_classes:
        raise ValueError(f"labels must be below num_classes = {num_classes}, got {int(classes.max())}")
    memory = _Memory(levels[0].dtype, num_classes * _anchors_of_tile(num_classes))
    loss = sum(_background(tile, terms, memory) for tile in _tiles(of_levels, marked, classes, scales, num_classes))
    foreground = marked[classes >= 0]
    own_quality = None if quality is None else in_order(quality)[foreground]
    loss += _own_classes(of_levels, foreground, classes[classes >= 0], own_quality, scales, terms)
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
    def backward(ctx, grad_loss: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
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
