"""Box loss over the foreground anchors, for the five losses of torchvision's RetinaNet.

    l1, smooth_l1 (beta 1)   on the deltas that would turn the anchor into its ground truth
                             (Girshick et al. 2014, https://arxiv.org/abs/1311.2524, appendix C)
    giou                     on the decoded box (Rezatofighi et al. 2019, https://arxiv.org/abs/1902.09630)
    diou, ciou               on the decoded box (Zheng et al. 2020, https://arxiv.org/abs/1911.08287)

Only foreground anchors are read: a few hundred rows of deltas an image, where torchvision gathers image by image.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import complete_box_iou_loss, distance_box_iou_loss, generalized_box_iou_loss

from retina_fast.kernels.box_decode import decode
from retina_fast.kernels.levels import flatten_all

_IOU_LOSSES = {"giou": generalized_box_iou_loss, "diou": distance_box_iou_loss, "ciou": complete_box_iou_loss}
LOSS_TYPES = ("l1", "smooth_l1", *_IOU_LOSSES)


def encode(boxes: Tensor, anchors: Tensor) -> Tensor:
    """Deltas (..., 4) that turn anchors (..., 4) into boxes (..., 4), both xyxy."""
    size, anchor_size = boxes[..., 2:] - boxes[..., :2], anchors[..., 2:] - anchors[..., :2]
    centre, anchor_centre = boxes[..., :2] + 0.5 * size, anchors[..., :2] + 0.5 * anchor_size
    return torch.cat(((centre - anchor_centre) / anchor_size, torch.log(size / anchor_size)), dim=-1)


def box_loss_reference(
    deltas: Sequence[Tensor],
    anchors: Tensor,
    indices: Tensor,
    boxes: Tensor,
    offsets: Tensor,
    normalizers: Tensor,
    loss_type: str = "l1",
) -> Tensor:
    """The definition, differentiable by autograd; see :func:`box_loss`."""
    image, anchor = (indices >= 0).nonzero(as_tuple=True)  # (F,) each, F the foreground anchors
    flat = torch.cat(flatten_all(deltas, 4), dim=1)[image, anchor]  # (F, 4)
    flat = flat if flat.dtype == torch.float64 else flat.float()
    anchors = anchors[anchor] if anchors.dim() == 2 else anchors[image, anchor]  # (F, 4)
    matched = boxes[indices[image, anchor] + offsets[image]]  # (F, 4)
    if loss_type in _IOU_LOSSES:
        loss = _IOU_LOSSES[loss_type](decode(flat, anchors), matched, reduction="none", eps=1e-7)
    else:
        difference = F.l1_loss if loss_type == "l1" else F.smooth_l1_loss
        loss = difference(flat, encode(matched, anchors), reduction="none").sum(dim=1)
    return (loss / normalizers[image]).sum()


def box_loss(
    deltas: Sequence[Tensor],
    anchors: Tensor,
    indices: Tensor,
    boxes: Tensor,
    offsets: Tensor,
    normalizers: Tensor,
    loss_type: str = "l1",
) -> Tensor:
    """Box loss of a batch: the sum over images b of (the summed loss of b's foreground) / normalizers[b], a scalar.

    Args:
        deltas: the levels as the heads wrote them, each ``(B, A*4, H, W)`` or ``(B, N_l, 4)``; any float dtype.
        anchors: ``(N, 4)`` float32 xyxy pixels, shared by the images, or ``(B, N, 4)``.
        indices: ``(B, N)`` integers: row of the matched ground truth within its image; negative is not foreground.
        boxes: ``(G, 4)`` float32 ground truths of all images, concatenated.
        offsets: ``(B + 1,)`` integers: image b owns rows offsets[b] to offsets[b + 1] of boxes.
        normalizers: ``(B,)``, the foreground counts (at least 1) times B for torchvision's mean over images.
        loss_type: one of l1, smooth_l1, giou, diou, ciou.

    Raises:
        AssertionError: for an unknown ``loss_type``, as torchvision's.

    Example::

        >>> anchors = torch.tensor([[0.0, 0.0, 10.0, 10.0], [5.0, 5.0, 15.0, 15.0]])
        >>> indices, offsets = torch.tensor([[-1, 0]]), torch.tensor([0, 1])
        >>> box_loss([torch.zeros(1, 2, 4)], anchors, indices, anchors[:1], offsets, torch.tensor([1.0]))
        tensor(1.)
    """
    if loss_type not in LOSS_TYPES:
        raise AssertionError(f"Unsupported loss: {loss_type!r}; choose one of {', '.join(LOSS_TYPES)}")
    return box_loss_reference(deltas, anchors, indices, boxes, offsets, normalizers, loss_type)
