"""Focal losses whose target of an anchor's class is how well its box fits, instead of 1: the score then says both.

    quality_focal   Li et al. 2020, https://arxiv.org/abs/2006.04388, equation 2
    varifocal       Zhang et al. 2021, https://arxiv.org/abs/2008.13367, equation 2

With p = sigmoid(x), s = softplus(x), y the quality of a foreground anchor (the IoU of its predicted box with the ground
truth), C = (1 - y) s + y (s - x) the cross entropy and g = gamma, which the first paper calls beta:

    element                            quality_focal                               varifocal
    anchor's class, loss               |p - y|^g C                                 y C, for y > 0
                    dL/dx              g |p - y|^(g-1) sign(p - y) p (1-p) C       y (p - y)
                                         + |p - y|^g (p - y)
    all others, loss                   p^g s                                       0.75 p^g s

The others are the focal loss of background with another weight, and nearly all tiles hold nothing else. So the kernel
is that of focal_loss.py: it reads the logits once and writes the finished gradient once, and it reads qualities only
for foreground anchors. Eager PyTorch makes a dense tensor of targets, and some 30 passes.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

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
from retina_fast.kernels.dispatch import is_transformed, needs_reference, runs_triton
from retina_fast.kernels.focal_loss import launch_focal_loss
from retina_fast.kernels.focal_loss_cpu import focal_loss_cpu
from retina_fast.kernels.labels import IGNORED
from retina_fast.kernels.levels import check_levels, flatten_all
from retina_fast.kernels.one_pass import grads_by_reference, run_one_pass

WEIGHTS = {"quality_focal": (1.0, 1.0), "varifocal": (0.75, 1.0)}
"""Of each loss the weights of the other elements and of an anchor's class; those of varifocal are its paper's."""


def soft_focal_loss_reference(
    logits: Sequence[Tensor],
    labels: Tensor,
    quality: Tensor,
    normalizers: Tensor,
    num_classes: int,
    loss_type: str = "quality_focal",
    gamma: float = 2.0,
) -> Tensor:
    """The definition, differentiable by autograd in the logits; see :func:`soft_focal_loss`."""
    x = at_least_float32(torch.cat(flatten_all(logits, num_classes), dim=1))  # (B, N, K)
    ignored = (labels == IGNORED)[..., None]
    target = labels[..., None] == torch.arange(num_classes, device=x.device)  # (B, N, K)
    if loss_type == "varifocal":
        target = target & ~(quality <= 0)[..., None]
    x = torch.where(ignored, 0, x)
    y = torch.where(target, quality[..., None].to(x.dtype), 0)
    p = torch.sigmoid(x)
    entropy = F.binary_cross_entropy_with_logits(x, y, reduction="none")
    background_weight, class_weight = WEIGHTS[loss_type]
    modulation = (p - y).abs() ** gamma
    if loss_type == "varifocal":
        modulation = torch.where(target, y, modulation)
    loss = torch.where(target, class_weight, background_weight) * modulation * entropy
    return (torch.where(ignored, 0, loss).sum(dim=(1, 2)) / normalizers).sum()


class SoftTerms(NamedTuple):
    """The loss of an element, as :class:`retina_fast.kernels.focal_loss_cpu.HardTerms` has it for the focal loss."""

    background_weight: float
    class_weight: float
    gamma: float
    loss_type: str

    def of_class(self, x: Tensor, quality: Tensor | None) -> tuple[Tensor, Tensor]:
        """The loss of the elements x (F,) of the anchors' own classes, and its slope in x."""
        assert quality is not None
        y, p, s = quality.to(x.dtype), torch.sigmoid(x), F.softplus(x)
        entropy, d = (1 - y) * s + y * F.softplus(-x), p - y
        if self.loss_type == "varifocal":
            weight = self.background_weight * p**self.gamma
            background, slope = weight * s, weight * (self.gamma * (1 - p) * s + p)
            return torch.where(y <= 0, background, y * entropy), torch.where(y <= 0, slope, y * d)
        power = d.abs() ** (self.gamma - 1) * d.sign()
        return power * d * entropy, self.gamma * power * p * (1 - p) * entropy + power * d * d


@torch.library.custom_op("retina_fast::soft_focal_loss", mutates_args=())
def _soft_focal_loss_op(
    levels: list[Tensor],
    labels: Tensor,
    quality: Tensor,
    normalizers: Tensor,
    factor: Tensor | None,
    num_classes: int,
    loss_type: str,
    gamma: float,
    with_loss: bool,
    with_grads: bool,
) -> list[Tensor]:
    of, outputs = WEIGHTS[loss_type], (with_loss, with_grads)
    return launch_focal_loss(levels, labels, quality, normalizers, factor, num_classes, of, gamma, loss_type, *outputs)


@_soft_focal_loss_op.register_fake
def _(levels, labels, quality, normalizers, factor, num_classes, loss_type, gamma, with_loss, with_grads):
    loss = [labels.new_empty((), dtype=torch.float32)] if with_loss else []
    return loss + ([torch.empty_like(level) for level in levels] if with_grads else [])


def _reference_of_levels(tensors, constants, *levels):
    return soft_focal_loss_reference(levels, *tensors, *constants)


def _setup_context(ctx, inputs, output):
    levels, labels, quality, normalizers, _, *ctx.constants, with_loss, _ = inputs
    ctx.mark_non_differentiable(*output[int(with_loss) :])
    ctx.save_for_backward(*levels, labels, quality, normalizers)


def _backward(ctx, grad_outputs):
    *levels, labels, quality, normalizers = ctx.saved_tensors
    tensors, nothing = (labels, quality, normalizers), [None] * 9
    if needs_reference(grad_outputs[0]):
        reference = functools.partial(_reference_of_levels, tensors, ctx.constants)
        return grads_by_reference("soft_focal_loss", reference, levels, grad_outputs[0]), *nothing
    return _soft_focal_loss_op(levels, *tensors, grad_outputs[0], *ctx.constants, False, True), *nothing


_soft_focal_loss_op.register_autograd(_backward, setup_context=_setup_context)


def _soft_focal_loss_triton(
    levels: Sequence[Tensor],
    labels: Tensor,
    quality: Tensor,
    normalizers: Tensor,
    num_classes: int,
    loss_type: str,
    gamma: float,
) -> Tensor:
    tensors = [x.contiguous() for x in (labels, quality, normalizers)]
    constants = num_classes, loss_type, gamma
    return run_one_pass(
        "soft_focal_loss",
        lambda levels, with_grads: _soft_focal_loss_op(levels, *tensors, None, *constants, True, with_grads),
        functools.partial(_reference_of_levels, tensors, constants),
        [level.contiguous() for level in levels],
    )


def soft_focal_loss(
    logits: Sequence[Tensor],
    labels: Tensor,
    quality: Tensor,
    normalizers: Tensor,
    num_classes: int,
    loss_type: str = "quality_focal",
    gamma: float = 2.0,
) -> Tensor:
    """Quality focal loss or varifocal loss of a batch: the sum over images b of (the summed loss of b's anchors) /
    normalizers[b], a scalar.

    Args:
        logits: the levels as the heads wrote them, each ``(B, A*K, H, W)`` or ``(B, N_l, K)``; any float dtype.
        labels: ``(B, N)`` integers, N the anchors of all levels: a class in [0, K), -1 background, -2 ignored.
        quality: ``(B, N)`` in [0, 1], the target of each foreground anchor's class, such as
            :func:`retina_fast.kernels.box_quality.box_quality` gives; others are not read. No gradient flows into it.
        normalizers: ``(B,)`` of any dtype.
        num_classes: K.
        loss_type: quality_focal or varifocal.
        gamma: focusing exponent, at least 1.

    Raises:
        ValueError: if the shapes do not fit, labels are not integers or, on a CPU, one is K or more, the levels differ
            in dtype, the tensors lie on different devices, or for an unknown ``loss_type`` or a ``gamma`` below 1.

    Example::

        >>> logits, labels = [torch.zeros(1, 4, 3)], torch.tensor([[-1, 2, -1, -2]])
        >>> quality = torch.tensor([[0.0, 0.5, 0.0, 0.0]])  # which the score of 0.5 meets
        >>> soft_focal_loss(logits, labels, quality, torch.ones(1), num_classes=3)
        tensor(1.3863)
    """
    count, first = check_levels(logits, num_classes), logits[0]
    for name, tensor in (("labels", labels), ("quality", quality)):
        check_shape(name, tensor, "(B, N)", (first.shape[0], count))
    check_integers(labels=labels)
    check_devices(first.device, labels=labels, quality=quality)
    if loss_type not in WEIGHTS:
        raise ValueError(f"loss_type must be one of {', '.join(WEIGHTS)}, got {loss_type!r}")
    if not gamma >= 1:
        raise ValueError(f"gamma must be at least 1, got {gamma}")
    normalizers = loss_normalizers(normalizers, first.shape[0], first)
    quality = quality.detach().to(normalizers.dtype)
    tensors, constants = (labels, quality, normalizers), (num_classes, loss_type, gamma)
    if runs_triton(*logits):
        return _soft_focal_loss_triton(flatten_all(logits, num_classes), *tensors, *constants)
    if first.device.type == "cpu" and not torch.compiler.is_compiling() and not is_transformed(*logits):
        reference = functools.partial(_reference_of_levels, tensors, constants)
        terms = SoftTerms(*WEIGHTS[loss_type], gamma, loss_type)
        return focal_loss_cpu("soft_focal_loss", logits, labels, normalizers, num_classes, terms, reference, quality)
    return soft_focal_loss_reference(logits, *tensors, *constants)
