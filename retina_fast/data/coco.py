"""Detection data in the COCO format: a JSON file and the folder of the images that it names."""

import json
import math
import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.v2 import functional as F

from retina_fast.errors import ImageError, UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif")

Sample = tuple[Tensor, dict[str, Any]]


def read_image(path: Path) -> Tensor:
    """Decode an image file to RGB, (3, H, W) uint8, turned upright by its EXIF orientation.

    Raises:
        ImageError: if the file is missing or cannot be decoded; the message names it.

    Example::

        >>> read_image(Path("photo.jpg")).shape  # doctest: +SKIP
        torch.Size([3, 480, 640])
    """
    if not path.is_file():
        raise ImageError(f"{path}: no such image file")
    try:
        image = decode_image(str(path), ImageReadMode.RGB, apply_exif_orientation=True)
    except RuntimeError as error:
        raise ImageError(f"{path}: not a readable image ({str(error).splitlines()[0]})") from error
    if image.ndim == 4:  # an animated GIF: its first frame
        image = image[0]
    return F.to_dtype(image, torch.uint8, scale=True)  # a 16-bit PNG decodes to uint16


class CocoDataset(Dataset[Sample]):
    """Images and boxes of a COCO JSON file.

    An item is an image, uint8 (3, H, W), and its target: `boxes` (G, 4) float32 xyxy in pixels, `labels` (G,) int64,
    `image_id` and the image's `path`. Labels are contiguous, 0 to K-1, in the order of the category ids: 0 is a real
    class. Crowd regions are left out of the targets. Boxes without an extent are left out with a warning that names
    them.

    Args:
        json_file: the annotations; `images`, `annotations` and `categories` as in COCO.
        folder: where the images are.

    Attributes:
        classes: K class names.
        category_ids: their K category ids in the file.
        coco: the file's content, usable for evaluation: without the boxes that have no extent.

    Raises:
        UserError: if the file is missing or not a COCO file; the message names the faulty entry.
        ImageError: by an item whose image is missing, unreadable, or not of the size that the file gives.

    Example::

        >>> dataset = CocoDataset("data/trees/heldout.json", "data/trees/heldout")  # doctest: +SKIP
        >>> image, target = dataset[0]  # doctest: +SKIP
    """

    def __init__(self, json_file: str | Path, folder: str | Path) -> None:
        self.json_file, self.folder = Path(json_file), Path(folder)
        if not self.folder.is_dir():
            raise UserError(f"{self.folder}: no such folder of images")
        self.coco = _read_json(self.json_file)
        categories = sorted(self.coco["categories"], key=lambda category: category["id"])
        self.classes = [str(category["name"]) for category in categories]
        self.category_ids = [int(category["id"]) for category in categories]
        self.images: list[dict[str, Any]] = self.coco["images"]
        self.coco["annotations"] = self._checked(self.coco["annotations"])
        self._boxes, self._labels = self._group(self.coco["annotations"])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:
        record = self.images[index]
        image = read_image(self.path(index))
        size = (record.get("height", image.shape[1]), record.get("width", image.shape[2]))
        if size != tuple(image.shape[1:]):
            given = f"{self.json_file} says {size[1]}x{size[0]}"
            raise ImageError(f"{self.path(index)}: is {image.shape[2]}x{image.shape[1]}, but {given}")
        boxes = torch.tensor(self._boxes.get(record["id"], []), dtype=torch.float32).reshape(-1, 4)
        target = {
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size),
            "labels": torch.tensor(self._labels.get(record["id"], []), dtype=torch.int64),
            "image_id": record["id"],
            "path": str(self.path(index)),
        }
        return tv_tensors.Image(image), target

    def path(self, index: int) -> Path:
        """The file of image `index`."""
        return self.folder / self.images[index]["file_name"]

    def _checked(self, annotations: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The annotations that have a box with an extent, each with an id, an area and a crowd flag."""
        image_ids = {record["id"] for record in self.images}
        kept, skipped = [], []
        for number, annotation in enumerate(annotations, start=1):
            annotation.setdefault("id", number)
            name = f"{self.json_file}: annotation {annotation['id']}"
            box = annotation.get("bbox")
            if annotation.get("image_id") not in image_ids:
                raise UserError(f"{name} belongs to image {annotation.get('image_id')}, which the file does not list")
            if annotation.get("category_id") not in self.category_ids:
                raise UserError(f"{name} has category {annotation.get('category_id')}, which the file does not list")
            if not isinstance(box, list) or len(box) != 4 or not all(isinstance(x, int | float) for x in box):
                raise UserError(f"{name} has bbox {box}; four numbers, x, y, width and height, are expected")
            if all(math.isfinite(x) for x in box) and box[2] > 0 and box[3] > 0:
                kept.append({"iscrowd": 0, "area": box[2] * box[3]} | annotation)
            else:
                skipped.append(str(annotation["id"]))
        if skipped:
            names = ", ".join(skipped[:10]) + (", ..." if len(skipped) > 10 else "")
            warnings.warn(
                f"{self.json_file}: {len(skipped)} boxes without an extent are left out: annotations {names}",
                stacklevel=3,
            )
        return kept

    def _group(self, annotations: list[dict[str, Any]]) -> tuple[dict[Any, list], dict[Any, list]]:
        """Boxes, xyxy, and labels by image id, without the crowd regions."""
        boxes, labels = defaultdict(list), defaultdict(list)
        label_of = {category_id: label for label, category_id in enumerate(self.category_ids)}
        for annotation in annotations:
            if not annotation["iscrowd"]:
                x, y, width, height = annotation["bbox"]
                boxes[annotation["image_id"]].append((x, y, x + width, y + height))
                labels[annotation["image_id"]].append(label_of[annotation["category_id"]])
        return dict(boxes), dict(labels)


class Tried(Dataset[Sample | ImageError]):
    """A data set that gives the error in place of an item whose image cannot be read, so that a run can go on.

    Example::

        >>> samples = [x for x in Tried(dataset) if not isinstance(x, ImageError)]  # doctest: +SKIP
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Sample | ImageError:
        try:
            return self.dataset[index]
        except ImageError as error:
            return error


def plain(sample: Any) -> Any:
    """The sample with ordinary tensors, which are cheaper than tv_tensors to use and to send to another process.

    Example::

        >>> image, target = plain(dataset[0])  # doctest: +SKIP
    """
    if isinstance(sample, ImageError):
        return sample
    return tuple(tree_map_only(tv_tensors.TVTensor, lambda tensor: tensor.as_subclass(Tensor), sample))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"{path}: not a JSON file ({error})") from error
    for key, needed in {"images": ("id", "file_name"), "annotations": (), "categories": ("id", "name")}.items():
        entries = content.get(key) if isinstance(content, dict) else None
        if not isinstance(entries, list):
            raise UserError(f"{path}: not a COCO detection file: it has no list called {key!r}")
        for entry in entries:
            missing = [field for field in needed if field not in entry]
            if missing:
                raise UserError(f"{path}: an entry of {key!r} has no {missing[0]!r}: {entry}")
    if not content["images"] or not content["categories"]:
        raise UserError(f"{path}: lists no {'categories' if content['images'] else 'images'}")
    return content
