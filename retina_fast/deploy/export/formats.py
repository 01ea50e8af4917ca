"""The formats of exported files: what their names end in, and what writing one needs, which is not imported here."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from retina_fast.data.errors import UserError
from retina_fast.data.images import IMAGE_SUFFIXES
from retina_fast.deploy.export.openvino_files import check_openvino


@dataclass(frozen=True)
class Format:
    """A format of exported files.

    Attributes:
        suffix: what the name of a file ends in.
        packages: those that writing one needs beside torch.
        through_onnx: whether the graph is made of ONNX's operators, which on a CPU need float32 weights.
        check: raises a UserError if a file of the given name cannot be written.
    """

    suffix: str
    packages: tuple[str, ...] = ()
    through_onnx: bool = False
    check: Callable[[Path], None] | None = None


def check_compiler(path: Path) -> None:
    """Raises a UserError if there is no C++ compiler."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise UserError("aotinductor needs a C++ compiler, and none was found: install g++ or clang++") from error


_ONNX = ("onnx", "onnxscript")
FORMATS = {
    "torch-export": Format(".pt2"),
    "onnx": Format(".onnx", _ONNX, through_onnx=True),
    "openvino": Format(".xml", (*_ONNX, "openvino"), through_onnx=True, check=check_openvino),
    "aotinductor": Format(".pt2", check=check_compiler),
}
"""Every format by its name."""


def checked_format(name: str, path: Path, dtype: torch.dtype) -> Format:
    """The format of that name, after a look at all that would make writing it fail in the end.

    Args:
        name: of the format.
        path: the file to be written.
        dtype: of the model's weights.

    Raises:
        UserError: for an unknown name, packages or a compiler that are missing, a file that cannot be written or has
            the name of an image, or weights that the format cannot hold.

    Example::

        >>> checked_format("torch-export", Path("model.pt2"), torch.float32).suffix
        '.pt2'
    """
    if name not in FORMATS:
        raise UserError(f"format must be one of {', '.join(FORMATS)}, got {name!r}")
    format = FORMATS[name]
    missing = [package for package in format.packages if find_spec(package) is None]
    if missing:
        raise UserError(f"{name} needs {', '.join(missing)}: pip install {' '.join(missing)}")
    if path.suffix.lower() in IMAGE_SUFFIXES:
        raise UserError(f"{path}: is the name of an image; the name of a file for {name} ends in {format.suffix}")
    if format.check:
        format.check(path)
    if format.through_onnx and dtype != torch.float32:  # ONNX Runtime has no convolutions of others on a CPU
        raise UserError(f"for {name} the model's weights must be float32, got {dtype}: call model.float()")
    return format
