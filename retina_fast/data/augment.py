"""Detection augmentations, and the training data that they make: every run with the same seed has the same items."""

import math
import random
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from enum import StrEnum

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from retina_fast.data.coco import CocoDataset, Sample
from retina_fast.data.errors import ImageError, UserError

_MIN_VISIBLE = 0.35  # A box is dropped if the crop shows less of its area.
_SCALES = (0.75, 1.35)  # factors that are drawn for a crop


class ScaledCrop(nn.Module):
    """Cuts a square crop of `size` px at a random place and scale; where it reaches beyond the image it is black.

    The crop is cut before it is resized, so that an image of any size costs the same. Boxes are clipped to the crop;
    a box is dropped with its label if the crop shows less than 35% of it, or less than one pixel.

    Args:
        size: side of the crop in pixels.

    Example::

        >>> image, target = ScaledCrop(256)(image, target)  # doctest: +SKIP
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, image: tv_tensors.Image, target: dict) -> Sample:
        scale = math.exp(_uniform(math.log(_SCALES[0]), math.log(_SCALES[1])))
        side = round(self.size / scale)
        height, width = image.shape[-2:]
        top, left = _start(height, side), _start(width, side)
        before = _area(target["boxes"])
        image, boxes = (F.crop(x, top, left, side, side) for x in (image, target["boxes"]))
        visible = _area(boxes) >= _MIN_VISIBLE * before
        image, boxes = (F.resize(x, [self.size, self.size], antialias=True) for x in (image, boxes))
        sides = boxes[:, 2:] - boxes[:, :2]
        keep = visible & (sides >= 1).all(dim=1)
        return image, target | {"boxes": tv_tensors.wrap(boxes[keep], like=boxes), "labels": target["labels"][keep]}


class RandomTranspose(nn.Module):
    """Mirrors an image on its diagonal with probability 1/2; with both flips, this gives every turn by 90 degrees.

    Example::

        >>> image, target = RandomTranspose()(image, target)  # doctest: +SKIP
    """

    def forward(self, image: tv_tensors.Image, target: dict) -> Sample:
        if torch.rand(()) < 0.5:
            return image, target
        boxes = target["boxes"]
        height, width = boxes.canvas_size
        boxes = tv_tensors.BoundingBoxes(boxes[:, [1, 0, 3, 2]], format="XYXY", canvas_size=(width, height))
        return tv_tensors.Image(image.mT), target | {"boxes": boxes}


class ColorJitter(nn.Module):
    """Changes brightness, contrast, saturation and hue by random amounts in one pass over the pixels.

    All four are linear in luma and chroma (YIQ), where they commute: together they are one 3x3 matrix and an offset.
    Brightness, contrast and saturation are torchvision's, without its clipping between them. The hue is rotated about
    the grey axis, which keeps the luma; torchvision rotates it in HSV, which takes 14 times as long
    (`python -m benchmarks.models.loader`).

    Args:
        brightness, contrast, saturation: ranges of the factors.
        hue: the largest rotation in either direction, as a fraction of a full one.

    Example::

        >>> jitter = ColorJitter(brightness=(0.6, 1.4), contrast=(0.5, 1.5), saturation=(0.3, 1.7), hue=0.08)
        >>> image, target = jitter(torch.zeros(3, 8, 8, dtype=torch.uint8), {})
        >>> image.dtype
        torch.uint8
    """

    _YIQ = torch.tensor([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])

    def __init__(
        self,
        brightness: tuple[float, float],
        contrast: tuple[float, float],
        saturation: tuple[float, float],
        hue: float,
    ) -> None:
        super().__init__()
        self.ranges = (brightness, contrast, saturation, (-hue, hue))

    def forward(self, image: Tensor, target: dict) -> tuple[Tensor, dict]:
        brightness, contrast, saturation, hue = (_uniform(*limits) for limits in self.ranges)
        cos, sin = (saturation * turn(2 * math.pi * hue) for turn in (math.cos, math.sin))
        core = torch.tensor([[1, 0, 0], [0, cos, -sin], [0, sin, cos]]) * (brightness * contrast)
        pixels = image.as_subclass(Tensor).flatten(1).float()  # (3, H*W)
        luma = self._YIQ[0] @ pixels.mean(dim=1)
        offset = (brightness * (1 - contrast) * luma).expand(3, 1)
        changed = torch.addmm(offset, torch.linalg.inv(self._YIQ) @ core @ self._YIQ, pixels)
        changed = changed.round_().clamp_(0, 255).to(torch.uint8).view(image.shape)
        return tv_tensors.wrap(changed, like=image), target


class Flips(StrEnum):
    """Which mirror images of a picture are as likely as the picture itself.

    `none` is for pictures in which light or labels have a direction, `all` for those without an upright direction: it
    adds the vertical flip and turns by 90 degrees.
    """

    NONE = "none"
    HORIZONTAL = "horizontal"
    ALL = "all"


def augmentation(crop: int, flips: Flips) -> v2.Compose:
    """The default recipe's transforms of an (image, target) pair: a crop, flips and changes of the colours.

    Args:
        crop: side of the crops in pixels, or 0 to keep whole images.
        flips: which flips there are, each with probability 1/2.

    Example::

        >>> image, target = augmentation(crop=256, flips=Flips.ALL)(*dataset[0])  # doctest: +SKIP
    """
    steps: list[nn.Module] = [ScaledCrop(crop)] if crop else []
    # The changes are strong, since they make a detector work on pictures of another haze or ground: without them, a
    # detector that was trained on one aerial photograph found 5% of the trees in another that it finds with them.
    jitter = ColorJitter(brightness=(0.6, 1.4), contrast=(0.5, 1.5), saturation=(0.3, 1.7), hue=0.08)
    return v2.Compose([*steps, *_flips(flips), v2.RandomApply([jitter], p=0.9)])


def whole_images(crop: int, flips: Flips) -> v2.Compose:
    """torchvision's transforms for COCO: flips alone. Boxes are clipped to their image.

    Args:
        crop: 0, since images stay whole.
        flips: which flips there are, each with probability 1/2.

    Raises:
        UserError: for a `crop` other than 0.

    Example::

        >>> image, target = whole_images(0, Flips.HORIZONTAL)(*dataset[0])  # doctest: +SKIP
    """
    if crop:
        raise UserError(f"the recipe trains on whole images: leave out --crop {crop}")
    return v2.Compose([_clipped_to_the_image, *_flips(flips)])


def _clipped_to_the_image(image: tv_tensors.Image, target: dict) -> Sample:
    boxes = F.clamp_bounding_boxes(target["boxes"])
    keep = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
    return image, target | {"boxes": tv_tensors.wrap(boxes[keep], like=boxes), "labels": target["labels"][keep]}


def _flips(flips: Flips) -> list[nn.Module]:
    horizontal = [v2.RandomHorizontalFlip()]
    return {
        Flips.NONE: [],
        Flips.HORIZONTAL: horizontal,
        Flips.ALL: [*horizontal, v2.RandomVerticalFlip(), RandomTranspose()],
    }[flips]


def scale_jitter(size: int, flips: Flips, scales: tuple[float, float]) -> v2.Compose:
    """Large-scale jitter (https://arxiv.org/abs/2012.07177): the image is scaled at random and cropped to a square.

    At factor 1 the image just fits into the square. Where it is smaller it is padded with black. Boxes are clipped;
    those of less than one pixel are dropped.

    Args:
        size: side of the square in pixels.
        flips: which flips there are, each with probability 1/2.
        scales: the least and the largest factor.

    Example::

        >>> image, target = scale_jitter(640, Flips.HORIZONTAL, scales=(0.5, 2.0))(*dataset[0])  # doctest: +SKIP
    """
    resized = v2.ScaleJitter((size, size), scales, antialias=True)
    crop = v2.RandomCrop((size, size), pad_if_needed=True)
    return v2.Compose([resized, crop, v2.SanitizeBoundingBoxes(), *_flips(flips)])


class TrainingSet(Dataset[Sample]):
    """A data set with augmentation. Its keys are (epoch, index); seed, epoch and index decide an item's randomness.

    So a run does not depend on the number of workers, and a resumed run has the items of an unbroken one. A warning
    names an image that cannot be read, and the next image takes its place.

    Args:
        dataset: the images and boxes.
        transform: the augmentation of an (image, target) pair.
        seed: of all randomness.

    Raises:
        UserError: when an item is read, if not one image can be.

    Example::

        >>> training_set = TrainingSet(dataset, augmentation(256, Flips.HORIZONTAL), seed=0)  # doctest: +SKIP
        >>> image, target = training_set[3, 17]  # epoch 3, image 17  # doctest: +SKIP
    """

    def __init__(self, dataset: CocoDataset, transform: v2.Compose, seed: int) -> None:
        self.dataset, self.transform, self.seed = dataset, transform, seed

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        epoch, index = key
        image, target = self._readable(index)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(mixed_seed(self.seed, epoch, index))
            return self.transform(image, target)

    def _readable(self, index: int) -> Sample:
        for offset in range(len(self.dataset)):
            try:
                return self.dataset[(index + offset) % len(self.dataset)]
            except ImageError as error:
                warnings.warn(f"{error}; another image takes its place", stacklevel=2)
        raise UserError(f"{self.dataset.folder}: not one of its {len(self.dataset)} images can be read")


def batches(
    length: int, batch_size: int, seed: int, steps: range, kinds: Sequence[int] | None = None, group_size: int = 1
) -> Iterator[list[tuple[int, int]]]:
    """The keys of each step's batch: (epoch, index) pairs from passes over `length` images, each shuffled anew.

    Args:
        length: how many images there are; each is in each pass once.
        batch_size: images a step.
        seed: of the order.
        steps: whose batches are wanted.
        kinds: the kind of each image, where images of one kind are to follow each other.
        group_size: size of the groups of one kind. A step begins with a group; the few images of a pass that fill no
            group come first and last in the pass.

    Example::

        >>> list(batches(length=3, batch_size=2, seed=0, steps=range(2)))
        [[(0, 2), (0, 1)], [(0, 0), (1, 1)]]
        >>> list(batches(length=4, batch_size=2, seed=0, steps=range(2), kinds=[0, 1, 0, 1], group_size=2))
        [[(0, 3), (0, 1)], [(0, 2), (0, 0)]]
    """
    order: tuple[int, list[int]] = (-1, [])
    for step in steps:
        keys = []
        for position in range(step * batch_size, (step + 1) * batch_size):
            epoch, place = divmod(position, length)
            if order[0] != epoch:
                shuffled = random.Random(mixed_seed(seed, epoch)).sample(range(length), length)
                order = (epoch, _grouped(shuffled, kinds or shuffled, group_size, lead=-epoch * length % group_size))
            keys.append((epoch, order[1][place]))
        yield keys


def _grouped(order: Sequence[int], kinds: Sequence[int], size: int, lead: int) -> list[int]:
    """The order, changed so that groups of `size` images of one kind follow the first `lead` images.

    The groups are in the order in which they become complete.
    """
    waiting: defaultdict[int, list[int]] = defaultdict(list)
    grouped: list[int] = []
    for index in order:
        group = waiting[kinds[index]]
        group.append(index)
        if len(group) == size:
            grouped += group
            group.clear()
    rest = [index for group in waiting.values() for index in group]
    if len(rest) < lead:
        grouped, rest = grouped[:-size], rest + grouped[-size:]
    return rest[:lead] + grouped + rest[lead:]


def mixed_seed(*numbers: int) -> int:
    """One 32-bit seed from several non-negative numbers; similar numbers give unrelated seeds.

    Example::

        >>> mixed_seed(0, 1), mixed_seed(0, 2)
        (3964924996, 3141116543)
    """
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def _uniform(low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand(()))


def _start(length: int, side: int) -> int:
    """The random start of a crop along one side: inside the image, or before it if the image is smaller."""
    room = length - side
    return int(torch.randint(min(0, room), max(0, room) + 1, ()))


def _area(boxes: Tensor) -> Tensor:
    boxes = boxes.as_subclass(Tensor)
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
