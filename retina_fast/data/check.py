"""Checking a data set before training on it: what is wrong with it, and how the model's anchors fit its boxes."""

import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from retina_fast.data.anchor_fit import AnchorFit
from retina_fast.data.coco import CocoDataset, Tried
from retina_fast.data.errors import ImageError
from retina_fast.data.faults import (
    UNUSABLE,
    Fault,
    Kind,
    Size,
    box_fault,
    corners,
    entry_faults,
    look_alikes,
    place,
    sizes_of,
    twins,
)
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
    """

    images: int = 0
    faults: Counter[Kind] = field(default_factory=Counter)
    objects: Counter[str] = field(default_factory=Counter)
    shapes: Tensor = field(default_factory=lambda: torch.zeros(0, 2))
    ious: Tensor = field(default_factory=lambda: torch.zeros(0))
    anchors: Tensor = field(default_factory=lambda: torch.zeros(0, 2))


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

    def report(kind: Kind, where: str, what: str) -> None:
        checked.faults[kind] += 1
        found(Fault(kind, where, what))

    content, folder = read_annotations(annotations, images, problem=lambda text: report(Kind.FILE, text, ""))
    source = str(annotations)
    for fault in [*entry_faults(content, source), *look_alikes(content, source)]:
        report(*fault)
    first = {record["id"]: record for record in reversed(content["images"])}  # of those with the same id
    content["images"] = list(reversed(first.values()))
    sizes = _read_images(annotations, folder, content, workers, console, report)
    checked.images = len(sizes)

    files = {record["id"]: record["file_name"] for record in content["images"]}
    classes = {category["id"]: str(category["name"]) for category in content["categories"]}

    def name(annotation: Annotation) -> str:
        file = files.get(annotation.get("image_id"))
        return place(source, annotation) + (f" ({file})" if file else "")

    boxes = []
    for annotation in content["annotations"]:
        wrong = box_fault(annotation, sizes, classes)
        if wrong:
            report(wrong.kind, name(annotation), wrong.what)
        if (wrong is None or wrong.kind not in UNUSABLE) and not annotation.get("iscrowd"):
            boxes.append(annotation)
    for kind, later, earlier in twins(boxes):
        other = ", of another class" if kind == Kind.TWO_LABELS else ""
        report(kind, name(later), f"with bbox {later['bbox']} is the same box as {place(source, earlier)}{other}")

    checked.objects = Counter(classes[box["category_id"]] for box in boxes)
    _compare_with_anchors(
        checked, AnchorFit(model), boxes, sizes, lambda box, what: report(Kind.UNTOUCHED, name(box), what)
    )
    return checked


def _compare_with_anchors(
    checked: Checked,
    fit: AnchorFit,
    boxes: Iterable[Annotation],
    sizes: Mapping[Any, Size | None],
    untouched: Callable[[Annotation, str], None],
) -> None:
    """Fills in `shapes`, `ious` and `anchors`, from the boxes of the images whose size is known.

    Calls `untouched` with each box that touches no anchor.
    """
    by_size = defaultdict(list)
    for box in boxes:
        if size := sizes[box["image_id"]]:
            by_size[size].append(box)
    shapes, best = [checked.shapes], [checked.ious]
    for size, group in by_size.items():
        ious = fit.best_ious(corners(group).float(), size)
        for row in (ious == 0).nonzero().flatten().tolist():
            rule = "every anchor that touches no other box would be foreground for it"
            untouched(group[row], f"with bbox {group[row]['bbox']} touches no anchor: {rule}")
        resized = fit.resized(corners(group).float(), size)
        shapes.append(resized[:, 2:] - resized[:, :2])
        best.append(ious)
        checked.anchors = fit.anchor_shapes(size)
    checked.shapes, checked.ious = torch.cat(shapes), torch.cat(best)


def _read_images(
    annotations: Path,
    folder: Path,
    content: dict[str, Any],
    workers: int,
    console: "Console | None",
    report: Callable[[Kind, str, str], None],
) -> dict[Any, Size | None]:
    """The size of each image by its id: the size in the file, or else the image's own; None if both are unknown.

    Images that cannot be read, or have another size, are reported.
    """
    sizes = sizes_of(content)
    records = content["images"]
    data = CocoDataset(annotations, folder, {"images": records, "annotations": [], "categories": []})
    loader: DataLoader = DataLoader(Tried(data), batch_size=None, collate_fn=_size, num_workers=workers)
    read = tracked(loader, "Reading images", len(records), console)
    for record, size in zip(records, read, strict=True):
        if isinstance(size, ImageError):
            report(Kind.IMAGE, "", str(size))
        else:
            sizes[record["id"]] = size
    return sizes


def _size(sample: Any) -> Size | ImageError:
    return sample if isinstance(sample, ImageError) else (sample[0].shape[1], sample[0].shape[2])


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
    figure.savefig(file, dpi=100)


def warn_of_faults(data: CocoDataset) -> None:
    """Warn, once, of the faults in the annotations of a data set that can be seen without reading its images.

    Example::

        >>> warn_of_faults(dataset)  # doctest: +SKIP
    """
    sizes, categories = sizes_of(data.coco), set(data.category_ids)
    annotations = data.coco["annotations"]
    kinds = Counter(fault.kind for fault in entry_faults(data.coco, ""))
    kinds += Counter(fault.kind for box in annotations if (fault := box_fault(box, sizes, categories)))
    kinds += Counter(kind for kind, *_ in twins(annotations))
    if kinds:
        faults = ", ".join(f"{count} x {kind}" for kind, count in kinds.most_common())
        warnings.warn(f"{data.json_file}: {faults}: `retina-fast check` names them", stacklevel=2)
