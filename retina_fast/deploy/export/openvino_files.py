"""OpenVINO's files: a graph in XML and, beside it under the same name with .bin, its weights.

They are made from the graph that an ONNX file holds. The XML ends with a comment that has a checksum of both files, at
which OpenVINO does not look.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from retina_fast.data.errors import UserError
from retina_fast.data.outputs import check_file
from retina_fast.deploy.export.onnx_file import KEY, OUTPUTS


def weights_file(path: Path) -> Path:
    """The file of the weights that belongs to a graph.

    Example::

        >>> weights_file(Path("out/model.xml")).name
        'model.bin'
    """
    return path.with_suffix(".bin")


def check_openvino(path: Path) -> None:
    """Raises a UserError unless both files can be written, and the second replaces none but an earlier model's."""
    if path.suffix != ".xml":
        raise UserError(f"{path}: a file of the format openvino must end in .xml, as OpenVINO asks")
    check_file(weights_file(path))
    if weights_file(path).exists() and not path.exists():
        raise UserError(f"{weights_file(path)}: is there already, without {path.name}; give another name")


def write_openvino(proto: Any, path: Path, described: dict[str, Any]) -> None:
    """Write an ONNX ModelProto and the metadata as OpenVINO's two files, float32."""
    import openvino

    model = openvino.Core().read_model(proto.SerializeToString())
    for port, name in zip(model.outputs, OUTPUTS, strict=True):
        port.get_tensor().set_names({name})
    model.set_rt_info(json.dumps(described), KEY)
    openvino.save_model(model, path, compress_to_fp16=False)
    content = path.read_bytes()
    path.write_bytes(content + _checksum(content, weights_file(path)))


def _checksum(content: bytes, weights: Path) -> bytes:
    digest = hashlib.sha256(content)
    with weights.open("rb") as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return f"<!-- sha256 {digest.hexdigest()} -->\n".encode()


def open_openvino(path: Path) -> tuple[dict[str, Any], Callable[[Tensor], list[Tensor]]] | None:
    """The metadata, and a function from images to the four outputs; None if the files are not as they were written.

    Raises:
        OSError: if a file cannot be read.
        ModuleNotFoundError: without the package ``openvino``.
    """
    content = path.read_bytes()
    end = content.rfind(b"<!-- sha256 ")
    if end < 0 or _checksum(content[:end], weights_file(path)) != content[end:]:
        return None
    import openvino

    core = openvino.Core()
    model = core.read_model(path)
    described = json.loads(model.get_rt_info(KEY).astype(str))
    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = core.compile_model(model, "CPU", options)

    def run(images: Tensor) -> list[Tensor]:
        outputs = compiled({"images": images.numpy()})
        return [torch.from_numpy(outputs[name].copy()) for name in OUTPUTS]

    return described, run
