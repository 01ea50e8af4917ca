"""Sizes and batching of images: what torchvision's GeneralizedRCNNTransform does, on ``image_batch``."""

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from retina_fast.device import to_device
from retina_fast.kernels.image_batch import image_batch
from retina_fast.stock import TRANSFORM_STEPS, has_stock_transform, is_stock, note_methods
from retina_fast.targets import GroundTruths


class RetinaNetTransform(GeneralizedRCNNTransform):
    """torchvision's transform that also takes ``min_size=None``: every image is scaled by ``image_scale`` alone."""

    def __init__(self, *args: Any, image_scale: float = 1.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.image_scale = image_scale

    def resize(self, image: Tensor, target: dict | None = None) -> tuple[Tensor, dict | None]:
        if self.min_size[-1] is not None or self.fixed_size is not None or (self.training and self._skip_resize):
            return super().resize(image, target)
        fixed = copy.copy(self)
        fixed.fixed_size = resized_size(self, *image.shape[-2:])[::-1]
        return GeneralizedRCNNTransform.resize(fixed, image, target)


note_methods(RetinaNetTransform, *TRANSFORM_STEPS)


def scaling_transform(plain: GeneralizedRCNNTransform, image_scale: float) -> GeneralizedRCNNTransform:
    """A :class:`RetinaNetTransform` with the settings of torchvision's transform; one of another class as it is."""
    if type(plain) is not GeneralizedRCNNTransform:
        return plain
    sizes, normalisation = (plain.min_size, plain.max_size), (plain.image_mean, plain.image_std)
    padding = plain.size_divisible, plain.fixed_size
    skip = plain._skip_resize
    return RetinaNetTransform(*sizes, *normalisation, *padding, _skip_resize=skip, image_scale=image_scale)


def is_stock_transform(transform: object) -> bool:
    """Whether ``transform`` is torchvision's or ours, with none of its steps a user's own and no hooks."""
    classes = RetinaNetTransform, GeneralizedRCNNTransform
    return has_stock_transform() and any(is_stock(transform, cls, *TRANSFORM_STEPS) for cls in classes)


def channels_of(transform: GeneralizedRCNNTransform) -> int:
    """How many channels an image may have, beside one: those of the mean and the standard deviation."""
    return max(len(transform.image_mean), len(transform.image_std))


def check_images(images: Sequence[Tensor] | Tensor, channels: int, take_uint8: bool = False) -> list[Tensor]:
    """The images of a list, a tuple or a 4-D batch.

    Args:
        images: what the model was given.
        channels: of the mean and the standard deviation; 1 serves any number, the same for all images.
        take_uint8: whether uint8 images in [0, 255] are taken, too.

    Raises:
        ValueError: for an image that is not 3-D, is empty, or has neither 1 nor ``channels`` channels.
        TypeError: for an image that is not floating point.
        IndexError: for no image at all.
    """
    if not hasattr(images, "__len__"):
        raise TypeError(f"images must be a list of (C, H, W) tensors or a (B, C, H, W) tensor, got a {type(images)}")
    if isinstance(images, Tensor) and images.is_nested:
        images = images.unbind()
    if isinstance(images, Tensor) and images.dim() != 4:
        raise ValueError(f"images must be a list of (C, H, W) tensors or a (B, C, H, W) tensor, got {images.shape}")
    if not len(images):
        raise IndexError("images is empty")
    for i, image in enumerate(images):
        if not isinstance(image, Tensor):
            raise TypeError(f"images[{i}] must be a Tensor, got a {type(image)}")
        if image.dim() != 3:
            raise ValueError(f"images is expected to be a list of 3d tensors (C, H, W), images[{i}] is {image.shape}")
        if not (image.is_floating_point() or (take_uint8 and image.dtype == torch.uint8)):
            raise TypeError(
                f"Expected input images to be of floating type (in range [0, 1]), images[{i}] is {image.dtype}; "
                "convert with image.float() / 255"
            )
        if not image.numel():
            raise ValueError(f"images[{i}] must have at least one pixel, got {image.shape}")
        if channels == 1:
            channels = image.shape[0]  # those after it have as many, or one
        if image.shape[0] not in (1, channels):
            raise ValueError(f"images[{i}] must be ({channels}, H, W), got {image.shape}")
    return list(images)


def resized_size(transform: GeneralizedRCNNTransform, height: int, width: int) -> tuple[int, int]:
    """The (height, width) an image is resized to.

    In training one of the ``min_size`` is drawn. As in torchvision the draw comes from torch's CPU generator even where
    there is one size, so that the same seed leaves the same random numbers to shuffling, augmentation and dropout.
    """
    if transform.training and transform._skip_resize:
        return height, width
    sizes = transform.min_size
    min_size = sizes[-1]
    if transform.training and len(sizes) > 1:
        min_size = transform.torch_choice(sizes)
    elif transform.training:
        torch.empty(1).uniform_(0.0, 1.0)  # torchvision's draw, whose value decides nothing
    if transform.fixed_size is not None:
        return transform.fixed_size[1], transform.fixed_size[0]
    if min_size is None:
        return round(height * transform.image_scale), round(width * transform.image_scale)
    scale = min(min_size / min(height, width), transform.max_size / max(height, width))
    return math.floor(height * scale), math.floor(width * scale)


def resized_sizes(transform: GeneralizedRCNNTransform, images: Sequence[Tensor]) -> list[tuple[int, int]]:
    """The (height, width) each image is to have in the batch.

    Raises:
        RuntimeError: for an image so elongated that one side would shrink to no pixel.
    """
    sizes = [resized_size(transform, *image.shape[1:]) for image in images]
    for i, (image, size) in enumerate(zip(images, sizes, strict=True)):
        if min(size) < 1:
            raise RuntimeError(f"images[{i}] of {tuple(image.shape[1:])} pixels would be resized to {size}")
    return sizes


def batch_images(
    transform: GeneralizedRCNNTransform, images: Sequence[Tensor], sizes: Sequence[tuple[int, int]]
) -> Tensor:
    """The padded batch ``(B, C, H, W)`` of images resized to ``sizes``."""
    return image_batch(images, sizes, transform.image_mean, transform.image_std, transform.size_divisible)


def size_rows(batch: Tensor, height: int, width: int) -> Tensor:
    """(B, 2) int64 on the batch's device: one height and width for all its images, made where it is needed."""
    return torch.stack([batch.new_full((batch.shape[0],), side, dtype=torch.int64) for side in (height, width)], dim=1)


def resize_batch(transform: GeneralizedRCNNTransform, images: Tensor) -> tuple[Tensor, Tensor]:
    """``batch_images`` for ``(B, C, h, w)`` images of one size: the batch ``(B, C, H, W)`` and the sizes (B, 2) in it.

    Raises:
        RuntimeError: for images so elongated that one side would shrink to no pixel.
    """
    height, width = resized_size(transform, *images.shape[2:])
    if min(height, width) < 1:
        raise RuntimeError(f"images of {tuple(images.shape[1:])} pixels would be resized to {(height, width)}")
    channels = max(images.shape[1], len(transform.image_mean), len(transform.image_std))
    constants = [values * (channels // len(values)) for values in (transform.image_mean, transform.image_std)]
    images = images.expand(-1, channels, -1, -1)
    # The constants are Python numbers, since tensors would have to be uploaded.
    parts = [(images[:, c] - mean) / std for c, (mean, std) in enumerate(zip(*constants, strict=True))]
    batch = torch.stack(parts, dim=1)
    if tuple(images.shape[2:]) != (height, width):
        batch = F.interpolate(batch, size=(height, width), mode="bilinear", align_corners=False)
    divisor = transform.size_divisible
    batch = F.pad(batch, (0, -width % divisor, 0, -height % divisor))
    layout = torch.channels_last if batch.is_cuda else torch.contiguous_format
    return batch.contiguous(memory_format=layout), size_rows(images, height, width)


def padded(batch: Tensor, multiple: int) -> Tensor:
    """The batch ``(B, C, H, W)``, with zeros at the right and at the bottom up to sides that are multiples."""
    right, bottom = (-side % multiple for side in (batch.shape[-1], batch.shape[-2]))
    return F.pad(batch, (0, right, 0, bottom)) if right or bottom else batch


def resize_targets(
    truths: GroundTruths, original: Sequence[tuple[int, int]], resized: Sequence[tuple[int, int]]
) -> GroundTruths:
    """The ground truths in the pixels of the resized images."""
    if list(original) == list(resized):
        return truths
    after, before = (torch.tensor(sizes, device="cpu").float() for sizes in (resized, original))
    ratio = (after / before).flip(1).repeat(1, 2)  # (B, 4): x, y, x, y
    rows = ratio.repeat_interleave(
        torch.tensor(truths.counts, device="cpu"), dim=0, output_size=len(truths.boxes)
    )  # (G, 4)
    return truths._replace(boxes=truths.boxes * to_device(rows, truths.boxes.device))
