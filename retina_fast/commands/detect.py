"""Objects in image files: `retina-fast detect`.

Into the output folder go detections.json, a COCO file with scores, and a picture with boxes for each image.
"""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table
from torchvision.io import write_jpeg

from retina_fast.checkpoint import Checkpoint
from retina_fast.commands.predict import predictions
from retina_fast.data.coco import IMAGE_SUFFIXES, Sample, read_image
from retina_fast.draw import above, draw_detections
from retina_fast.errors import ImageError, UserError
from retina_fast.exported import Exported
from retina_fast.metrics import as_results


@dataclass
class Found:
    """What :func:`detect` found: a count of objects by class for each image, and the images that cannot be read."""

    counts: dict[Path, Counter[str]]
    unreadable: list[str]


class ImageFiles:
    """A data set of image files without annotations.

    Example::

        >>> image, target = ImageFiles([Path("photo.jpg")])[0]  # doctest: +SKIP
    """

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Sample:
        return read_image(self.paths[index]), {"path": str(self.paths[index])}


def image_files(inputs: list[Path]) -> list[Path]:
    """The files among the inputs, and the images directly in the folders among them, each once.

    Raises:
        UserError: for a folder without images.

    Example::

        >>> image_files([Path("photos"), Path("another.jpg")])  # doctest: +SKIP
    """
    files: list[Path] = []
    for path in inputs:
        inside = sorted(p for p in path.glob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
        if path.is_dir() and not inside:
            raise UserError(f"{path}: holds no image ({', '.join(IMAGE_SUFFIXES)})")
        files += inside if path.is_dir() else [path]
    return list(dict.fromkeys(files))


def detect(
    model: Any,
    content: Checkpoint | Exported,
    inputs: list[Path],
    output: Path,
    score: float,
    workers: int,
    console: Console,
) -> Found:
    """Find objects in images; write detections.json and the drawn pictures into `output`.

    Args:
        model: a RetinaNet in evaluation mode, or an exported one that takes uint8 images.
        content: its class names and category ids.
        inputs: image files, or folders of them.
        output: a folder; files of an earlier run in it are replaced.
        score: the least score of a detection, 0 to 1.
        workers: processes that read images.
        console: where the progress bar is shown.

    Raises:
        UserError: for a folder without images, or an output that is a file.

    Example::

        >>> detect(model, content, [Path("photos")], Path("out"), 0.3, 1, Console()).unreadable  # doctest: +SKIP
        []
    """
    files = image_files(inputs)
    if output.exists() and not output.is_dir():
        raise UserError(f"{output}: is a file; give a folder as --output")
    output.mkdir(parents=True, exist_ok=True)
    found = Found({}, [])
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    drawn: Counter[str] = Counter()
    predicted = predictions(model, ImageFiles(files), workers)
    for image_id, prediction in enumerate(
        track(predicted, "Detecting", total=len(files), console=console, transient=True), start=1
    ):
        if isinstance(prediction, ImageError):
            found.unreadable.append(str(prediction))
            continue
        (image, target), detections = prediction
        detections = above(detections, score)
        path = Path(target["path"])
        found.counts[path] = Counter(content.classes[label] for label in detections["labels"].tolist())
        drawn[path.stem] += 1  # photo.jpg of two folders becomes photo.jpg and photo_2.jpg
        name = path.stem if drawn[path.stem] == 1 else f"{path.stem}_{drawn[path.stem]}"
        write_jpeg(draw_detections(image, detections, content.classes), str(output / f"{name}.jpg"), quality=90)
        images.append({"id": image_id, "file_name": str(path), "height": image.shape[1], "width": image.shape[2]})
        for result in as_results(detections, image_id, list(content.category_ids)):
            area = result["bbox"][2] * result["bbox"][3]
            annotations.append({"id": len(annotations) + 1, **result, "area": area, "iscrowd": 0})
    named = zip(content.category_ids, content.classes, strict=True)
    categories = [{"id": category_id, "name": name} for category_id, name in named]
    coco = {"images": images, "annotations": annotations, "categories": categories}
    (output / "detections.json").write_text(json.dumps(coco))
    return found


def report(found: Found, console: Console) -> None:
    """Print a table of the images and their objects, and name the images that cannot be read.

    Example::

        >>> report(found, Console())  # doctest: +SKIP
    """
    table = Table("image", "objects")
    for path, counts in found.counts.items():
        table.add_row(str(path), ", ".join(f"{count} {name}" for name, count in counts.most_common()) or "none")
    if found.counts:
        console.print(table)
    for problem in found.unreadable:
        console.print(f"warning: {problem}", style="yellow", markup=False, soft_wrap=True)
    if found.unreadable:
        console.print(
            f"{len(found.unreadable)} of {len(found.unreadable) + len(found.counts)} images could not be read"
        )
