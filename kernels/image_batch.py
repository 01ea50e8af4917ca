"""Image batching: images of differing sizes become one normalised, resized, padded batch (torchvision's transform).

    out[b, c, y, x] = bilinear((image_b[c] - mean[c]) / std[c]) inside image b's resized area, 0 in the padding

Bilinear without antialiasing, half-pixel centres, scale = input size / output size. On a GPU the batch is
channels_last, as the convs of the trunk want it; on a CPU it is NCHW, so that they round as torchvision's do.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def image_batch_reference(
    images: Sequence[Tensor],
    sizes: Sequence[tuple[int, int]],
    mean: Sequence[float],
    std: Sequence[float],
    size_divisible: int = 32,
) -> Tensor:
    """The definition; see :func:`image_batch`."""
    first = images[0]
    height, width = (math.ceil(max(side) / size_divisible) * size_divisible for side in zip(*sizes, strict=True))
    layout = torch.channels_last if first.is_cuda else torch.contiguous_format
    shape = (len(images), len(mean), height, width)
    batch = torch.empty(shape, dtype=first.dtype, device=first.device, memory_format=layout).zero_()
    for b, (image, (h, w)) in enumerate(zip(images, sizes, strict=True)):
        image = (image - image.new_tensor(mean)[:, None, None]) / image.new_tensor(std)[:, None, None]
        if image.shape[1:] != (h, w):
            image = F.interpolate(image[None], size=(h, w), mode="bilinear", align_corners=False)[0]
        batch[b, :, :h, :w] = image
    return batch


def image_batch(
    images: Sequence[Tensor],
    sizes: Sequence[tuple[int, int]],
    mean: Sequence[float],
    std: Sequence[float],
    size_divisible: int = 32,
) -> Tensor:
    """Normalise, resize and pad images into one ``(B, C, H, W)`` batch of the first image's dtype.

    Args:
        images: B tensors ``(C, h, w)``, or ``(1, h, w)`` to be repeated, floating point.
        sizes: the (height, width) each is resized to, at least 1 pixel.
        mean: C means to subtract.
        std: C standard deviations to divide by.
        size_divisible: H and W are the largest sizes rounded up to a multiple of it.

    Example::

        >>> images = [torch.rand(3, 50, 70), torch.rand(3, 90, 40)]
        >>> image_batch(images, [(100, 140), (180, 80)], (0.5, 0.5, 0.5), (0.2, 0.2, 0.2)).shape
        torch.Size([2, 3, 192, 160])
    """
    return image_batch_reference(images, sizes, mean, std, size_divisible)
