"""`retina-fast evaluate`: a model's COCO metrics on a data set."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from retina_fast.commands.shared import (
    Annotations,
    Images,
    ModelFile,
    Published,
    Weights,
    Workers,
    chosen_model,
    console,
    console_of,
    one_sentence,
    said_once,
)
from retina_fast.data.errors import one_line
from retina_fast.data.outputs import check_plot
from retina_fast.data.processes import WORKERS, joined
from retina_fast.data.voc import open_data, read_places

if TYPE_CHECKING:  # only when it runs does the command import what takes seconds
    from retina_fast.predict.evaluate import Evaluation

_MEANING = {
    "AP": "mean over IoU 0.50:0.95",
    "AP50": "at IoU 0.50",
    "AP75": "at IoU 0.75",
    "APs": "objects under 32x32 px",
    "APm": "objects of 32x32 to 96x96 px",
    "APl": "objects over 96x96 px",
    "AR": "recall, mean over IoU 0.50:0.95",
}


def evaluate(
    json: Annotations,
    images: Images = None,
    checkpoint: ModelFile = None,
    model: Published = None,
    weights: Weights = None,
    max_detections: Annotated[
        int | None, typer.Option(min=10, help="Of an image that count, best first; by default all. COCO's tables: 100.")
    ] = None,
    workers: Workers = WORKERS,
    plot: Annotated[Path | None, typer.Option(help="A picture to draw of precision over recall.")] = None,
) -> None:
    """Print a model's COCO metrics on a data set."""
    with one_sentence(), joined() as processes:
        from retina_fast.data.check import warn_of_faults
        from retina_fast.data.metrics import plot_precision_recall
        from retina_fast.predict.evaluate import evaluate as run

        if plot:
            check_plot(plot, [*read_places(json, images), *([checkpoint] if checkpoint else [])])
        network, content = chosen_model(checkpoint, model, weights)
        with said_once(processes):
            data = open_data(json, images)
            warn_of_faults(data)
        found = run(
            network,
            content.classes,
            data,
            max_detections=max_detections,
            workers=workers,
            console=console_of(processes),
            processes=processes,
        )
        if found:
            print_evaluation(found, console)
        if found and plot:
            plot_precision_recall(found.metrics, plot)
            console.print(f"Wrote {plot}", soft_wrap=True)


def print_evaluation(evaluation: "Evaluation", console: Console) -> None:
    """Print the metrics as a table, what they are over, and a last line `AP50 0.52`.

    Example::

        >>> print_evaluation(evaluation, Console())  # doctest: +SKIP
    """
    table = Table("metric", "value", "", box=None)
    for name, value in evaluation.metrics.values.items():
        table.add_row(name, "-" if value != value else f"{value:.3f}", _MEANING[name])
    console.print(table)
    console.print(
        f"over {evaluation.images} images; at most {evaluation.max_detections} detections an image count (COCO's own "
        "tables count 100: --max-detections)"
    )
    for problem in evaluation.crowded + evaluation.unreadable:
        console.print(f"warning: {one_line(problem)}", style="yellow", markup=False, emoji=False, soft_wrap=True)
    if evaluation.unreadable:
        console.print(f"{len(evaluation.unreadable)} images could not be read and do not count")
    console.print(f"AP50 {evaluation.metrics.values['AP50']:.2f}", highlight=False)
