"""Leaving Python: a detector as one file that runs without this package, from images to padded detections.

The graph that is written holds the target's standard operators alone. Candidates are chosen by a top-k a level, lower
index first on a tie; what lies below the score threshold is masked, so that every shape but the batch's is static.
Suppression is exact per class, the rule of :mod:`retina_fast.kernels.batched_nms`: for ``torch.export`` and AOTInductor
a loop of ATen operations that keeps one box of every image a turn and ends when no image has any left, for ONNX its
NonMaxSuppression. The model is traced on the CPU, where its path has no kernels.
"""

import copy
import hashlib
import json
import math
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import retinanet as tv

from retina_fast.anchors import shared_anchors
from retina_fast.convert import from_torchvision
from retina_fast.engine import refuse_own_parts
from retina_fast.errors import UserError
from retina_fast.kernels.box_decode import decode
from retina_fast.kernels.candidate_selection import logit
from retina_fast.kernels.levels import flatten_all
from retina_fast.model import RetinaNet
from retina_fast.transform import padded, resized_size

FORMATS = {"torch-export": ".pt2", "onnx": ".onnx", "aotinductor": ".pt2"}
"""Every format with the suffix of its files."""

KEY = "retina_fast"
"""Under which a file holds its metadata, as JSON."""

OPSET = 18
OUTPUTS = ("boxes", "scores", "labels", "counts")
SHAPES = {"images": {0: torch.export.Dim("batch", min=1)}}
MASK = 0x7FFFFFFF


def best_by_key(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k highest of rows (B, n) and where they lie, the lower index first on a tie.

    ATen's top-k leaves ties open, so it is given integers without any: the float's bits, which order as the floats do,
    above the falling index.
    """
    bits = torch.where(values == 0, 0.0, values).view(torch.int32)  # -0 and 0 tie
    rising = torch.where(bits < 0, bits ^ MASK, bits).long()
    keys = (rising << 32) + (MASK - torch.arange(values.shape[1], device=values.device))
    index = MASK - (keys.topk(k).values & 0xFFFFFFFF)
    return values.gather(1, index), index


def suppress(boxes: Tensor, labels: Tensor, valid: Tensor, iou_thresh: float, most: int) -> Tensor:
    """Which boxes (B, M, 4) are kept, (B, M), as a loop: each turn keeps every image's best box and drops its overlaps.

    Args:
        boxes: best first.
        labels: (B, M).
        valid: (B, M), which of them count.
        iou_thresh: float32, above which a box goes.
        most: turns, the most boxes kept of an image.
    """
    falling = torch.arange(boxes.shape[1], 0, -1, device=boxes.device)
    threshold = torch.tensor(iou_thresh, device=boxes.device)  # while_loop makes symbols of numbers that change
    areas = (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])

    def going(turns: Tensor, alive: Tensor, kept: Tensor) -> Tensor:
        return (turns > 0) & alive.any()

    def keep_best(turns: Tensor, alive: Tensor, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rank = torch.where(alive, falling, 0).amax(dim=1, keepdim=True)  # (B, 1); 0 where none is left
        first = torch.minimum(falling[0] - rank, falling[0] - 1)
        best = boxes.gather(1, first[..., None].expand(-1, -1, 4))  # (B, 1, 4)
        sides = torch.minimum(boxes[..., 2:], best[..., 2:]) - torch.maximum(boxes[..., :2], best[..., :2])
        sides = sides.clamp(min=0)
        intersection = sides[..., 0] * sides[..., 1]
        overlaps = intersection / (areas.gather(1, first) + areas - intersection) > threshold
        overlaps = overlaps & (labels == labels.gather(1, first))
        is_best = falling == rank
        return turns - 1, alive & ~overlaps & ~is_best, kept | is_best

    start = torch.full((), most, device=boxes.device), valid.clone(), torch.zeros_like(valid)
    return torch.while_loop(going, keep_best, start)[2]


@torch.library.custom_op("retina_fast::non_max_suppression", mutates_args=())
def _non_max_suppression(boxes: Tensor, ranks: Tensor, iou_thresh: float, most: int) -> Tensor:
    """Stands in the traced graph for ONNX's operator, in whose terms :func:`_onnx_suppression` says what it does."""
    raise NotImplementedError("retina_fast::non_max_suppression is for the ONNX exporter alone")


@_non_max_suppression.register_fake
def _(boxes: Tensor, ranks: Tensor, iou_thresh: float, most: int) -> Tensor:
    return boxes.new_empty(boxes.shape[:2], dtype=torch.int64)


def _onnx_suppression(boxes: Any, ranks: Any, iou_thresh: float, most: int) -> Any:
    """(B, M) int64, 1 where kept."""
    from onnxscript import opset18 as op

    def numbers(*values: int) -> Any:
        return op.Constant(value_ints=list(values))

    threshold: Any = op.Constant(value_floats=[iou_thresh])
    least: Any = op.Constant(value_floats=[0.5])
    chosen = op.NonMaxSuppression(boxes, ranks, numbers(most), threshold, least)  # (S, 3): image, class, box
    places = op.Gather(chosen, numbers(0, 2), axis=1)
    none = op.Expand(numbers(0), op.Shape(boxes, start=0, end=2))
    return op.ScatterND(none, places, op.Expand(numbers(1), op.Shape(chosen, start=0, end=1)))


def _bilinear(size: int, resized: int) -> Tensor:
    """(size, resized): the weights of torch's bilinear resize of one side."""
    if size == resized:
        return torch.eye(size)
    return F.interpolate(torch.eye(size)[None], size=resized, mode="linear", align_corners=False)[0]


class _Graph(nn.Module):
    """What is traced: images (B, 3, H, W) to the four tensors of ``Detections``."""

    down: Tensor
    across: Tensor
    anchors: Tensor
    limits: Tensor
    scale: Tensor

    def __init__(self, model: RetinaNet, image_size: tuple[int, int], preprocess: bool) -> None:
        super().__init__()
        self.model, self.preprocess = model, preprocess
        self.dtype = next(model.parameters()).dtype
        inside = resized_size(model.transform, *image_size) if preprocess else image_size
        # Each runtime has its own rounding of a resize's coordinates, up to 1e-5 of a pixel's value: so its weights are
        # written as numbers.
        self.register_buffer("down", _bilinear(image_size[0], inside[0]).T.contiguous())
        self.register_buffer("across", _bilinear(image_size[1], inside[1]))
        with torch.no_grad():
            batch, features = self._trunk(torch.zeros(1, 3, *image_size))
            anchors = shared_anchors(model.anchor_generator, batch, features)
            self.cells = [level.shape[2] * level.shape[3] for level in features]
            outputs = model._by_level(model._head_outputs(features), self.cells, anchors)
            self.num_classes = model._num_classes(outputs)
        self.register_buffer("anchors", anchors.clone())
        height, width = inside
        self.register_buffer("limits", torch.tensor([width, height, width, height], dtype=torch.float32))
        scale = torch.tensor(image_size).float() / torch.tensor(inside).float()
        self.register_buffer("scale", scale.flip(0).repeat(2))
        # An IoU in float32 is compared with the threshold in float64: with the next one below in float32, here.
        below = torch.tensor(model.nms_thresh, dtype=torch.float32)
        if float(below) > model.nms_thresh:
            below = torch.nextafter(below, torch.tensor(-math.inf))
        self.iou_thresh = float(below)

    def best(self, values: Tensor, k: int) -> tuple[Tensor, Tensor]:
        return best_by_key(values, k)

    def suppress(self, boxes: Tensor, labels: Tensor, valid: Tensor, most: int) -> Tensor:
        return suppress(boxes, labels, valid, self.iou_thresh, most)

    def _trunk(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        transform = self.model.transform
        if self.preprocess:
            mean, std = (torch.tensor(x)[:, None, None] for x in (transform.image_mean, transform.image_std))
            images = (images.float() / 255 - mean.to(images.device)) / std.to(images.device)
            images = self.down @ images @ self.across
        return self.model._trunk(padded(images, transform.size_divisible).to(self.dtype))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        model = self.model
        _, features = self._trunk(images)
        outputs = model._by_level(model._head_outputs(features), self.cells, self.anchors)
        values, indices, first = [], [], 0
        for level in flatten_all(outputs["cls_logits"], self.num_classes):
            flat = level.flatten(1).float()  # (B, N_l*K)
            above = torch.where(flat > logit(model.score_thresh), flat, -math.inf)
            best, index = self.best(above, min(model.topk_candidates, flat.shape[1]))
            values.append(best)
            indices.append(index + first)
            first += flat.shape[1]
        count = sum(level.shape[1] for level in values)
        logits, order = self.best(torch.cat(values, dim=1), count)  # (B, M), best first
        chosen = torch.cat(indices, dim=1).gather(1, order)
        anchors, labels = chosen // self.num_classes, chosen % self.num_classes
        deltas = torch.cat(flatten_all(outputs["bbox_regression"], 4), dim=1)
        deltas = deltas.gather(1, anchors[..., None].expand(-1, -1, 4)).float()
        boxes = torch.minimum(decode(deltas, self.anchors[anchors]).clamp(min=0), self.limits)

        most = min(model.detections_per_img, count)
        kept = self.suppress(boxes, labels, logits > -math.inf, most)
        falling = torch.arange(count, 0, -1, device=boxes.device)
        ranks = torch.where(kept, falling, 0).topk(most).values  # (B, D); 0 is padding
        real, position = ranks > 0, (count - ranks).clamp(max=count - 1)
        boxes = boxes.gather(1, position[..., None].expand(-1, -1, 4)) * self.scale
        return (
            torch.where(real[..., None], boxes, 0.0),
            torch.where(real, logits.gather(1, position).sigmoid(), 0.0),
            torch.where(real, labels.gather(1, position), -1),
            real.sum(dim=1),
        )


class _OnnxGraph(_Graph):
    """The same in ONNX's operators: its TopK gives the lower index first on a tie, and it has a suppression."""

    def best(self, values: Tensor, k: int) -> tuple[Tensor, Tensor]:
        best = values.topk(k)
        return best.values, best.indices

    def suppress(self, boxes: Tensor, labels: Tensor, valid: Tensor, most: int) -> Tensor:
        falling = torch.arange(boxes.shape[1], 0, -1, device=boxes.device).float()  # in place of scores: no ties
        own = labels[:, None] == torch.arange(self.num_classes, device=boxes.device)[:, None]  # (B, K, M)
        ranks = torch.where(own & valid[:, None], falling, 0.0)
        return _non_max_suppression(boxes, ranks, self.iou_thresh, most) > 0


def _version() -> str:
    try:
        return metadata.version("retina_fast")
    except metadata.PackageNotFoundError:
        return "an uninstalled checkout"


def describe(
    model: RetinaNet, image_size: tuple[int, int], preprocess: bool, classes: Sequence[str], category_ids: Sequence[int]
) -> dict[str, Any]:
    """The metadata that every file holds."""
    transform = model.transform
    return {
        "version": _version(),
        "torch": torch.__version__,
        "image_size": list(image_size),
        "input": "uint8" if preprocess else "float32",
        "image_mean": list(transform.image_mean),
        "image_std": list(transform.image_std),
        "classes": list(classes),
        "category_ids": list(category_ids),
        "score_thresh": model.score_thresh,
        "nms_thresh": model.nms_thresh,
        "detections_per_img": model.detections_per_img,
        "topk_candidates": model.topk_candidates,
    }


def export(
    model: tv.RetinaNet,
    path: str | Path,
    format: str,
    image_size: tuple[int, int],
    preprocess: bool = True,
    classes: Sequence[str] | None = None,
    category_ids: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Write a detector to one file that runs without this package; returns the metadata that the file holds.

    The file takes a batch ``(B, 3, H, W)``, any B, and gives the tensors of :class:`retina_fast.Detections`: boxes
    (B, D, 4), scores (B, D), labels (B, D), counts (B). The model itself is not changed, and is left where it is.

    Args:
        model: a RetinaNet of this package or of torchvision. Backbone and head may be anything the target can hold.
        path: the file.
        format: ``torch-export``, for :func:`torch.export.load`; ``onnx``, opset 18, with no operators but ONNX's own;
            or ``aotinductor``, machine code for the model's device, for ``torch._inductor.aoti_load_package``. That
            needs a C++ compiler to write, not to run.
        image_size: (H, W) of the images.
        preprocess: whether the file takes uint8 images and scales, normalises and resizes them as the model would. Else
            it takes float32 images so treated already, and boxes are in their pixels.
        classes: K class names, by label; the labels themselves by default.
        category_ids: K ids of the data set's categories; the labels by default.

    Raises:
        UserError: for an unknown format, sizes, names or thresholds that cannot be, or a missing C++ compiler.
        TypeError: for anything but a RetinaNet, or if a part of the user's own would not run: a forward, transform,
            anchor generator, box coder or postprocessing.

    Example::

        >>> import tempfile
        >>> from retina_fast import load_exported, retinanet_resnet18_fpn_lite
        >>> model = retinanet_resnet18_fpn_lite(num_classes=2, weights_backbone=None)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     written = export(model, f"{folder}/model.pt2", "torch-export", (64, 96), classes=["cat", "dog"])
        ...     detect = load_exported(f"{folder}/model.pt2")
        >>> detect(torch.zeros(3, 3, 64, 96, dtype=torch.uint8)).counts.shape
        torch.Size([3])
    """
    model = from_torchvision(model)
    refuse_own_parts(model, "an exported file")
    if format not in FORMATS:
        raise UserError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    if len(image_size) != 2 or min(image_size) < 1:
        raise UserError(f"image_size must be a height and a width in pixels, got {image_size}")
    if preprocess and min(resized_size(model.transform, *image_size)) < 1:
        raise UserError(f"image_size {image_size} would be resized to {resized_size(model.transform, *image_size)}")
    if not 0 <= model.nms_thresh <= 1:
        raise UserError(f"nms_thresh must lie in [0, 1], got {model.nms_thresh}")
    for name in ("topk_candidates", "detections_per_img"):
        if getattr(model, name) < 1:
            raise UserError(f"{name} must be at least 1, got {getattr(model, name)}")
    device = next(model.parameters()).device
    own = copy.deepcopy(model).eval().requires_grad_(False).to("cpu", memory_format=torch.contiguous_format)
    graph = (_OnnxGraph if format == "onnx" else _Graph)(own, image_size, preprocess)
    labels = range(graph.num_classes)
    names = [str(label) for label in labels] if classes is None else classes
    ids = labels if category_ids is None else category_ids
    for argument, values in (("classes", names), ("category_ids", ids)):
        if len(values) != len(labels):
            raise UserError(f"{argument} must be {len(labels)}, one a class, got {len(values)}")
    described = describe(own, image_size, preprocess, names, ids)

    images = torch.zeros(2, 3, *image_size, dtype=torch.uint8 if preprocess else torch.float32)
    with torch.no_grad():
        program = torch.export.export(graph.eval(), (images,), dynamic_shapes=SHAPES)
    write = {"torch-export": _write_program, "onnx": _write_onnx, "aotinductor": _write_package}[format]
    path = Path(path)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:  # what fails half-way leaves an old file whole
        whole = Path(folder) / path.with_suffix(FORMATS[format]).name  # PyTorch insists on its suffix
        write(program, whole, described, device)
        whole.replace(path)
    return described


def _write_program(program: Any, path: Path, described: dict[str, Any], device: torch.device) -> None:
    torch.export.save(program, path, extra_files={KEY: json.dumps(described)})


def _write_package(program: Any, path: Path, described: dict[str, Any], device: torch.device) -> None:
    from torch._inductor import aoti_compile_and_package
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler
    from torch.export.passes import move_to_device_pass

    if device.type != "cpu":
        program = move_to_device_pass(program, str(device))
    held = {KEY: json.dumps(described | {"device": device.type})}
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise UserError("aotinductor needs a C++ compiler, and none was found: install g++ or clang++") from error
    aoti_compile_and_package(program, package_path=str(path), inductor_configs={"aot_inductor.metadata": held})


def checksum(content: bytes) -> bytes:
    """What follows ``content`` in an ONNX file: one more entry of its metadata, the SHA-256 of all that is before it.

    A protobuf message may be written in pieces, so ONNX's readers see one file.
    """
    entry = b"".join(
        bytes([number << 3 | 2, len(value)]) + value
        for number, value in ((1, b"sha256"), (2, hashlib.sha256(content).hexdigest().encode()))
    )
    return bytes([14 << 3 | 2, len(entry)]) + entry  # ModelProto.metadata_props


def _write_onnx(program: Any, path: Path, described: dict[str, Any], device: torch.device) -> None:
    import onnx
    import onnxscript  # noqa: F401 - torch needs it, and would name it less clearly

    written = torch.onnx.export(
        program,
        dynamo=True,
        opset_version=OPSET,
        input_names=["images"],
        output_names=list(OUTPUTS),
        dynamic_shapes=SHAPES,  # for their names
        custom_translation_table={torch.ops.retina_fast.non_max_suppression.default: _onnx_suppression},
        verbose=False,
    )
    assert written is not None
    proto = written.model_proto
    proto.metadata_props.add(key=KEY, value=json.dumps(described))
    onnx.checker.check_model(proto, full_check=True)
    content = proto.SerializeToString()
    path.write_bytes(content + checksum(content))
