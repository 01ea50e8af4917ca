"""Focal loss from integer labels (Lin et al. 2017, https://arxiv.org/abs/1708.02002, equation 5).

With p = sigmoid(x), s = softplus(x) = -log(1 - p), a = alpha, g = gamma, an element that is background costs

    L = (1-a) p^g s              dL/dx = (1-a) p^g (g (1-p) s + p)

In the row of a foreground anchor, the element of the anchor's class costs L(-x), with a in place of 1-a; its slope has
the opposite sign. A label from 0 up is a class (0 is a real class: there is no background channel), -1 is background,
and an anchor labelled -2 is ignored.

torchvision makes 87 passes over the logits (one-hot targets, eight saved tensors). Here the forward pass reads them
once and writes the finished gradient once, since the foreground counts are known before it runs. Backward scales this
gradient by the incoming one, and reads nothing where that is 1. In two cases backward reads the logits again, three
passes in all: in float16, since small finished gradients would become zero before GradScaler's factor reaches them, and
in compiled graphs, where scaling a saved tensor in place becomes a copy.
"""

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from retina_fast.kernels.arguments import (
    at_least_float32,
    check_devices,
    check_integers,
    check_shape,
    loss_normalizers,
)
from retina_fast.kernels.dispatch import PTX, is_transformed, needs_reference, runs_triton, tl, triton
from retina_fast.kernels.fast_math import reciprocal, widen
from retina_fast.kernels.focal_loss_cpu import HardTerms, focal_loss_cpu, weights
from retina_fast.kernels.focal_terms import loss_and_slope, soft_loss_and_slope
from retina_fast.kernels.labels import IGNORED, TL_BACKGROUND, TL_IGNORED
from retina_fast.kernels.levels import check_levels, encode_sizes, flatten_all, level_of, pick, pick_size
from retina_fast.kernels.one_pass import grads_by_reference, run_one_pass, sum_of


def focal_loss_reference(
    logits: Sequence[Tensor],
    labels: Tensor,
    normalizers: Tensor,
    num_classes: int,
    alpha: float = 0.25,
    gamma: float = 2.0,
) -> Tensor:
    """The definition, differentiable by autograd; see :func:`focal_loss`."""
    x = at_least_float32(torch.cat(flatten_all(logits, num_classes), dim=1))  # (B, N, K)
    target = labels[..., None] == torch.arange(num_classes, device=x.device)  # (B, N, K)
    x = torch.where((labels == IGNORED)[..., None], 0, x)
    x = torch.where(target, -x, x)  # the logit of the wrong answer
    background_weight, class_weight = (1 - alpha, alpha) if alpha >= 0 else (1.0, 1.0)
    weight = torch.where(target, class_weight, background_weight)
    loss = weight * torch.sigmoid(x) ** gamma * -F.logsigmoid(-x)
    loss = torch.where((labels == IGNORED)[..., None], 0, loss)
    return (loss.sum(dim=(1, 2)) / normalizers).sum()


# Triton. A tile is a run of logits of one image and level that starts on a 16-byte boundary. Nearly all tiles hold
# background only: the kernel reads their anchors' labels once, and then needs no labels by element and no mask. Most
# other tiles lie wholly inside their image and level, and need no mask either. Only tiles at its ends do.

_TILE_BYTES = 1 << 14  # of logits
_CHUNK = 1024  # the elements that a program works on at once: 16 bytes a thread in bf16, and no register spills
_AHEAD_BYTES = 1 << 13  # read before they are needed: no compiler moves a load up beyond a store of gradients


@triton.jit
def _load_ahead(chunks, x_ptr, mask, TILE: tl.constexpr, CHUNK: tl.constexpr, AHEAD: tl.constexpr):
    """The tuple ``chunks``, which is empty, with the first chunks of the tile."""
    for begin in tl.static_range(0, min(AHEAD * CHUNK, TILE), CHUNK):
        chunks += (tl.load(x_ptr + begin + tl.arange(0, CHUNK), mask=mask),)
    return chunks


@triton.jit
def _background_tile(
    x_ptr, grad_ptr, chunks, weight, factor, GAMMA: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr,
    WITH_GRADS: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    losses = tl.zeros([CHUNK], tl.float32)
    for begin in tl.static_range(0, TILE, CHUNK):
        if begin + len(chunks) * CHUNK < TILE:
            chunks += (tl.load(x_ptr + begin + len(chunks) * CHUNK + tl.arange(0, CHUNK)),)
        loss, slope = loss_and_slope(widen(chunks[0], PTX), GAMMA, PTX)
        chunks = chunks[1:]
        losses += loss
        if WITH_GRADS:
            grad = slope * (weight * factor)
            tl.store(grad_ptr + begin + tl.arange(0, CHUNK), grad.to(grad_ptr.dtype.element_ty))
    return losses * weight


@triton.jit
def _mixed_tile(
    x_ptr, grad_ptr, labels_ptr, quality_ptr, begin, end, background_weight, class_weight, factor, K: tl.constexpr,
    GAMMA: tl.constexpr, KIND: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr, MASKED: tl.constexpr,
    WITH_GRADS: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    losses = tl.zeros([CHUNK], tl.float32)
    for chunk in range(0, TILE, CHUNK):
        i = chunk + tl.arange(0, CHUNK)
        element = begin + i
        anchor = element // K
        if MASKED:
            mask = (element >= 0) & (element < end)
            label = tl.load(labels_ptr + anchor, mask=mask, other=TL_IGNORED)
            x = tl.load(x_ptr + i, mask=mask, other=0.0).to(tl.float32)
        else:
            mask = None
            label = tl.load(labels_ptr + anchor)
            x = tl.load(x_ptr + i).to(tl.float32)
        is_class = label == element - anchor * K
        if KIND == "focal":
            loss, slope = loss_and_slope(tl.where(is_class, -x, x), GAMMA, PTX)
            weight = tl.where(is_class, class_weight, background_weight)
            signed_weight = tl.where(is_class, -weight, weight)
        else:
            y = tl.load(quality_ptr + anchor, mask=is_class, other=0.0)
            if KIND == "varifocal":  # a quality of 0 makes the class one of the others; NaN must show
                is_class = is_class & ~(y <= 0)
            loss, slope = loss_and_slope(x, GAMMA, PTX)
            soft_loss, soft_slope = soft_loss_and_slope(x, y, GAMMA, KIND, PTX)
            loss, slope = tl.where(is_class, soft_loss, loss), tl.where(is_class, soft_slope, slope)
            weight = tl.where(is_class, class_weight, background_weight)
            signed_weight = weight
        losses += tl.where(label == TL_IGNORED, 0.0, loss * weight)
        if WITH_GRADS:
            grad = tl.where(label == TL_IGNORED, 0.0, slope * (signed_weight * factor))
            tl.store(grad_ptr + i, grad.to(grad_ptr.dtype.element_ty), mask=mask)
    return losses


@triton.jit(do_not_specialize=["num_anchors"])
def _focal_loss_kernel(
    levels, grads, labels_ptr, quality_ptr, normalizers_ptr, partials_ptr, factor_ptr, starts, first_tiles, num_anchors,
    background_weight, class_weight, K: tl.constexpr, GAMMA: tl.constexpr, KIND: tl.constexpr, TILE: tl.constexpr,
    CHUNK: tl.constexpr, TILE_ANCHORS: tl.constexpr, AHEAD: tl.constexpr, WITH_GRADS: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Program (t, b) handles a tile, counted through the levels, of image b, the last one first: the ends of levels,
    which take longest. It writes the tile's share of the loss to partials (B, T), and its gradients, times factor if
    there is one. Either output may be left out."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    image = tl.program_id(1).to(tl.int64)
    level = level_of(first_tiles, tile)
    x_ptr, grad_ptr = pick(levels, level), pick(grads, level)
    start = pick_size(starts, level)
    end = (pick_size(starts[1:], level) - start) * K  # logits of an image in this level
    tile_of_level = tile - pick_size(first_tiles, level)
    shift = ((image * end) & 15).to(tl.int32)  # the image's first logit may lie off the 16-byte boundaries
    begin = tile_of_level * TILE - shift
    offset = tl.multiple_of(image * end - shift, 16) + tile_of_level * TILE
    labels_ptr += image * num_anchors + start
    if quality_ptr is not None:
        quality_ptr += image * num_anchors + start

    scale = reciprocal(tl.load(normalizers_ptr + image), PTX)
    background_weight *= scale
    class_weight *= scale
    factor = 1.0
    if factor_ptr is not None:
        factor = tl.load(factor_ptr)
    is_whole = (begin >= 0) & (begin + TILE <= end)
    chunks = _load_ahead((), x_ptr + offset, is_whole, TILE, CHUNK, AHEAD)

    first_anchor = tl.maximum(begin, 0) // K
    anchor = first_anchor + tl.arange(0, TILE_ANCHORS)
    label = tl.load(labels_ptr + anchor, mask=anchor * K < tl.minimum(begin + TILE, end), other=TL_BACKGROUND)
    is_background = is_whole & (tl.max((label != TL_BACKGROUND).to(tl.int32), axis=0) == 0)

    if is_background:
        losses = _background_tile(
            x_ptr + offset, grad_ptr + offset, chunks, background_weight, factor, GAMMA, TILE, CHUNK, WITH_GRADS, PTX
        )
    elif is_whole:
        losses = _mixed_tile(
            x_ptr + offset, grad_ptr + offset, labels_ptr, quality_ptr, begin, end, background_weight, class_weight,
            factor, K, GAMMA, KIND, TILE, CHUNK, False, WITH_GRADS, PTX,
        )  # fmt: skip
    else:
        losses = _mixed_tile(
            x_ptr + offset, grad_ptr + offset, labels_ptr, quality_ptr, begin, end, background_weight, class_weight,
            factor, K, GAMMA, KIND, TILE, CHUNK, True, WITH_GRADS, PTX,
        )  # fmt: skip
    if partials_ptr is not None:
        tl.store(partials_ptr + image * tl.num_programs(0) + tile, tl.sum(losses, axis=0))


def launch_focal_loss(
    levels: list[Tensor],
    labels: Tensor,
    quality: Tensor | None,
    normalizers: Tensor,
    factor: Tensor | None,
    num_classes: int,
    weights_of: tuple[float, float],
    gamma: float,
    kind: str,
    with_loss: bool,
    with_grads: bool,
) -> list[Tensor]:
    """A list of the loss (), if wanted, and the gradients of all contiguous levels (B, N_l, K), if wanted. The
    gradients are multiplied by factor (), if there is one.

    All levels take one launch: at batch 1 the whole work is 10 us, the time of two launches. ``weights_of`` are those
    of background and class; ``kind`` is "focal", or one of soft_focal_loss.py, which reads quality (B, N).
    """
    size = levels[0].element_size()
    tile, ahead = _TILE_BYTES // size, _AHEAD_BYTES // (size * _CHUNK)
    starts, first_tiles = [0], [0]
    for level in levels:
        starts.append(starts[-1] + level.shape[1])
        first_tiles.append(first_tiles[-1] + triton.cdiv(level.shape[1] * num_classes + 15, tile))
    partials = labels.new_empty(len(labels), first_tiles[-1], dtype=torch.float32) if with_loss else None
    grads = [torch.empty_like(level) for level in levels] if with_grads else []
    background_weight, class_weight = weights_of
    with torch.cuda.device_of(labels):
        _focal_loss_kernel[(first_tiles[-1], len(labels))](
            tuple(levels), tuple(grads or levels), labels, quality, normalizers, partials, factor, encode_sizes(starts),
            encode_sizes(first_tiles), labels.shape[1], background_weight, class_weight, K=num_classes,
            GAMMA=float(gamma), KIND=kind, TILE=tile, CHUNK=_CHUNK,
            TILE_ANCHORS=triton.next_power_of_2((tile - 2) // num_classes + 2), AHEAD=ahead, WITH_GRADS=with_grads,
            PTX=PTX, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return ([] if partials is None else [sum_of(partials)]) + grads


@torch.library.custom_op("retina_fast::focal_loss", mutates_args=())
def _focal_loss_op(
    levels: list[Tensor],
    labels: Tensor,
    normalizers: Tensor,
    factor: Tensor | None,
    num_classes: int,
    alpha: float,
    gamma: float,
    with_loss: bool,
    with_grads: bool,
) -> list[Tensor]:
    of, outputs = weights(alpha), (with_loss, with_grads)
    return launch_focal_loss(levels, labels, None, normalizers, factor, num_classes, of, gamma, "focal", *outputs)


@_focal_loss_op.register_fake
def _(levels, labels, normalizers, factor, num_classes, alpha, gamma, with_loss, with_grads):
    loss = [labels.new_empty((), dtype=torch.float32)] if with_loss else []
    return loss + ([torch.empty_like(level) for level in levels] if with_grads else [])


def _reference_of_levels(labels, normalizers, constants, *levels):
    return focal_loss_reference(levels, labels, normalizers, *constants)


def _setup_context(ctx, inputs, output):
    levels, labels, normalizers, _, *ctx.constants, with_loss, _ = inputs
    ctx.mark_non_differentiable(*output[int(with_loss) :])
    ctx.save_for_backward(*levels, labels, normalizers)


def _backward(ctx, grad_outputs):
    *levels, labels, normalizers = ctx.saved_tensors
    if needs_reference(grad_outputs[0]):
        reference = functools.partial(_reference_of_levels, labels, normalizers, ctx.constants)
        return grads_by_reference("focal_loss", reference, levels, grad_outputs[0]), *[None] * 8
    constants = *ctx.constants, False, True
    return _focal_loss_op(levels, labels, normalizers, grad_outputs[0], *constants), *[None] * 8


_focal_loss_op.register_autograd(_backward, setup_context=_setup_context)


def _focal_loss_triton(
    levels: Sequence[Tensor], labels: Tensor, normalizers: Tensor, num_classes: int, alpha: float, gamma: float
) -> Tensor:
    labels, normalizers, constants = labels.contiguous(), normalizers.contiguous(), (num_classes, alpha, gamma)
    return run_one_pass(
        "focal_loss",
        lambda levels, with_grads: _focal_loss_op(levels, labels, normalizers, None, *constants, True, with_grads),
        functools.partial(_reference_of_levels, labels, normalizers, constants),
        [level.contiguous() for level in levels],
    )


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
        logits: the levels as the heads wrote them, each ``(B, A*K, H, W)`` or ``(B, N_l, K)``; any float dtype. Levels
            in channels_last memory are read and their gradients written as they lie, NCHW ones are copied once.
        labels: ``(B, N)`` integers, N the anchors of all levels: a class in [0, K), -1 background, -2 ignored.
        normalizers: ``(B,)`` of any dtype: the foreground counts (at least 1) times B for torchvision's mean over
            images.
        num_classes: K.
        alpha: weight of the positive class, 1 - alpha of the background; negative: no weights.
        gamma: focusing exponent, at least 0.

    Raises:
        ValueError: if the shapes do not fit, labels are not integers or, on a CPU, one is K or more, the levels differ
            in dtype, or the tensors lie on different devices.

    Example::

        >>> logits = [torch.randn(2, 9 * 91, 8, 8), torch.randn(2, 9 * 91, 4, 4)]
        >>> labels = torch.full((2, 9 * 80), -1)
        >>> labels[0, 7] = 17
        >>> focal_loss(logits, labels, torch.tensor([2.0, 2.0]), num_classes=91).shape
        torch.Size([])
    """
    count, first = check_levels(logits, num_classes), logits[0]
    check_shape("labels", labels, "(B, N)", (first.shape[0], count))
    check_integers(labels=labels)
    check_devices(first.device, labels=labels)
    normalizers = loss_normalizers(normalizers, first.shape[0], first)
    if runs_triton(*logits):
        levels = flatten_all(logits, num_classes)
        return _focal_loss_triton(levels, labels, normalizers, num_classes, alpha, gamma)
    if first.device.type == "cpu" and not torch.compiler.is_compiling() and not is_transformed(*logits):
        reference = functools.partial(_reference_of_levels, labels, normalizers, (num_classes, alpha, gamma))
        terms = HardTerms(*weights(alpha), gamma)
        return focal_loss_cpu("focal_loss", logits, labels, normalizers, num_classes, terms, reference)
    return focal_loss_reference(logits, labels, normalizers, num_classes, alpha, gamma)
