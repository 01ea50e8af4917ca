"""What the commands share: options, the console, and errors and warnings as one sentence."""

import contextlib
import errno
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from retina_fast.data.errors import UserError, one_line
from retina_fast.data.processes import Processes

console = Console(markup=False, emoji=False)  # names of files and classes are printed as they are

DEFAULT_MODEL = "retinanet_resnet18_fpn_lite"

# PyTorch's words for tensors that the memory of the machine, or its numbers for sizes, cannot hold.
_TOO_LARGE = ("can't allocate memory", "not enough memory", "Storage size calculation overflowed")

MOST_IMAGES = 2**16  # at once: more than any memory holds, and few enough to be counted out

Workers = Annotated[int, typer.Option(min=0, max=1024, help="Processes that prepare images.")]
Images = Annotated[Path | None, typer.Option(help="The folder of their images; needed with COCO JSON.")]
Annotations = Annotated[
    Path,
    typer.Option(
        "--json", "--voc", help="Annotations: COCO JSON; or a Pascal VOC folder, or one of its lists of images."
    ),
]
ModelFile = Annotated[
    Path | None, typer.Option(help="The model file that train wrote; without it, the trees that come with the package.")
]
Published = Annotated[
    str | None, typer.Option("--model", help="A network with published --weights, in place of a checkpoint.")
]
Weights = Annotated[
    str | None, typer.Option(help="COCO_V1: torchvision's weights of --model, which it downloads. Labels are COCO's.")
]


def finite(value: float | None) -> float | None:
    """A number that an option was given. `min` and `max` of typer let NaN pass.

    Raises:
        typer.BadParameter: for NaN and infinity.

    Example::

        >>> finite(0.5)
        0.5
    """
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number")
    return value


@contextlib.contextmanager
def one_sentence() -> Iterator[None]:
    """Prints warnings, and errors that a person can put right, as one sentence on stderr; errors end with code 1.

    Example::

        >>> with one_sentence():  # doctest: +SKIP
        ...     raise UserError("photo.jpg: no such image file")
    """
    stderr = Console(stderr=True, soft_wrap=True, highlight=False, markup=False, emoji=False)

    def show(message: Warning | str, *_: object, **__: object) -> None:
        stderr.print(f"warning: {one_line(str(message))}", style="yellow")

    try:
        with warnings.catch_warnings():
            warnings.showwarning = show
            warnings.filterwarnings("ignore", "Dataset has no geotransform")  # rasterio's, of a TIFF that is no map
            yield
    except UserError as error:
        problem = str(error)
    except ModuleNotFoundError as error:
        problem = f"this command needs {error.name}: pip install '.[all]' in the folder of retina_fast's source"
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        if not full and error.filename is None:
            raise
        where = f" ({error.filename})" if error.filename else ""
        problem = f"the disk is full{where}: make room, and go on" if full else f"{error.filename}: {error.strerror}"
    except torch.OutOfMemoryError:
        problem = "the GPU's memory is too small for this: give a smaller --batch-size or --crop, or --accumulate"
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(words in str(error) for words in _TOO_LARGE):
            raise
        problem = "the memory is too small for this: give smaller numbers, of pixels or images at once for example"
    except KeyboardInterrupt:
        stderr.print("stopped before the end")
        raise typer.Exit(130) from None
    else:
        return
    stderr.print(f"error: {one_line(problem)}", style="red")
    raise typer.Exit(1)


@contextlib.contextmanager
def said_once(processes: Processes) -> Iterator[None]:
    """Silences warnings in all processes but the first, for a block in which every process warns of the same.

    Example::

        >>> with said_once(processes):  # doctest: +SKIP
        ...     data = open_data(json, images)
    """
    with warnings.catch_warnings():
        if not processes.first:
            warnings.simplefilter("ignore")
        yield


def console_of(processes: Processes) -> Console:
    """The console in the first process, and one that shows nothing in the others.

    Example::

        >>> console_of(Processes(rank=1, count=2)).quiet
        True
    """
    return console if processes.first else Console(quiet=True)


def chosen_model(checkpoint: Path | None, model: str | None, weights: str | None) -> tuple[Any, Any]:
    """The network that the options --checkpoint, --model and --weights choose, and the content of its file.

    Raises:
        UserError: if the options do not go together, or the file or the weights cannot be used.

    Example::

        >>> network, content = chosen_model(None, None, None)  # the trees that come with the package  # doctest: +SKIP
    """
    from retina_fast.predict.load import TREES, load_model, load_published

    if model and weights and not checkpoint:
        return load_published(model, weights)
    if model or weights:
        raise UserError("--model and --weights belong together, in place of --checkpoint")
    return load_model(checkpoint or TREES)
