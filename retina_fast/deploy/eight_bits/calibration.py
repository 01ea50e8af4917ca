"""The images with which a detector is calibrated for eight bits: read one by one, and checked."""

import itertools
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from retina_fast.data.errors import UserError
from retina_fast.data.images import IMAGE_SUFFIXES, read_image

Images = Iterable[Tensor] | Dataset[Tensor] | str | Path
"""Images (3, H, W) each, uint8 in [0, 255] or floating point in [0, 1]; or a folder of image files."""

MOST_FILES = 300
"""Of a folder with more images, so many are read, evenly spread over their names: ranges have settled long before."""
FEW = 8
"""Fewer images than that, without those of a single colour, are warned of."""


def calibration_images(
    images: Images, size: tuple[int, int] | None = None, prepared: bool = False, channels: int = 3
) -> Iterator[Tensor]:
    """Each image, read and checked as it is asked for, so that only one is in memory; the first one at once.

    Args:
        images: see :data:`Images`.
        size: the height and width that each must have; None takes any.
        prepared: whether they are float32 of any values, as the model's transform makes them.
        channels: of each.

    Raises:
        UserError: at once for what is no list of images, or for no image. For an unreadable file, or an image of a
            wrong kind or size or with values outside its range: at once if it is the first one, else when it is read.
            In the end, for images that all have a single colour each: they would say nothing about the ranges.

    Warns:
        UserWarning: for fewer than 8 images, without those of a single colour.

    Example::

        >>> [image.shape for image in calibration_images(torch.rand(8, 3, 32, 48))][:1]
        [torch.Size([3, 32, 48])]
    """
    if isinstance(images, (str, Path)):
        if prepared:
            raise UserError(f"prepared images cannot be read from image files, got the folder {images}: give tensors")
        named = ((str(path), read_image(path).as_subclass(Tensor)) for path in _files(Path(images)))
    elif isinstance(images, Iterable):
        named = ((f"calibration image {i}", image) for i, image in enumerate(images))
    elif isinstance(images, Dataset):  # which need not end by itself
        data: Any = images
        named = ((f"calibration image {i}", data[i]) for i in range(len(data)))
    else:
        raise UserError(
            f"the images for calibration must be a list or another iterable of images, or a folder, got {type(images)}"
        )
    checked = _checked(named, (channels, *size) if size else (channels,), prepared)
    return itertools.chain(iter([next(checked)]), checked)  # a list itself would keep the image to the end


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of images")
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    if not files:
        raise UserError(f"{folder}: holds no image ({', '.join(IMAGE_SUFFIXES)})")
    count = min(MOST_FILES, len(files))
    return [files[i * len(files) // count] for i in range(count)]


def _checked(named: Iterable[tuple[str, Tensor]], size: tuple[int, ...], prepared: bool) -> Iterator[Tensor]:
    count = plain = 0
    for name, image in named:
        _check(name, image, size, prepared)
        count += 1
        plain += bool((image == image[:, :1, :1]).all())
        yield image
    if not count:
        raise UserError("the images for calibration must be at least one, got none")
    if plain == count:
        which = "the image" if count == 1 else f"the {count} images"
        raise UserError(f"{which} for calibration must show something, but have a single colour each")
    if count - plain < FEW:
        without = f" ({plain} more have a single colour each)" if plain else ""
        warnings.warn(
            f"calibrated with {count - plain} images alone{without}, so that other images may exceed the ranges: give "
            f"at least {FEW}, better 50, of the kind that the detector will see",
            stacklevel=2,
        )


def _check(name: str, image: Tensor, size: tuple[int, ...], prepared: bool) -> None:
    if not isinstance(image, Tensor):
        raise UserError(f"{name} must be a Tensor ({size[0]}, H, W), got {type(image)}")
    if image.dim() != 3 or image.shape[0] != size[0] or not image.numel():
        raise UserError(f"{name} must be ({size[0]}, H, W), got {tuple(image.shape)}")
    if size[1:] and tuple(image.shape[1:]) != size[1:]:
        expected, given = ("x".join(map(str, sides)) for sides in (size[1:], image.shape[1:]))
        raise UserError(f"{name} must be {expected} pixels, height and width, got {given}: crop or resize it")
    if prepared and image.dtype != torch.float32:
        raise UserError(f"{name} must be float32, as the model's transform makes it, got {image.dtype}")
    if prepared or image.dtype == torch.uint8:
        return
    if not image.is_floating_point():
        raise UserError(f"{name} must be uint8 in [0, 255] or floating point in [0, 1], got {image.dtype}")
    lowest, highest = float(image.min()), float(image.max())
    if not (lowest >= 0 and highest <= 1):
        raise UserError(f"{name} must be floating point in [0, 1], got values from {lowest:.3g} to {highest:.3g}")
