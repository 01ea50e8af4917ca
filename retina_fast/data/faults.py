"""The rules for annotations in the COCO format: everything that can be wrong with them.

A data set refuses annotations that it cannot understand, and leaves out those that nothing can be learnt from;
`retina-fast check` names every fault.
"""

import math
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import StrEnum
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

_SLACK = 1.0  # px: formats that count pixels from 0 or from 1, and rounded sizes, differ by at most this much
_SAME = 0.5  # px: boxes whose sides all differ by at most this much count as the same box


class Kind(StrEnum):
    """The kinds of faults. A data set refuses those in `REFUSED` and leaves out those in `LEFT_OUT`."""

    FILE = "broken entry"
    LABEL = "wrong label"
    IMAGE = "unreadable image"
    DEGENERATE = "box without an extent"
    OUTSIDE = "box outside its image"
    CUT = "box that reaches out of its image"
    DUPLICATE = "duplicate box"
    TWO_LABELS = "box with two labels"
    UNTOUCHED = "box that no anchor touches"
    TWICE = "image listed twice"


REFUSED = frozenset({Kind.FILE, Kind.LABEL})
LEFT_OUT = frozenset({Kind.DEGENERATE, Kind.OUTSIDE})
UNUSABLE = REFUSED | {Kind.DEGENERATE}  # No other rule can be applied to such a box.


class Fault(NamedTuple):
    """A fault and its place.

    Example::

        >>> print(Fault(Kind.CUT, "val.json: annotation 7", "reaches out of its image"))
        val.json: annotation 7 reaches out of its image
    """

    kind: Kind
    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where} {self.what}".strip()


Size = tuple[int, int]  # height, width


def sizes_of(content: Mapping[str, Any]) -> dict[Any, Size | None]:
    """The size of each image by its id; None where the file does not say."""
    return {
        record["id"]: (record["height"], record["width"]) if record.get("height") and record.get("width") else None
        for record in content["images"]
    }


def place(source: str, annotation: Mapping[str, Any]) -> str:
    """The words that name an annotation: its own `source`, or its id in the file `source`."""
    return annotation.get("source") or f"{source}: annotation {annotation['id']}"


def entry_faults(content: Mapping[str, Any], source: str) -> Iterator[Fault]:
    """Entries with the same id or name. Annotations without an id are given one."""
    for number, annotation in enumerate(content["annotations"], start=1):
        annotation.setdefault("id", number)
    for key in ("images", "annotations", "categories"):
        yield from _repeated(content[key], "id", Kind.FILE, f"{source}: {key}")
    yield from _repeated(content["images"], "file_name", Kind.TWICE, f"{source}: images")
    yield from _repeated(content["categories"], "name", Kind.LABEL, f"{source}: categories")


def _repeated(entries: Sequence[Mapping[str, Any]], field: str, kind: Kind, where: str) -> Iterator[Fault]:
    seen = set()
    for entry in entries:
        value = entry[field]
        if value in seen:
            yield Fault(kind, where, f"have the {field.replace('_', ' ')} {value!r} more than once")
        seen.add(value)


def look_alikes(content: Mapping[str, Any], source: str) -> Iterator[Fault]:
    """Classes whose names differ only in case, spaces or underscores: one of them is probably a mistake."""
    names: dict[str, str] = {}
    for category in content["categories"]:
        name = str(category["name"])
        other = names.setdefault("".join(name.lower().replace("_", " ").split()), name)
        if other != name:
            yield Fault(Kind.LABEL, f"{source}: class {name!r}", f"is spelled almost as {other!r}")


def corners(annotations: Sequence[Mapping[str, Any]]) -> Tensor:
    """(G, 4) float64 xyxy of the annotations' `bbox`."""
    boxes = torch.tensor([annotation["bbox"] for annotation in annotations], dtype=torch.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return boxes


def box_fault(annotation: Mapping[str, Any], sizes: Mapping[Any, Size | None], categories: Any) -> Fault | None:
    """What is wrong with one annotation by itself, if anything; the caller fills in the place.

    Args:
        annotation: with `bbox` x, y, width, height in pixels.
        sizes: (height, width) of each image by its id.
        categories: the ids of the classes.

    Example::

        >>> box_fault({"image_id": 1, "category_id": 3, "bbox": [90, 10, 20, 20]}, {1: (96, 96)}, {3}).what
        'with bbox [90, 10, 20, 20] reaches out of its image of 96x96'
    """
    image_id, box = annotation.get("image_id"), annotation.get("bbox")
    if image_id not in sizes:
        return Fault(Kind.FILE, "", f"belongs to image {image_id}, which the file does not list")
    if annotation.get("category_id") not in categories:
        return Fault(Kind.LABEL, "", f"has category {annotation.get('category_id')}, which the file does not list")
    if not isinstance(box, list) or len(box) != 4 or not all(isinstance(x, int | float) for x in box):
        return Fault(Kind.FILE, "", f"has bbox {box}; four numbers, x, y, width and height, are expected")
    x1, y1, x2, y2 = array("f", (box[0], box[1], box[0] + box[2], box[1] + box[3]))  # as in training, float32
    if not all(map(math.isfinite, (x1, y1, x2, y2))) or x2 <= x1 or y2 <= y1:
        return Fault(Kind.DEGENERATE, "", f"has bbox {box}, which has no extent")
    if (size := sizes[image_id]) is None:
        return None
    height, width = size
    if x2 <= 0 or y2 <= 0 or x1 >= width or y1 >= height:
        return Fault(Kind.OUTSIDE, "", f"with bbox {box} lies outside its image of {width}x{height}")
    if min(x1, y1) < -_SLACK or x2 > width + _SLACK or y2 > height + _SLACK:
        return Fault(Kind.CUT, "", f"with bbox {box} reaches out of its image of {width}x{height}")
    return None


def twins(annotations: Iterable[Mapping[str, Any]]) -> Iterator[tuple[Kind, Mapping[str, Any], Mapping[str, Any]]]:
    """Boxes that an image has twice, to half a pixel: the kind of fault, the later box and the first one.

    Args:
        annotations: those without a fault of their own. Crowd regions do not count.
    """
    counted = [annotation for annotation in annotations if not annotation.get("iscrowd")]
    boxes = corners(counted).numpy()
    numbers: dict[Any, int] = {}
    images = np.array([numbers.setdefault(annotation["image_id"], len(numbers)) for annotation in counted], dtype=int)
    order = np.lexsort((boxes[:, 0], images))
    boxes, images = boxes[order], images[order]
    first: dict[int, int] = {}
    # The boxes are sorted by image and left side. Each is compared with the next one, then with the one after that, and
    # so on, as long as the left sides are near enough.
    left, step = np.arange(len(boxes)), 1
    while len(left := left[left + step < len(boxes)]):
        near = (images[left] == images[left + step]) & (boxes[left + step, 0] - boxes[left, 0] <= _SAME)
        left = left[near]
        same = left[(np.abs(boxes[left + step] - boxes[left]) <= _SAME).all(axis=1)]
        for pair in zip(order[same].tolist(), order[same + step].tolist(), strict=True):
            first[max(pair)] = min(*pair, first.get(max(pair), len(order)))
        step += 1
    for later, earlier in sorted(first.items()):
        same_class = counted[later]["category_id"] == counted[earlier]["category_id"]
        yield Kind.DUPLICATE if same_class else Kind.TWO_LABELS, counted[later], counted[earlier]
