"""`retina-fast check`: everything that is wrong with a data set."""

from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from retina_fast.commands.shared import DEFAULT_MODEL, Images, Workers, console, one_sentence
from retina_fast.data.errors import one_line
from retina_fast.data.outputs import check_plot
from retina_fast.data.processes import WORKERS
from retina_fast.data.voc import read_places

if TYPE_CHECKING:  # only when it runs does the command import what takes seconds
    from retina_fast.data.check import Checked

# px: the rows of the table of sizes. Powers of two, as the anchors' sides are.
_SIDES = (0.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, float("inf"))


def check(
    data: Annotated[Path, typer.Argument(help="COCO JSON; or a Pascal VOC folder, or one of its lists of images.")],
    images: Images = None,
    model: Annotated[str, typer.Option(help="The network to be trained, for its anchors.")] = DEFAULT_MODEL,
    workers: Workers = WORKERS,
    plot: Annotated[Path | None, typer.Option(help="A picture to draw of the sizes of boxes and anchors.")] = None,
) -> None:
    """Name everything that is wrong with a data set before training on it; the exit code is 1 if something is."""
    with one_sentence():
        from retina_fast.checkpoint import build
        from retina_fast.data.check import check as run
        from retina_fast.data.check import plot_sizes

        if plot:
            check_plot(plot, read_places(data, images))

        def show(fault: object) -> None:
            console.print(str(fault), markup=False, soft_wrap=True, highlight=False)

        checked = run(data, images, build(model, 1), show, workers=workers, console=console)
        print_checked(checked, console)
        if plot:
            plot_sizes(checked, plot)
            console.print(f"Wrote {plot}", soft_wrap=True)
        if checked.faults:
            raise typer.Exit(1)


def print_checked(checked: "Checked", console: Console) -> None:
    """Print the classes, the sizes of the boxes against the anchors, and how many faults there are.

    Example::

        >>> print_checked(checked, Console())  # doctest: +SKIP
    """
    table = Table("class", "boxes", box=None)
    for name, count in checked.objects.most_common():
        table.add_row(Text(one_line(name)), str(count))
    console.print(table)
    if len(checked.ious):
        anchors = checked.anchors.prod(dim=1).sqrt()
        console.print(
            "\nBoxes by their side, the root of their area, in the model's pixels; its anchors have sides of "
            f"{anchors.min():.0f} to {anchors.max():.0f}. "
            "A box whose best IoU with an anchor is under 0.5 is learnt from that anchor alone."
        )
        console.print(_table_of_sizes(checked.shapes.prod(dim=1).sqrt(), checked.ious))
        sides = ", ".join(str(side) for (side,) in checked.proposed["sizes"])
        with_these, with_own = checked.proposed_ious.mean(), checked.ious.mean()
        console.print(
            f"\nOf one anchor a cell, sides of {sides} and a ratio of {checked.proposed['ratios'][0]:g} fit best: the "
            f"mean best IoU of a box is {with_these:.2f} with them, {with_own:.2f} with the model's. To use them, "
            "train with --anchors auto and --matcher atss, which needs no IoU of 0.5."
        )
    console.print(f"\n{checked.images} images, {checked.objects.total()} boxes, {checked.faults.total()} faults")
    for kind, count in checked.faults.most_common():
        console.print(f"  {count} x {kind}: {kind.consequence}")


def _table_of_sizes(sides: Tensor, ious: Tensor) -> Table:
    """A row for each range of sides that holds a box.

    Args:
        sides: (G,) in pixels.
        ious: (G,) the highest IoU of each box with any anchor.
    """
    table = Table("side, px", "boxes", "median best IoU", "under 0.5", "under 0.4", box=None)
    for low, high in pairwise(_SIDES):
        inside = ious[(sides >= low) & (sides < high)]
        if len(inside):
            shares = [f"{(inside < limit).float().mean():.1%}" for limit in (0.5, 0.4)]
            table.add_row(f"{low:.0f} to {high:.0f}", str(len(inside)), f"{inside.median():.2f}", *shares)
    return table
