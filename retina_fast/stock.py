"""Whether a part of a model is torchvision's own, so that the fast path may run in its place.

A user may replace or override any part of a model; then the user's code runs. A part counts as torchvision's own
("stock") while its class is torchvision's, none of the named methods is overridden, neither in a subclass nor on the
object, and it has no hooks.
"""

from typing import Any

import torchvision
from torch import nn
from torchvision.models.detection import retinanet as tv
from torchvision.models.detection._utils import BoxCoder

from retina_fast import ops
from retina_fast.kernels.box_decode import MAX_LOG_SCALE

_LIBRARIES = ("torch.", "torchvision.", "timm.", "retina_fast.")


def is_stock(part: object, cls: type, *methods: str) -> bool:
    """Whether ``part`` is exactly a ``cls``, with none of ``methods`` replaced on the object, and without hooks.

    Example::

        >>> is_stock(nn.ReLU(), nn.ReLU, "forward"), is_stock(nn.ReLU6(), nn.ReLU, "forward")
        (True, False)
    """
    if type(part) is not cls or any(name in vars(part) for name in methods):
        return False
    return not isinstance(part, nn.Module) or not has_hooks(part)


def has_hooks(module: nn.Module) -> bool:
    """Whether calling ``module`` would run forward or backward hooks."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def is_plain_conv(module: object) -> bool:
    """Whether it is a conv of PyTorch's own class without hooks, padded with zeros: one that a fused conv replaces."""
    return (
        is_stock(module, nn.Conv2d, "forward", "_conv_forward")
        and module.padding_mode == "zeros"  # type: ignore[attr-defined]
        and not isinstance(module.padding, str)  # type: ignore[attr-defined]
    )


def is_stem_pooling(part: Any) -> bool:
    """Whether it is the max pooling of a ResNet: windows of 3x3, stride 2, padding 1."""
    if not is_stock(part, nn.MaxPool2d, "forward") or part.return_indices or part.ceil_mode:
        return False
    sizes = part.kernel_size, part.stride, part.padding, part.dilation
    return all(size in (one, (one, one)) for size, one in zip(sizes, (3, 2, 1, 1), strict=True))


def has_own_code(model: nn.Module) -> bool:
    """Whether a part of the model is of a class of the user's own, or has hooks.

    Example::

        >>> model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
        >>> before, _ = has_own_code(model), model[0].register_forward_hook(print)
        >>> before, has_own_code(model)
        (False, True)
    """
    return any(not type(part).__module__.startswith(_LIBRARIES) or has_hooks(part) for part in model.modules())


def overrides(model: nn.Module, base: type, method: str) -> bool:
    """Whether ``model``, by its class or by an attribute of its own, has another ``method`` than ``base``."""
    return method in vars(model) or getattr(type(model), method) is not getattr(base, method)


# The functions that torchvision's RetinaNet calls: the module that holds each, its name, and the accepted equivalents.
_LOSS_FUNCTIONS: list[tuple[Any, str, tuple[Any, ...]]] = [
    (tv, "sigmoid_focal_loss", (tv.sigmoid_focal_loss, ops.sigmoid_focal_loss)),
    (tv, "_box_loss", (tv._box_loss,)),
    (tv.box_ops, "box_iou", (tv.box_ops.box_iou,)),
]
_NMS = (torchvision.ops.boxes.batched_nms, torchvision.ops.boxes._batched_nms_vanilla, ops.batched_nms)
_DETECTION_FUNCTIONS: list[tuple[Any, str, tuple[Any, ...]]] = [
    (tv.box_ops, "batched_nms", _NMS),
    (tv.box_ops, "nms", (torchvision.ops.boxes.nms, ops.nms)),
    (tv.box_ops, "clip_boxes_to_image", (torchvision.ops.boxes.clip_boxes_to_image,)),
]


def has_stock_loss_functions() -> bool:
    """Whether nobody has replaced a function that torchvision's losses call, such as its ``sigmoid_focal_loss``."""
    return all(getattr(module, name) in same for module, name, same in _LOSS_FUNCTIONS)


def has_stock_detection_functions() -> bool:
    """Whether nobody has replaced a function that torchvision's postprocessing calls, such as its ``batched_nms``."""
    return all(getattr(module, name) in same for module, name, same in _DETECTION_FUNCTIONS)


def is_stock_coder(coder: object) -> bool:
    """Whether boxes are coded as the operations code them: by torchvision's own coder, with its own constants."""
    return (
        is_stock(coder, BoxCoder, "encode_single", "decode_single")
        and tuple(coder.weights) == (1.0, 1.0, 1.0, 1.0)  # type: ignore[attr-defined]
        and coder.bbox_xform_clip == MAX_LOG_SCALE  # type: ignore[attr-defined]
    )
