"""Checking a data set before training on it: what is wrong with it, and how the model's anchors fit its boxes."""

import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from retina_fast.data.anchor_fit import AnchorFit, proposed_anchors
from retina_fast.data.coco import CocoDataset, Tried
from retina_fast.data.errors import ImageError
from retina_fast.data.faults import LEFT_OUT, Fault, Kind, Size, corners, no_box, place, spelling, twins
from retina_fast.data.fitting import FittingImages
from retina_fast.data.outputs import save_plot
from retina_fast.data.processes import WORKERS
from retina_fast.data.progress import tracked
from retina_fast.data.voc import read_annotations

if TYPE_CHECKING:
    from rich.console import Console

Annotation = Mapping[str, Any]


@dataclass
class Checked:
    """The result of :func:`check`.

    Attributes:
        images: how many images the data set lists.
        faults: how many faults of each kind.
        objects: how many boxes of each class, without crowd regions.
        shapes: (G, 2) width and height of the boxes, in pixels of the images as the model resizes them.
        ious: (G,) the highest IoU of each of these boxes with any anchor.
        anchors: (A, 2) width and height of the model's anchors.
        proposed: one anchor a cell that fits the boxes, see :func:`retina_fast.data.anchor_fit.proposed_anchors`; empty
            if there is no box.
        proposed_ious: (G,) the highest IoU of each box with any of those.
    """

    images: int = 0
    faults: Counter[Kind] = field(default_factory=Counter)
    objects: Counter[str] = field(default_factory=Counter)
    shapes: Tensor = field(default_factory=lambda: torch.zeros(0, 2))
    ious: Tensor = field(default_factory=lambda: torch.zeros(0))
    anchors: Tensor = field(default_factory=lambda: torch.zeros(0, 2))
    proposed: dict[str, Any] = field(default_factory=dict)
    proposed_ious: Tensor = field(default_factory=lambda: torch.zeros(0))


def check(
    annotations: Path,
    images: Path | None,
    model: Any,
    found: Callable[[Fault], None],
    *,
    workers: int = WORKERS,
    console: "Console | None" = None,
) -> Checked:
    """Check every entry, every box and every image of a data set.

    Args:
        annotations: COCO JSON or Pascal VOC, as for :func:`retina_fast.data.voc.open_data`.
        images: the folder of the images, which a .json file needs.
        model: the RetinaNet with whose anchors the boxes are compared. It cannot be used any more.
        found: called with each fault as soon as it is found.
        workers: how many processes read images.
        console: where the progress bar is shown; nowhere by default.

    Raises:
        UserError: if the annotations cannot be read at all.

    Example::

        >>> checked = check(Path("val.json"), Path("val"), model, print)  # doctest: +SKIP
    """
    checked = Checked()

    def report(fault: Fault) -> None:
        checked.faults[fault.kind] += 1
        found(fault._replace(where=f"{fault.where} ({fault.image})") if fault.image else fault)

    content, folder = read_annotations(annotations, images, found=report)
    data = CocoDataset(annotations, folder, content, found=report)
    checked.images = len(data)
    readable = _readable(data, model.transform, workers, console, report)

    files = {record["id"]: record["file_name"] for record in data.images}
    classes = dict(zip(data.category_ids, data.classes, strict=True))
    boxes = [box for box in data.coco["annotations"] if not box["iscrowd"]]
    checked.objects = Counter(classes[box["category_id"]] for box in boxes)
    if nothing := no_box(boxes, str(annotations)):
        report(nothing)
    boxes += [box for fault, box in data.left_out if fault.kind == Kind.OUTSIDE and not box["iscrowd"]]

    def report_box(kind: Kind, box: Annotation, what: str) -> None:
        report(Fault(kind, place(str(annotations), box), f"with bbox {box['bbox']} {what}", files[box["image_id"]]))

    for kind, later, earlier in twins(boxes):
        other = ", of another class" if kind == Kind.TWO_LABELS else ""
        report_box(kind, later, f"is the same box as {place(str(annotations), earlier)}{other}")
    by_size = defaultdict(list)
    for box in boxes:
        if box["image_id"] in readable and (size := data.sizes[box["image_id"]]):
            by_size[size].append(box)
    _compare_with_anchors(checked, AnchorFit(model), by_size, report_box)
    return checked


def _compare_with_anchors(
    checked: Checked,
    fit: AnchorFit,
    by_size: Mapping[Size, list[Annotation]],
    report: Callable[[Kind, Annotation, str], None],
) -> None:
    """Fills in `shapes`, `ious` and `anchors`, from the boxes by the size of their image; reports untouched ones."""
    shapes, best = [checked.shapes], [checked.ious]
    for size, group in by_size.items():
        ious = fit.best_ious(corners(group).float(), size)
        for row in (ious == 0).nonzero().flatten().tolist():
            rule = "every anchor that touches no other box would be foreground for it"
            report(Kind.UNTOUCHED, group[row], f"touches no anchor: {rule}")
        resized = fit.resized(corners(group).float(), size)
        shapes.append(resized[:, 2:] - resized[:, :2])
        best.append(ious)
        checked.anchors = fit.anchor_shapes(size)
    checked.shapes, checked.ious = torch.cat(shapes), torch.cat(best)
    if len(checked.shapes):
        checked.proposed = proposed_anchors(checked.shapes, fit.strides(next(iter(by_size))))
        other = fit.with_anchors(checked.proposed)
        checked.proposed_ious = torch.cat(
            [other.best_ious(corners(group).float(), size) for size, group in by_size.items()]
        )


def _readable(
    data: CocoDataset, transform: Any, workers: int, console: "Console | None", report: Callable[[Fault], None]
) -> set[int | str]:
    """The ids of the images that can be read, have the size in the file and fit the model; the others are reported."""
    images = Tried(FittingImages(data, transform))
    loader: DataLoader = DataLoader(images, batch_size=None, collate_fn=_problem, num_workers=workers)
    readable = set()
    problems = tracked(loader, "Reading images", len(data), console)
    for record, problem in zip(data.images, problems, strict=True):
        if problem:
            report(Fault(Kind.IMAGE, problem, ""))
        else:
            readable.add(record["id"])
    return readable


def _problem(sample: Any) -> str:
    """Why an image could not be read; empty if it could."""
    return str(sample) if isinstance(sample, ImageError) else ""


def plot_sizes(checked: Checked, file: Path) -> None:
    """Draw the width and height of every box, coloured by its best IoU, and those of the anchors.

    Example::

        >>> plot_sizes(checked, Path("boxes.png"))  # doctest: +SKIP
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 6), layout="constrained")
    axes = figure.add_subplot(xlabel="width, px as the model sees it", ylabel="height", xscale="log", yscale="log")
    width, height = checked.shapes.T
    dots = axes.scatter(width, height, c=checked.ious, s=6, vmin=0, vmax=1, label="boxes")
    width, height = checked.anchors.T
    axes.scatter(width, height, marker="+", c="red", label="anchors")
    figure.colorbar(dots, label="highest IoU with an anchor")
    axes.legend()
    save_plot(figure, file)


def warn_of_faults(data: CocoDataset) -> None:
    """Warn, once, of the faults in the annotations of a data set that can be seen without reading its images, and where
    no box is left.

    Boxes that are left out are not among them, since the data set has warned of these.

    Example::

        >>> warn_of_faults(dataset)  # doctest: +SKIP
    """
    kinds = Counter(fault.kind for fault in data.faults if fault.kind not in LEFT_OUT)
    kinds += Counter(kind for kind, *_ in twins(data.coco["annotations"]))
    if kinds:
        faults = ", ".join(f"{count} x {kind}" for kind, count in kinds.most_common())
        warnings.warn(f"{data.json_file}: {faults}: `retina-fast check` names them", stacklevel=2)
    if nothing := no_box(data.coco["annotations"], str(data.json_file)):
        warnings.warn(str(nothing), stacklevel=2)


_NO_CLASS = ("__background__", "N/A")  # labels of torchvision's weights that stand for no class


def warn_of_other_classes(classes: Sequence[str], data: CocoDataset) -> None:
    """Warn of classes that a model and the data it is evaluated on do not share: they are found by name.

    Args:
        classes: the names of the model's classes.
        data: the images and their true boxes.

    Example::

        >>> warn_of_other_classes(["Tree"], dataset)  # doctest: +SKIP
    """
    labels = Counter(box["category_id"] for box in data.coco["annotations"] if not box["iscrowd"])
    counts = {name: labels[number] for name, number in zip(data.classes, data.category_ids, strict=True)}
    lacking = {name: counts[name] for name in data.classes if name not in classes}
    unknown = [f"{name} ({count} box{'es' * (count != 1)})" for name, count in lacking.items()]
    unused = [name for name in classes if name not in (*counts, *_NO_CLASS)]
    if unknown:
        warnings.warn(
            f"{data.json_file} has classes that the model does not find, so that their boxes count as missed: "
            f"{_listed(unknown)}",
            stacklevel=2,
        )
    if unused:
        warnings.warn(
            f"the model finds classes that {data.json_file} does not have, so that these detections do not count: "
            f"{_listed(unused)}",
            stacklevel=2,
        )
    for name in unused:
        for other in data.classes:
            if other not in classes and spelling(other) == spelling(name):
                warnings.warn(f"the model's {name!r} and the data's {other!r} are probably one class", stacklevel=2)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
