"""Data sets in the COCO format: a JSON file of annotations, and the folder of the images that it names."""

import copy
import io
import json
import re
import warnings
from bisect import bisect_right
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils._pytree import tree_map_only
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.v2 import functional as F

from retina_fast.data.errors import ImageError, UserError
from retina_fast.data.faults import LEFT_OUT, REFUSED, Kind, box_fault, corners, entry_faults, place, sizes_of

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".tif", ".tiff", ".bmp", ".avif")
"""What the names of image files usually end in. Which kind a file is of, its content decides."""

_BY_TORCHVISION = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8")  # how JPEG, PNG and GIF begin
_BY_PILLOW = ("WEBP", "TIFF", "BMP", "AVIF")  # torchvision ignores the orientation of a WebP, and reads no other

Sample = tuple[Tensor, dict[str, Any]]


def read_image(path: Path) -> Tensor:
    """Decode an image file to RGB, (3, H, W) uint8, turned upright by its EXIF orientation.

    The content decides which kind it is, not the name. It reads JPEG (grey, RGB, CMYK), PNG (grey, palette, RGB, with
    or without alpha, 1 to 16 bits), WebP, GIF, TIFF, BMP, and AVIF where Pillow does. Of several pictures in a file it
    reads the first. Alpha is dropped; of 16 bits the upper 8 are kept.

    Raises:
        ImageError: if the file is missing or cannot be decoded; the message names it.

    Example::

        >>> read_image(Path("photo.jpg")).shape  # doctest: +SKIP
        torch.Size([3, 480, 640])
    """
    try:
        if not path.is_file():
            raise ImageError(f"{path}: no such image file")
        content = path.read_bytes()
        if not content:
            raise ValueError("an image file must be non empty")
        if not content.startswith(_BY_TORCHVISION):
            return _decode_by_pillow(content)
        encoded = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        image = decode_image(encoded, ImageReadMode.RGB, apply_exif_orientation=True)
    except ImageError:
        raise
    except Exception as error:  # A damaged file may make a decoder raise anything.
        reason = getattr(error, "strerror", None) or re.sub(r"^.*\.cpp:\d+, ", "", f"{error}\n".splitlines()[0])
        raise ImageError(f"{path}: not a readable image ({reason})") from error
    if image.ndim == 4:  # An animated GIF is decoded to all its frames.
        image = image[0]
    return F.to_dtype(image, torch.uint8, scale=True)  # A 16-bit PNG is decoded to uint16.


def _decode_by_pillow(content: bytes) -> Tensor:
    """The first picture in a file of a kind that torchvision does not read, RGB (3, H, W) uint8."""
    Image.init()
    try:
        opened = Image.open(io.BytesIO(content), formats=[kind for kind in _BY_PILLOW if kind in Image.OPEN])
    except UnidentifiedImageError:
        raise ValueError("cannot identify image file: no JPEG, PNG, WebP, GIF, TIFF, BMP or AVIF") from None
    with opened:
        picture = ImageOps.exif_transpose(opened)
        if picture.mode.startswith("I;16"):
            return torch.from_numpy((np.asarray(picture) >> 8).astype(np.uint8)).expand(3, -1, -1).contiguous()
        if picture.mode in ("I", "F"):
            raise ValueError("its pixels are numbers of 32 bits, whose range is unknown: convert it to 8 bits")
        return F.pil_to_tensor(picture.convert("RGB"))


class CocoDataset(Dataset[Sample]):
    """Images and boxes of a COCO JSON file.

    An item is an image, uint8 (3, H, W), and its target: `boxes` (G, 4) float32 xyxy in pixels, `labels` (G,) int64,
    `image_id` and the image's `path`. Labels are contiguous, 0 to K-1, in the order of the category ids: 0 is a real
    class. Crowd regions are left out of the targets. Boxes without an extent, and those that lie outside their image,
    are left out with a warning that names them.

    Args:
        json_file: the annotations; `images`, `annotations` and `categories` as in COCO.
        folder: where the images are.
        content: the annotations, if `json_file` has been read already or has another format.

    Attributes:
        classes: K class names.
        category_ids: their K category ids in the file.
        images: the file's entries of the images, in the order of the items.
        coco: the file's content for an evaluation, without the boxes that are left out and without masks.

    Raises:
        UserError: if the file is missing or not a COCO file. The message names the faulty entry.
        ImageError: when an item is read whose image is missing, unreadable, or not of the size in the file.

    Example::

        >>> dataset = CocoDataset("data/trees/heldout.json", "data/trees/heldout")  # doctest: +SKIP
        >>> image, target = dataset[0]  # doctest: +SKIP
    """

    def __init__(self, json_file: str | Path, folder: str | Path, content: dict[str, Any] | None = None) -> None:
        self.json_file, self.folder = Path(json_file), Path(folder)
        if not self.folder.is_dir():
            raise UserError(f"{self.folder}: no such folder of images")
        self.coco = read_json(self.json_file) if content is None else content
        categories = sorted(self.coco["categories"], key=lambda category: category["id"])
        self.classes = [str(category["name"]) for category in categories]
        self.category_ids = [int(category["id"]) for category in categories]
        self.images: list[dict[str, Any]] = self.coco["images"]
        self.coco["annotations"] = self._usable(self.coco["annotations"])
        self._boxes, self._labels, self._ends = self._targets(self.coco["annotations"])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:
        record = self.images[index]
        image = read_image(self.path(index))
        size = (record.get("height", image.shape[1]), record.get("width", image.shape[2]))
        if size != tuple(image.shape[1:]):
            given = f"{self.json_file} says {size[1]}x{size[0]}"
            raise ImageError(f"{self.path(index)}: is {image.shape[2]}x{image.shape[1]}, but {given}")
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
        return self.folder / self.images[index]["file_name"]

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

        An image whose size the file does not give counts as a square.
        """
        edges = [2 ** (i / 3) for i in range(-3, 4)]
        sizes = [(record.get("height"), record.get("width")) for record in self.images]
        return [bisect_right(edges, height / width if height and width else 1.0) for height, width in sizes]

    def _usable(self, annotations: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The annotations that have a box to learn from, each with an id, an area and a crowd flag.

        A warning names those that are left out.
        """
        for broken in entry_faults(self.coco, str(self.json_file)):
            if broken.kind == Kind.FILE:
                raise UserError(str(broken))
        sizes, categories = sizes_of(self.coco), set(self.category_ids)
        kept, skipped = [], []
        for annotation in annotations:
            fault = box_fault(annotation, sizes, categories)
            if fault and fault.kind in REFUSED:
                raise UserError(f"{place(str(self.json_file), annotation)} {fault.what}")
            if fault and fault.kind in LEFT_OUT:
                skipped.append(annotation.get("source", f"annotation {annotation['id']}"))
            else:
                kept.append({"iscrowd": 0, "area": annotation["bbox"][2] * annotation["bbox"][3]} | annotation)
        if skipped:
            names = ", ".join(skipped[:10]) + (", ..." if len(skipped) > 10 else "")
            what = f"{len(skipped)} boxes without an extent or outside their image are left out"
            warnings.warn(f"{self.json_file}: {what}: {names}", stacklevel=3)
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


def refuse(problem: str) -> None:
    """Raise a UserError for a broken entry: how files are read where the caller gives no function of its own."""
    raise UserError(problem)


def read_json(path: Path, problem: Callable[[str], None] = refuse) -> dict[str, Any]:
    """The content of a COCO detection file, without the masks of its objects, which are the largest part of it.

    Args:
        path: the file.
        problem: called with a message for each entry that lacks something; if it returns, the entry is left out.

    Raises:
        UserError: if the file is missing, or not a COCO detection file.

    Example::

        >>> read_json(Path("instances_val2017.json"))["categories"][0]["name"]  # doctest: +SKIP
        'person'
    """
    try:
        content = json.loads(path.read_text(), object_hook=_without_mask)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"{path}: not a JSON file ({error})") from error
    for key, needed in {"images": ("id", "file_name"), "annotations": (), "categories": ("id", "name")}.items():
        entries = content.get(key) if isinstance(content, dict) else None
        if not isinstance(entries, list):
            raise UserError(f"{path}: not a COCO detection file: it has no list called {key!r}")
        whole = []
        for entry in entries:
            missing = [field for field in needed if field not in entry] if isinstance(entry, dict) else ["fields"]
            if missing:
                problem(f"{path}: an entry of {key!r} has no {missing[0]!r}: {entry}")
            else:
                whole.append(entry)
        content[key] = whole
    if not content["images"] or not content["categories"]:
        raise UserError(f"{path}: lists no {'categories' if content['images'] else 'images'}")
    return content


def _without_mask(entry: dict[str, Any]) -> dict[str, Any]:
    entry.pop("segmentation", None)
    return entry
