"""Box decoding (Girshick et al. 2014, https://arxiv.org/abs/1311.2524, appendix C): deltas on anchors become boxes.

With an anchor's centre (cx, cy) and size (w, h), and deltas (dx, dy, dw, dh):

    centre = (dx w + cx, dy h + cy)     size = (exp(min(dw, c)) w, exp(min(dh, c)) h),  c = log(1000 / 16)

then clipped to the image. All of it in float32 whatever the deltas' dtype. Only the candidates are gathered: the
anchors are never repeated an image.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from retina_fast.kernels.levels import flatten_all

MAX_LOG_SCALE = math.log(1000 / 16)


def decode(deltas: Tensor, anchors: Tensor) -> Tensor:
    """Boxes (..., 4) xyxy of deltas (..., 4) on anchors (..., 4), not clipped; differentiable."""
    size = anchors[..., 2:] - anchors[..., :2]
    centre = anchors[..., :2] + 0.5 * size
    centre = deltas[..., :2] * size + centre
    half = 0.5 * (torch.exp(deltas[..., 2:].clamp(max=MAX_LOG_SCALE)) * size)
    return torch.cat((centre - half, centre + half), dim=-1)


def box_decode_reference(deltas: Sequence[Tensor], anchors: Tensor, index: Tensor, image_sizes: Tensor) -> Tensor:
    """The definition; see :func:`box_decode`."""
    flat = torch.cat(flatten_all(deltas, 4), dim=1)  # (B, N, 4)
    rows = index.long()[..., None].expand(-1, -1, 4)  # (B, M, 4)
    anchors = anchors.expand(len(index), -1, 4) if anchors.dim() == 2 else anchors
    boxes = decode(flat.gather(1, rows).float(), anchors.gather(1, rows))
    limits = image_sizes.to(boxes.dtype).flip(1).repeat(1, 2)[:, None]  # (B, 1, 4): w, h, w, h
    return torch.minimum(boxes.clamp_(min=0), limits)


def box_decode(deltas: Sequence[Tensor], anchors: Tensor, index: Tensor, image_sizes: Tensor) -> Tensor:
    """Decode and clip the boxes of chosen anchors: ``(B, M, 4)`` float32 xyxy pixels.

    Args:
        deltas: the levels as the heads wrote them, each ``(B, A*4, H, W)`` or ``(B, N_l, 4)``; any float dtype.
        anchors: ``(N, 4)`` float32 xyxy pixels, shared by the images, or ``(B, N, 4)``.
        index: ``(B, M)`` integers: which anchors to decode.
        image_sizes: ``(B, 2)`` height and width that boxes are clipped to.

    Example::

        >>> anchors = torch.tensor([[0.0, 0.0, 10.0, 10.0], [5.0, 5.0, 15.0, 15.0]])
        >>> box_decode([torch.zeros(1, 2, 4)], anchors, torch.tensor([[1]]), torch.tensor([[12, 20]]))
        tensor([[[ 5.,  5., 15., 12.]]])
    """
    return box_decode_reference(deltas, anchors, index, image_sizes)
