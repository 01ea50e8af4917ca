"""Objects in image files: `retina-fast detect`.

Into the output folder go detections.json, a COCO file with scores, and a picture with boxes for each image. Several
processes, see `processes`, share the images; each notes what it found in a file of its own, and the first merges them.
Memory does not grow with what is found, only with the list of the files.
"""

import heapq
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import track
from rich.table import Table
from torchvision.io import write_jpeg

from retina_fast.checkpoint import Checkpoint
from retina_fast.commands.predict import predictions
from retina_fast.commands.processes import ALONE, Processes
from retina_fast.data.coco import IMAGE_SUFFIXES, Sample, read_image
from retina_fast.draw import above, draw_detections
from retina_fast.errors import ImageError, UserError
from retina_fast.files import replacing
from retina_fast.metrics import as_results

_SHOWN = 100  # images, and problems, that a report names


@dataclass
class Found:
    """What :func:`detect` found.

    Attributes:
        images: how many could be read.
        unreadable: how many could not.
        objects: counts by class.
        counts: the same of the first images, by image.
        problems: of the first images that cannot be read.
    """

    images: int = 0
    unreadable: int = 0
    objects: Counter[str] = field(default_factory=Counter)
    counts: dict[Path, Counter[str]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def add(self, entry: dict[str, Any]) -> None:
        """Count what was found in one image."""
        if "problem" in entry:
            self.unreadable += 1
            self.problems += [entry["problem"]] if self.unreadable <= _SHOWN else []
            return
        self.images += 1
        self.objects.update(entry["counts"])
        if self.images <= _SHOWN:
            self.counts[Path(entry["image"]["file_name"])] = Counter(entry["counts"])


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
    """The files among the inputs, the images directly in the folders, and those that the lists name, each once.

    A list is a .txt file with a path a line; one that is not absolute is relative to the list's folder.

    Raises:
        UserError: for a folder or a list without images, or a list that cannot be read.

    Example::

        >>> image_files([Path("photos"), Path("another.jpg"), Path("list.txt")])  # doctest: +SKIP
    """
    files: dict[Path, None] = {}
    for path in inputs:
        inside = _inside(path)
        if not inside:
            what = "names no image" if path.suffix == ".txt" else f"holds no image ({', '.join(IMAGE_SUFFIXES)})"
            raise UserError(f"{path}: {what}")
        files.update(dict.fromkeys(inside))
    return list(files)


def _inside(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
    if path.suffix != ".txt":
        return [path]
    try:
        with path.open() as lines:
            return [path.parent / line.strip() for line in lines if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error


def picture_names(files: list[Path]) -> list[str]:
    """A name for each file's picture, its own where no other has it.

    Example::

        >>> picture_names([Path("a/x.png"), Path("b/x.png"), Path("x_2.png")])
        ['x', 'x_2', 'x_2_2']
    """
    names: dict[str, None] = {}
    count: Counter[str] = Counter()
    for path in files:
        name = path.stem
        while name in names:
            count[path.stem] += 1
            name = f"{path.stem}_{count[path.stem] + 1}"
        names[name] = None
    return list(names)


def detect(
    model: Any,
    content: Checkpoint,
    inputs: list[Path],
    output: Path,
    score: float,
    workers: int,
    console: Console,
    processes: Processes = ALONE,
) -> Found | None:
    """Find objects in images; write detections.json and the drawn pictures into `output`.

    Args:
        model: a RetinaNet in evaluation mode.
        content: its class names and category ids.
        inputs: image files, folders of them, or .txt lists of them.
        output: a folder, the same one for all processes; files of an earlier run in it are replaced.
        score: the least score of a detection, 0 to 1.
        workers: processes that read images.
        console: where the progress bar is shown.
        processes: they share the images; the first one gives what all of them found, the others None.

    Raises:
        UserError: for a folder without images, or an output that is a file.

    Example::

        >>> detect(model, content, [Path("photos")], Path("out"), 0.3, 1, Console()).problems  # doctest: +SKIP
        []
    """
    files = image_files(inputs)
    if output.exists() and not output.is_dir():
        raise UserError(f"{output}: is a file; give a folder as --output")
    output.mkdir(parents=True, exist_ok=True)
    names, share = picture_names(files), processes.share(len(files))
    predicted = zip(share, predictions(model, ImageFiles(files), workers, share), strict=True)
    with _part(output, processes.rank).open("w") as part:
        for index, prediction in track(predicted, "Detecting", total=len(share), console=console, transient=True):
            if isinstance(prediction, ImageError):
                entry: dict[str, Any] = {"problem": str(prediction)}
            else:
                (image, target), detections = prediction
                detections = above(detections, score)
                picture = draw_detections(image, detections, content.classes)
                write_jpeg(picture, str(output / f"{names[index]}.jpg"), quality=90)
                entry = _entry(image.shape, target["path"], detections, index + 1, content)
            part.write(json.dumps({"index": index, **entry}) + "\n")
    processes.gather(None)  # all parts are written
    if not processes.first:
        return None
    parts = [_part(output, rank) for rank in range(processes.count)]
    found = _merge(parts, output / "detections.json", content)
    for file in parts:
        file.unlink()
    return found


def _part(output: Path, rank: int) -> Path:
    return output / f"detections.part-{rank}"


def _entry(
    shape: tuple[int, ...], path: str, detections: dict[str, Any], image_id: int, content: Checkpoint
) -> dict[str, Any]:
    annotations = [
        {**result, "area": result["bbox"][2] * result["bbox"][3], "iscrowd": 0}
        for result in as_results(detections, image_id, list(content.category_ids))
    ]
    counts = Counter(content.classes[label] for label in detections["labels"].tolist())
    image = {"id": image_id, "file_name": path, "height": shape[1], "width": shape[2]}
    return {"image": image, "annotations": annotations, "counts": counts}


def _merge(parts: list[Path], file: Path, content: Checkpoint) -> Found:
    """One COCO file of all parts, its images in the order of the inputs, read and written line by line."""
    found = Found()
    for entry in _entries(parts):
        found.add(entry)
    with replacing(file) as partial, partial.open("w") as out:
        out.write('{"images": ')
        _write_list(out, (entry["image"] for entry in _entries(parts) if "image" in entry))
        out.write(', "annotations": ')
        annotations = (annotation for entry in _entries(parts) for annotation in entry.get("annotations", ()))
        _write_list(out, ({"id": number} | annotation for number, annotation in enumerate(annotations, start=1)))
        named = zip(content.category_ids, content.classes, strict=True)
        out.write(', "categories": ')
        _write_list(out, ({"id": category_id, "name": name} for category_id, name in named))
        out.write("}")
    return found


def _entries(parts: list[Path]) -> Iterator[dict[str, Any]]:
    with ExitStack() as stack:
        lines = [stack.enter_context(part.open()) for part in parts]
        yield from heapq.merge(*(map(json.loads, part) for part in lines), key=lambda entry: entry["index"])


def _write_list(out: TextIO, entries: Iterable[dict[str, Any]]) -> None:
    out.write("[")
    for number, entry in enumerate(entries):
        out.write((", " if number else "") + json.dumps(entry))
    out.write("]")


def report(found: Found, console: Console) -> None:
    """Print a table of the images and their objects, and name the images that cannot be read.

    Example::

        >>> report(found, Console())  # doctest: +SKIP
    """
    table = Table("image", "objects")
    for path, counts in found.counts.items():
        table.add_row(str(path), _in_words(counts))
    if found.images > len(found.counts):
        table.add_row(f"{found.images} images in all", _in_words(found.objects))
    if found.counts:
        console.print(table)
    for problem in found.problems:
        console.print(f"warning: {problem}", style="yellow", markup=False, soft_wrap=True)
    if found.unreadable:
        console.print(f"{found.unreadable} of {found.unreadable + found.images} images could not be read")


def _in_words(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.most_common()) or "none"
