"""A network as a file: its builder and the builder's arguments, which `retina-fast train --model` takes for a name."""

import json
from pathlib import Path
from typing import Any

from retina_fast.builders import MODELS
from retina_fast.data.errors import UserError
from retina_fast.data.files import replacing

_FIELDS = {"model": str, "arguments": dict}


def write_model_file(path: Path, model: str, arguments: dict[str, Any]) -> None:
    """Write a network as JSON.

    Args:
        path: the file.
        model: a builder's name in `retina_fast.builders.MODELS`.
        arguments: the builder's keyword arguments, as plain data.

    Raises:
        UserError: if it cannot be written.

    Example::

        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_model_file(Path(folder) / "a.json", "retinanet_spinenet49", {"activation": "silu"})
        ...     read_model_file(Path(folder) / "a.json")
        ('retinanet_spinenet49', {'activation': 'silu'})
    """
    with replacing(path) as partial:
        partial.write_text(json.dumps({"model": model, "arguments": arguments}, indent=1) + "\n")


def read_model_file(path: Path) -> tuple[str, dict[str, Any]]:
    """The builder's name and arguments that a file holds.

    Raises:
        UserError: if there is no such file, or it holds something else.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file of a network")
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path}: is no JSON ({error})") from error
    fits = isinstance(content, dict) and content.keys() == _FIELDS.keys()
    if not fits or not all(isinstance(content[name], kind) for name, kind in _FIELDS.items()):
        raise UserError(f'{path}: must hold {{"model": name, "arguments": {{...}}}} and nothing else')
    if content["model"] not in MODELS:
        raise UserError(f"{path}: there is no model {content['model']!r}; choose one of {', '.join(sorted(MODELS))}")
    return content["model"], content["arguments"]
