"""The one way through the network: images -> Batch -> trunk -> heads -> HeadOutputs.

    make_batch    on the host: checks images and targets, gathers the ground truths, decides every size
    run           on the device: pixels -> trunk -> heads -> HeadOutputs(levels, anchors, num_classes)

``RetinaNet``, ``TrainingStep``, the engine and the exporters all go this way; losses.py and detections.py take over
from the HeadOutputs. Where a user has put in a head, an anchor generator or a transform of their own, it is called
here as it is, and what it returns is brought into the same form.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchvision.models.detection.retinanet import RetinaNet, RetinaNetHead

from retina_fast.anchors import batch_anchors
from retina_fast.heads import reg_max_of, run_head
from retina_fast.kernels.levels import flatten_all
from retina_fast.kernels.side_distributions import box_channels
from retina_fast.stock import overrides
from retina_fast.targets import GroundTruths, TargetCheck, check_boxes, gather_targets
from retina_fast.transform import (
    batch_images,
    channels_of,
    check_images,
    is_stock_transform,
    padded,
    resize_targets,
    resized_sizes,
)

Images = Sequence[Tensor] | Tensor
Targets = Sequence[Mapping[str, Tensor]]
Sizes = list[tuple[int, int]]
Convs = Callable[[RetinaNet, Tensor], tuple[list[Tensor], Mapping[str, Any]]]

LOGITS, DELTAS = "cls_logits", "bbox_regression"
"""torchvision's names of the two outputs of a head."""


class Batch(NamedTuple):
    """What the host makes of images and targets. All that follows is the device's work, which a CUDA graph can hold."""

    images: list[Tensor]
    """B tensors (C, H, W) as they were given."""
    pixels: Tensor | None
    """(B, C, H, W) resized, normalised and padded, if a user's own transform or a graph has made them already. None
    means that ``run`` makes them from the images."""
    image_sizes: Sizes
    """B heights and widths within the padded batch."""
    original_sizes: Sizes
    """B heights and widths of the images as they were given."""
    targets: Targets | None
    truths: GroundTruths | None
    """The boxes and labels of the targets, in the pixels of the batch."""


class HeadOutputs(NamedTuple):
    """What the heads say about a batch of B images with N anchors each, and the anchors."""

    levels: Mapping[str, list[Tensor]]
    """``cls_logits`` and ``bbox_regression``, level by level as the convs wrote them, ``(B, A*K, H, W)`` and
    ``(B, A*4, H, W)``; or, where a user's head flattens them, ``(B, N_l, K)`` and ``(B, N_l, 4)``."""
    anchors: Tensor
    """``(N, 4)`` xyxy pixels that all images share, or ``(B, N, 4)``."""
    num_classes: int
    """K."""
    returned: Mapping[str, Any]
    """What a user's own head returned, for the user's own loss or postprocessing; empty for torchvision's heads."""
    cells: Sequence[int] = ()
    """How many cells the grid of each level has; empty where nobody knows, as for outputs that a user has joined."""
    reg_max: int = 0
    """n where a side of a box is a distribution over n + 1 places; ``bbox_regression`` has 4 (n + 1) channels an anchor
    then in place of 4. 0 for deltas."""

    def joined(self) -> Mapping[str, Any]:
        """torchvision's form, ``(B, N, K)`` and ``(B, N, 4)``; for a user's own head it is what that head returned."""
        channels = {LOGITS: self.num_classes, DELTAS: box_channels(self.reg_max)}
        return self.returned or {
            name: torch.cat(flatten_all(levels, channels[name]), dim=1) for name, levels in self.levels.items()
        }


def make_batch(
    model: RetinaNet,
    images: Images,
    targets: Targets | None,
    check: TargetCheck | None,
    whole_targets: bool = False,
) -> Batch:
    """Check images and targets, and decide the size of each image in the batch.

    Args:
        model: its transform decides the sizes.
        images: B tensors ``(C, H, W)``, or one ``(B, C, H, W)``.
        targets: B dicts of ``boxes`` and ``labels``, or None.
        check: looks at the values of the targets; None skips that.
        whole_targets: whether the transform itself is to resize the targets, masks and keypoints among them.

    Raises:
        What :func:`retina_fast.transform.check_images` and :func:`retina_fast.targets.gather_targets` raise.
    """
    transform = model.transform
    truths = None
    if not is_stock_transform(transform) or whole_targets:  # it decides itself what it takes and what it makes of it
        original_sizes = [(image.shape[-2], image.shape[-1]) for image in images]
        image_list, targets = transform(images, targets)
        pixels, image_sizes = image_list.tensors, image_list.image_sizes
        if targets is not None:
            truths = gather_targets(targets, len(image_sizes), pixels.device, check)
        return Batch(list(images), pixels, image_sizes, original_sizes, targets, truths)
    if targets is not None:  # boxes, images, then values, as torchvision looks at them, and draws sizes between
        check_boxes(targets)
    images = check_images(images, channels_of(transform))
    original_sizes = [(image.shape[1], image.shape[2]) for image in images]
    image_sizes = resized_sizes(transform, images)
    if targets is not None:
        truths = gather_targets(targets, len(images), images[0].device, check)
    if truths is not None:
        truths = resize_targets(truths, original_sizes, image_sizes)
    return Batch(images, None, image_sizes, original_sizes, targets, truths)


def run(model: RetinaNet, batch: Batch) -> HeadOutputs:
    """From a batch to the outputs of the heads."""
    pixels = batch.pixels
    if pixels is None:
        pixels = batch_images(model.transform, batch.images, batch.image_sizes)
    return run_network(model, pixels, batch.image_sizes)


def run_convs(model: RetinaNet, pixels: Tensor) -> tuple[list[Tensor], Mapping[str, Any]]:
    """Trunk and heads of ``pixels`` (B, C, H, W): the levels of the pyramid, and what the heads return."""
    features = model.backbone(pixels)
    levels = [features] if isinstance(features, Tensor) else list(features.values())
    return levels, run_head(model.head, levels)


def run_network(
    model: RetinaNet, pixels: Tensor, image_sizes: Sequence[tuple[int, int]] = (), convs: Convs = run_convs
) -> HeadOutputs:
    """From pixels to the outputs of the heads.

    Args:
        model: whose trunk, heads and anchor generator run.
        pixels: ``(B, C, H, W)``; padded here to the sides that the backbone asks for.
        image_sizes: B heights and widths before padding; only an anchor generator of the user's own reads them.
        convs: :func:`run_convs`, or what ``torch.compile`` made of it.

    Example::

        >>> from retina_fast import retinanet_resnet18_fpn
        >>> model = retinanet_resnet18_fpn(num_classes=3, weights_backbone=None)
        >>> outputs = run_network(model, torch.rand(1, 3, 64, 64))
        >>> [tuple(level.shape) for level in outputs.levels["cls_logits"]][:2], tuple(outputs.anchors.shape)
        ([(1, 27, 8, 8), (1, 27, 4, 4)], (774, 4))
    """
    pixels = padded(pixels, getattr(model.backbone, "size_divisible", 1))  # a level's stride is H or W // its grid
    features, returned = convs(model, pixels)
    anchors = batch_anchors(model.anchor_generator, pixels, image_sizes, features)
    return head_outputs(model.head, returned, anchors, cells_of(features))


def input_channels(model: nn.Module) -> int:
    """The channels of a model's images, as its first conv takes them.

    Example::

        >>> input_channels(nn.Sequential(nn.Conv2d(1, 8, 3)))
        1
    """
    return next(module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d))


def cells_of(features: Sequence[Tensor]) -> list[int]:
    """How many cells the grid of each level ``(B, C, H, W)`` has."""
    return [level.shape[-2] * level.shape[-1] for level in features]


def head_outputs(
    head: nn.Module, returned: Mapping[str, Any], anchors: Tensor, cells: Sequence[int] | None = None
) -> HeadOutputs:
    """What a head returned, in the one form that losses and detections read.

    Args:
        head: torchvision's, or the user's own.
        returned: a list of levels or one tensor for each name. A user's own head may return more, and anything.
        anchors: ``(N, 4)`` or ``(B, N, 4)``.
        cells: how many cells each level has; a tensor ``(B, N, C)`` is then split into levels. None does not split it,
            since a loss does not need single levels.
    """
    levels = {
        name: _as_levels(returned[name], anchors.shape[-2], cells) for name in (LOGITS, DELTAS) if name in returned
    }
    own = not isinstance(head, RetinaNetHead) or overrides(head, RetinaNetHead, "forward")
    returned = returned if own else {}
    return HeadOutputs(levels, anchors, _num_classes(head, levels), returned, tuple(cells or ()), reg_max_of(head))


def _as_levels(output: Any, num_anchors: int, cells: Sequence[int] | None) -> list[Tensor]:
    if not isinstance(output, Tensor):
        return list(output)
    if cells is None or output.dim() != 3 or output.shape[1] != num_anchors:
        return [output]
    per_cell = num_anchors // sum(cells)
    return list(output.split([count * per_cell for count in cells], dim=1))


def _num_classes(head: Any, levels: Mapping[str, list[Tensor]]) -> int:
    logits = levels.get(LOGITS)
    if not logits:
        return 0
    return logits[0].shape[2] if logits[0].dim() == 3 else int(head.classification_head.num_classes)  # or NumPy's


def are_float64(levels: Sequence[Tensor]) -> bool:
    """Whether levels have the precision that only torchvision's postprocessing keeps."""
    return any(level.dtype == torch.float64 for level in levels)


def refuse_tracing() -> None:
    """Refuse torch.jit.trace and torch.onnx.export(dynamo=False): a trace would fix the number of detections."""
    if torch.jit.is_tracing():
        raise NotImplementedError(
            "retina_fast.RetinaNet cannot be traced by torch.jit.trace or torch.onnx.export(dynamo=False): "
            "retina_fast.export writes ONNX, torch.export and AOTInductor files"
        )
