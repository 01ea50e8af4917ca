"""`retina-fast detect`: objects in images, wherever they are."""

from collections import Counter
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from retina_fast.commands.shared import (
    ModelFile,
    Weights,
    chosen_model,
    console,
    console_of,
    finite,
    one_sentence,
)
from retina_fast.data.errors import UserError, one_line
from retina_fast.data.processes import WORKERS, joined

if TYPE_CHECKING:  # only when it runs does the command import what takes seconds
    from retina_fast.predict.detect import Found


class Kind(StrEnum):
    """The files that the command writes."""

    COCO = "coco"
    CSV = "csv"
    GEOJSON = "geojson"
    HTML = "html"
    YOLO = "yolo"


def detect(
    inputs: Annotated[
        list[str],
        typer.Argument(
            help="Images, videos, folders, .txt lists, URLs, globs, or the number of a camera.", metavar="SOURCE..."
        ),
    ],
    output: Annotated[Path, typer.Option(help="The folder for pictures and files of the detections.")] = Path("out"),
    score: Annotated[float, typer.Option(min=0, max=1, callback=finite, help="The least score of a detection.")] = 0.3,
    format: Annotated[
        list[Kind] | None,
        typer.Option(help="Of the files; may be repeated. html is a page to look through.  [default: coco]"),
    ] = None,
    tile: Annotated[
        int | None, typer.Option(min=1, help="Sides of tiles in pixels, into which larger images are cut, such as 800.")
    ] = None,
    overlap: Annotated[
        float, typer.Option(min=0, max=0.99, callback=finite, help="The part of a side that tiles share.")
    ] = 0.2,
    resume: Annotated[
        bool, typer.Option(help="Go on from what a run that was stopped left, and leave it if this one is stopped.")
    ] = False,
    checkpoint: ModelFile = None,
    model: Annotated[
        str | None,
        typer.Option(help="A file that export wrote; or, with --weights, a network. In place of a checkpoint."),
    ] = None,
    weights: Weights = None,
    workers: Annotated[int, typer.Option(min=0, help="Threads that read images.")] = WORKERS,
) -> None:
    """Find objects in images."""
    with one_sentence(), joined() as processes:
        from retina_fast.predict.detect import KINDS
        from retina_fast.predict.detect import detect as run

        network: Any
        content: Any
        if model and not weights:
            network = content = _chosen_export(Path(model), checkpoint)
        else:
            network, content = chosen_model(checkpoint, model, weights)
        kinds = [str(kind) for kind in format or [Kind.COCO]]
        try:
            found = run(
                network,
                content,
                inputs,
                output,
                score,
                kinds=kinds,
                tile=tile,
                overlap=overlap,
                resume=resume,
                workers=workers,
                console=console_of(processes),
                processes=processes,
            )
        except KeyboardInterrupt:
            if resume and processes.first:
                console.print(f"{output} keeps what was found: the same command goes on", markup=False, soft_wrap=True)
            raise
        if found:
            print_found(found, console)
            if not found.images:
                raise UserError("not one of the images " + ("can be read" if found.unreadable else "fits the model"))
            files = ", ".join(str(output / KINDS.get(kind, "labels")) for kind in dict.fromkeys(kinds))
            console.print(f"Wrote {files} and {found.images} pictures beside it", soft_wrap=True)


def _chosen_export(file: Path, checkpoint: Path | None) -> Any:
    """The exported model in the file that --model names."""
    from retina_fast.deploy.export.exported import load_exported

    if checkpoint:
        raise UserError("--model and --checkpoint exclude each other: give one of them")
    return load_exported(file)


def print_found(found: "Found", console: Console) -> None:
    """Print which images could not be used, a table of the first images and their objects, and the totals.

    Example::

        >>> print_found(found, Console())  # doctest: +SKIP
    """

    def words(counts: Counter[str]) -> str:
        return ", ".join(f"{count} {one_line(name)}" for name, count in counts.most_common()) or "none"

    for problem in found.unreadable + found.unfit:
        console.print(f"warning: {one_line(problem)}", style="yellow", markup=False, emoji=False, soft_wrap=True)
    table = Table(Column("image", overflow="fold"), Column("objects", overflow="fold"))
    for path, counts in found.first.items():
        table.add_row(Text(one_line(path)), Text(words(counts)))
    if found.images > len(found.first):
        table.add_row(f"... all {found.images}", Text(words(found.objects)))
    if found.images:
        console.print(table)
    every = len(found.unreadable) + len(found.unfit) + found.images
    if found.unreadable:
        console.print(f"{len(found.unreadable)} of {every} images could not be read")
    if found.unfit:
        console.print(f"{len(found.unfit)} of {every} images do not fit the model")
