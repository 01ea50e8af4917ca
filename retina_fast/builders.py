"""Builders of models: torchvision's two with their exact signatures, and others for more ResNets and for SpineNet."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from torch import nn
from torchvision.models import (
    ResNet18_Weights,
    ResNet34_Weights,
    ResNet50_Weights,
    ResNet101_Weights,
    ResNet152_Weights,
    ResNeXt50_32X4D_Weights,
    resnet18,
    resnet34,
    resnet50,
    resnet101,
    resnet152,
    resnext50_32x4d,
)
from torchvision.models._api import WeightsEnum
from torchvision.models._utils import _ovewrite_value_param, handle_legacy_interface
from torchvision.models.detection._utils import overwrite_eps
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import _validate_trainable_layers
from torchvision.models.detection.retinanet import (
    RetinaNet_ResNet50_FPN_V2_Weights,
    RetinaNet_ResNet50_FPN_Weights,
    RetinaNetHead,
    _default_anchorgen,
)
from torchvision.models.resnet import ResNet

from retina_fast.anchors import taken_anchors
from retina_fast.backbones.frozen_norm import FrozenBatchNorm2d
from retina_fast.backbones.published import load_published_weights
from retina_fast.backbones.resnet_fpn import resnet_fpn, resnet_fpn_lite
from retina_fast.backbones.specification import MOBILE_SPINENET, SPINENET
from retina_fast.backbones.spinenet import SIZES, SpineNet
from retina_fast.backbones.spinenet_mobile import MOBILE_SIZES, MobileSpineNet
from retina_fast.heads import level_norm_head
from retina_fast.model import RetinaNet

Builder = Callable[..., RetinaNet]


def _v1(
    trunk: Callable[..., ResNet],
    weights: WeightsEnum | None,
    progress: bool,
    num_classes: int | None,
    weights_backbone: WeightsEnum | None,
    trainable_backbone_layers: int | None,
    _fetch: bool = True,
    **kwargs: Any,
) -> RetinaNet:
    """The paper's model as torchvision trains it: P6 from P5, heads without norm, L1 box loss."""
    num_classes, weights_backbone = _resolve(weights, num_classes, weights_backbone, kwargs)
    pretrained = weights is not None or weights_backbone is not None
    layers = _validate_trainable_layers(pretrained, trainable_backbone_layers, 5, 3)
    norm_layer = FrozenBatchNorm2d if pretrained else nn.BatchNorm2d
    resnet = trunk(norm_layer=norm_layer)
    load_published_weights(resnet, weights_backbone if _fetch else None, progress)
    generator = taken_anchors(kwargs, 5, weights)
    if generator is not None:
        kwargs["anchor_generator"] = generator
    model = RetinaNet(resnet_fpn(resnet, layers, p6_from_c5=False), num_classes, **kwargs)
    load_published_weights(model, weights, progress)
    if weights is not None:
        overwrite_eps(model, 0.0)
        model.classes = list(weights.meta["categories"])
    return model


def _v2(
    trunk: Callable[..., ResNet],
    weights: WeightsEnum | None,
    progress: bool,
    num_classes: int | None,
    weights_backbone: WeightsEnum | None,
    trainable_backbone_layers: int | None,
    _fetch: bool = True,
    **kwargs: Any,
) -> RetinaNet:
    """torchvision's improved model: P6 from C5, GroupNorm in the heads, GIoU box loss."""
    num_classes, weights_backbone = _resolve(weights, num_classes, weights_backbone, kwargs)
    pretrained = weights is not None or weights_backbone is not None
    layers = _validate_trainable_layers(pretrained, trainable_backbone_layers, 5, 3)
    resnet = trunk()
    load_published_weights(resnet, weights_backbone if _fetch else None, progress)
    backbone = resnet_fpn(resnet, layers, p6_from_c5=True)
    generator = taken_anchors(kwargs, 5, weights) or _default_anchorgen()
    head = RetinaNetHead(256, generator.num_anchors_per_location()[0], num_classes, partial(nn.GroupNorm, 32))
    head.regression_head._loss_type = "giou"
    model = RetinaNet(backbone, num_classes, anchor_generator=generator, head=head, **kwargs)
    load_published_weights(model, weights, progress)
    if weights is not None:
        model.classes = list(weights.meta["categories"])
    return model


def _resolve(
    weights: WeightsEnum | None, num_classes: int | None, weights_backbone: WeightsEnum | None, kwargs: dict[str, Any]
) -> tuple[int, WeightsEnum | None]:
    """The class count, and the backbone's weights: none when the whole model's are given."""
    if weights is not None:
        if kwargs.get("reg_max") is not None:
            raise ValueError("the COCO weights are for boxes of four deltas: give weights or reg_max, not both")
        return _ovewrite_value_param("num_classes", num_classes, len(weights.meta["categories"])), None
    return 91 if num_classes is None else num_classes, weights_backbone


@handle_legacy_interface(
    weights=("pretrained", RetinaNet_ResNet50_FPN_Weights.COCO_V1),
    weights_backbone=("pretrained_backbone", ResNet50_Weights.IMAGENET1K_V1),
)
def retinanet_resnet50_fpn(
    *,
    weights: RetinaNet_ResNet50_FPN_Weights | None = None,
    progress: bool = True,
    num_classes: int | None = None,
    weights_backbone: ResNet50_Weights | None = ResNet50_Weights.IMAGENET1K_V1,
    trainable_backbone_layers: int | None = None,
    **kwargs: Any,
) -> RetinaNet:
    """RetinaNet on ResNet-50 with FPN, as torchvision's function of this name (34.1 M parameters at 91 classes).

    Args:
        weights: COCO weights of the whole model; they fix ``num_classes`` at 91 (see ``set_num_classes``).
        progress: whether to show a progress bar while downloading.
        num_classes: K, 91 by default; label 0 is a real class.
        weights_backbone: ImageNet weights of the ResNet.
        trainable_backbone_layers: how many of its five stages are trained: 3 by default, all where nothing is
            pretrained.
        **kwargs: arguments of :class:`retina_fast.RetinaNet`; ``anchors``, sizes and ratios as
            :func:`retina_fast.anchors.generator_of` takes them; and ``_fetch=False`` for a model that is frozen as with
            ``weights_backbone``, but without them, where all weights will be loaded anyway.

    Raises:
        ValueError: if ``num_classes`` conflicts with ``weights``, or for trainable layers outside [0, 5].
        KeyError: for an unknown name of weights.
        ConnectionError: if weights cannot be downloaded.
        UserError: if the file of weights is damaged; it is a ValueError that names the file.

    Example::

        >>> model = retinanet_resnet50_fpn(weights=None, weights_backbone=None, num_classes=5)
        >>> sum(p.numel() for p in model.parameters())
        32284049
    """
    weights = RetinaNet_ResNet50_FPN_Weights.verify(weights)
    weights_backbone = ResNet50_Weights.verify(weights_backbone)
    return _v1(resnet50, weights, progress, num_classes, weights_backbone, trainable_backbone_layers, **kwargs)


@handle_legacy_interface(
    weights=("pretrained", RetinaNet_ResNet50_FPN_V2_Weights.COCO_V1),
    weights_backbone=("pretrained_backbone", ResNet50_Weights.IMAGENET1K_V1),
)
def retinanet_resnet50_fpn_v2(
    *,
    weights: RetinaNet_ResNet50_FPN_V2_Weights | None = None,
    progress: bool = True,
    num_classes: int | None = None,
    weights_backbone: ResNet50_Weights | None = None,
    trainable_backbone_layers: int | None = None,
    **kwargs: Any,
) -> RetinaNet:
    """Improved RetinaNet on ResNet-50 with FPN, as torchvision's function of this name (38.2 M parameters).

    The arguments are those of :func:`retinanet_resnet50_fpn`; no backbone weights by default.

    Example::

        >>> model = retinanet_resnet50_fpn_v2()
        >>> sum(p.numel() for p in model.parameters())
        38198935
    """
    weights = RetinaNet_ResNet50_FPN_V2_Weights.verify(weights)
    weights_backbone = ResNet50_Weights.verify(weights_backbone)
    return _v2(resnet50, weights, progress, num_classes, weights_backbone, trainable_backbone_layers, **kwargs)


def _kin(name: str, make: Builder, trunk: Callable[..., ResNet], enum: Any, default: WeightsEnum | None) -> Builder:
    """A builder like torchvision's for a ResNet that it has none for, so without COCO weights."""

    @handle_legacy_interface(weights=("pretrained", None), weights_backbone=("pretrained_backbone", enum.IMAGENET1K_V1))
    def builder(
        *,
        weights: None = None,
        progress: bool = True,
        num_classes: int | None = None,
        weights_backbone: WeightsEnum | None = default,
        trainable_backbone_layers: int | None = None,
        **kwargs: Any,
    ) -> RetinaNet:
        if weights is not None:
            raise ValueError(f"there are no COCO weights of {name}, so weights must be None, got {weights!r}")
        backbone = enum.verify(weights_backbone)
        return make(trunk, None, progress, num_classes, backbone, trainable_backbone_layers, **kwargs)

    builder.__name__ = builder.__qualname__ = name
    builder.__doc__ = f"""RetinaNet on {trunk.__name__} with FPN: {make.__doc__}

    The arguments are those of :func:`retinanet_resnet50_fpn`; ``weights`` must be None.
    """
    return builder


def _kin_v1(trunk: Callable[..., ResNet], enum: Any) -> Builder:
    return _kin(f"retinanet_{trunk.__name__}_fpn", _v1, trunk, enum, enum.IMAGENET1K_V1)


def _kin_v2(trunk: Callable[..., ResNet], enum: Any) -> Builder:
    return _kin(f"retinanet_{trunk.__name__}_fpn_v2", _v2, trunk, enum, None)


retinanet_resnet18_fpn = _kin_v1(resnet18, ResNet18_Weights)
retinanet_resnet34_fpn = _kin_v1(resnet34, ResNet34_Weights)
retinanet_resnet101_fpn = _kin_v1(resnet101, ResNet101_Weights)
retinanet_resnet152_fpn = _kin_v1(resnet152, ResNet152_Weights)
retinanet_resnext50_32x4d_fpn = _kin_v1(resnext50_32x4d, ResNeXt50_32X4D_Weights)
retinanet_resnet18_fpn_v2 = _kin_v2(resnet18, ResNet18_Weights)
retinanet_resnet34_fpn_v2 = _kin_v2(resnet34, ResNet34_Weights)
retinanet_resnet101_fpn_v2 = _kin_v2(resnet101, ResNet101_Weights)
retinanet_resnet152_fpn_v2 = _kin_v2(resnet152, ResNet152_Weights)
retinanet_resnext50_32x4d_fpn_v2 = _kin_v2(resnext50_32x4d, ResNeXt50_32X4D_Weights)


def _lite(
    trunk: Callable[..., ResNet],
    weights: None,
    progress: bool,
    num_classes: int | None,
    weights_backbone: WeightsEnum | None,
    trainable_backbone_layers: int | None,
    _fetch: bool = True,
    **kwargs: Any,
) -> RetinaNet:
    """Strides 4 to 32, 64 channels, GroupNorm in the heads; made for objects of 8 to 200 pixels at native size."""
    if trainable_backbone_layers is not None:
        raise ValueError("trainable_backbone_layers: the lite model trains all layers")
    resnet = trunk()
    load_published_weights(resnet, weights_backbone if _fetch else None, progress)
    backbone = resnet_fpn_lite(resnet)
    sizes = tuple((x, int(x * 2 ** (1 / 3)), int(x * 2 ** (2 / 3))) for x in (16, 32, 64, 128))
    generator = taken_anchors(kwargs, 4) or AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes))
    num_classes = 91 if num_classes is None else num_classes
    per_cell = generator.num_anchors_per_location()[0]
    head = RetinaNetHead(backbone.out_channels, per_cell, num_classes, partial(nn.GroupNorm, 16))
    kwargs.setdefault("min_size", None)
    return RetinaNet(backbone, num_classes, anchor_generator=generator, head=head, **kwargs)


retinanet_resnet18_fpn_lite = _kin("retinanet_resnet18_fpn_lite", _lite, resnet18, ResNet18_Weights, None)


def _spinenet(size: str, mobile: bool = False) -> Builder:
    """The builder of a published SpineNet detector."""
    network: Any = MobileSpineNet if mobile else SpineNet
    published: Any = (MOBILE_SIZES if mobile else SIZES)[size]
    name = f"retinanet_spinenet{size}" + ("_mobile" if mobile else "")

    @handle_legacy_interface(weights=("pretrained", None), weights_backbone=("pretrained_backbone", None))
    def builder(
        *,
        weights: None = None,
        progress: bool = True,
        num_classes: int | None = None,
        weights_backbone: None = None,
        trainable_backbone_layers: int | None = None,
        specification: Iterable[Sequence[Any]] = MOBILE_SPINENET if mobile else SPINENET,
        activation: str = "silu" if mobile else "relu",
        stochastic_depth: float = 0.0,
        size: Sequence[Any] = published,
        **kwargs: Any,
    ) -> RetinaNet:
        for argument, value in {"weights": weights, "weights_backbone": weights_backbone}.items():
            if value is not None:
                raise ValueError(f"there are no weights of {name}, so {argument} must be None, got {value!r}")
        if trainable_backbone_layers is not None:
            raise ValueError("trainable_backbone_layers must be None: SpineNet trains all of its layers")
        num_classes = 91 if num_classes is None else num_classes
        if len(size) != len(published):
            raise ValueError(f"size must be the {len(published)} values of a {type(published).__name__}, got {size!r}")
        row = type(published)(*size)
        backbone = network.of_size(
            row, specification=specification, activation=activation, stochastic_depth=stochastic_depth
        )
        sides = [row.anchor_base * stride for stride in (8, 16, 32, 64, 128)]
        sizes = tuple(tuple(int(side * 2 ** (i / 3)) for i in range(3)) for side in sides)
        generator = taken_anchors(kwargs, len(sizes)) or AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes))
        head = level_norm_head(
            row.out_channels,
            generator.num_anchors_per_location()[0],
            num_classes,
            row.head_width,
            row.head_depth,
            activation_layer=network.activations[activation],
            separable=mobile,
        )
        kwargs = {"min_size": row.image_size, "max_size": row.image_size, **kwargs}
        return RetinaNet(backbone, num_classes, anchor_generator=generator, head=head, **kwargs)

    builder.__name__ = builder.__qualname__ = name
    title = f"{'Mobile ' * mobile}SpineNet-{size.upper()}{', with separable convs in the heads' * mobile}"
    activations = "``silu`` (swish) or ``hardswish``" if mobile else "``relu`` (protocol B) or ``silu`` (C)"
    builder.__doc__ = f"""RetinaNet on {title}, as published: each level has its own norms in the heads.

    Args:
        weights, weights_backbone: must be None: none are published for PyTorch.
        progress: without effect.
        num_classes: K, 91 by default; label 0 is a real class.
        trainable_backbone_layers: must be None: all are trained.
        specification: another permutation, as rows; see :func:`retina_fast.backbones.specification.checked`.
        activation: {activations}, in the backbone and the heads.
        stochastic_depth: see :class:`{network.__module__}.{network.__name__}`.
        size: other widths and depths, as the values of a :class:`{network.__module__}.{type(published).__name__}`.
        **kwargs: arguments of :class:`retina_fast.RetinaNet`; the longer side of images is resized to
            {published.image_size} by default.

    Raises:
        ValueError: for any weights, trainable layers, or a specification, activation or size that is refused.

    Example::

        >>> import torch
        >>> with torch.device("meta"):  # shapes alone: no memory, no time
        ...     model = {name}(num_classes=3)
        >>> model.transform.max_size
        {published.image_size}
    """
    return builder


retinanet_spinenet49s = _spinenet("49s")
retinanet_spinenet49 = _spinenet("49")
retinanet_spinenet96 = _spinenet("96")
retinanet_spinenet143 = _spinenet("143")
retinanet_spinenet190 = _spinenet("190")
retinanet_spinenet49_mobile = _spinenet("49", mobile=True)
retinanet_spinenet49s_mobile = _spinenet("49s", mobile=True)
retinanet_spinenet49xs_mobile = _spinenet("49xs", mobile=True)

MODELS: dict[str, Builder] = {name: value for name, value in globals().items() if name.startswith("retinanet_")}
"""Every builder by its name."""
