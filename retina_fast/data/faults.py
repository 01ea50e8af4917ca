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

from retina_fast.data.errors import one_line

_SLACK = 1.0  # px: formats that count pixels from 0 or from 1, and rounded sizes, differ by at most this much
_SAME = 0.5  # px: boxes whose sides all differ by at most this much count as the same box


class Kind(StrEnum):
    """The kinds of faults. A data set refuses those in `REFUSED` and leaves out those in `LEFT_OUT`.

    Example::

        >>> Kind.OUTSIDE.consequence
        'left out'
    """

    FILE = "broken entry"
    LABEL = "wrong label"
    IMAGE = "unreadable image"
    DEGENERATE = "box without an extent"
    OUTSIDE = "box outside its image"
    CUT = "box that reaches out of its image"
    SPECK = "box smaller than a pixel"
    DUPLICATE = "duplicate box"
    TWO_LABELS = "box with two labels"
    UNTOUCHED = "box that no anchor touches"
    TWICE = "image listed twice"
    SPELLING = "class spelled almost as another"
    NO_BOX = "no box to find"

    @property
    def consequence(self) -> str:
        """What `train` and `evaluate` do about it."""
        if self in REFUSED:
            return "training and evaluation refuse the file"
        return "left out" if self in LEFT_OUT else "kept"


REFUSED = frozenset({Kind.FILE, Kind.LABEL})
LEFT_OUT = frozenset({Kind.DEGENERATE, Kind.OUTSIDE, Kind.IMAGE})


class Fault(NamedTuple):
    """A fault, its place, and the image that it concerns, if it concerns one.

    Example::

        >>> print(Fault(Kind.CUT, "val.json: annotation 7", "reaches out of its image"))
        val.json: annotation 7 reaches out of its image
    """

    kind: Kind
    where: str
    what: str
    image: str = ""

    def __str__(self) -> str:
        return one_line(f"{self.where} {self.what}".strip())


Size = tuple[int, int]  # height, width


def no_box(annotations: Iterable[Mapping[str, Any]], source: str) -> Fault | None:
    """The fault of data without a box to find: those of crowds are none."""
    if any(not box["iscrowd"] for box in annotations):
        return None
    return Fault(Kind.NO_BOX, f"{source}:", "not one box, but for crowds: there is nothing to find")


def place(source: str, annotation: Mapping[str, Any]) -> str:
    """The words that name an annotation: its own `source`, or its id in the file `source`."""
    return annotation.get("source") or f"{source}: annotation {annotation['id']}"


def spelling(name: str) -> str:
    """The name of a class without case, spaces and underscores: names that share it are probably one class.

    Example::

        >>> spelling("Palm_Tree") == spelling("palm tree")
        True
    """
    return "".join(name.lower().replace("_", " ").split())


def look_alikes(names: Iterable[str], source: str) -> Iterator[Fault]:
    """Classes whose names differ only in case, spaces or underscores: one of them is probably a mistake."""
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(spelling(name), name)
        if other != name:
            yield Fault(Kind.SPELLING, f"{source}: class {name!r}", f"is spelled almost as {other!r}")


def corners(annotations: Sequence[Mapping[str, Any]]) -> Tensor:
    """(G, 4) float64 xyxy of the annotations' `bbox`."""
    boxes = torch.tensor([annotation["bbox"] for annotation in annotations], dtype=torch.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return boxes


def box_fault(box: Sequence[float], size: Size | None) -> tuple[Kind, str] | None:
    """What is wrong with the place of a box, if anything: the kind of fault, and the words for it.

    Args:
        box: x, y, width and height in pixels.
        size: (height, width) of its image; None if it is unknown.

    Example::

        >>> box_fault([90, 10, 20, 20], (96, 96))[1]
        'with bbox [90, 10, 20, 20] reaches out of its image of 96x96'
    """
    x1, y1, x2, y2 = array("f", (box[0], box[1], box[0] + box[2], box[1] + box[3]))  # as in training, float32
    if not all(map(math.isfinite, (x1, y1, x2, y2))) or x2 <= x1 or y2 <= y1:
        return Kind.DEGENERATE, f"has bbox {box}, which has no extent"
    speck = None
    if x2 - x1 < 1 and y2 - y1 < 1:
        speck = Kind.SPECK, f"with bbox {box} is smaller than a pixel: x, y, width and height are counted in pixels"
    if size is None:
        return speck
    height, width = size
    if x2 <= 0 or y2 <= 0 or x1 >= width or y1 >= height:
        return Kind.OUTSIDE, f"with bbox {box} lies outside its image of {width}x{height}"
    if min(x1, y1) < -_SLACK or x2 > width + _SLACK or y2 > height + _SLACK:
        return Kind.CUT, f"with bbox {box} reaches out of its image of {width}x{height}"
    return speck


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
