"""Heads that torchvision does not have: those whose tower convs are shared by the levels while each level has norms of
its own, as SpineNet's detectors have; and those that predict a distribution for each side of a box.

Losses, ``set_num_classes`` and all attributes work as on torchvision's. ``level_outputs`` runs all kinds of heads, by
levels.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.retinanet import (
    RetinaNet,
    RetinaNetClassificationHead,
    RetinaNetHead,
    RetinaNetRegressionHead,
)
from torchvision.ops.misc import Conv2dNormActivation

from retina_fast.kernels.arguments import at_least_float32
from retina_fast.kernels.box_decode import decode
from retina_fast.kernels.distribution_loss import distribution_loss
from retina_fast.kernels.group_norm_relu import group_norm_relu
from retina_fast.kernels.iou_losses import IOU_LOSSES
from retina_fast.kernels.levels import flatten_all
from retina_fast.kernels.side_distributions import box_channels
from retina_fast.stock import is_stock, is_stock_coder

batch_norm = partial(nn.BatchNorm2d, momentum=0.01, eps=1e-3)  # the paper's momentum


class SeparableConv2d(nn.Sequential):
    """A depthwise 3x3 conv without bias, then a 1x1 conv with one: from (B, C_in, H, W) to (B, C_out, H, W).

    Example::

        >>> conv = SeparableConv2d(8, 16)
        >>> [tuple(p.shape) for p in conv.parameters()]
        [(8, 1, 3, 3), (16, 8, 1, 1), (16,)]
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        depthwise = nn.Conv2d(in_channels, in_channels, 3, padding=1, groups=in_channels, bias=False)
        super().__init__(depthwise, nn.Conv2d(in_channels, out_channels, 1))
        self.in_channels, self.out_channels = in_channels, out_channels
        nn.init.normal_(depthwise.weight, std=1 / 3)  # keeps the variance

    @property
    def weight(self) -> Tensor:
        """Of the 1x1 conv; the one to initialise."""
        return self[1].weight  # pyrefly: ignore[bad-return]

    @property
    def bias(self) -> Tensor:
        return self[1].bias  # pyrefly: ignore[bad-return]


class LevelNormTower(nn.Module):
    """3x3 convs with a bias, which all levels share. After each conv come the level's own norm and the activation."""

    def __init__(
        self,
        in_channels: int,
        width: int,
        depth: int,
        num_levels: int,
        norm_layer: Callable[[int], nn.Module],
        activation_layer: Callable[..., nn.Module],
        separable: bool = False,
    ) -> None:
        super().__init__()
        inputs = [in_channels, *[width] * (depth - 1)]
        make = SeparableConv2d if separable else partial(nn.Conv2d, kernel_size=3, padding=1)
        self.convs = nn.ModuleList(make(channels, width) for channels in inputs)
        self.norms = nn.ModuleList(nn.ModuleList(norm_layer(width) for _ in range(depth)) for _ in range(num_levels))
        self.act = activation_layer(inplace=True)
        for conv in self.convs:
            nn.init.normal_(conv.weight, std=0.01)  # pyrefly: ignore[bad-argument-type]
            nn.init.zeros_(conv.bias)  # pyrefly: ignore[bad-argument-type]

    def forward(self, levels: Sequence[Tensor]) -> list[Tensor]:
        if len(levels) != len(self.norms):
            raise ValueError(f"this head has norms for {len(self.norms)} levels, the backbone returns {len(levels)}")
        return [self._level(level, norms) for level, norms in zip(levels, self.norms, strict=True)]  # pyrefly: ignore[bad-argument-type]

    def _level(self, x: Tensor, norms: nn.ModuleList) -> Tensor:
        for conv, norm in zip(self.convs, norms, strict=True):
            x = self.act(norm(conv(x)))
        return x


class LevelNormClassificationHead(RetinaNetClassificationHead):
    def __init__(self, tower: LevelNormTower, num_anchors: int, num_classes: int) -> None:
        super().__init__(tower.convs[-1].out_channels, num_anchors, num_classes)
        self.conv = tower
        if isinstance(tower.convs[-1], SeparableConv2d):
            self.cls_logits = as_separable(self.cls_logits)
        nn.init.normal_(self.cls_logits.weight, std=1e-5)

    def forward(self, x: list[Tensor]) -> Tensor:
        return torch.cat(flatten_all(level_outputs(self, x), self.num_classes), dim=1)


class LevelNormRegressionHead(RetinaNetRegressionHead):
    def __init__(self, tower: LevelNormTower, num_anchors: int) -> None:
        super().__init__(tower.convs[-1].out_channels, num_anchors)
        self.conv = tower
        if isinstance(tower.convs[-1], SeparableConv2d):
            self.bbox_reg = as_separable(self.bbox_reg)
        nn.init.normal_(self.bbox_reg.weight, std=1e-5)

    def forward(self, x: list[Tensor]) -> Tensor:
        return torch.cat(flatten_all(level_outputs(self, x), 4), dim=1)


class DistributionCoder(BoxCoder):
    """Decodes distributions as boxes, and deltas as torchvision's coder does, where torchvision's own postprocessing
    runs."""

    def __init__(self) -> None:
        super().__init__((1.0, 1.0, 1.0, 1.0))

    def decode_single(self, rel_codes: Tensor, boxes: Tensor) -> Tensor:
        codes = at_least_float32(rel_codes)
        return decode(codes, boxes.to(codes.dtype))


class DistributionRegressionHead(RetinaNetRegressionHead):
    """A regression head that predicts a distribution for each side of a box, see
    :mod:`retina_fast.kernels.side_distributions`.

    Args:
        head: the regression head whose tower and kind of last layer it takes over.
        reg_max: n, at least 1, of the distributions over 0, 1, ..., n units.

    Raises:
        ValueError: for a ``reg_max`` that is no whole number of at least 1.
    """

    def __init__(self, head: RetinaNetRegressionHead, reg_max: int) -> None:
        nn.Module.__init__(self)
        if type(reg_max) is not int or reg_max < 1:
            raise ValueError(f"reg_max must be a whole number of at least 1, got {reg_max!r}")
        old: Any = head.bbox_reg
        self.reg_max, self.conv = reg_max, head.conv
        channels = old.out_channels // 4 * box_channels(reg_max)
        self.bbox_reg = nn.Conv2d(old.in_channels, channels, 3, padding=1)
        nn.init.zeros_(self.bbox_reg.bias)  # pyrefly: ignore[bad-argument-type]
        if isinstance(old, SeparableConv2d):
            self.bbox_reg = as_separable(self.bbox_reg)
        nn.init.normal_(self.bbox_reg.weight, std=1e-5 if isinstance(self.conv, LevelNormTower) else 0.01)
        self.bbox_reg.to(old.weight.device, old.weight.dtype)
        self.box_coder = DistributionCoder()
        self._loss_type = head._loss_type if head._loss_type in IOU_LOSSES else "giou"

    def forward(self, x: list[Tensor]) -> Tensor:
        return torch.cat(flatten_all(level_outputs(self, x), box_channels(self.reg_max)), dim=1)

    def compute_loss(
        self,
        targets: Sequence[Mapping[str, Tensor]],
        head_outputs: Mapping[str, Tensor],
        anchors: Sequence[Tensor],
        matched_idxs: Sequence[Tensor],
    ) -> Tensor:
        """The box loss where torchvision's own loss path runs; the arguments are as there."""
        indices = torch.stack(list(matched_idxs))  # (B, N)
        boxes = torch.cat([target["boxes"] for target in targets])
        counts = [len(target["boxes"]) for target in targets]
        offsets = torch.tensor([0, *counts], device="cpu").cumsum(0).to(indices.device)
        normalizers = (indices >= 0).sum(dim=1).clamp(min=1) * len(indices)
        geometry = torch.stack(list(anchors)), indices, boxes, offsets
        return distribution_loss(
            [head_outputs["bbox_regression"]], *geometry, normalizers, self.reg_max, self._loss_type
        )


def give_distributions(model: RetinaNet, reg_max: int) -> None:
    """Gives a model's boxes distributions, by a last layer of the regression head with random weights.

    Raises:
        TypeError: if the regression head is not torchvision's.
        ValueError: for a ``reg_max`` that is no whole number of at least 1.
    """
    head = getattr(model.head, "regression_head", None)
    if not isinstance(head, RetinaNetRegressionHead):
        raise TypeError(f"reg_max needs torchvision's regression head, the model has {type(head)}")
    model.head.regression_head = DistributionRegressionHead(head, reg_max)
    model.box_coder = DistributionCoder()


def reg_max_of(head: Any) -> int:
    """n of a head whose boxes are distributions, 0 for one whose boxes are deltas."""
    return getattr(getattr(head, "regression_head", None), "reg_max", 0)


def is_known_coder(coder: object) -> bool:
    """Whether boxes are coded as the operations code them: by torchvision's own coder, or by that of distributions."""
    return is_stock_coder(coder) or is_stock(coder, DistributionCoder, "encode_single", "decode_single")


def as_separable(conv: Any) -> Any:
    """A separable conv of the same channels and bias.

    Example::

        >>> as_separable(nn.Conv2d(8, 36, 3)).out_channels
        36
    """
    other = SeparableConv2d(conv.in_channels, conv.out_channels)
    with torch.no_grad():
        other.bias.copy_(conv.bias)
    return other


def fresh_logits(head: RetinaNetClassificationHead, num_classes: int) -> nn.Module:
    """A last layer for another class count, of the same kind, device and dtype as the head's.

    Example::

        >>> fresh_logits(RetinaNetClassificationHead(8, num_anchors=9, num_classes=3), 5).out_channels
        45
    """
    old: Any = head.cls_logits
    fresh = RetinaNetClassificationHead(old.in_channels, head.num_anchors, num_classes).cls_logits
    if isinstance(old, SeparableConv2d):
        fresh = as_separable(fresh)
        nn.init.normal_(fresh.weight, std=1e-5)
    return fresh.to(old.weight.device, old.weight.dtype)


def level_norm_head(
    in_channels: int,
    num_anchors: int,
    num_classes: int,
    width: int = 256,
    depth: int = 4,
    num_levels: int = 5,
    norm_layer: Callable[[int], nn.Module] = batch_norm,
    activation_layer: Callable[..., nn.Module] = nn.ReLU,
    separable: bool = False,
) -> RetinaNetHead:
    """torchvision's RetinaNetHead with another tower: ``depth`` convs to ``width`` channels, a norm for each level.

    Args:
        in_channels: channels of the levels.
        num_anchors: A, for each cell.
        num_classes: K.
        width, depth: channels and convs of a tower.
        num_levels: how many levels the backbone returns.
        norm_layer: from channels to a norm.
        activation_layer: called with ``inplace=True``.
        separable: whether the convs of towers and predictors are separable ones, as the mobile detectors have.

    Example::

        >>> head = level_norm_head(16, num_anchors=9, num_classes=3, width=8, num_levels=2)
        >>> outputs = head([torch.rand(2, 16, 4, 4), torch.rand(2, 16, 2, 2)])
        >>> [tuple(output.shape) for output in outputs.values()]
        [(2, 180, 3), (2, 180, 4)]
    """

    def tower() -> LevelNormTower:
        return LevelNormTower(in_channels, width, depth, num_levels, norm_layer, activation_layer, separable)

    head = RetinaNetHead.__new__(RetinaNetHead)  # its own towers would be made to be thrown away
    nn.Module.__init__(head)
    head.classification_head = LevelNormClassificationHead(tower(), num_anchors, num_classes)
    head.regression_head = LevelNormRegressionHead(tower(), num_anchors)
    return head


HEAD_PARTS = {"cls_logits": "classification_head", "bbox_regression": "regression_head"}
"""A head's outputs, and which part gives each."""


def run_head(head: Any, features: Sequence[Tensor]) -> Mapping[str, Any]:
    """``cls_logits`` and ``bbox_regression`` of a head: lists of levels as its convs write them, ``(B, A*C, H, W)``.

    If the head or a part of it is the user's own, the head is called, and its result is returned unchanged.
    """
    if not head_runs_by_level(head):
        return head(features)
    return {name: level_outputs(getattr(head, part), features) for name, part in HEAD_PARTS.items()}


def head_runs_by_level(head: Any) -> bool:
    """Whether neither the head nor a part of it is the user's own."""
    stock = is_stock(head, RetinaNetHead, "forward")
    return stock and all(runs_by_level(getattr(head, part)) for part in HEAD_PARTS.values())


def runs_by_level(part: Any) -> bool:
    """Whether :func:`level_outputs` may replace this head's ``forward``: it has no user's class, method or hook."""
    known = (
        RetinaNetClassificationHead,
        RetinaNetRegressionHead,
        LevelNormClassificationHead,
        LevelNormRegressionHead,
        DistributionRegressionHead,
    )
    return any(is_stock(part, cls, "forward") for cls in known)


def level_outputs(part: Any, features: Sequence[Tensor]) -> list[Tensor]:
    """The outputs of a classification or regression head as its convs write them, ``(B, A*C, H, W)`` a level."""
    levels = part.conv(features) if isinstance(part.conv, LevelNormTower) else run_tower(part.conv, features)
    last = part.cls_logits if isinstance(part, RetinaNetClassificationHead) else part.bbox_reg
    return [last(level) for level in levels]


Norm = Callable[[Sequence[Tensor], Tensor, Tensor, int, float], list[Tensor]]


def run_tower(tower: Any, levels: Sequence[Tensor], norm: Norm = group_norm_relu) -> list[Tensor]:
    """A tower's outputs of every level.

    On a GPU a tower of conv, GroupNorm and ReLU, as in torchvision's v2 heads, goes block by block: the norms of all
    levels are one call. Any other runs level by level, as it is.

    Args:
        tower: a head's ``conv``.
        levels: ``(B, C, H_l, W_l)``.
        norm: what stands in for GroupNorm and ReLU; tests put the kernels here where there is no GPU.
    """
    on_gpu = levels[0].is_cuda or norm is not group_norm_relu
    if not (on_gpu and is_stock(tower, nn.Sequential, "forward") and all(map(_is_stock_block, tower))):
        return [tower(level) for level in levels]
    for conv, group_norm, _ in tower:
        levels = [conv(level) for level in levels]
        levels = norm(levels, group_norm.weight, group_norm.bias, group_norm.num_groups, group_norm.eps)
    return list(levels)


def _is_stock_block(block: Any) -> bool:
    """Whether it is torchvision's conv, GroupNorm with weights, ReLU; the conv may be of any kind."""
    return (
        is_stock(block, Conv2dNormActivation, "forward")
        and len(block) == 3
        and is_stock(block[1], nn.GroupNorm, "forward")
        and block[1].affine
        and is_stock(block[2], nn.ReLU, "forward")
    )
