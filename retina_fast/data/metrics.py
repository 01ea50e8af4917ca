"""COCO metrics, computed by faster-coco-eval, and their curves of precision over recall."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from faster_coco_eval import COCO, COCOeval_faster

from retina_fast.data.entries import as_id
from retina_fast.data.outputs import save_plot

# In the order of COCO's own summary; None stands for a metric that is not reported.
_SUMMARY = ("AP", "AP50", "AP75", "APs", "APm", "APl", None, None, "AR")
_CURVES = {"IoU 0.50": slice(0, 1), "IoU 0.75": slice(5, 6), "IoU 0.50:0.95": slice(None)}

RECALLS = [step / 100 for step in range(101)]
"""The 101 recalls at which COCO takes the precision."""


@dataclass
class CocoMetrics:
    """COCO's metrics of a detector on a data set.

    Attributes:
        values: the box metrics by name, each 0 to 1, or NaN where the data has no object of that size.
        precision: the precision at each of `RECALLS`, mean over the classes: a curve for IoU 0.50, one for 0.75 and the
            mean curve of 0.50:0.95.
    """

    values: dict[str, float]
    precision: dict[str, list[float]]


def coco_metrics(
    coco: dict[str, Any], results: list[dict[str, Any]], image_ids: Iterable[Any], max_detections: int
) -> CocoMetrics:
    """COCO's box metrics (https://cocodataset.org/#detection-eval), computed by faster-coco-eval.

    AP is the mean over IoU 0.50:0.95, AP50 and AP75 are those at one IoU; APs, APm and APl count objects under 32x32
    px, up to 96x96 px, and over; AR is the recall, mean over IoU 0.50:0.95.

    Images, annotations and categories are numbered anew from 1, so that no id changes a figure: to faster-coco-eval, an
    annotation of id 0 is one that nothing was matched with.

    Args:
        coco: the ground truth, a COCO file's content; every annotation with `area` and `iscrowd`.
        results: detections as :func:`retina_fast.data.coco.as_results` gives them.
        image_ids: the images that count.
        max_detections: the most detections of an image that count, best first. COCO's own number is 100.

    Example::

        >>> coco_metrics(dataset.coco, results, image_ids=[1, 2], max_detections=300).values["AP50"]  # doctest: +SKIP
        0.52
    """
    images = {as_id(image_id): number for number, image_id in enumerate(image_ids, start=1)}
    categories = {as_id(category["id"]): number for number, category in enumerate(coco["categories"], start=1)}
    truth = COCO(
        {
            "images": [{"id": number} for number in images.values()],
            "categories": [{"id": number} for number in categories.values()],
            "annotations": _renumbered(coco["annotations"], images, categories),
        }
    )
    found = truth.loadRes(_renumbered(results, images, categories))
    evaluation = COCOeval_faster(truth, found, "bbox", print_function=lambda *_: None)
    evaluation.params.imgIds = list(images.values())
    evaluation.params.maxDets = [1, 10, max(10, max_detections)]
    evaluation.run()
    values = {name: float(value) for name, value in zip(_SUMMARY, evaluation.stats, strict=False) if name}
    values = {name: math.nan if value < 0 else value for name, value in values.items()}
    precision = evaluation.eval["precision"][:, :, :, 0, -1]  # IoU, recall, class; -1 for a class without an object
    precision = precision[:, :, (precision >= 0).all(axis=(0, 1))]
    curves = {}
    if precision.size:
        curves = {name: precision[part].mean(axis=(0, 2)).tolist() for name, part in _CURVES.items()}
    return CocoMetrics(values, curves)


_KEPT = ("bbox", "area", "iscrowd", "score")


def _renumbered(
    entries: Iterable[Mapping[str, Any]], images: Mapping[Any, int], categories: Mapping[Any, int]
) -> list[dict[str, Any]]:
    """The annotations or results of these images and categories, with our numbers in place of all ids."""
    kept: list[dict[str, Any]] = []
    for entry in entries:
        image, category = images.get(as_id(entry["image_id"])), categories.get(as_id(entry["category_id"]))
        if image and category:
            values = {name: entry[name] for name in _KEPT if name in entry}
            kept.append({"id": len(kept) + 1, "image_id": image, "category_id": category} | values)
    return kept


def plot_precision_recall(metrics: CocoMetrics, file: Path) -> None:
    """Draw precision over recall, a curve for each entry of `metrics.precision`, with its average precision.

    Example::

        >>> plot_precision_recall(evaluation.metrics, Path("precision_recall.png"))  # doctest: +SKIP
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 5), layout="constrained")
    axes = figure.add_subplot(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
    for name, precision in metrics.precision.items():
        axes.plot(RECALLS, precision, label=f"{name}, AP {sum(precision) / len(precision):.3f}")
    if axes.lines:
        axes.legend()
    axes.set_title("mean over the classes")
    axes.grid(alpha=0.3)
    save_plot(figure, file)
