"""Ground truths of a batch, concatenated into flat tensors and checked once, without waiting for the GPU."""

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from retina_fast.device import LateRead, to_device


class GroundTruths(NamedTuple):
    """The ground truths of B images, concatenated: image b owns rows offsets[b] to offsets[b + 1]."""

    boxes: Tensor
    """(G, 4) float32 xyxy pixels."""
    labels: Tensor
    """(G,) int64 classes."""
    offsets: Tensor
    """(B + 1,) int64."""
    counts: list[int]
    """B row counts, on the host."""


def gather_targets(
    targets: Sequence[Mapping[str, Tensor]], num_images: int, device: torch.device, check: "TargetCheck | None" = None
) -> GroundTruths:
    """Concatenate torchvision's list of target dicts, after checking them.

    Args:
        targets: B dicts with ``boxes`` (N, 4) xyxy and ``labels`` (N,); other keys are ignored.
        num_images: B.
        device: where the result is wanted; targets are checked where they lie, before they are moved.
        check: looks at the values of boxes and labels; None skips it.

    Raises:
        AssertionError: boxes not a tensor or not (N, 4), or (by ``check``) without positive width and height.
        KeyError: no boxes or labels.
        TypeError: targets that are no list, a target that is no dict, or labels that are no tensor.
        IndexError: fewer targets than images or labels than boxes, labels not integers or (``check``) out of range.
        ValueError: more targets than images, more labels than boxes, or (``check``) boxes that are not finite.
    """
    check_boxes(targets)
    sizes = f"targets has {len(targets)} entries for {num_images} images"
    if len(targets) < num_images:
        raise IndexError(sizes)
    counts = [len(target["boxes"]) for target in targets]
    boxes = torch.cat([target["boxes"].float() for target in targets])  # cast first: cat would promote to fp16
    each: list[Tensor] = []
    try:
        for i, target in enumerate(targets):
            _check_labels(i, target)
            each.append(target["labels"].long())  # unsigned ones cannot be compared
        if len(targets) > num_images:
            raise ValueError(sizes)
    except (KeyError, TypeError, IndexError, ValueError):
        if check is not None:
            check.refuse(boxes, each, counts)  # all boxes, then label by label, as torchvision does
        raise
    labels = torch.cat(each)
    offsets = torch.tensor([0, *counts], device="cpu").cumsum(0)
    if check is not None:
        check(boxes, labels, counts)
    return GroundTruths(to_device(boxes, device), to_device(labels, device), to_device(offsets, device), counts)


def check_boxes(targets: Sequence[Mapping[str, Tensor]]) -> None:
    """Refuse targets that are no list of dicts with boxes (N, 4), by the errors of :func:`gather_targets`; values are
    not looked at."""
    _check_list(targets)
    for i, target in enumerate(targets):
        _check_boxes(i, target)


def _check_list(targets: Any) -> None:
    if isinstance(targets, Mapping) or not hasattr(targets, "__getitem__"):
        raise TypeError(f"targets must be a list of dicts, one for each image, got a {type(targets)}")


def _check_boxes(i: int, target: Mapping[str, Tensor]) -> None:
    if not hasattr(target, "keys"):
        raise TypeError(f"targets[{i}] must be a dict of boxes and labels, got a {type(target)}")
    if "boxes" not in target:
        raise KeyError(f"targets[{i}] has no 'boxes'; its keys are {sorted(target)}")
    boxes = target["boxes"]
    if not isinstance(boxes, Tensor):
        raise AssertionError(f"Expected target boxes to be of type Tensor: targets[{i}]['boxes'] is a {type(boxes)}.")
    if boxes.dim() != 2 or boxes.shape[1] != 4:
        raise AssertionError(
            f"Expected target boxes to be a tensor of shape [N, 4]: targets[{i}]['boxes'] is {tuple(boxes.shape)}."
        )
    if boxes.is_complex():
        raise NotImplementedError(f"targets[{i}]['boxes'] must be real numbers, got {boxes.dtype}")


def _check_labels(i: int, target: Mapping[str, Tensor]) -> None:
    if "labels" not in target:
        raise KeyError(f"targets[{i}] has no 'labels'; its keys are {sorted(target)}")
    boxes, labels = target["boxes"], target["labels"]
    if not isinstance(labels, Tensor):
        raise TypeError(f"targets[{i}]['labels'] must be a Tensor, got a {type(labels)}")
    integers = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
    if labels.numel() and not integers:
        raise IndexError(f"targets[{i}]['labels'] must be integers, got {labels.dtype}")
    if labels.dim() != 1 or len(labels) != len(boxes):
        error = IndexError if labels.dim() == 1 and len(labels) < len(boxes) else ValueError
        raise error(f"targets[{i}] has {len(boxes)} boxes and labels of shape {tuple(labels.shape)}")


def with_truths(targets: Sequence[Mapping[str, Tensor]], truths: GroundTruths) -> list[dict[str, Tensor]]:
    """Target dicts with the boxes and labels of ``truths``, the other keys as they were."""
    boxes, labels = truths.boxes.split(truths.counts), truths.labels.split(truths.counts)
    return [{**target, "boxes": boxes[b], "labels": labels[b]} for b, target in enumerate(targets)]


def unlabelled(targets: Sequence[Mapping[str, Tensor]], num_images: int) -> list[dict[str, Tensor]]:
    """Targets as torchvision reads them in evaluation: only their boxes count, labels may be anything or missing, and
    there may be more than images."""
    _check_list(targets)
    targets = targets[:num_images]
    check_boxes(targets)
    return [
        {**target, "labels": target["boxes"].new_zeros(len(target["boxes"]), dtype=torch.int64)} for target in targets
    ]


def first_error(boxes: Tensor, labels: Tensor, num_classes: int | None) -> Tensor:
    """What is wrong first in boxes (G, 4) and labels (G,): box g as g, or, where all boxes are right, label g as G + g;
    2 G if nothing is."""
    right = torch.cat((boxes[:, 2:] > boxes[:, :2], boxes.abs() < math.inf), dim=1).all(dim=1)
    known = labels >= 0 if num_classes is None else (labels >= 0) & (labels < num_classes)
    return torch.cat((right, known, right.new_zeros(1))).int().argmin()


class _Pending(NamedTuple):
    step: int
    found: LateRead  # first_error's answer
    boxes: Tensor
    labels: Tensor
    counts: list[int]


class TargetCheck:
    """Checks the values of targets: on CUDA at a later call, when the result has arrived, and elsewhere at once."""

    def __init__(self) -> None:
        self.step = 0
        self.num_classes: int | None = None
        self._counts = True
        self._pending: deque[_Pending] = deque()

    def __call__(self, boxes: Tensor, labels: Tensor, counts: list[int]) -> None:
        self.step += self._counts
        found = first_error(boxes, labels, self.num_classes)
        if boxes.device.type != "cuda":
            self._raise(int(found), boxes, labels, counts, "")
            return
        self.raise_pending()
        self._pending.append(_Pending(self.step, LateRead(found), boxes, labels, counts))

    def refuse(self, boxes: Tensor, labels: Sequence[Tensor], counts: list[int]) -> None:
        """Raise the error of the first wrong box or, where all are right, label, at once; later images may have no
        labels."""
        missing = boxes.new_zeros(len(boxes) - sum(map(len, labels)), dtype=torch.int64)
        known = torch.cat((*labels, missing))
        self._raise(int(first_error(boxes, known, self.num_classes)), boxes, known, counts, "")

    @contextmanager
    def same_step(self) -> Iterator[None]:
        """Within this context, checks do not count as a new step."""
        self._counts = False
        try:
            yield
        finally:
            self._counts = True

    def raise_pending(self) -> None:
        """Raise the error of an earlier step whose answer has arrived; never waits."""
        while self._pending and self._pending[0].found.arrived():
            step, found, boxes, labels, counts = self._pending.popleft()
            self._raise(int(found.wait()), boxes, labels, counts, f" (in the targets of training step {step})")

    def _raise(self, found: int, boxes: Tensor, labels: Tensor, counts: list[int], when: str) -> None:
        if found == 2 * len(boxes):
            return
        found = row = found % len(boxes)
        image = 0
        while row >= counts[image]:
            row, image = row - counts[image], image + 1
        box, label = boxes[found].tolist(), int(labels[found])
        if not all(map(math.isfinite, box)):
            raise ValueError(f"targets[{image}]['boxes'][{row}] is not finite: {box}{when}")
        if box[2] <= box[0] or box[3] <= box[1]:
            raise AssertionError(
                "All bounding boxes should have positive height and width. "
                f"Found invalid box {box} for target at index {image}: targets[{image}]['boxes'][{row}]{when}"
            )
        allowed = "at least 0" if self.num_classes is None else f"in [0, {self.num_classes})"
        raise IndexError(f"targets[{image}]['labels'][{row}] is {label}, must be {allowed}{when}")


_CHECKS: WeakKeyDictionary[nn.Module, TargetCheck] = WeakKeyDictionary()


def target_check(model: nn.Module) -> TargetCheck:
    """The check of a model. It is kept beside the model, not in it, so that the model can be copied and pickled."""
    return _CHECKS.setdefault(model, TargetCheck())
