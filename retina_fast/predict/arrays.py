"""Arrays and tensors of every usual dtype and number of channels as RGB images of 8 bits."""

import numpy as np
import torch
from torch import Tensor

_TYPES = "uint8, uint16, or floating point in [0, 1]"


def pixels_of_array(array: np.ndarray, bgr: bool = False) -> Tensor:
    """The pixels of an array as RGB, (3, H, W) uint8.

    Args:
        array: (H, W), (H, W, 1), (H, W, 3) or (H, W, 4); uint8, uint16, of which the upper 8 bits are kept, or floating
            point in [0, 1]. A fourth channel, alpha, is dropped.
        bgr: whether its channels are in OpenCV's order.

    Raises:
        ValueError: for another shape or dtype, or values outside [0, 1].

    Example::

        >>> pixels_of_array(np.full((2, 4, 3), 0.5))[:, 0, 0].tolist()
        [128, 128, 128]
    """
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4):
        chw = " (a tensor may be (C, H, W))" if array.ndim == 3 and array.shape[0] in (1, 3, 4) else ""
        raise ValueError(f"an array must be (H, W), or (H, W, C) with 1, 3 or 4 channels{chw}, got {array.shape}")
    if array.dtype.newbyteorder("=") == np.uint16:
        array = (array >> 8).astype(np.uint8)
    elif np.issubdtype(array.dtype, np.floating):
        array = array.astype(np.float32)
    elif array.dtype != np.uint8:
        raise ValueError(f"an array must be {_TYPES}, got {array.dtype}")
    values = torch.from_numpy(np.require(array, requirements=["C", "W"]))  # PyTorch warns of arrays that are read-only
    return _rgb(values.permute(2, 0, 1), bgr)


def pixels_of_tensor(image: Tensor, bgr: bool = False) -> Tensor:
    """The pixels of a tensor as RGB, (3, H, W) uint8, on its own device.

    Args:
        image: (H, W), (1, H, W), (3, H, W) or (4, H, W), with the dtypes of :func:`pixels_of_array`.
        bgr: whether its channels are in OpenCV's order.

    Returns:
        In memory of its own.

    Raises:
        ValueError: for another shape or dtype, values outside [0, 1], or a tensor that is sparse or has no data.

    Example::

        >>> pixels_of_tensor(torch.rand(1, 2, 4)).shape
        torch.Size([3, 2, 4])
    """
    if image.is_nested or image.is_meta or image.layout != torch.strided:
        kind = "nested" if image.is_nested else "on the device meta" if image.is_meta else f"a {image.layout}"
        raise ValueError(f"a tensor must be dense and have data, got one that is {kind}")
    if image.dim() == 2:
        image = image[None]
    if image.dim() != 3 or image.shape[0] not in (1, 3, 4):
        hwc = " (an array may be (H, W, C))" if image.dim() == 3 and image.shape[2] in (1, 3, 4) else ""
        raise ValueError(
            f"a tensor must be (H, W), or (C, H, W) with 1, 3 or 4 channels{hwc}, got {tuple(image.shape)}"
        )
    if image.dtype == torch.uint16:
        image = (image.int() >> 8).to(torch.uint8)
    elif image.dtype != torch.uint8 and not image.is_floating_point():
        raise ValueError(f"a tensor must be {_TYPES}, got {image.dtype}")
    return _rgb(image.detach(), bgr)


def _rgb(image: Tensor, bgr: bool) -> Tensor:
    """(C, H, W), uint8 or floating point, as RGB of 8 bits."""
    if not image.numel():
        raise ValueError(f"it has no pixels: its shape is {tuple(image.shape)}")
    if image.is_floating_point():
        low, high = (float(value) for value in image.float().aminmax())
        if not (low >= 0 and high <= 1):  # NaN is neither
            raise ValueError(f"values of floating point must be in [0, 1], got {low:.8g} to {high:.8g}: scale them")
        image = (image.float() * 255).round().to(torch.uint8)
    if len(image) == 1:
        return image.expand(3, -1, -1).contiguous()
    return image[:3].flip(0) if bgr else image[:3].clone(memory_format=torch.contiguous_format)
