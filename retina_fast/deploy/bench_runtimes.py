"""The same model in other runtimes, for `retina-fast bench`: ONNX Runtime, OpenVINO and torch.compile."""

import tempfile
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from retina_fast.convert import torchvision_detector
from retina_fast.deploy.export.exported import load_exported
from retina_fast.deploy.export.onnx_file import OUTPUTS
from retina_fast.deploy.export.write import export
from retina_fast.detections import Detections

Run = Callable[[list[Tensor]], Any]


def other_runtimes(model: Any, images: Sequence[Tensor], say: Callable[[str], None]) -> dict[str, Run]:
    """Functions from a list of uint8 images (3, H, W) to detections in torchvision's form, by name.

    ONNX Runtime and OpenVINO run the file that ``retina_fast.export`` writes, on a CPU and on images of one size;
    torch.compile compiles torchvision's trunk and heads, on a CPU with frozen weights in channels_last. Each has run
    once, and the compiler is given every batch size anew.

    Args:
        model: a float32 RetinaNet in evaluation mode.
        images: those that will be measured.
        say: is told what was left out, and why.

    Example::

        >>> from retina_fast import retinanet_resnet18_fpn_lite
        >>> model = retinanet_resnet18_fpn_lite(num_classes=2, weights_backbone=None).eval()
        >>> image = torch.zeros(3, 64, 64, dtype=torch.uint8)
        >>> other_runtimes(model, [image, image[:, :32]], print).keys() <= {"torch.compile, float32"}  # doctest: +SKIP
        ONNX Runtime and OpenVINO were left out: the images differ in size
        True
    """
    made: dict[str, Callable[[], Run]] = {}
    if images[0].device.type != "cpu":
        say("ONNX Runtime and OpenVINO were left out: they are measured on a CPU")
    elif len({image.shape for image in images}) > 1:
        say("ONNX Runtime and OpenVINO were left out: the images differ in size")
    else:
        size = images[0].shape[1], images[0].shape[2]
        made["ONNX Runtime, float32"] = lambda: _onnxruntime(model, size)
        made["OpenVINO, float32"] = lambda: _openvino(model, size)
    made["torch.compile, float32"] = lambda: _compiled(model)
    runs = {}
    for name, make in made.items():
        try:
            run = make()
            run([images[0]])
            runs[name] = run
        except Exception as error:  # of whatever kind: packages and compilers that are missing or fail
            say(f"{name} was left out: {' '.join(str(error).split())[:200]}")
    return runs


def _onnxruntime(model: Any, size: tuple[int, int]) -> Run:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        export(model, path, "onnx", size)
        detect = load_exported(path)
    return lambda images: detect(torch.stack(images)).to_list()


def _openvino(model: Any, size: tuple[int, int]) -> Run:
    if find_spec("openvino") is None:
        raise ModuleNotFoundError("No module named 'openvino'")
    import openvino

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        export(model, path, "onnx", size)
        options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
        compiled = openvino.Core().compile_model(str(path), "CPU", options)

    def run(images: list[Tensor]) -> Any:
        outputs = compiled({"images": torch.stack(images).numpy()})
        return Detections(*(torch.from_numpy(outputs[name].copy()) for name in OUTPUTS)).to_list()

    return run


def _compiled(model: Any) -> Run:
    theirs = torchvision_detector(model).to(memory_format=torch.channels_last)
    for part in (theirs.backbone, theirs.head.classification_head, theirs.head.regression_head):
        part.compile(dynamic=False)

    def run(images: list[Tensor]) -> Any:
        with torch.no_grad(), torch._inductor.config.patch(freezing=True):
            return theirs([image.float() / 255 for image in images])

    return run
