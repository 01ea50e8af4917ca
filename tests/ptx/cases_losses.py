"""Cases of the losses and of what weighs them. Expected values are in float64."""

from collections.abc import Iterator

import torch
from torch import Generator

from retina_fast.kernels.box_loss import box_loss_reference
from retina_fast.kernels.box_quality import box_quality_reference
from retina_fast.kernels.distribution_loss import distribution_loss_reference
from retina_fast.kernels.focal_loss import focal_loss_reference
from retina_fast.kernels.sigmoid_focal_loss import sigmoid_focal_loss_reference
from retina_fast.kernels.soft_focal_loss import soft_focal_loss_reference
from tests.ptx.inputs import (
    SHAPES,
    Comparison,
    Run,
    Shapes,
    close,
    doubles,
    head_outputs,
    limit_of,
    random_boxes,
    shifted,
)

ops = torch.ops.retina_fast


def focal_loss(
    generator: Generator, dtype: torch.dtype, num_classes: int, gamma: float = 2.0, shapes: Shapes = SHAPES,
    shift: int = 0, nan: bool = False,
) -> Run:  # fmt: skip
    levels = head_outputs(generator, dtype, num_classes, shapes, 1.5, -3.0, shift)
    if nan:
        levels[0][0, 5, 2] = float("nan")
    count = sum(level.shape[1] for level in levels)
    drawn = torch.rand(2, count, generator=generator)
    labels = torch.randint(0, num_classes, (2, count), generator=generator, dtype=torch.int32)
    labels = torch.where(drawn < 0.004, labels, torch.where(drawn < 0.996, -1, -2)).int()
    normalizers = torch.tensor([3.0, 17.0])
    exact = doubles(levels)
    expected = focal_loss_reference(exact, labels, normalizers.double(), num_classes, 0.25, gamma)
    grads = torch.autograd.grad(expected, exact)
    factor = torch.tensor(1024.0 if dtype == torch.float16 else 0.5)  # as loss scaling would, or float16 underflows

    def run() -> Iterator[Comparison]:
        constants = num_classes, 0.25, gamma
        if dtype == torch.float16:
            yield close(
                "loss", ops.focal_loss(levels, labels, normalizers, None, *constants, True, False), [expected], 1e-5
            )
        else:
            loss, *ours = ops.focal_loss(levels, labels, normalizers, None, *constants, True, True)
            yield close("loss", [loss], [expected], 1e-5)
            yield close("gradients", ours, grads, limit_of(dtype))
        ours = ops.focal_loss(levels, labels, normalizers, factor, *constants, False, True)
        yield close("scaled gradients", ours, [grad * factor for grad in grads], limit_of(dtype))

    return run


def soft_focal_loss(
    generator: Generator, dtype: torch.dtype, num_classes: int, loss_type: str, gamma: float = 2.0,
    shapes: Shapes = SHAPES, shift: int = 0,
) -> Run:  # fmt: skip
    levels = head_outputs(generator, dtype, num_classes, shapes, 1.5, -1.0, shift)
    count = sum(level.shape[1] for level in levels)
    drawn = torch.rand(2, count, generator=generator)
    labels = torch.randint(0, num_classes, (2, count), generator=generator, dtype=torch.int32)
    labels = torch.where(drawn < 0.02, labels, torch.where(drawn < 0.996, -1, -2)).int()
    quality = shifted((torch.rand(2, count, generator=generator) * 1.4 - 0.2).clamp(0, 1), shift)
    normalizers, factor = torch.tensor([3.0, 17.0]), torch.tensor(0.5)
    exact, constants = doubles(levels), (num_classes, loss_type, gamma)
    expected = soft_focal_loss_reference(exact, labels, quality.double(), normalizers.double(), *constants)
    grads = torch.autograd.grad(expected, exact)

    def run() -> Iterator[Comparison]:
        loss, *ours = ops.soft_focal_loss(levels, labels, quality, normalizers, None, *constants, True, True)
        yield close("loss", [loss], [expected], 1e-5)
        yield close("gradients", ours, grads, limit_of(dtype))
        ours = ops.soft_focal_loss(levels, labels, quality, normalizers, factor, *constants, False, True)
        yield close("scaled gradients", ours, [grad * factor for grad in grads], limit_of(dtype))

    return run


def sigmoid_focal_loss(
    generator: Generator, dtype: torch.dtype, soft: bool, gamma: float = 2.0, count: int = 3007, shift: int = 0
) -> Run:
    x = shifted((torch.randn(count, generator=generator) * 4).to(dtype), shift)
    targets = torch.rand(count, generator=generator)
    targets = shifted((targets if soft else targets.round()).to(dtype), 2 * shift)
    incoming = torch.randn(count, generator=generator).to(dtype)
    (exact,) = doubles([x])
    expected = sigmoid_focal_loss_reference(exact, targets.double(), 0.25, gamma)
    (grad,) = torch.autograd.grad(expected, exact, incoming.double())

    def run() -> Iterator[Comparison]:
        arguments = x, targets, None, 0.25, gamma
        yield close("losses", [ops.sigmoid_focal_loss(*arguments, "losses", dtype)], [expected], limit_of(dtype))
        sums = ops.sigmoid_focal_loss(*arguments, "sums", torch.float32)
        yield close("sum", [sums.sum()], [expected.sum()], 1e-5)
        ours = ops.sigmoid_focal_loss(x, targets, incoming, 0.25, gamma, "gradients", dtype)
        yield close("gradients", [ours], [grad], limit_of(dtype))

    return run


def box_loss(
    generator: Generator, dtype: torch.dtype, loss_type: str, shapes: Shapes = SHAPES, shift: int = 0,
    weighted: bool = False,
) -> Run:  # fmt: skip
    levels = head_outputs(generator, dtype, 4, shapes, scale=0.3, shift=shift)
    count = sum(level.shape[1] for level in levels)
    anchors, boxes = (shifted(random_boxes(generator, n), shift) for n in (count, 9))
    offsets, normalizers = torch.tensor([0, 4, 9]), torch.tensor([5.0, 8.0])
    drawn = torch.rand(2, count, generator=generator)
    indices = torch.where(drawn < 0.03, torch.randint(0, 4, (2, count), generator=generator), -1).int()
    indices[0, -1] = 3  # so that there is a foreground anchor, however few anchors there are
    weights = shifted(torch.rand(2, count, generator=generator), shift) if weighted else None
    exact = doubles(levels)
    rest = anchors, indices, boxes, offsets, normalizers
    rest_exact = anchors.double(), indices, boxes.double(), offsets, normalizers.double()
    expected = box_loss_reference(exact, *rest_exact, loss_type, weights)
    grads = torch.autograd.grad(expected, exact)
    limit = max(limit_of(dtype), 2e-5)

    def run() -> Iterator[Comparison]:
        loss, *ours = ops.box_loss(levels, *rest, None, loss_type, True, True, weights)
        yield close("loss", [loss], [expected], 1e-5)
        yield close("gradients", ours, grads, limit)
        ours = ops.box_loss(levels, *rest, torch.tensor(2.0), loss_type, False, True, weights)
        yield close("scaled gradients", ours, [2 * grad for grad in grads], limit)

    return run


def distribution_loss(
    generator: Generator, dtype: torch.dtype, loss_type: str, reg_max: int = 16, shapes: Shapes = SHAPES,
    shift: int = 0, weighted: bool = False,
) -> Run:  # fmt: skip
    levels = head_outputs(generator, dtype, 4 * (reg_max + 1), shapes, shift=shift)
    count = sum(level.shape[1] for level in levels)
    anchors, boxes = (shifted(random_boxes(generator, n), shift) for n in (count, 9))
    offsets, normalizers = torch.tensor([0, 4, 9]), torch.tensor([5.0, 8.0])
    drawn = torch.rand(2, count, generator=generator)
    indices = torch.where(drawn < 0.02, torch.randint(0, 4, (2, count), generator=generator), -1).int()
    indices[0, -1] = 3  # so that there is a foreground anchor, however few anchors there are
    weights = shifted(torch.rand(2, count, generator=generator), shift) if weighted else None
    exact, constants = doubles(levels), (reg_max, loss_type)
    rest = anchors, indices, boxes, offsets, normalizers
    rest_exact = anchors.double(), indices, boxes.double(), offsets, normalizers.double()
    expected = distribution_loss_reference(exact, *rest_exact, *constants, weights)
    grads = torch.autograd.grad(expected, exact)
    limit = max(1.5 * limit_of(dtype), 2e-5)

    def run() -> Iterator[Comparison]:
        loss, *ours = ops.distribution_loss(levels, *rest, None, *constants, True, True, weights)
        yield close("loss", [loss], [expected], 1e-5)
        yield close("gradients", ours, grads, limit)
        ours = ops.distribution_loss(levels, *rest, torch.tensor(2.0), *constants, False, True, weights)
        yield close("scaled gradients", ours, [2 * grad for grad in grads], limit)

    return run


def box_quality(generator: Generator, dtype: torch.dtype, own: bool = False, reg_max: int = 0, shift: int = 0) -> Run:
    levels = head_outputs(generator, dtype, 4 * (reg_max + 1), scale=1.0 if reg_max else 0.3, shift=shift)
    count = sum(level.shape[1] for level in levels)
    places, boxes = random_boxes(generator, count), shifted(random_boxes(generator, 9), shift)
    anchors = shifted(torch.stack((places, places + 5)) if own else places, shift)
    offsets, drawn = torch.tensor([0, 4, 9]), torch.rand(2, count, generator=generator)
    indices = torch.where(drawn < 0.03, torch.randint(0, 4, (2, count), generator=generator), -1).int()
    indices[0, -1] = 3  # so that there is a foreground anchor, however few anchors there are
    doubles = [level.double() for level in levels]
    expected = box_quality_reference(doubles, anchors.double(), indices, boxes.double(), offsets, reg_max)

    def run() -> Iterator[Comparison]:
        yield close("qualities", [ops.box_quality(levels, anchors, indices, boxes, offsets, reg_max)], [expected], 2e-6)

    return run
