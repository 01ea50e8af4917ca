"""Whether a part of a model is torchvision's own, so that the fast path may run in its place.

A user may replace or override any part of a model; then the user's code runs. A part counts as torchvision's own
("stock") while its class is torchvision's, none of the named methods is overridden, neither in a subclass nor on the
object nor in torchvision's class itself, and it has no hooks.
"""

from typing import Any

import torch
from torch import nn
from torchvision.models.detection import _utils as tv_utils
from torchvision.models.detection import retinanet as tv
from torchvision.models.detection import transform as tv_transform
from torchvision.models.detection._utils import BoxCoder, Matcher
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.retinanet import (
    RetinaNet,
    RetinaNetClassificationHead,
    RetinaNetHead,
    RetinaNetRegressionHead,
)
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops import FeaturePyramidNetwork, FrozenBatchNorm2d
from torchvision.ops import boxes as tv_boxes

from retina_fast import ops
from retina_fast.kernels.box_decode import MAX_LOG_SCALE

_LIBRARIES = ("torch.", "torchvision.", "timm.", "retina_fast.")
TRANSFORM_STEPS = ("forward", "normalize", "resize", "torch_choice", "batch_images", "max_by_axis", "postprocess")
"""The methods of torchvision's transform that make a batch of images, and detections of its outputs."""

_ORIGINALS: dict[tuple[type, str], Any] = {}


def _is_a_librarys(function: Any, name: str) -> bool:
    """Whether a library defines the function, under this name; ``functools.wraps`` copies the name, but no globals."""
    home = getattr(function, "__globals__", {}).get("__name__", "")
    return home.startswith(_LIBRARIES) and function.__name__ == name


def note_methods(cls: type, *methods: str) -> None:
    """Note a class's methods as they are now, so that others that are put on the class later count as a user's own.

    A method that somebody has put there before is a user's own, too.

    Example::

        >>> class Part(nn.Identity): pass
        >>> note_methods(Part, "forward")
        >>> before, Part.forward = is_stock(Part(), Part, "forward"), lambda self, x: 2 * x
        >>> before, is_stock(Part(), Part, "forward")
        (True, False)
    """
    for name in methods:
        method = getattr(cls, name)
        _ORIGINALS[cls, name] = method if _is_a_librarys(method, name) else None


def is_replaced(cls: type, method: str) -> bool:
    """Whether somebody has put another method on a class than :func:`note_methods` found there."""
    return getattr(cls, method) is not _original(cls, method)


def _original(cls: type, method: str) -> Any:
    return _ORIGINALS[cls, method] if (cls, method) in _ORIGINALS else getattr(cls, method)


def is_stock(part: object, cls: type, *methods: str) -> bool:
    """Whether ``part`` is exactly a ``cls``, with none of ``methods`` replaced on the object, and without hooks.

    Example::

        >>> is_stock(nn.ReLU(), nn.ReLU, "forward"), is_stock(nn.ReLU6(), nn.ReLU, "forward")
        (True, False)
    """
    if type(part) is not cls or any(name in vars(part) or is_replaced(cls, name) for name in methods):
        return False
    return not isinstance(part, nn.Module) or not has_hooks(part)


def has_hooks(module: nn.Module) -> bool:
    """Whether calling ``module`` would run forward or backward hooks, its own or those of all modules, or another
    ``__call__`` than PyTorch's."""
    own = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(own) or torch.nn.modules.module._has_any_global_hook() or _is_called_otherwise(type(module))


def _is_called_otherwise(cls: type) -> bool:
    if torch.compiler.is_compiling():
        return False
    homes = [getattr(call, "__globals__", {}).get("__name__", "") for call in (cls.__call__, cls._call_impl)]
    return not all(home.startswith(_LIBRARIES) for home in homes)


def is_plain_conv(module: Any) -> bool:
    """Whether it is a conv of PyTorch's own class without hooks, padded with zeros: one that a fused conv replaces."""
    return (
        is_stock(module, nn.Conv2d, "forward", "_conv_forward")
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
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
    """Whether ``model``, by its class or by an attribute of its own, has another ``method`` than ``base`` had."""
    return method in vars(model) or getattr(type(model), method) is not _original(base, method)


for _cls, *_methods in (
    (RetinaNet, "forward", "compute_loss", "postprocess_detections"),
    (RetinaNetHead, "forward", "compute_loss"),
    (RetinaNetClassificationHead, "forward", "compute_loss"),
    (RetinaNetRegressionHead, "forward", "compute_loss"),
    (Matcher, "__call__", "set_low_quality_matches_"),
    (BoxCoder, "encode_single", "decode_single"),
    (AnchorGenerator, "forward", "grid_anchors", "set_cell_anchors"),
    (GeneralizedRCNNTransform, *TRANSFORM_STEPS),
    (FeaturePyramidNetwork, "forward", "get_result_from_inner_blocks", "get_result_from_layer_blocks"),
    (nn.Conv2d, "forward", "_conv_forward"),
    *((cls, "forward") for cls in (nn.BatchNorm2d, FrozenBatchNorm2d, nn.MaxPool2d, nn.ReLU, nn.Sequential)),
    *((cls, "forward") for cls in (BasicBlock, Bottleneck)),
):
    note_methods(_cls, *_methods)

_Rows = list[tuple[Any, str, list[Any]]]  # the module that holds a function, its name, and what may be there


def _rows(module: Any, *names: str, accepted: Any = None) -> _Rows:
    """Functions that torchvision's RetinaNet calls, as they are now, each with an equivalent of ours."""
    found = [(name, getattr(module, name)) for name in names]
    return [(module, name, [accepted, *[own] * _is_a_librarys(own, name)]) for name, own in found]


_LOSS_FUNCTIONS = [
    *_rows(tv, "sigmoid_focal_loss", accepted=ops.sigmoid_focal_loss),
    *_rows(tv, "_box_loss", "_sum"),
    *_rows(tv_boxes, "box_iou", "box_area", "_box_inter_union"),
    *_rows(tv_utils, "encode_boxes", "generalized_box_iou_loss", "distance_box_iou_loss", "complete_box_iou_loss"),
]
_DETECTION_FUNCTIONS = [
    *_rows(tv_boxes, "batched_nms", "_batched_nms_coordinate_trick", "_batched_nms_vanilla", accepted=ops.batched_nms),
    *_rows(tv_boxes, "nms", accepted=ops.nms),
    *_rows(tv_boxes, "clip_boxes_to_image"),
    *_rows(tv_utils, "_topk_min"),
    *_rows(tv_transform, "resize_boxes"),
]
_DETECTION_FUNCTIONS[0][2].append(tv_boxes._batched_nms_vanilla)  # slow, but exact as ours
_DETECTION_FUNCTIONS[1][2].append(tv_boxes._batched_nms_vanilla)
_TRANSFORM_FUNCTIONS = _rows(tv_transform, "resize_boxes", "_resize_image_and_masks")


def _are_stock(rows: _Rows) -> bool:
    return all(getattr(module, name) in same for module, name, same in rows)


def has_stock_loss_functions() -> bool:
    """Whether nobody has replaced a function that torchvision's losses call, such as its ``sigmoid_focal_loss``, nor
    ``compute_loss`` of its RetinaNet."""
    return _are_stock(_LOSS_FUNCTIONS) and not is_replaced(RetinaNet, "compute_loss")


def has_stock_detection_functions() -> bool:
    """Whether nobody has replaced a function that torchvision's postprocessing calls, such as its ``batched_nms``, nor
    ``postprocess_detections`` of its RetinaNet."""
    return _are_stock(_DETECTION_FUNCTIONS) and not is_replaced(RetinaNet, "postprocess_detections")


def has_stock_transform() -> bool:
    """Whether nobody has replaced a step of torchvision's transform, which ours inherits, nor a function it calls."""
    steps = any(is_replaced(GeneralizedRCNNTransform, name) for name in TRANSFORM_STEPS)
    return not steps and _are_stock(_TRANSFORM_FUNCTIONS)


def is_stock_coder(coder: Any) -> bool:
    """Whether boxes are coded as the operations code them: by torchvision's own coder, with its own constants."""
    return (
        is_stock(coder, BoxCoder, "encode_single", "decode_single")
        and tuple(coder.weights) == (1.0, 1.0, 1.0, 1.0)
        and coder.bbox_xform_clip == MAX_LOG_SCALE
    )
