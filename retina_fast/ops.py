"""The operations for people with a detector of their own.

``sigmoid_focal_loss``, ``nms`` and ``batched_nms`` have torchvision.ops' signatures and errors, and may replace the
functions of torchvision.ops. The other operations are this package's own: they take integer labels, levels as the
heads wrote them, and padded batches.

Arguments that these kernels do not take (quantized boxes, and all that torchvision refuses) are passed to torchvision's
own function. TorchScript and ONNX export get torchvision's operator, which they can write.
"""

import torch
from torch import Tensor
from torchvision.ops.boxes import batched_nms as torchvision_batched_nms
from torchvision.ops.boxes import nms as torchvision_nms

from retina_fast.kernels.anchor_matching import Matches, anchor_matching
from retina_fast.kernels.atss_matching import atss_matching
from retina_fast.kernels.batched_nms import FEW, Kept, nms_image
from retina_fast.kernels.batched_nms import batched_nms as padded_batched_nms
from retina_fast.kernels.box_decode import box_decode
from retina_fast.kernels.box_loss import box_loss
from retina_fast.kernels.box_quality import box_quality
from retina_fast.kernels.box_voting import box_voting
from retina_fast.kernels.candidate_selection import Candidates, candidate_selection
from retina_fast.kernels.distribution_loss import distribution_loss
from retina_fast.kernels.focal_loss import focal_loss
from retina_fast.kernels.greedy_nmm import Merged, greedy_nmm
from retina_fast.kernels.image_batch import image_batch
from retina_fast.kernels.sigmoid_focal_loss import sigmoid_focal_loss
from retina_fast.kernels.soft_focal_loss import soft_focal_loss
from retina_fast.kernels.soft_nms import SoftKept, soft_nms
from retina_fast.kernels.task_aligned_matching import AlignedMatches, task_aligned_matching

__all__ = [
    "AlignedMatches",
    "Candidates",
    "Kept",
    "Matches",
    "Merged",
    "SoftKept",
    "anchor_matching",
    "atss_matching",
    "batched_nms",
    "box_decode",
    "box_loss",
    "box_quality",
    "box_voting",
    "candidate_selection",
    "distribution_loss",
    "focal_loss",
    "greedy_nmm",
    "image_batch",
    "nms",
    "padded_batched_nms",
    "sigmoid_focal_loss",
    "soft_focal_loss",
    "soft_nms",
    "task_aligned_matching",
]


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """torchvision.ops.nms: ``(D,)`` int64 positions of the kept boxes by falling score, lower index first on a tie.

    Args:
        boxes: ``(N, 4)`` xyxy.
        scores: ``(N,)``.
        iou_threshold: a box goes when its IoU with a better kept one is strictly above.

    Raises:
        RuntimeError: if the shapes or dtypes do not fit, as torchvision's.

    Example::

        >>> import torch
        >>> nms(torch.tensor([[0.0, 0, 9, 9], [0, 0, 9, 8], [20, 20, 29, 29]]), torch.tensor([0.5, 0.9, 0.1]), 0.5)
        tensor([1, 2])
    """
    if not torch.jit.is_scripting():
        return _nms(boxes, scores, iou_threshold)
    return torch.ops.torchvision.nms(boxes, scores, iou_threshold)


def batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    """torchvision.ops.batched_nms, exact per class whatever the boxes' dtype and size.

    In TorchScript and in ONNX files, offsets keep the classes apart, as in torchvision. Only there may rounding decide
    whether a box is kept whose IoU is almost at the threshold.

    Args:
        boxes: ``(N, 4)`` xyxy.
        scores: ``(N,)``.
        idxs: ``(N,)`` classes: boxes of different ones do not suppress each other.
        iou_threshold: a box goes when its IoU with a better kept one of its class is strictly above.

    Raises:
        RuntimeError: if the shapes or dtypes do not fit, as torchvision's.

    Example::

        >>> import torch
        >>> boxes = torch.tensor([[0.0, 0, 9, 9], [0, 0, 9, 8], [0, 0, 9, 9]])
        >>> batched_nms(boxes, torch.tensor([0.5, 0.9, 0.1]), torch.tensor([0, 0, 1]), 0.5)
        tensor([1, 2])
    """
    if not torch.jit.is_scripting():
        return _batched_nms(boxes, scores, idxs, iou_threshold)
    return _nms_by_offsets(boxes, scores, idxs, iou_threshold)


def _nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    if _are_few(boxes) or _is_scripted_or_onnx() or not _is_served(boxes, scores, iou_threshold):
        return torchvision_nms(boxes, scores, iou_threshold)
    boxes, scores = boxes.detach(), scores.detach()
    run = _kept_positions if _is_eager_on_cpu(boxes, scores) else _nms_op
    return run(boxes, scores, None, iou_threshold)


def _batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    if _is_scripted_or_onnx():
        return _nms_by_offsets(boxes, scores, idxs, iou_threshold)
    if not torch.compiler.is_compiling() and not boxes.numel():  # whatever the other arguments are
        return torch.empty(0, dtype=torch.int64, device=boxes.device)
    served = _is_served(boxes, scores, iou_threshold) and isinstance(idxs, Tensor) and idxs.shape == scores.shape
    if not served or idxs.layout != torch.strided or idxs.is_meta:
        return torchvision_batched_nms(boxes, scores, idxs, iou_threshold)
    run = _kept_positions if _is_eager_on_cpu(boxes, scores, idxs) else _nms_op
    return run(boxes.detach(), scores.detach(), idxs, iou_threshold)


def _are_few(boxes: Tensor) -> bool:
    """Whether torchvision's own function is the fastest, which also says what is wrong with its arguments."""
    if torch.compiler.is_compiling():
        return False
    return isinstance(boxes, Tensor) and boxes.is_cpu and boxes.dtype == torch.float32 and boxes.numel() <= 4 * FEW


def _is_eager_on_cpu(*tensors: Tensor) -> bool:
    """Whether nobody watches what is done with tensors on a CPU. The calls of an operation that others can see take as
    long as the suppression of twenty boxes."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    plain = all(type(x) in (Tensor, torch.nn.Parameter) and x.is_cpu for x in tensors)
    return plain and torch._C._functorch.peek_interpreter_stack() is None


def _is_scripted_or_onnx() -> bool:
    return torch.jit.is_tracing() or torch.onnx.is_in_onnx_export()


def _is_served(boxes: Tensor, scores: Tensor, iou_threshold: float) -> bool:
    """Whether kinds, shapes and dtypes are such that this package's suppression takes them."""
    if not isinstance(boxes, Tensor) or not isinstance(scores, Tensor):
        return False
    fits = not boxes.is_meta and boxes.layout == scores.layout == torch.strided
    fits = fits and boxes.dim() == 2 and boxes.shape[1] == 4 and scores.shape == boxes.shape[:1]
    floats = boxes.is_floating_point() and boxes.dtype == scores.dtype
    return fits and floats and isinstance(iou_threshold, int | float)


def _kept_positions(boxes: Tensor, scores: Tensor, idxs: Tensor | None, iou_threshold: float) -> Tensor:
    """Positions (D,) of the kept boxes, best first; how many there are is the shape, which the host must know."""
    if idxs is not None and (idxs.is_floating_point() or idxs.dtype == torch.bool):
        idxs = idxs.unique(return_inverse=True)[1]
    if not boxes.is_cuda:
        return nms_image(boxes, scores, idxs, iou_threshold)
    counts = torch.full((1,), len(boxes), device=boxes.device)
    idxs = None if idxs is None else idxs[None]
    kept = padded_batched_nms(boxes[None], scores[None], idxs, counts, iou_threshold, len(boxes))
    return kept.positions[0, : int(kept.counts)].clone()


# A custom_op's checks at each call would take as long as the suppression of a hundred boxes on a CPU.
torch.library.define(
    "retina_fast::nms",
    torch.library.infer_schema(_kept_positions, mutates_args=()),
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.impl("retina_fast::nms", "default", _kept_positions)
_nms_op = torch.ops.retina_fast.nms.default


@torch.library.register_fake("retina_fast::nms")
def _(boxes, scores, idxs, iou_threshold):
    return boxes.new_empty(torch.library.get_ctx().new_dynamic_size(min=0), dtype=torch.int64)


def _nms_by_offsets(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    """One suppression for all classes, whose boxes are moved apart by offsets; works for N = 0, too."""
    ends = torch.cat((boxes.reshape(-1), torch.zeros(1, dtype=boxes.dtype, device=boxes.device)))
    offsets = idxs.to(boxes.dtype).reshape(-1) * (ends.max() - ends.min() + 1.0)
    return torch.ops.torchvision.nms(boxes.reshape(-1, 4) + offsets[:, None], scores.reshape(-1), iou_threshold)
