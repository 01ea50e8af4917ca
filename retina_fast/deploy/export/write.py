"""Export: a detector is written to one file that goes from images to padded detections without this package."""

import json
import math
import tempfile
from collections.abc import Sequence
from importlib import metadata
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torchvision.models.detection import retinanet as tv

from retina_fast.convert import copied, from_torchvision
from retina_fast.data.errors import UserError
from retina_fast.data.outputs import check_file
from retina_fast.deploy.detector_module import refuse_own_parts
from retina_fast.deploy.eight_bits.calibration import Images, calibration_images
from retina_fast.deploy.eight_bits.onnx_graph import eight_bits
from retina_fast.deploy.export.formats import checked_format
from retina_fast.deploy.export.graph import SHAPES, Graph
from retina_fast.deploy.export.onnx_file import KEY, OPSET, QUANTIZED_OPSET, OnnxPostprocess, translate, write_onnx
from retina_fast.deploy.export.openvino_files import weights_file, write_openvino
from retina_fast.deploy.export.postprocess import Postprocess
from retina_fast.deploy.fusion.fold import conv_outputs, fold_batch_norm
from retina_fast.forward import input_channels
from retina_fast.model import RetinaNet
from retina_fast.transform import resized_size


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
    quantize: Images | None = None,
    float32_share: float = 0.0,
    symmetric: bool = False,
) -> dict[str, Any]:
    """Write a detector to a file that runs without this package; returns the metadata that the file holds.

    The file takes a batch ``(B, 3, H, W)``, any B, and gives the tensors of :class:`retina_fast.Detections`: boxes
    (B, D, 4), scores (B, D), labels (B, D), counts (B). The model itself is not changed, and is left where it is.

    Args:
        model: a RetinaNet of this package or of torchvision. Backbone and head may be anything the target can hold.
        path: the file.
        format: ``torch-export``, for :func:`torch.export.load`; ``onnx``, opset 18 (19 in eight bits), with no
            operators but ONNX's own; ``openvino``, whose weights come to lie beside it in a second file that ends in
            .bin; or ``aotinductor``, machine code for the model's device, for ``torch._inductor.aoti_load_package``.
            That needs a C++ compiler to write, not to run.
        image_size: (H, W) of the images.
        preprocess: whether the file takes uint8 images and scales, normalises and resizes them as the model would. Else
            it takes float32 images that are prepared already, and boxes are in their pixels.
        classes: K class names, by label; by default the model's ``classes``, or else the labels.
        category_ids: K ids of the data set's categories; by default the model's, or else the labels.
        quantize: images for calibration, of ``image_size``, for an ``onnx`` file whose convs compute in eight bits: an
            iterable of uint8 (3, H, W), or floating point in [0, 1], that is read once; or a folder of image files. A
            hundred are enough. The metadata say under ``quantized`` how many detections in them are kept.
        float32_share: the share, from 0 to 1, of the multiplications of the layers in eight bits that may stay in
            float32. It goes to the layers whose eight bits change logits and box offsets the most, each tried alone.
        symmetric: with ``quantize``, activations as int8 with a zero point of 0, and biases in float32. TensorRT takes
            no others; in ONNX Runtime and OpenVINO detections are less exact by it.

    Raises:
        UserError: for an unknown format, sizes, names or thresholds that cannot be, a file that cannot be
            written, weights of another dtype than float32 for ``onnx`` and ``openvino``, missing packages or a missing
            C++ compiler, or images that cannot serve for calibration, where the message names the image.
        TypeError: for anything but a RetinaNet, or if a part of the user's own would not run: a forward, transform,
            anchor generator, box coder or postprocessing.

    Warns:
        UserWarning: for few images for calibration, for images in which nothing is found, and if more than one in
            twenty detections of a score of 0.3 changes in eight bits.

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
    path = Path(path)
    device, dtype = (getattr(next(model.parameters()), name) for name in ("device", "dtype"))
    kind = checked_format(format, path, dtype)
    check_file(path)
    sides = list(image_size) if isinstance(image_size, Sequence) else []
    if [isinstance(side, Integral) and not isinstance(side, bool) for side in sides] != [True, True] or min(sides) < 1:
        raise UserError(f"image_size must be a height and a width in whole pixels, got {image_size}")
    image_size = int(sides[0]), int(sides[1])
    if input_channels(model) != 3:
        raise UserError(f"an exported file takes images of 3 channels, and the model {input_channels(model)}")
    if math.isnan(model.score_thresh):
        raise UserError(f"score_thresh must be a number, got {model.score_thresh}")
    if not 0 <= model.nms_thresh <= 1:
        raise UserError(f"nms_thresh must lie in [0, 1], got {model.nms_thresh}")
    for name in ("topk_candidates", "detections_per_img"):
        if type(getattr(model, name)) is not int or getattr(model, name) < 1:
            raise UserError(f"{name} must be an integer of at least 1, got {getattr(model, name)!r}")
    if quantize is not None and format != "onnx":
        raise UserError(f"quantize serves the format onnx alone, got {format!r}")
    if not 0 <= float32_share <= 1:
        raise UserError(f"float32_share must lie in [0, 1], got {float32_share}")
    if quantize is None and (float32_share or symmetric):
        given = f"float32_share={float32_share}" if float32_share else f"symmetric={symmetric}"
        raise UserError(f"{given} is of a model in eight bits: give quantize, too, or leave it out")
    calibration = None if quantize is None else calibration_images(quantize, image_size, prepared=not preprocess)
    own = copied(model).eval().requires_grad_(False).to("cpu", memory_format=torch.contiguous_format)
    if preprocess and min(resized_size(own.transform, *image_size)) < 1:
        raise UserError(f"image_size {image_size} would be resized to {resized_size(own.transform, *image_size)}")
    if calibration is not None:
        sample = torch.rand(1, 3, 128, 128, dtype=torch.float32, device="cpu")
        fold_batch_norm(own, lambda: conv_outputs(own, sample))
    graph = Graph(own, image_size, preprocess, OnnxPostprocess if kind.through_onnx else Postprocess)
    labels = range(graph.postprocess.num_classes)
    if isinstance(classes, str):
        raise UserError(f"classes must be a list of names, got {classes!r}")
    if classes is None and model.classes is not None:
        classes, category_ids = model.classes, category_ids or model.category_ids
    names = list(map(str, labels if classes is None else classes))
    ids = list(map(int, labels if category_ids is None else category_ids))
    for argument, values in (("classes", names), ("category_ids", ids)):
        if len(values) != len(labels):
            raise UserError(f"{argument} must be {len(labels)}, one a class, got {len(values)}")
    described = describe(own, image_size, preprocess, names, ids)

    images = torch.zeros(2, 3, *image_size, dtype=torch.uint8 if preprocess else torch.float32, device="cpu")
    with torch.no_grad():
        program = torch.export.export(graph.eval(), (images,), dynamic_shapes=SHAPES)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:  # what fails half-way leaves an old file whole
        whole = Path(folder) / path.with_suffix(kind.suffix).name  # PyTorch insists on its suffix
        if format == "onnx":
            proto = translate(program, opset=OPSET if calibration is None else QUANTIZED_OPSET)
            if calibration is not None:
                proto, described["quantized"] = eight_bits(proto, calibration, float32_share, symmetric)
            write_onnx(proto, whole, described)
        elif format == "openvino":
            write_openvino(translate(program), whole, described)
            weights_file(whole).replace(weights_file(path))
        elif format == "aotinductor":
            _write_package(program, whole, described, device)
        else:
            torch.export.save(program, whole, extra_files={KEY: json.dumps(described)})
        whole.replace(path)
    return described


def _write_package(
    program: torch.export.ExportedProgram, path: Path, described: dict[str, Any], device: torch.device
) -> None:
    from torch._inductor import aoti_compile_and_package
    from torch.export.passes import move_to_device_pass

    if device.type != "cpu":
        program = move_to_device_pass(program, str(device))
    held = {KEY: json.dumps(described | {"device": device.type})}
    aoti_compile_and_package(program, package_path=str(path), inductor_configs={"aot_inductor.metadata": held})
