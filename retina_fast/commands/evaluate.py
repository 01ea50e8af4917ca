"""COCO metrics of a model on a data set: `retina-fast evaluate`."""

from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from retina_fast.commands.predict import predictions
from retina_fast.data.coco import CocoDataset
from retina_fast.errors import ImageError, UserError
from retina_fast.metrics import as_results, coco_metrics

_MEANING = {
    "AP": "mean over IoU 0.50:0.95",
    "AP50": "at IoU 0.50",
    "AP75": "at IoU 0.75",
    "APs": "objects under 32x32 px",
    "APm": "objects of 32x32 to 96x96 px",
    "APl": "objects over 96x96 px",
    "AR": "recall, mean over IoU 0.50:0.95",
}


@dataclass
class Evaluation:
    """What :func:`evaluate` found.

    Attributes:
        metrics: COCO's box metrics by name, 0 to 1, over the images that could be read.
        results: the detections, as COCO results.
        images: how many images counted.
        max_detections: the most detections that counted in an image.
        unreadable: one message for each image that could not be read.
        crowded: one message for each image with more objects than the model gives detections.
    """

    metrics: dict[str, float]
    results: list[dict[str, Any]]
    images: int
    max_detections: int
    unreadable: list[str]
    crowded: list[str]


def evaluate(
    model: Any,
    classes: list[str],
    data: CocoDataset,
    workers: int,
    console: Console,
    max_detections: int | None = None,
) -> Evaluation:
    """Run the model over the data and compute COCO's metrics.

    Args:
        model: a RetinaNet in evaluation mode.
        classes: its K class names; they are found in the data by name.
        data: the images and their true boxes.
        workers: processes that read images.
        console: where the progress bar is shown.
        max_detections: the most detections of an image that count; by default all that the model gives.

    Raises:
        UserError: if model and data have no class in common, or not one image can be read.

    Example::

        >>> evaluate(model, ["Tree"], dataset, workers=1, console=Console()).metrics["AP50"]  # doctest: +SKIP
        0.52
    """
    ids = dict(zip(data.classes, data.category_ids, strict=True))
    category_ids = [ids.get(name) for name in classes]
    if not any(name in ids for name in classes):
        raise UserError(f"the model finds {', '.join(classes)}; {data.json_file} has only {', '.join(data.classes)}")
    results: list[dict[str, Any]] = []
    image_ids, unreadable, crowded = [], [], []
    limit = model.detections_per_img
    found = predictions(model, data, workers)
    for prediction in track(found, "Evaluating", total=len(data), console=console, transient=True):
        if isinstance(prediction, ImageError):
            unreadable.append(str(prediction))
            continue
        (_, target), detections = prediction
        if len(target["boxes"]) > limit:
            crowded.append(f"{target['path']}: has {len(target['boxes'])} objects, but the model gives at most {limit}")
        results += as_results(detections, target["image_id"], category_ids)
        image_ids.append(target["image_id"])
    if not image_ids:
        raise UserError(f"not one of the {len(data)} images can be read; the first: {unreadable[0]}")
    counted = min(limit, max_detections or limit)
    metrics = coco_metrics(data.coco, results, image_ids, counted)
    return Evaluation(metrics, results, len(image_ids), counted, unreadable, crowded)


def report(evaluation: Evaluation, console: Console) -> None:
    """Print the metrics as a table, what they are over, and a last line `AP50 0.52`.

    Example::

        >>> report(evaluation, Console())  # doctest: +SKIP
    """
    table = Table("metric", "value", "", box=None)
    for name, value in evaluation.metrics.items():
        table.add_row(name, "-" if value != value else f"{value:.3f}", _MEANING[name])
    console.print(table)
    console.print(
        f"over {evaluation.images} images; at most {evaluation.max_detections} detections an image count (COCO's own "
        "tables count 100: --max-detections)"
    )
    for problem in evaluation.crowded + evaluation.unreadable:
        console.print(f"warning: {problem}", style="yellow", markup=False, soft_wrap=True)
    if evaluation.unreadable:
        console.print(f"{len(evaluation.unreadable)} images could not be read and do not count")
    console.print(f"AP50 {evaluation.metrics['AP50']:.2f}", highlight=False)
