"""Checks and conversions of arguments, which every public operation makes before it chooses a path.

A kernel gets nothing but addresses. Unchecked, it would read the bits of an int32 as a float32, take a host address for
one of the GPU, and read beyond the end of a tensor that is too short.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from retina_fast.kernels.dispatch import is_transformed
from retina_fast.kernels.levels import check_levels


def at_least_float32(x: Tensor) -> Tensor:
    """The tensor in float32, but float64 as it is."""
    return x if x.dtype == torch.float64 else x.float()


def check_devices(device: torch.device, **tensors: Tensor | None) -> None:
    """Raises ValueError, with its name, for a tensor that is not on the device. None passes."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name} must be on {device} as the other arguments are, got {tensor.device}")


def check_integers(**tensors: Tensor | None) -> None:
    """Raises ValueError, with its name, for a tensor that does not hold integers. None passes."""
    for name, tensor in tensors.items():
        if tensor is not None and (tensor.is_floating_point() or tensor.is_complex()):
            raise ValueError(f"{name} must be integers, got {tensor.dtype}")


def check_shape(name: str, tensor: Tensor, meaning: str, *shapes: tuple[int, ...]) -> None:
    """Raises ValueError, with the name and what its shape means, for a tensor that has none of the shapes."""
    if not any(tuple(tensor.shape) == shape for shape in shapes):
        allowed = " or ".join(map(str, shapes))
        raise ValueError(f"{name} must be {meaning} = {allowed}, got {tuple(tensor.shape)}")


def check_boxes(boxes: Tensor, scores: Tensor | None, labels: Tensor | None, counts: Tensor) -> tuple[int, int]:
    """B and M of padded boxes (B, M, 4), with scores and labels (B, M), of which the first counts[b] of image b count.

    Raises:
        ValueError: if the shapes do not fit, M is 2^29 or more, since the kernels' offsets of coordinates, up to 4 M,
            have 32 bits, labels or counts are not integers, or the tensors lie on different devices.
    """
    if boxes.dim() != 3 or boxes.shape[2] != 4:
        raise ValueError(f"boxes must be (B, M, 4), got {tuple(boxes.shape)}")
    batch, width = boxes.shape[:2]
    if width >= 2**29:
        raise ValueError(f"boxes must be fewer than 2^29 an image, got {width}")
    for name, rows in (("scores", scores), ("labels", labels)):
        if rows is not None:
            check_shape(name, rows, "(B, M)", (batch, width))
    check_shape("counts", counts, "(B,)", (batch,))
    check_integers(labels=labels, counts=counts)
    check_devices(boxes.device, scores=scores, labels=labels, counts=counts)
    return batch, width


def counts_on_host(counts: Tensor) -> list[int]:
    """Counts (B,) as numbers, which waits for a GPU: for references, which need them as numbers.

    Raises:
        ValueError: for a negative one. One above M stands for all M boxes.
    """
    found = counts.tolist()
    if found and min(found) < 0:
        raise ValueError(f"counts must be at least 0, got {min(found)} for image {found.index(min(found))}")
    return found


def offsets_on_host(offsets: Tensor, total: int) -> list[int]:
    """Offsets (B + 1,) into ``total`` rows as numbers, as :func:`counts_on_host` gives counts.

    Raises:
        ValueError: if they fall, begin below 0 or end above ``total``.
    """
    found = offsets.tolist()
    if any(stop < start for start, stop in pairwise([0, *found, total])):
        raise ValueError(f"offsets must rise from 0 to at most the {total} boxes, got {found}")
    return found


def check_matches(indices: Tensor, offsets: Tensor, total: int) -> None:
    """Raises ValueError if an index of a match (B, N) is none of its image's ground truths, or offsets (B + 1,) into
    ``total`` ground truths are impossible. It waits for a GPU: for references, which would read another image's box.
    While torch.compile or torch.func traces the tensors, which then have no values, nothing is checked."""
    if torch.compiler.is_compiling() or is_transformed(indices, offsets) or not indices.numel():
        return
    counts = [stop - start for start, stop in pairwise(offsets_on_host(offsets, total))]
    for image, (count, highest) in enumerate(zip(counts, indices.amax(dim=1).tolist(), strict=True)):
        if highest >= count:
            raise ValueError(f"indices must be below the {count} ground truths of image {image}, got {highest}")


def check_anchors(anchors: Tensor, batch: int, count: int) -> None:
    """Raises ValueError for anchors that are neither shared by the images, (N, 4), nor one set an image, (B, N, 4)."""
    check_shape("anchors", anchors, "(N, 4) or (B, N, 4)", (count, 4), (batch, count, 4))


def check_matched_levels(
    levels: Sequence[Tensor], channels: int, anchors: Tensor, indices: Tensor, boxes: Tensor, offsets: Tensor
) -> tuple[int, int]:
    """B and N of levels with ``channels`` numbers an anchor, anchors, and matches of these with ground truths.

    Raises:
        ValueError: if the shapes do not fit, indices or offsets are not integers, or the tensors lie on different
            devices.
    """
    count = check_levels(levels, channels)
    shape = levels[0].shape[0], count
    check_anchors(anchors, *shape)
    check_shape("indices", indices, "(B, N)", shape)
    check_shape("boxes", boxes, "(G, 4)", (len(boxes), 4))
    check_shape("offsets", offsets, "(B + 1,)", (shape[0] + 1,))
    check_integers(indices=indices, offsets=offsets)
    check_devices(levels[0].device, anchors=anchors, indices=indices, boxes=boxes, offsets=offsets)
    return shape


def loss_normalizers(normalizers: Tensor, batch: int, like: Tensor) -> Tensor:
    """Normalizers (B,) of any dtype and device as a loss divides by them: float32, or float64 for float64 levels, on
    the device of ``like``, a level.

    Raises:
        ValueError: for another shape.
    """
    check_shape("normalizers", normalizers, "(B,)", (batch,))
    return normalizers.to(like.device, torch.float64 if like.dtype == torch.float64 else torch.float32)


def loss_weights(weights: Tensor | None, normalizers: Tensor, shape: tuple[int, int]) -> Tensor | None:
    """Weights (B, N) of anchors as a loss multiplies by them: of the dtype of the normalizers, without history.

    Raises:
        ValueError: for another shape or device.
    """
    if weights is None:
        return None
    check_shape("weights", weights, "(B, N)", shape)
    check_devices(normalizers.device, weights=weights)
    return weights.detach().to(normalizers.dtype)
