"""Running the files that ``export`` writes, with their inputs checked."""

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from retina_fast.data.errors import UserError
from retina_fast.data.files import damage
from retina_fast.deploy.export.onnx_file import KEY, OUTPUTS, checksum, onnx_session
from retina_fast.deploy.export.openvino_files import open_openvino
from retina_fast.detections import Detections
from retina_fast.predict.method import Predicts

Run = Callable[[Tensor], Any]


class Exported(Predicts):
    """A file that :func:`load_exported` has opened: call it with a batch of images.

    Attributes:
        format: ``torch-export``, ``onnx``, ``openvino`` or ``aotinductor``.
        metadata: what the file says of itself: ``classes``, ``image_size``, ``input``, thresholds, ``version``.
        path: the whole path of the file.
        classes, category_ids: those of the metadata.
    """

    def __init__(self, format: str, metadata: dict[str, Any], run: Run, path: Path) -> None:
        self.format, self.metadata, self._run, self.path = format, metadata, run, path
        self.classes: list[str] = metadata["classes"]
        self.category_ids: list[int] = metadata["category_ids"]
        self._shape = (3, *metadata["image_size"])
        self._dtype = getattr(torch, metadata["input"])
        self.device = torch.device(metadata.get("device", "cpu"))

    def __call__(self, images: Tensor) -> Detections:
        """Padded detections of a batch ``(B, 3, H, W)`` of the file's own size and dtype.

        Raises:
            UserError: for another size or dtype.
        """
        self.check(images)
        with torch.no_grad():
            return Detections(*self._run(images.to(self.device).contiguous()))

    def check(self, images: Tensor) -> None:
        """Raise a UserError for a batch of another size or dtype than the file's."""
        if not isinstance(images, Tensor):
            raise UserError(f"images must be a Tensor (B, {', '.join(map(str, self._shape))}), got {type(images)}")
        if images.dim() != 4 or images.shape[1:] != self._shape or not len(images):
            raise UserError(f"images must be (B, {', '.join(map(str, self._shape))}), got {tuple(images.shape)}")
        if images.dtype != self._dtype:
            raise UserError(f"images must be {self._dtype}, got {images.dtype}")


def load_exported(path: str | Path) -> Exported:
    """Open a file that :func:`retina_fast.export` wrote, of any format.

    The formats of PyTorch are programs: open only files whose author you trust.

    Args:
        path: the file.

    Raises:
        UserError: if the file is missing, damaged, or none of ours; the message names it.
        ModuleNotFoundError: without the package ``onnxruntime`` or ``openvino``, for a file of theirs.

    Example::

        >>> detect = load_exported("model.onnx")  # doctest: +SKIP
        >>> detect(images).to_list()  # doctest: +SKIP
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such exported file")
    try:
        if zipfile.is_zipfile(path):
            format, metadata, run = _open_archive(path)
        elif path.suffix == ".xml":
            opened = open_openvino(path)
            if opened is None:
                raise _Damaged
            format, metadata, run = "openvino", *opened
        else:
            format, metadata, run = "onnx", *_open_onnx(path)
        return Exported(format, metadata, run, path.absolute())
    except (_Damaged, OSError) as error:
        why = damage(path)
        problem = f"{path}: damaged, or not a file that retina-fast export wrote" + (f" ({why})" if why else "")
        raise UserError(f"{problem}: copy it again, or export the model anew") from error


def is_exported(path: Path) -> bool:
    """Whether a file looks like one that :func:`retina_fast.export` wrote, rather than a file of weights.

    Example::

        >>> is_exported(Path("model.onnx"))
        True
    """
    if path.suffix.lower() in (".onnx", ".xml"):
        return True
    try:
        with zipfile.ZipFile(path) as archive:
            return any("/aotinductor/" in name or name.endswith(f"/{KEY}") for name in archive.namelist())
    except (zipfile.BadZipFile, NotImplementedError):
        with path.open("rb") as file:
            return file.read(1) == b"\x08"  # the version, with which ONNX begins; a pickle begins with another byte


def may_be_replaced(path: Path) -> bool:
    """Whether an export may take a file's place: it looks like one of ours, and, if its name alone says so, ends in the
    checksum of ours.

    Example::

        >>> may_be_replaced(Path("annotations.xml"))  # doctest: +SKIP
        False
    """
    if path.suffix.lower() not in (".onnx", ".xml"):
        return is_exported(path)
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 128))
        return b"sha256" in file.read()


class _Damaged(Exception):
    """What is in a file is not what was written."""


def _open_archive(path: Path) -> tuple[str, dict[str, Any], Run]:
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():
                raise _Damaged
            compiled = any("/aotinductor/" in name for name in archive.namelist())
            ours = any(name.endswith(f"/{KEY}") for name in archive.namelist())
    except (zipfile.BadZipFile, NotImplementedError) as error:
        raise _Damaged from error
    if compiled:
        with path.open("rb") as file:
            package = torch._inductor.aoti_load_package(file)
        described = package.get_metadata()
        if KEY not in described:
            raise _Damaged
        return "aotinductor", json.loads(described[KEY]), package
    if not ours:
        raise _Damaged
    extra = {KEY: ""}
    # By its name it would have to end in .pt2. PyTorch fails where the default device is not the CPU.
    with path.open("rb") as file, torch.device("cpu"):
        program = torch.export.load(file, extra_files=extra)
    return "torch-export", json.loads(extra[KEY]), program.module()


def _open_onnx(path: Path) -> tuple[dict[str, Any], Run]:
    content = path.read_bytes()
    length = len(checksum(b""))
    if checksum(content[:-length]) != content[-length:]:
        raise _Damaged
    session = onnx_session(content)
    described = json.loads(session.get_modelmeta().custom_metadata_map[KEY])

    def run(images: Tensor) -> list[Tensor]:
        return [torch.from_numpy(output) for output in session.run(list(OUTPUTS), {"images": images.numpy()})]

    return described, run
