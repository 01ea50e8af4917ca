"""Data sets in the COCO format: a JSON file of annotations, and the folder of the images that it names."""

import contextlib
import copy
import json
import os
import unicodedata
import warnings
from bisect import bisect_right
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import torch
from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile
from torch import Tensor
from torch.utils._pytree import tree_map_only
from torch.utils.data import Dataset
from torchvision import tv_tensors

from retina_fast.data.encodings import encoding_of
from retina_fast.data.entries import Found, clean, refuse
from retina_fast.data.errors import ImageError, UserError
from retina_fast.data.faults import LEFT_OUT, Fault, Size, box_fault, corners, place
from retina_fast.data.images import read_image

Sample = tuple[Tensor, dict[str, Any]]

_ORIENTATION = 0x0112  # the EXIF tag; from 5 on, turning upright exchanges width and height


def _turned(path: Path) -> tuple[Size, bool]:
    """The size of an image file, turned upright, and whether turning exchanges width and height; its head is read."""
    with warnings.catch_warnings(action="ignore"), Image.open(path) as picture:  # Pillow's, which name no file
        width, height = picture.size
        if isinstance(picture, TiffImageFile):  # Newer versions of Pillow give its size turned.
            width, height = picture.tag_v2[256], picture.tag_v2[257]
        turned = picture.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)
    return ((width, height) if turned else (height, width)), turned


class CocoDataset(Dataset[Sample]):
    """Images and boxes of a COCO JSON file.

    An item is an image, uint8 (3, H, W), and its target: `boxes` (G, 4) float32 xyxy in pixels, `labels` (G,) int64,
    `image_id` and the image's `path`. Labels are contiguous, 0 to K-1, in the order of the category ids: 0 is a real
    class. Crowd regions are left out of the targets. Boxes without an extent, and those that lie outside their image,
    are left out with a warning that names them.

    Args:
        json_file: the annotations; `images`, `annotations` and `categories` as in COCO, in any of the forms that
            :func:`retina_fast.data.entries.clean` takes.
        folder: where the images are.
        content: the annotations, if `json_file` has been read already or has another format.
        found: called with each fault of the annotations; by default, those that refuse the file are raised.

    Attributes:
        classes: K class names.
        category_ids: their K category ids: those in the file, or 1 to K if it has others than numbers.
        images: the entries of the images, in the order of the items.
        coco: the content for an evaluation, in one form and without the boxes that are left out.
        sizes: (height, width) of each image by its id: as the file says, else from the image's head; None if neither
            gives it.
        faults: what is wrong with the annotations and does not refuse them.
        left_out: the boxes that are left out, each with its fault.

    Raises:
        UserError: if the file is missing or not a COCO file. The message names the faulty entry.
        ImageError: when an item is read whose image is missing, unreadable, or not of the size in the file.

    Example::

        >>> dataset = CocoDataset("data/trees/heldout.json", "data/trees/heldout")  # doctest: +SKIP
        >>> image, target = dataset[0]  # doctest: +SKIP
    """

    def __init__(
        self,
        json_file: str | Path,
        folder: str | Path,
        content: dict[str, Any] | None = None,
        found: Found = refuse,
    ) -> None:
        self.json_file, self.folder = Path(json_file), Path(folder)
        if not self.folder.is_dir():
            raise UserError(f"{self.folder}: no such folder of images")
        self.faults: list[Fault] = []
        self.left_out: list[tuple[Fault, dict[str, Any]]] = []

        def note(fault: Fault) -> None:
            found(fault)
            self.faults.append(fault)

        content = read_json(self.json_file) if content is None else content
        self.coco = clean(content, str(self.json_file), note)
        self.classes: list[str] = [category["name"] for category in self.coco["categories"]]
        self.category_ids: list[int] = [category["id"] for category in self.coco["categories"]]
        self.images: list[dict[str, Any]] = self.coco["images"]
        self.sizes = {record["id"]: self._size(record) for record in self.images}
        self.coco["annotations"] = self._usable(self.coco["annotations"], note)
        self._boxes, self._labels, self._ends = self._targets(self.coco["annotations"])
        if self.left_out and found is refuse:
            names = [fault.where.removeprefix(f"{self.json_file}: ") for fault, _ in self.left_out]
            what = f"{len(names)} boxes without an extent or outside their image are left out"
            more = ", ..." if len(names) > 10 else ""
            warnings.warn(f"{self.json_file}: {what}: {', '.join(names[:10])}{more}", stacklevel=2)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:
        record = self.images[index]
        image = read_image(self.path(index))
        size = (record.get("height", image.shape[1]), record.get("width", image.shape[2]))
        if size != tuple(image.shape[1:]):
            raise ImageError(self._other_size(self.path(index), size, (image.shape[1], image.shape[2])))
        rows = slice(*self._ends[index : index + 2].tolist())
        target = {
            "boxes": tv_tensors.BoundingBoxes(self._boxes[rows].clone(), format="XYXY", canvas_size=size),
            "labels": self._labels[rows].clone(),
            "image_id": record["id"],
            "path": str(self.path(index)),
        }
        return tv_tensors.Image(image), target

    def path(self, index: int) -> Path:
        """The file of image `index`."""
        return self._path(self.images[index])

    def _path(self, record: dict[str, Any]) -> Path:
        """The file of an image. Where none has its name, the spellings of Windows, of URLs and of Unicode are tried."""
        name = record["file_name"]
        composed, apart = (unicodedata.normalize(form, name) for form in ("NFC", "NFD"))
        spellings = [name.replace("\\", "/"), unquote(name), composed, apart]
        others = (self.folder / spelling for spelling in spellings if spelling != name)
        path = self.folder / name
        return path if os.path.isfile(path) else next(filter(os.path.isfile, others), path)

    def _size(self, record: dict[str, Any]) -> Size | None:
        """(height, width) of an image, as the file says or else as the image's head says; None if neither does."""
        if "height" in record and "width" in record:
            return record["height"], record["width"]
        try:
            return _turned(self._path(record))[0]
        except Exception:  # A damaged file may make Pillow raise anything.
            return None

    def _other_size(self, path: Path, given: Size, found: Size) -> str:
        """The words for an image that has not the size that the annotations give."""
        is_, says = (f"{width}x{height}" for height, width in (found, given))
        with contextlib.suppress(Exception):
            if given == found[::-1] and _turned(path)[1]:
                return (
                    f"{path}: is {is_} once its EXIF orientation has turned it upright, but {self.json_file} gives its "
                    f"size before turning, {says}: exchange width and height there, and see that its boxes are upright"
                )
        return f"{path}: is {is_}, but {self.json_file} says {says}"

    def with_objects(self) -> "CocoDataset":
        """The same data set without the images that have no box to learn from.

        Raises:
            UserError: if no image has one.
        """
        counts = self._ends.diff()
        kept = copy.copy(self)
        kept.images = [record for record, count in zip(self.images, counts.tolist(), strict=True) if count]
        if not kept.images:
            raise UserError(f"{self.json_file}: not one image has a box to learn from")
        kept.coco = self.coco | {"images": kept.images}
        kept._ends = torch.cat((self._ends[:1], counts[counts > 0].cumsum(0)))
        return kept

    def aspects(self) -> list[int]:
        """The group of each image by its aspect ratio, as torchvision groups them: in steps of a factor 2 ** (1/3).

        An image whose size is not known counts as a square.
        """
        edges = [2 ** (i / 3) for i in range(-3, 4)]
        sizes = (self.sizes[record["id"]] or (1, 1) for record in self.images)
        return [bisect_right(edges, height / width) for height, width in sizes]

    def _usable(self, annotations: list[dict[str, Any]], note: Found) -> list[dict[str, Any]]:
        """The annotations that have a box to learn from; the others become `left_out`."""
        kept = []
        files = {record["id"]: record["file_name"] for record in self.images}
        for annotation in annotations:
            image_id = annotation["image_id"]
            if wrong := box_fault(annotation["bbox"], self.sizes[image_id]):
                fault = Fault(wrong[0], place(str(self.json_file), annotation), wrong[1], files[image_id])
                note(fault)
                if fault.kind in LEFT_OUT:
                    self.left_out.append((fault, annotation))
                    continue
            kept.append(annotation)
        return kept

    def _targets(self, annotations: list[dict[str, Any]]) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes (G, 4) xyxy, labels (G,) and ends (images + 1,): image i has the rows from ends[i] to ends[i + 1].

        Crowd regions are left out. They are tensors, since processes that load images share the memory of tensors.
        """
        index_of = {record["id"]: index for index, record in enumerate(self.images)}
        label_of = {category_id: label for label, category_id in enumerate(self.category_ids)}
        counted = [annotation for annotation in annotations if not annotation["iscrowd"]]
        labels = torch.tensor([label_of[annotation["category_id"]] for annotation in counted], dtype=torch.int64)
        images = torch.tensor([index_of[annotation["image_id"]] for annotation in counted], dtype=torch.int64)
        order = images.argsort(stable=True)
        ends = torch.cat((torch.zeros(1, dtype=torch.int64), images.bincount(minlength=len(self.images)).cumsum(0)))
        return corners(counted)[order].float(), labels[order], ends


class Tried(Dataset[Sample | ImageError]):
    """A data set that gives an ImageError as the item, where its image cannot be read, in place of raising it.

    Example::

        >>> samples = [x for x in Tried(dataset) if not isinstance(x, ImageError)]  # doctest: +SKIP
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: Any) -> Sample | ImageError:
        try:
            return self.dataset[key]
        except ImageError as error:
            return error


def plain(sample: Any) -> Any:
    """The sample, or the error, with ordinary tensors, which cost less than tv_tensors to use and to send elsewhere.

    Example::

        >>> image, target = plain(dataset[0])  # doctest: +SKIP
    """
    if isinstance(sample, ImageError):
        return sample
    return tuple(tree_map_only(tv_tensors.TVTensor, lambda tensor: tensor.as_subclass(Tensor), sample))


def as_results(detections: dict[str, Tensor], image_id: Any, category_ids: list[int | None]) -> list[dict[str, Any]]:
    """One image's detections as COCO results.

    Args:
        detections: `boxes` (D, 4) xyxy in pixels, `scores` (D,), `labels` (D,), as a model returns them.
        image_id: the image's id in the COCO file.
        category_ids: the category id of each label; detections of a label whose id is None are left out.

    Example::

        >>> import torch
        >>> as_results({"boxes": torch.tensor([[0., 0., 4., 2.]]), "scores": torch.ones(1),
        ...             "labels": torch.zeros(1, dtype=torch.int64)}, image_id=7, category_ids=[1])
        [{'image_id': 7, 'category_id': 1, 'bbox': [0.0, 0.0, 4.0, 2.0], 'score': 1.0}]
    """
    rows = zip(detections["boxes"].tolist(), detections["scores"].tolist(), detections["labels"].tolist(), strict=True)
    return [
        {"image_id": image_id, "category_id": category_ids[label], "bbox": [x1, y1, x2 - x1, y2 - y1], "score": score}
        for (x1, y1, x2, y2), score, label in rows
        if category_ids[label] is not None
    ]


def read_json(path: Path) -> dict[str, Any]:
    """The lists of a COCO detection file as they are written, but without the masks of its objects.

    Masks are the largest part of it. The file may be in UTF-8, UTF-16 or UTF-32, with a byte order mark or without.

    Raises:
        UserError: if the file is missing, or not a COCO detection file.

    Example::

        >>> read_json(Path("instances_val2017.json"))["categories"][0]["name"]  # doctest: +SKIP
        'person'
    """
    twice: list[str] = []
    try:
        text = path.read_text(encoding=encoding_of(path))
        content = json.loads(text, object_pairs_hook=lambda pairs: _entry(pairs, twice))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except RecursionError as error:
        raise UserError(f"{path}: not a COCO detection file: its brackets are nested too deeply") from error
    except ValueError as error:
        packed = path.read_bytes()[:2] == b"\x1f\x8b"
        reason = "it is compressed by gzip: unpack it first" if packed else error
        raise UserError(f"{path}: not a JSON file ({reason})") from error
    if twice:
        raise UserError(
            f"{path}: has {twice[0]!r} twice in one place, with different values, of which one would be lost"
        )
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise UserError(f"{path}: not a COCO detection file: it has no list called {key!r}")
    return content


def _entry(pairs: list[tuple[str, Any]], twice: list[str]) -> dict[str, Any]:
    """The entry without its mask, and without a `source`, a word by which readers of other formats name an entry. Keys
    that it has twice with different values are appended to `twice`."""
    entry = dict(pairs)
    if len(entry) < len(pairs):
        twice += [key for key, value in pairs if entry[key] != value]
    entry.pop("segmentation", None)
    entry.pop("source", None)
    return entry
