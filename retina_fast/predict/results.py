"""Results: what was found in one image, which draws, saves and converts itself."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from retina_fast.data.coco import as_results
from retina_fast.data.errors import ImageError, UserError, one_line, within
from retina_fast.predict.draw import draw_detections
from retina_fast.predict.georeference import Georeference
from retina_fast.predict.outputs import COLUMNS, write

Pixels = Tensor | Callable[[], Tensor]


def _places(which: Any, count: int) -> Tensor:
    """The places (N,) of the objects, of `count`, that an index, slice, boolean mask or list of indices means."""
    wrong = TypeError(f"objects are given by an index, slice, boolean mask or list of indices, got {which!r}")
    if isinstance(which, slice):
        which = range(count)[which]
    if isinstance(which, bool) or not isinstance(which, Integral | range | list | np.ndarray | Tensor):
        raise wrong
    try:
        given = which if isinstance(which, Tensor) else torch.as_tensor(np.array(which), device="cpu")
    except (ValueError, TypeError) as error:
        raise wrong from error
    if given.dtype == torch.bool and given.dim() == 1:
        if len(given) != count:
            raise IndexError(f"there are {count} objects, got a mask of {len(given)}")
        return given.nonzero()[:, 0]
    if given.shape == (0,):  # of any type: an empty list has none
        return given.long()
    if given.dim() > 1 or given.is_floating_point() or given.dtype in (torch.bool, torch.uint8):
        raise wrong
    given = given.reshape(-1).long()
    beyond = given[(given < -count) | (given >= count)]
    if len(beyond):
        raise IndexError(f"there are {count} objects, got the index {int(beyond[0])}")
    return given % count


class Results:
    """What was found in one image: D objects, highest score first.

    Its length is D; an index, slice, or boolean mask over the objects gives the results of these alone.

    Args:
        boxes: (D, 4) float32 xyxy in pixels of the image.
        scores: (D,) float32.
        labels: (D,) int64.
        size: (height, width) of the image in pixels.
        classes: class names by label; a label beyond them is called ``class 7``.
        category_ids: ids of the classes in COCO files, by label; by default the labels.
        path: where the image comes from: a path, as it was given, or URL, with ``#17`` for a frame of a video; None for
            an array.
        file: the whole path of the image's file, if it has one of its own, which :meth:`save` never replaces.
        image: its pixels (3, H, W) uint8, or a function that reads them, for :meth:`plot`.
        georeference: where it lies on the earth, for :meth:`to_geojson`.
        error: why the image could not be read, or does not fit the model; there are no objects then.

    Example::

        >>> boxes, scores, labels = torch.tensor([[8.0, 8, 40, 40]]), torch.tensor([0.9]), torch.tensor([0])
        >>> found = Results(boxes, scores, labels, (64, 96), ["Tree"])
        >>> found
        <Results 96x64 pixels: 1 Tree>
        >>> len(found[found.scores > 0.95])
        0
    """

    def __init__(
        self,
        boxes: Tensor,
        scores: Tensor,
        labels: Tensor,
        size: tuple[int, int],
        classes: Sequence[str] = (),
        category_ids: Sequence[int] | None = None,
        path: str | None = None,
        image: Pixels | None = None,
        georeference: Georeference | None = None,
        error: ImageError | None = None,
        file: Path | None = None,
    ) -> None:
        self.boxes, self.scores, self.labels = boxes, scores, labels
        self.size, self.path, self.file = size, path, file
        self.georeference, self.error = georeference, error
        count = max(len(classes), 1 + max(labels.tolist(), default=-1))
        self.classes = [*classes, *(f"class {label}" for label in range(len(classes), count))]
        ids = list(range(len(classes)) if category_ids is None else category_ids)
        self.category_ids = [*ids, *range(len(ids), count)]
        self._image = image

    @classmethod
    def unread(cls, error: ImageError, path: str | None, classes: Sequence[str] = ()) -> "Results":
        """The results of an image that could not be read.

        Example::

            >>> Results.unread(ImageError("a.jpg: no such image file"), "a.jpg")
            <Results a.jpg: no such image file>
        """
        none = torch.zeros(0, device="cpu")
        return cls(none.reshape(0, 4), none, none.long(), (0, 0), classes, path=path, error=error)

    @property
    def image(self) -> Tensor:
        """The pixels (3, H, W) uint8, read again if they come from a file.

        Raises:
            ImageError: if they cannot be read, or the file has changed since.
            UserError: if these results have none.
        """
        if self.error:
            raise self.error
        if self._image is None:
            raise UserError(f"{self.path or 'these results'}: the pixels of the image are not at hand")
        return self._image if isinstance(self._image, Tensor) else self._image()

    def __len__(self) -> int:
        return len(self.boxes)

    def __getitem__(self, which: Any) -> "Results":
        """The results of some objects: by an index, a slice, a boolean mask (D,), or a list or tensor of indices."""
        places = _places(which, len(self)).to(self.boxes.device)
        some = copy(self)
        some.boxes, some.scores, some.labels = self.boxes[places], self.scores[places], self.labels[places]
        return some

    def __iter__(self) -> Iterator["Results"]:
        return (self[index] for index in range(len(self)))

    def filter(self, score: float = 0.0, classes: str | Iterable[str] | None = None) -> "Results":
        """The objects of at least that score, and of these classes.

        Args:
            score: 0 to 1.
            classes: one or several names; by default all.

        Raises:
            ValueError: for a score outside [0, 1], or a name that is not among the classes.
        """
        if not within(0, score, 1):
            raise UserError(f"score must be at least 0 and at most 1, got {score!r}")
        if not (classes is None or isinstance(classes, Iterable)):
            raise TypeError(f"classes must be one or several names, got {classes!r}")
        wanted = self.classes if classes is None else [classes] if isinstance(classes, str) else list(classes)
        for name in wanted:
            if name not in self.classes:
                raise ValueError(f"classes must be some of {', '.join(self.classes)}, got {name!r}")
        labels = torch.tensor([i for i, name in enumerate(self.classes) if name in wanted], device=self.labels.device)
        return self[(self.scores >= score) & torch.isin(self.labels, labels)]

    def detections(self) -> dict[str, Tensor]:
        """The objects in torchvision's form: ``boxes``, ``scores`` and ``labels``."""
        return {"boxes": self.boxes, "scores": self.scores, "labels": self.labels}

    def counts(self) -> Counter[str]:
        """How many objects of each class there are."""
        return Counter(self.classes[label] for label in self.labels.tolist())

    def __repr__(self) -> str:
        path = one_line(self.path or "")
        where = f" {path}" if path else ""
        if self.error:
            return f"<Results{where}: {str(self.error).removeprefix(f'{path}: ')}>"
        found = ", ".join(f"{count} {name}" for name, count in self.counts().most_common()) or "nothing"
        return one_line(f"<Results{where}{',' * bool(where)} {self.size[1]}x{self.size[0]} pixels: {found}>")

    def plot(self) -> Image.Image:
        """The image with its boxes, as a Pillow image: it shows itself in a notebook, and elsewhere by ``show()``."""
        found = self.detections()
        return Image.fromarray(draw_detections(self.image.cpu(), found, self.classes).permute(1, 2, 0).numpy())

    def reduced(self, longest: int) -> "Results":
        """The results in a picture of at most that many pixels a side; of a raster's file, only these are read."""
        if not within(1, longest):
            raise UserError(f"longest must be at least 1 pixel, got {longest!r}")
        height, width = self.size
        if max(self.size) <= longest:
            return self
        small = [max(1, round(side * longest / max(self.size))) for side in self.size]
        y, x = small[0] / height, small[1] / width
        some, read = copy(self), getattr(self._image, "reduced", None)
        some._image = read((small[0], small[1])) if read else F.resize(self.image, small, antialias=True)
        some.size, some.boxes = (small[0], small[1]), self.boxes * self.boxes.new_tensor([x, y, x, y])
        if self.georeference:
            a, b, c, d, e, f = self.georeference.transform
            some.georeference = Georeference((a / x, b / y, c, d / x, e / y, f), self.georeference.crs)
        return some

    def save(self, file: str | Path) -> None:
        """Write a picture or file, by its suffix; see :func:`retina_fast.predict.outputs.write`.

        Raises:
            UserError: for another suffix, for a file that cannot be written, or for the image's own.
        """
        write([self], file)

    def records(self) -> list[dict[str, Any]]:
        """One dict an object: ``path``, ``class``, ``label``, ``score``, and ``xmin``, ``ymin``, ``xmax``, ``ymax``."""
        rows = zip(self.labels.tolist(), self.scores.tolist(), self.boxes.tolist(), strict=True)
        every = ((self.path or "", self.classes[label], label, score, *box) for label, score, box in rows)
        return [dict(zip(COLUMNS, values, strict=True)) for values in every]

    def to_dataframe(self) -> Any:
        """A pandas ``DataFrame`` of :meth:`records`."""
        try:
            import pandas
        except ModuleNotFoundError as error:
            raise UserError("to_dataframe needs pandas: pip install pandas") from error
        return pandas.DataFrame(self.records(), columns=list(COLUMNS))

    def to_supervision(self) -> Any:
        """``supervision.Detections``, with the class names as its data ``class_name``."""
        try:
            import supervision
        except ModuleNotFoundError as error:
            raise UserError("to_supervision needs supervision: pip install supervision") from error
        names = np.array([self.classes[label] for label in self.labels.tolist()], dtype=str)
        arrays = (value.cpu().numpy() for value in (self.boxes, self.scores, self.labels))
        xyxy, confidence, class_id = arrays
        return supervision.Detections(xyxy, None, confidence, class_id, data={"class_name": names})

    def to_coco(self, image_id: int = 1) -> dict[str, Any]:
        """A COCO file of this one image: ``images``, ``annotations`` with their ``score``, and ``categories``."""
        height, width = self.size
        found = self.detections()
        boxes = as_results(found, image_id, list(self.category_ids))
        more = [{"area": box["bbox"][2] * box["bbox"][3], "iscrowd": 0} for box in boxes]
        named = zip(self.category_ids, self.classes, strict=True)
        return {
            "images": [{"id": image_id, "file_name": self.path or "", "height": height, "width": width}],
            "annotations": [{"id": i, **box, **more[i - 1]} for i, box in enumerate(boxes, start=1)],
            "categories": [{"id": category_id, "name": name} for category_id, name in named],
        }

    def to_geojson(self) -> dict[str, Any]:
        """A GeoJSON ``FeatureCollection`` of the boxes as polygons, in the coordinates of the image's own system.

        RFC 7946 (https://www.rfc-editor.org/rfc/rfc7946) knows longitude and latitude alone. Another system is named by
        the member ``crs`` of the earlier specification of 2008, which GDAL and QGIS read.

        Raises:
            UserError: if the image has no georeference.
        """
        if self.georeference is None:
            raise UserError(f"{self.path or 'the image'}: has no georeference, so its boxes have no place on the earth")
        a, b, c, d, e, f = self.georeference.transform
        features = []
        for row in self.records():
            x1, y1, x2, y2 = (row.pop(name) for name in ("xmin", "ymin", "xmax", "ymax"))
            corners = [(x1, y1), (x1, y2), (x2, y2), (x2, y1), (x1, y1)]  # counterclockwise where rows go south
            ring = [[a * x + b * y + c, d * x + e * y + f] for x, y in (corners if a * e < b * d else corners[::-1])]
            geometry = {"type": "Polygon", "coordinates": [ring]}
            features.append({"type": "Feature", "properties": row, "geometry": geometry})
        authority, _, code = self.georeference.crs.partition(":")
        name = f"urn:ogc:def:crs:{authority}::{code}" if code.isdigit() else self.georeference.crs
        crs = {"crs": {"type": "name", "properties": {"name": name}}}
        return {"type": "FeatureCollection", **({} if code == "4326" else crs), "features": features}
