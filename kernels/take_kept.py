"""Detections from candidates: the boxes that were kept, scaled to the original image, with their scores and labels.

    box[b, d] = candidate box[b, position[b, d]] * original size[b] / image size[b]     for d < count[b]

PyTorch needs a dozen small operations for this. Here it is one launch.
"""

import torch
from torch import Tensor

from retina_fast.kernels.arguments import at_least_float32, check_devices, check_integers, check_shape
from retina_fast.kernels.dispatch import is_differentiated, runs_triton, tl, triton


def take_kept_reference(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    positions: Tensor,
    counts: Tensor,
    image_sizes: Tensor,
    original_sizes: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition; see :func:`take_kept`."""
    valid = torch.arange(positions.shape[1], device=boxes.device) < counts[:, None]  # (B, D)
    taken = boxes.gather(1, positions[..., None].expand(-1, -1, 4))  # (B, D, 4)
    scale = (original_sizes.float() / image_sizes.float()).flip(1).repeat(1, 2)[:, None]  # (B, 1, 4): x, y, x, y
    return (
        torch.where(valid[..., None], taken * scale, 0),
        torch.where(valid, scores.gather(1, positions), 0),
        torch.where(valid, labels.gather(1, positions), -1),
    )


_TILE = 128


@triton.jit(do_not_specialize=["width", "max_detections"])
def _take_kept_kernel(
    boxes_ptr, scores_ptr, labels_ptr, positions_ptr, counts_ptr, sizes_ptr, original_ptr, out_boxes_ptr,
    out_scores_ptr, out_labels_ptr, width, max_detections, TILE: tl.constexpr,
):  # fmt: skip
    """Program (t, b) writes TILE detections of image b."""
    image = tl.program_id(1).to(tl.int64)
    d = tl.program_id(0) * TILE + tl.arange(0, TILE)
    out = image * max_detections + d
    inside = d < max_detections
    valid = inside & (d < tl.load(counts_ptr + image))
    source = image * width + tl.load(positions_ptr + out, mask=valid, other=0)
    for side in tl.static_range(4):
        axis = image * 2 + 1 - side % 2  # the sizes are height and width
        scale = tl.div_rn(tl.load(original_ptr + axis).to(tl.float32), tl.load(sizes_ptr + axis).to(tl.float32))
        box = tl.load(boxes_ptr + source * 4 + side, mask=valid, other=0.0)
        tl.store(out_boxes_ptr + out * 4 + side, tl.where(valid, box * scale, 0.0), mask=inside)
    tl.store(out_scores_ptr + out, tl.load(scores_ptr + source, mask=valid, other=0.0), mask=inside)
    tl.store(out_labels_ptr + out, tl.load(labels_ptr + source, mask=valid, other=-1), mask=inside)


@torch.library.custom_op("retina_fast::take_kept", mutates_args=())
def _op(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    positions: Tensor,
    counts: Tensor,
    image_sizes: Tensor,
    original_sizes: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`take_kept`; all arguments contiguous."""
    batch, max_detections = positions.shape
    out = (
        boxes.new_empty(batch, max_detections, 4),
        scores.new_empty(batch, max_detections),
        labels.new_empty(batch, max_detections),
    )
    with torch.cuda.device_of(boxes):
        _take_kept_kernel[(triton.cdiv(max_detections, _TILE), batch)](
            boxes, scores, labels, positions, counts, image_sizes, original_sizes, *out, boxes.shape[1],
            max_detections, TILE=_TILE, enable_fp_fusion=False,
        )  # fmt: skip
    return out


@_op.register_fake
def _(boxes, scores, labels, positions, counts, image_sizes, original_sizes):
    shape = positions.shape
    return boxes.new_empty(*shape, 4), scores.new_empty(shape), labels.new_empty(shape)


def take_kept(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    positions: Tensor,
    counts: Tensor,
    image_sizes: Tensor,
    original_sizes: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes ``(B, D, 4)`` in the pixels of the original images, scores and labels ``(B, D)``; 0, 0 and -1 as padding.

    Args:
        boxes: ``(B, M, 4)`` float32 candidates in the pixels of the batch; differentiable, as the scores are.
        scores: ``(B, M)`` float32.
        labels: ``(B, M)`` integers.
        positions: ``(B, D)`` int64, which candidates to take.
        counts: ``(B,)``: only the first counts[b] of them count.
        image_sizes: ``(B, 2)`` height and width of each image in the batch.
        original_sizes: ``(B, 2)`` height and width as it was given.

    Raises:
        ValueError: if the shapes do not fit, labels, positions or counts are not integers, or the tensors lie on
            different devices.

    Example::

        >>> boxes, sizes = torch.tensor([[[0.0, 0.0, 4.0, 4.0], [1.0, 2.0, 3.0, 4.0]]]), torch.tensor([[8, 8]])
        >>> scores, labels = torch.tensor([[0.9, 0.8]]), torch.tensor([[5, 7]])
        >>> take_kept(boxes, scores, labels, torch.tensor([[1, 0]]), torch.tensor([1]), sizes, 2 * sizes)
        (tensor([[[2., 4., 6., 8.],
                 [0., 0., 0., 0.]]]), tensor([[0.8000, 0.0000]]), tensor([[ 7, -1]]))
    """
    batch, width = boxes.shape[:2]
    check_shape("boxes", boxes, "(B, M, 4)", (batch, width, 4))
    check_shape("scores", scores, "(B, M)", (batch, width))
    check_shape("labels", labels, "(B, M)", (batch, width))
    check_shape("positions", positions, "(B, D)", (batch, positions.shape[-1]))
    check_shape("counts", counts, "(B,)", (batch,))
    check_shape("image_sizes", image_sizes, "(B, 2)", (batch, 2))
    check_shape("original_sizes", original_sizes, "(B, 2)", (batch, 2))
    check_integers(labels=labels, positions=positions, counts=counts)
    check_devices(
        boxes.device, scores=scores, labels=labels, positions=positions, counts=counts, image_sizes=image_sizes,
        original_sizes=original_sizes,
    )  # fmt: skip
    boxes, scores = at_least_float32(boxes), at_least_float32(scores)
    arguments = boxes, scores, labels, positions, counts, image_sizes, original_sizes
    if runs_triton(boxes, scores) and not is_differentiated(boxes, scores):
        return _op(*(argument.contiguous() for argument in arguments))
    return take_kept_reference(*arguments)
