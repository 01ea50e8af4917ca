"""RetinaNet (Lin et al. 2017, https://arxiv.org/abs/1708.02002): torchvision's model on this package's operations."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torchvision.models.detection import retinanet as tv
from torchvision.models.detection._utils import BoxCoder, Matcher
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from retina_fast.anchors import batch_anchors, is_stock_generator, shared_anchors
from retina_fast.detections import Detections, detect
from retina_fast.heads import level_outputs, runs_by_level
from retina_fast.kernels.box_decode import MAX_LOG_SCALE
from retina_fast.kernels.levels import flatten_all
from retina_fast.losses import detection_losses, shared_or_stacked
from retina_fast.stock import is_stock, overrides
from retina_fast.targets import GroundTruths, gather_targets, target_check, to_device
from retina_fast.transform import (
    RetinaNetTransform,
    batch_images,
    check_images,
    is_stock_transform,
    padded,
    resize_batch,
    resize_targets,
    resized_sizes,
    size_rows,
)

Images = Sequence[Tensor] | Tensor
Targets = Sequence[Mapping[str, Tensor]]
Sizes = list[tuple[int, int]]

_TRANSFORM_ARGUMENTS = {"size_divisible", "fixed_size", "_skip_resize", "image_scale"}


class Inputs(NamedTuple):
    """What the host makes of images and targets. All that follows is the device's work, which a CUDA graph can hold."""

    images: list[Tensor]
    batch: Tensor | None  # made by a transform of the user's own; else `batch_images` makes it
    image_sizes: Sizes  # in the batch
    original_sizes: Sizes
    targets: Targets | None
    truths: GroundTruths | None  # in the pixels of the batch


class _Forward(NamedTuple):
    """What one pass through the trunk and the heads leaves for the losses and the detections."""

    head_outputs: dict[str, Any]  # stock head: lists of levels as the convs wrote them; else what the head returned
    grids: list[int]  # cells of each level
    anchors: list[Tensor]
    image_sizes: Sizes  # in the batch
    original_sizes: Sizes
    targets: Targets | None
    truths: GroundTruths | None  # in the pixels of the batch


class RetinaNet(tv.RetinaNet):
    """torchvision's RetinaNet, drop-in: the same weights, arguments and results, computed faster.

    Args:
        backbone: a module with ``out_channels`` that returns a tensor or a dict of levels.
        num_classes: K. Label 0 is a real class: there is no background class.
        min_size: the shorter side images are resized to; None (not in torchvision) scales every image alike, by
            ``image_scale``.
        max_size: bounds the longer side after that.
        image_mean, image_std: of the normalisation; ImageNet's by default.
        anchor_generator: sizes 32 to 512 at three scales and three ratios by default.
        head: a module from levels to ``{"cls_logits": (B, N, K), "bbox_regression": (B, N, 4)}``.
        proposal_matcher: a ``Matcher``; made of the two IoU thresholds by default.
        score_thresh: scores must exceed it to be detections.
        nms_thresh: IoU above which the lower of two boxes of one class goes.
        detections_per_img: the most detections of an image.
        fg_iou_thresh, bg_iou_thresh: IoU from which an anchor is foreground, and below which it is background.
        topk_candidates: the most candidates of an image and level.
        **kwargs: ``size_divisible`` (that of the backbone if it has one, else 32), ``fixed_size``, ``_skip_resize`` (in
            training) of torchvision's transform, and ``image_scale``, 1 by default; others are warned of.

    Input, output and errors are torchvision's: in training, ``model(images, targets)`` returns
    ``{"classification", "bbox_regression"}``; in evaluation a list of ``{"boxes", "scores", "labels"}``, boxes xyxy in
    pixels of the image as given. Where a part was replaced by a user's own, that part runs and the fast path steps
    aside. On a GPU weights and activations are kept in channels_last; on a CPU they keep the user's layout, so that
    the convs round exactly as torchvision's. Targets are checked in one batched pass, which
    ``model.check_targets = False`` switches off. ``model.focal_gamma`` is the focusing exponent, 2 as in torchvision.

    Example::

        >>> from retina_fast import retinanet_resnet18_fpn
        >>> model = retinanet_resnet18_fpn(num_classes=3, weights_backbone=None).eval()
        >>> [sorted(image) for image in model([torch.rand(3, 64, 96)])]
        [['boxes', 'labels', 'scores']]
    """

    check_targets = True
    focal_gamma = 2.0

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        min_size: int | Sequence[int] | None = 800,
        max_size: int = 1333,
        image_mean: Sequence[float] | None = None,
        image_std: Sequence[float] | None = None,
        anchor_generator: AnchorGenerator | None = None,
        head: nn.Module | None = None,
        proposal_matcher: Matcher | None = None,
        score_thresh: float = 0.05,
        nms_thresh: float = 0.5,
        detections_per_img: int = 300,
        fg_iou_thresh: float = 0.5,
        bg_iou_thresh: float = 0.4,
        topk_candidates: int = 1000,
        **kwargs: Any,
    ) -> None:
        kwargs.setdefault("size_divisible", getattr(backbone, "size_divisible", 32))
        super().__init__(
            backbone,
            num_classes,
            min_size,
            max_size,
            image_mean,
            image_std,
            anchor_generator,
            head,
            proposal_matcher,
            score_thresh,
            nms_thresh,
            detections_per_img,
            fg_iou_thresh,
            bg_iou_thresh,
            topk_candidates,
            **kwargs,
        )
        unknown = sorted(set(kwargs) - _TRANSFORM_ARGUMENTS)
        if unknown:
            warnings.warn(f"RetinaNet ignores the unknown arguments {', '.join(unknown)}", stacklevel=2)
        plain: GeneralizedRCNNTransform = self.transform
        if min_size is not None and kwargs.get("image_scale", 1.0) != 1:
            raise ValueError(f"image_scale needs min_size=None, got min_size={min_size}")
        self.transform: GeneralizedRCNNTransform = RetinaNetTransform(
            plain.min_size,
            plain.max_size,
            plain.image_mean,
            plain.image_std,
            plain.size_divisible,
            plain.fixed_size,
            _skip_resize=plain._skip_resize,
            image_scale=kwargs.get("image_scale", 1.0),
        )
        self._apply(same)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "RetinaNet":
        super()._apply(fn, recurse)
        super()._apply(_channels_last_on_gpu, recurse)
        return self

    def forward(self, images: Images, targets: Targets | None = None) -> Any:
        """Losses in training, detections in evaluation.

        Args:
            images: B tensors ``(3, H, W)`` of values in [0, 1], or one ``(B, 3, H, W)``.
            targets: in training, B dicts with ``boxes`` (N, 4) xyxy pixels and ``labels`` (N,) integers in [0, K). In
                evaluation they are not needed; only the boxes are then checked.
        """
        if self.training and targets is None:
            raise AssertionError("targets should not be none when in training mode")
        if targets is not None and not self.training:
            targets = _unlabelled(targets[: len(images)])
        passed = self._forward(images, targets)
        losses = self._losses(passed) if self.training else {}
        detections = [] if self.training else self._detections(passed)
        return self.eager_outputs(losses, detections)

    def losses_and_detections(
        self, images: Images, targets: Targets
    ) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
        """Both from one forward pass, for validation: what training returns and what evaluation returns."""
        passed = self._forward(images, targets)
        return self._losses(passed), self._detections(passed)

    def detect(self, batch: Tensor) -> Detections:
        """The detections of ``forward`` for a batch ``(B, 3, H, W)``, padded to ``detections_per_img`` or, where that
        is more, to the most candidates there can be.

        Raises:
            TypeError, ValueError: if the batch is no tensor, or not 4-D.
            RuntimeError: in training mode, where a forward pass would move the BatchNorm statistics.
        """
        if not isinstance(batch, Tensor):
            raise TypeError(f"batch must be a Tensor (B, C, H, W), got {type(batch)}: a list is for the model itself")
        if batch.dim() != 4:
            raise ValueError(f"batch must be (B, C, H, W), got {tuple(batch.shape)}")
        if self.training:
            raise RuntimeError("detect needs evaluation mode: call model.eval() first")
        if self._detects_fast() and is_stock_transform(self.transform) and is_stock_generator(self.anchor_generator):
            return self._detect_batch(batch)
        passed = self._forward(batch, None)
        if self._detects_fast():
            return self._padded_detections(passed)
        return Detections.from_list(self._detections(passed), self.detections_per_img)

    def set_num_classes(self, num_classes: int) -> "RetinaNet":
        """Give the model, pretrained or not, a fresh last layer for another class count; returns the model.

        Raises:
            ValueError: for a class count below 1.
            TypeError: if the classification head is not torchvision's.
        """
        head = self.head.classification_head
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        if not isinstance(head, tv.RetinaNetClassificationHead):
            raise TypeError(f"set_num_classes knows torchvision's classification head, not {type(head)}")
        old = head.cls_logits
        fresh = tv.RetinaNetClassificationHead(old.in_channels, head.num_anchors, num_classes).cls_logits
        head.cls_logits = fresh.to(old.weight.device, old.weight.dtype)
        head.num_classes = num_classes
        return self._apply(same)

    def compute_loss(
        self, targets: Targets, head_outputs: Mapping[str, Any], anchors: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        """The losses of given head outputs, each one concatenated ``(B, N, C)`` tensor or the list of its levels.

        Args:
            targets: B dicts with ``boxes`` and ``labels``, boxes in the pixels of the anchors.
            head_outputs: ``cls_logits`` with K channels an anchor and ``bbox_regression`` with 4.
            anchors: B tensors ``(N, 4)`` xyxy; they may differ between images.
        """
        truths = gather_targets(targets, len(anchors), anchors[0].device, self._check())
        return self._losses_of(targets, truths, head_outputs, anchors)

    def postprocess_detections(
        self, head_outputs: Mapping[str, list[Tensor]], anchors: list[list[Tensor]], image_shapes: Sizes
    ) -> list[dict[str, Tensor]]:
        """Detections in the pixels of the batch, from lists of levels ``(B, N_l, C)`` and, an image, ``(N_l, 4)``."""
        if not _stock_coder(self.box_coder):
            return super().postprocess_detections(head_outputs, anchors, image_shapes)
        joined = torch.stack([torch.cat(levels) for levels in anchors])
        sizes = to_device(torch.tensor(image_shapes), joined.device)
        return self._detect(head_outputs, joined, sizes, sizes).to_list()

    def __prepare_scriptable__(self) -> NoReturn:
        raise NotImplementedError("retina_fast.RetinaNet cannot be scripted: TorchScript is no longer developed")

    def _check(self) -> Any:
        if not self.check_targets:
            return None
        check = target_check(self)
        check.num_classes = getattr(getattr(self.head, "classification_head", None), "num_classes", None)
        return check

    def _forward(self, images: Images, targets: Targets | None) -> _Forward:
        return self._network(self._inputs(images, targets))

    def _inputs(self, images: Images, targets: Targets | None) -> Inputs:
        batch = truths = None
        if is_stock_transform(self.transform) and not (targets and self._loss_reads_shapes(targets)):
            images = check_images(images, max(len(self.transform.image_mean), len(self.transform.image_std)))
            original_sizes = [(image.shape[1], image.shape[2]) for image in images]
            if targets is not None:
                truths = gather_targets(targets, len(images), images[0].device, self._check())
            image_sizes = resized_sizes(self.transform, images)
            if truths is not None:
                truths = resize_targets(truths, original_sizes, image_sizes)
        else:  # what it may be given, and what it makes of the targets, is for the user's own transform to say
            original_sizes = [(image.shape[-2], image.shape[-1]) for image in images]
            image_list, targets = self.transform(images, targets)
            batch, image_sizes = image_list.tensors, image_list.image_sizes
            if targets is not None:
                truths = gather_targets(targets, len(image_sizes), batch.device, self._check())
        return Inputs(list(images), batch, image_sizes, original_sizes, targets, truths)

    def _network(self, inputs: Inputs) -> _Forward:
        batch = inputs.batch
        if batch is None:
            batch = batch_images(self.transform, inputs.images, inputs.image_sizes)
        batch, features = self._trunk(batch)
        return _Forward(
            self._head_outputs(features),
            [level.shape[-2] * level.shape[-1] for level in features],
            batch_anchors(self.anchor_generator, batch, inputs.image_sizes, features),
            inputs.image_sizes,
            inputs.original_sizes,
            inputs.targets,
            inputs.truths,
        )

    def _trunk(self, batch: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The batch, padded where the backbone asks for more, and its levels. Anchors take their strides from both."""
        batch = padded(batch, getattr(self.backbone, "size_divisible", 1))
        features = self.backbone(batch)
        return batch, [features] if isinstance(features, Tensor) else list(features.values())

    def _loss_reads_shapes(self, targets: Targets) -> bool:
        """Whether a loss of the user's own may read masks or keypoints, which torchvision's transform resizes."""
        own_loss = overrides(self, RetinaNet, "compute_loss") or not self._trains_fast()
        return own_loss and any(key in target for target in targets for key in ("masks", "keypoints"))

    def _head_outputs(self, features: list[Tensor]) -> dict[str, Any]:
        """The head's outputs level by level as its convs write them; a user's own head is called as it is."""
        head = self.head
        parts = {"cls_logits": "classification_head", "bbox_regression": "regression_head"}
        if not is_stock(head, tv.RetinaNetHead, "forward"):
            return head(features)
        if not all(runs_by_level(getattr(head, part)) for part in parts.values()):
            return head(features)
        return {key: level_outputs(getattr(head, part), features) for key, part in parts.items()}

    def _losses(self, passed: _Forward) -> dict[str, Tensor]:
        assert passed.targets is not None
        assert passed.truths is not None
        if not overrides(self, RetinaNet, "compute_loss"):
            return self._losses_of(passed.targets, passed.truths, passed.head_outputs, passed.anchors)
        resized = _as_dicts(passed.targets, passed.truths)
        with target_check(self).same_step():  # it may call ours, which checks what it is given
            return self.compute_loss(resized, self._concatenated(passed.head_outputs), passed.anchors)

    def _losses_of(
        self, targets: Targets, truths: GroundTruths, head_outputs: Mapping[str, Any], anchors: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        if not self._trains_fast():
            return super().compute_loss(_as_dicts(targets, truths), self._concatenated(head_outputs), anchors)
        return detection_losses(
            _levels(head_outputs["cls_logits"]),
            _levels(head_outputs["bbox_regression"]),
            shared_or_stacked(anchors),
            truths,
            self._num_classes(head_outputs),
            self.proposal_matcher,
            self.head.regression_head._loss_type,
            self.focal_gamma,
        )

    def _trains_fast(self) -> bool:
        head = self.head
        if not isinstance(head, tv.RetinaNetHead) or overrides(head, tv.RetinaNetHead, "compute_loss"):
            return False
        classification, regression = head.classification_head, head.regression_head
        return (
            isinstance(classification, tv.RetinaNetClassificationHead)
            and not overrides(classification, tv.RetinaNetClassificationHead, "compute_loss")
            and isinstance(regression, tv.RetinaNetRegressionHead)
            and not overrides(regression, tv.RetinaNetRegressionHead, "compute_loss")
            and _stock_coder(regression.box_coder)
            and is_stock(self.proposal_matcher, Matcher, "__call__", "set_low_quality_matches_")
        )

    def _detects_fast(self) -> bool:
        return (
            _stock_coder(self.box_coder)
            and not overrides(self, RetinaNet, "postprocess_detections")
            and isinstance(self.transform, GeneralizedRCNNTransform)
            and not overrides(self.transform, GeneralizedRCNNTransform, "postprocess")
        )

    def _detections(self, passed: _Forward) -> list[dict[str, Tensor]]:
        if self._detects_fast():
            return self._padded_detections(passed).to_list()
        outputs = self._concatenated(passed.head_outputs)
        per_cell = outputs["cls_logits"].shape[1] // sum(passed.grids)
        lengths = [cells * per_cell for cells in passed.grids]
        split = {key: list(output.split(lengths, dim=1)) for key, output in outputs.items()}
        anchors = [list(image.split(lengths)) for image in passed.anchors]
        detections = self.postprocess_detections(split, anchors, passed.image_sizes)
        training, self.transform.training = self.transform.training, False  # in training it would not rescale
        try:
            return self.transform.postprocess(detections, passed.image_sizes, passed.original_sizes)
        finally:
            self.transform.training = training

    def _padded_detections(self, passed: _Forward) -> Detections:
        anchors = shared_or_stacked(passed.anchors)
        return self._detect(
            self._by_level(passed.head_outputs, passed.grids, anchors),
            anchors,
            to_device(torch.tensor(passed.image_sizes), anchors.device),
            to_device(torch.tensor(passed.original_sizes), anchors.device),
        )

    def _detect_batch(self, images: Tensor) -> Detections:
        """The detections of images of one size, which no list holds: one graph for any number of them."""
        check_images(images[:1], max(len(self.transform.image_mean), len(self.transform.image_std)))
        batch, image_sizes = resize_batch(self.transform, images)
        batch, features = self._trunk(batch)
        anchors = shared_anchors(self.anchor_generator, batch, features)
        cells = [level.shape[-2] * level.shape[-1] for level in features]
        outputs = self._by_level(self._head_outputs(features), cells, anchors)
        return self._detect(outputs, anchors, image_sizes, size_rows(images, *images.shape[2:]))

    def _by_level(self, outputs: dict[str, Any], grids: list[int], anchors: Tensor) -> dict[str, Any]:
        """Head outputs as lists of levels: those of a user's head come concatenated."""
        if not isinstance(outputs["cls_logits"], Tensor):
            return outputs
        per_cell = anchors.shape[-2] // sum(grids)
        lengths = [cells * per_cell for cells in grids]
        return {key: outputs[key].split(lengths, dim=1) for key in ("cls_logits", "bbox_regression")}

    def _detect(
        self, head_outputs: Mapping[str, Any], anchors: Tensor, image_sizes: Tensor, original_sizes: Tensor
    ) -> Detections:
        return detect(
            head_outputs["cls_logits"],
            head_outputs["bbox_regression"],
            anchors,
            image_sizes,
            original_sizes,
            self._num_classes(head_outputs),
            self.score_thresh,
            self.topk_candidates,
            self.nms_thresh,
            self.detections_per_img,
        )

    def _num_classes(self, head_outputs: Mapping[str, Any]) -> int:
        first = _levels(head_outputs["cls_logits"])[0]
        return first.shape[2] if first.dim() == 3 else self.head.classification_head.num_classes

    def _concatenated(self, head_outputs: Mapping[str, Any]) -> Mapping[str, Any]:
        """torchvision's form of head outputs, one ``(B, N, C)`` tensor each; what a user's own head returned stays."""
        if not isinstance(self.head, tv.RetinaNetHead) or overrides(self.head, tv.RetinaNetHead, "forward"):
            return head_outputs
        channels = {"cls_logits": self._num_classes(head_outputs), "bbox_regression": 4}
        joined = {
            key: torch.cat(flatten_all(_levels(head_outputs[key]), channels[key]), dim=1)
            for key in channels
            if not isinstance(head_outputs[key], Tensor) or head_outputs[key].dim() == 4
        }
        return {**head_outputs, **joined}


def same(tensor: Tensor) -> Tensor:
    """For ``model._apply``: changes nothing, but has the model lay out its weights."""
    return tensor


def _channels_last_on_gpu(tensor: Tensor) -> Tensor:
    on_gpu = tensor.is_cuda and tensor.dim() == 4
    return tensor.contiguous(memory_format=torch.channels_last) if on_gpu else tensor


def _levels(output: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [output] if isinstance(output, Tensor) else list(output)


def _as_dicts(targets: Targets, truths: GroundTruths) -> list[dict[str, Tensor]]:
    """Target dicts with the boxes and labels of ``truths``, the other keys as they were."""
    boxes, labels = truths.boxes.split(truths.counts), truths.labels.split(truths.counts)
    return [{**target, "boxes": boxes[b], "labels": labels[b]} for b, target in enumerate(targets)]


def _unlabelled(targets: Targets) -> list[dict[str, Tensor]]:
    """Targets as evaluation reads them, as in torchvision: the labels may be of any kind, or missing."""
    return [
        {**target, "labels": target["boxes"].new_zeros(len(target["boxes"]), dtype=torch.int64)} for target in targets
    ]


def _stock_coder(coder: object) -> bool:
    return (
        is_stock(coder, BoxCoder, "encode_single", "decode_single")
        and tuple(coder.weights) == (1.0, 1.0, 1.0, 1.0)  # type: ignore[attr-defined]
        and coder.bbox_xform_clip == MAX_LOG_SCALE  # type: ignore[attr-defined]
    )
