"""RetinaNet (Lin et al. 2017, https://arxiv.org/abs/1708.02002): torchvision's model on this package's operations.

This file keeps torchvision's contract and decides which path runs: the fast one, or, where a user has replaced or
overridden a part, that part. The way through the network is in forward.py, what follows it in losses.py and
detections.py.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torchvision.models.detection._utils import Matcher
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.retinanet import RetinaNet as TorchvisionRetinaNet
from torchvision.models.detection.retinanet import RetinaNetClassificationHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from retina_fast import forward as network
from retina_fast.anchors import is_stock_generator
from retina_fast.detections import Detections, Thresholds, detect
from retina_fast.device import lay_out, to_device
from retina_fast.forward import Batch, HeadOutputs, Images, Sizes, Targets
from retina_fast.heads import fresh_logits, give_distributions, is_known_coder
from retina_fast.kernels.dispatch import is_differentiated
from retina_fast.kernels.levels import count_anchors
from retina_fast.losses import check_losses, detection_losses, has_stock_losses, matcher_of, refuse_arguments
from retina_fast.predict.method import Predicts
from retina_fast.stock import has_stock_detection_functions, is_replaced, note_methods, overrides
from retina_fast.targets import GroundTruths, TargetCheck, gather_targets, target_check, unlabelled, with_truths
from retina_fast.transform import check_images, is_stock_transform, resize_batch, scaling_transform, size_rows

_TRANSFORM_ARGUMENTS = {"size_divisible", "fixed_size", "_skip_resize", "image_scale"}


class RetinaNet(Predicts, TorchvisionRetinaNet):
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
        nms_thresh: IoU above which the lower-scored of two boxes of one class is dropped.
        detections_per_img: the most detections of an image.
        fg_iou_thresh, bg_iou_thresh: IoU from which an anchor is foreground, and below which it is background.
        topk_candidates: the most candidates of an image and level.
        **kwargs: ``matcher``, in place of ``proposal_matcher``: "atss", "task_aligned", or an object such as
            :class:`AtssMatcher`; ``classification_loss``: "focal" as torchvision's, "quality_focal" or "varifocal";
            ``box_loss``: "l1", "smooth_l1", "giou", "diou" or "ciou", that of the head by default; ``box_weights``:
            "quality" weighs box losses by the IoU of the predicted box; ``reg_max``: each side of a box becomes a
            distribution over 0, 1, ..., ``reg_max`` eighths of the anchor, 16 in its paper, and distribution focal loss
            is added to one of the last three box losses, GIoU by default; ``size_divisible`` (that of the backbone if
            it has one, else 32), ``fixed_size``, ``_skip_resize`` (in training) of torchvision's transform, and
            ``image_scale``, 1 by default; others are warned of.

    Input, output and errors are torchvision's: in training, ``model(images, targets)`` returns
    ``{"classification", "bbox_regression"}``; in evaluation a list of ``{"boxes", "scores", "labels"}``, boxes xyxy in
    pixels of the image as given. Where a part was replaced by a user's own, that part runs and the fast path steps
    aside. On a GPU weights and activations are kept in channels_last; on a CPU they keep the user's layout, so that
    the convs round exactly as torchvision's. Targets are checked in one batched pass, which
    ``model.check_targets = False`` switches off. ``model.focal_gamma`` is the focusing exponent, 2 as in torchvision.

    Example::

        >>> from retina_fast import retinanet_resnet18_fpn
        >>> model = retinanet_resnet18_fpn(num_classes=3, weights_backbone=None, min_size=64).eval()
        >>> [sorted(image) for image in model([torch.rand(3, 64, 96)])]
        [['boxes', 'labels', 'scores']]
    """

    check_targets = True
    focal_gamma = 2.0
    classification_loss = "focal"
    box_weights: str | None = None

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
        chosen = matcher_of(kwargs.pop("matcher", None))
        if chosen is not None and proposal_matcher is not None:
            raise ValueError("matcher and proposal_matcher are the same: give one of them")
        proposal_matcher = proposal_matcher if chosen is None else chosen
        box_loss = kwargs.pop("box_loss", None)
        classification_loss = kwargs.pop("classification_loss", None)
        reg_max = kwargs.pop("reg_max", None)
        box_weights = kwargs.pop("box_weights", None)
        check_losses(classification_loss, box_loss, reg_max, box_weights)
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
        if min_size is not None and kwargs.get("image_scale", 1.0) != 1:
            raise ValueError(f"image_scale needs min_size=None, got min_size={min_size}")
        self.transform: GeneralizedRCNNTransform = scaling_transform(self.transform, kwargs.get("image_scale", 1.0))
        if classification_loss is not None:
            self.classification_loss = classification_loss
        self.box_weights = box_weights
        if reg_max is not None:
            give_distributions(self, reg_max)
        if box_loss is not None:
            self.head.regression_head._loss_type = box_loss
        lay_out(self)

    def __setattr__(self, name: str, value: Any) -> None:
        if type(self) is RetinaNet:  # a user's subclass may have attributes of these names
            refuse_arguments(name)
        super().__setattr__(name, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "RetinaNet":
        super()._apply(fn, recurse)
        lay_out(self)
        return self

    def forward(self, images: Images, targets: Targets | None = None) -> Any:
        """Losses in training, detections in evaluation.

        Args:
            images: B tensors ``(3, H, W)`` of values in [0, 1], or one ``(B, 3, H, W)``.
            targets: in training, B dicts with ``boxes`` (N, 4) xyxy pixels and ``labels`` (N,) integers in [0, K). In
                evaluation they are not needed; only the boxes are then checked.
        """
        network.refuse_tracing()
        if is_replaced(TorchvisionRetinaNet, "forward"):
            return super().forward(images, targets)
        if self.training and targets is None:
            raise AssertionError("targets should not be none when in training mode")
        if targets is not None and not self.training:
            targets = unlabelled(targets, len(images))
        batch = self.make_batch(images, targets)
        outputs = network.run(self, batch)
        losses = self.losses_of(batch, outputs) if self.training else {}
        detections = [] if self.training else self.detections_of(batch, outputs)
        return self.eager_outputs(losses, detections)

    def losses_and_detections(
        self, images: Images, targets: Targets
    ) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
        """Both from one forward pass, for validation: what training returns and what evaluation returns."""
        batch = self.make_batch(images, targets)
        outputs = network.run(self, batch)
        return self.losses_of(batch, outputs), self.detections_of(batch, outputs)

    def detect(self, batch: Tensor) -> Detections:
        """The detections of ``forward`` for a batch ``(B, 3, H, W)``, padded to ``detections_per_img``, or on the fast
        path to the most candidates there can be, if these are fewer.

        Args:
            batch: images of one size, values in [0, 1].

        Raises:
            TypeError, ValueError: if the batch is no tensor, or not 4-D.
            RuntimeError: in training mode, where a forward pass would move the BatchNorm statistics.
        """
        network.refuse_tracing()
        if not isinstance(batch, Tensor):
            raise TypeError(f"batch must be a Tensor (B, C, H, W), got {type(batch)}: a list is for the model itself")
        if batch.dim() != 4:
            raise ValueError(f"batch must be (B, C, H, W), got {tuple(batch.shape)}")
        if self.training:
            raise RuntimeError("detect needs evaluation mode: call model.eval() first")
        if not self.uses_fast_detections():
            made = self.make_batch(batch, None)
            return Detections.from_list(self.detections_of(made, network.run(self, made)), self.detections_per_img or 0)
        if is_stock_transform(self.transform) and is_stock_generator(self.anchor_generator):
            return self._detect_alike(batch)
        made = self.make_batch(batch, None)
        return self._padded_detections(made, network.run(self, made))

    def set_num_classes(self, num_classes: int) -> "RetinaNet":
        """Give the model, pretrained or not, a fresh last layer for another class count; returns the model.

        Raises:
            ValueError: for a class count below 1.
            TypeError: if the classification head is not torchvision's.
        """
        head = self.head.classification_head
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        if not isinstance(head, RetinaNetClassificationHead):
            raise TypeError(f"set_num_classes knows torchvision's classification head, not {type(head)}")
        head.cls_logits = fresh_logits(head, num_classes)
        head.num_classes, self.classes, self.category_ids = num_classes, None, None
        lay_out(self)
        return self

    def compute_loss(
        self, targets: Targets, head_outputs: Mapping[str, Any], anchors: Sequence[Tensor] | Tensor
    ) -> dict[str, Tensor]:
        """The losses of given head outputs, each one concatenated ``(B, N, C)`` tensor or the list of its levels.

        Args:
            targets: B dicts with ``boxes`` and ``labels``, boxes in the pixels of the anchors.
            head_outputs: ``cls_logits`` with K channels an anchor and ``bbox_regression`` with 4.
            anchors: B tensors ``(N, 4)`` xyxy, which may differ between images; or one ``(N, 4)`` for all images.
        """
        if not isinstance(anchors, Tensor):
            anchors = torch.stack(list(anchors))
        images = len(anchors) if anchors.dim() == 3 else len(targets)
        truths = gather_targets(targets, images, anchors.device, self._target_check())
        return self._losses_of(targets, truths, network.head_outputs(self.head, head_outputs, anchors))

    def postprocess_detections(
        self, head_outputs: Mapping[str, list[Tensor]], anchors: list[list[Tensor]], image_shapes: Sizes
    ) -> list[dict[str, Tensor]]:
        """Detections in the pixels of the batch, from levels ``(B, N_l, C)`` and each image's anchors ``(N_l, 4)``."""
        if not self._has_stock_postprocessing() or network.are_float64(head_outputs[network.LOGITS]):
            return super().postprocess_detections(head_outputs, anchors, image_shapes)
        outputs = network.head_outputs(self.head, head_outputs, torch.stack([torch.cat(levels) for levels in anchors]))
        sizes = to_device(torch.tensor(image_shapes, device="cpu"), outputs.anchors.device)
        return detect(outputs, sizes, sizes, Thresholds.of(self)).to_list()

    def __prepare_scriptable__(self) -> NoReturn:
        raise NotImplementedError(
            "retina_fast.RetinaNet cannot be scripted: TorchScript is no longer developed; see retina_fast.export"
        )

    # The steps of a forward pass, which TrainingStep also calls. Each runs the fast path, or a part of the user's own.

    def make_batch(self, images: Images, targets: Targets | None) -> Batch:
        """Check images and targets, as ``forward`` does, and decide the size of each image in the batch."""
        # torchvision's transform resizes masks and keypoints, which a loss of the user's own may read.
        whole = (
            targets is not None and not self.uses_fast_losses() and any({"masks", "keypoints"} & {*t} for t in targets)
        )
        return network.make_batch(self, images, targets, self._target_check(), whole)

    def losses_of(self, batch: Batch, outputs: HeadOutputs) -> dict[str, Tensor]:
        """The losses of a batch with targets, given the outputs of the heads for it."""
        assert batch.targets is not None, "targets should not be none when in training mode"
        assert batch.truths is not None
        if not overrides(self, RetinaNet, "compute_loss"):
            return self._losses_of(batch.targets, batch.truths, outputs)
        resized = with_truths(batch.targets, batch.truths)
        anchors = list(outputs.anchors.expand(len(resized), -1, -1))
        with target_check(self).same_step():  # it may call ours, which checks what it is given
            return self.compute_loss(resized, outputs.joined(), anchors)

    def detections_of(self, batch: Batch, outputs: HeadOutputs) -> list[dict[str, Tensor]]:
        """The detections of a batch, in the pixels of its images as they were given; float64 where the outputs are."""
        if self.uses_fast_detections() and not network.are_float64(outputs.levels[network.LOGITS]):
            return self._padded_detections(batch, outputs).to_list()
        lengths = [count_anchors(level, outputs.num_classes) for level in outputs.levels[network.LOGITS]]
        split = {name: list(output.split(lengths, dim=1)) for name, output in outputs.joined().items()}
        anchors = outputs.anchors.expand(len(batch.image_sizes), -1, -1)
        by_level = [list(image.split(lengths)) for image in anchors]
        detections = self.postprocess_detections(split, by_level, batch.image_sizes)
        training, self.transform.training = self.transform.training, False  # in training it would not rescale
        try:
            return self.transform.postprocess(detections, batch.image_sizes, batch.original_sizes)
        finally:
            self.transform.training = training

    def uses_fast_losses(self) -> bool:
        """Whether this package's losses run: neither ``compute_loss`` nor a part that it uses is a user's own."""
        return not overrides(self, RetinaNet, "compute_loss") and has_stock_losses(self.head, self.proposal_matcher)

    def uses_fast_detections(self) -> bool:
        """Whether this package's postprocessing runs: neither it nor the box coder is a user's own."""
        return (
            self._has_stock_postprocessing()
            and not overrides(self, RetinaNet, "postprocess_detections")
            and isinstance(self.transform, GeneralizedRCNNTransform)
            and not overrides(self.transform, GeneralizedRCNNTransform, "postprocess")
        )

    def _target_check(self) -> TargetCheck | None:
        check = target_check(self) if self.check_targets else None
        if check:
            check.num_classes = getattr(getattr(self.head, "classification_head", None), "num_classes", None)
        return check

    def _losses_of(self, targets: Targets, truths: GroundTruths, outputs: HeadOutputs) -> dict[str, Tensor]:
        check_losses(self.classification_loss, None, None, self.box_weights)  # they may have been set since
        if isinstance(self.proposal_matcher, str):
            raise TypeError(f"proposal_matcher must be a matcher, such as AtssMatcher(), got {self.proposal_matcher!r}")
        torchvisions = self.classification_loss == "focal" and isinstance(self.proposal_matcher, Matcher)
        # Ours have no derivative with respect to the ground truths.
        aside = torchvisions and not self.box_weights and is_differentiated(truths.boxes)
        if has_stock_losses(self.head, self.proposal_matcher) and not aside:
            loss_type = self.head.regression_head._loss_type
            matcher, gamma, chosen = self.proposal_matcher, self.focal_gamma, self.classification_loss
            return detection_losses(outputs, truths, matcher, loss_type, gamma, chosen, self.box_weights)
        if self.classification_loss != "focal" or self.box_weights:
            raise NotImplementedError(
                f"classification_loss {self.classification_loss!r} with box_weights {self.box_weights!r} needs this "
                "package's losses, but a part of the model that computes losses is the user's own"
            )
        anchors = list(outputs.anchors.expand(len(targets), -1, -1))
        return super().compute_loss(with_truths(targets, truths), outputs.joined(), anchors)

    def _has_stock_postprocessing(self) -> bool:
        """Whether the box coder, and what the postprocessing calls, are torchvision's own."""
        return is_known_coder(self.box_coder) and has_stock_detection_functions()

    def _padded_detections(self, batch: Batch, outputs: HeadOutputs) -> Detections:
        device, sizes = outputs.anchors.device, (batch.image_sizes, batch.original_sizes)
        inside, original = (to_device(torch.tensor(size, device="cpu"), device) for size in sizes)
        return detect(outputs, inside, original, Thresholds.of(self))

    def _detect_alike(self, images: Tensor) -> Detections:
        """Detections of images of one size, without a Python list, so that one compiled graph serves any batch size."""
        check_images(images[:1], max(len(self.transform.image_mean), len(self.transform.image_std)))
        pixels, image_sizes = resize_batch(self.transform, images)
        outputs = network.run_network(self, pixels)
        return detect(outputs, image_sizes, size_rows(images, *images.shape[2:]), Thresholds.of(self))


note_methods(RetinaNet, "forward", "eager_outputs", "compute_loss", "postprocess_detections")
