"""COCO metrics of a model on a data set."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from retina_fast.data.check import warn_of_other_classes
from retina_fast.data.coco import CocoDataset, as_results
from retina_fast.data.errors import ImageError, UserError
from retina_fast.data.metrics import CocoMetrics, coco_metrics
from retina_fast.data.processes import ALONE, WORKERS, Processes
from retina_fast.data.progress import tracked
from retina_fast.predict.batches import predictions

if TYPE_CHECKING:  # rich is needed only where progress is shown
    from rich.console import Console

_Seen = tuple[str, int, dict[str, Tensor]]  # an image's path, how many objects it has, and what was found in it


@dataclass
class Evaluation:
    """The result of :func:`evaluate`.

    Attributes:
        metrics: COCO's metrics over the images that could be read.
        results: the detections, as COCO results.
        images: how many images counted.
        max_detections: the most detections that counted in an image.
        unreadable: one message for each image that could not be read.
        crowded: one message for each image with more objects than the model gives detections.
    """

    metrics: CocoMetrics
    results: list[dict[str, Any]]
    images: int
    max_detections: int
    unreadable: list[str]
    crowded: list[str]


def evaluate(
    model: Any,
    classes: list[str],
    data: CocoDataset,
    *,
    max_detections: int | None = None,
    workers: int = WORKERS,
    console: "Console | None" = None,
    processes: Processes = ALONE,
) -> Evaluation | None:
    """Run the model over the data and compute COCO's metrics.

    Args:
        model: a RetinaNet in evaluation mode.
        classes: its K class names; they are found in the data by name. A warning names those that only one of the two
            has.
        data: the images and their true boxes.
        max_detections: the most detections of an image that count; by default all that the model gives. At
            least 10.
        workers: how many processes read images.
        console: where the progress bar is shown; nowhere by default.
        processes: they share the images. The first one computes the metrics; the others get None.

    Raises:
        UserError: if model and data have no class in common, not one image can be read, or fewer than 10 detections
            are to count.

    Example::

        >>> evaluate(model, ["Tree"], dataset).metrics.values["AP50"]  # doctest: +SKIP
        0.52
    """
    if max_detections is not None and max_detections < 10:
        raise UserError(
            f"--max-detections must be at least 10, since COCO's metrics count 10 too, got {max_detections}"
        )
    ids = dict(zip(data.classes, data.category_ids, strict=True))
    category_ids = [ids.get(name) for name in classes]
    if not any(name in ids for name in classes):
        raise UserError(f"the model finds {', '.join(classes)}; {data.json_file} has only {', '.join(data.classes)}")
    if processes.first:
        warn_of_other_classes(classes, data)
    share = processes.share(len(data))
    found: list[tuple[int, str | _Seen]] = []
    predicted = zip(share, predictions(model, data, workers, share), strict=True)
    for index, prediction in tracked(predicted, "Evaluating", len(share), console):
        if isinstance(prediction, ImageError):
            found.append((index, str(prediction)))
        else:
            (_, target), detections = prediction
            found.append((index, (target["path"], len(target["boxes"]), detections)))
    shares = processes.gather(found)
    if not processes.first:
        return None
    results: list[dict[str, Any]] = []
    image_ids, unreadable, crowded = [], [], []
    limit = model.detections_per_img
    for index, seen in sorted((entry for share in shares for entry in share), key=lambda entry: entry[0]):
        if isinstance(seen, str):
            unreadable.append(seen)
            continue
        path, objects, detections = seen
        if objects > limit:
            crowded.append(f"{path}: has {objects} objects, but the model gives at most {limit}")
        image_id = data.images[index]["id"]
        results += as_results(detections, image_id, category_ids)
        image_ids.append(image_id)
    if not image_ids:
        raise UserError(f"not one of the {len(data)} images can be read; the first: {unreadable[0]}")
    counted = min(limit, max_detections or limit)
    metrics = coco_metrics(data.coco, results, image_ids, counted)
    return Evaluation(metrics, results, len(image_ids), counted, unreadable, crowded)
