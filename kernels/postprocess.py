"""From the heads' outputs to padded detections: selection, box decoding, suppression and scaling in one operation.

It is the four operations one after another, each of which is defined in a file of its own. In one operation their seams
cost nothing: a candidate's box is decoded where its place is found, and the kept boxes are written, scaled, by the
kernel that finds them. Eight launches serve a batch in half precision.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from retina_fast.kernels.arguments import check_anchors, check_devices, check_shape
from retina_fast.kernels.batched_nms import Kept, batched_nms, is_walked, thresholds_of
from retina_fast.kernels.box_decode import box_decode
from retina_fast.kernels.candidate_places import Decoding, write_candidates
from retina_fast.kernels.candidate_search import search_keys
from retina_fast.kernels.candidate_selection import Candidates, candidate_selection, candidates_width, logit
from retina_fast.kernels.dispatch import is_differentiated, runs_triton, tl, triton
from retina_fast.kernels.levels import check_levels, flatten_all
from retina_fast.kernels.nms_tiles import suppress_by_tiles, tile_progress
from retina_fast.kernels.nms_walk import flag_by_walks, flags_pitch, progress_blocks
from retina_fast.kernels.side_distributions import box_channels
from retina_fast.kernels.take_kept import take_kept

Fields = tuple[Tensor, Tensor, Tensor, Tensor]
"""Boxes (B, D, 4), scores and labels (B, D), and counts (B,)."""
Nms = Callable[[Tensor, None, Tensor, Tensor, float, int], Kept]
"""Suppression of boxes that lie best first, see :func:`retina_fast.kernels.batched_nms.batched_nms`."""


def postprocess_by_steps(
    logits: Sequence[Tensor],
    deltas: Sequence[Tensor],
    anchors: Tensor,
    image_sizes: Tensor,
    original_sizes: Tensor,
    num_classes: int,
    score_thresh: float,
    topk: int,
    iou_thresh: float,
    max_detections: int,
    reg_max: int = 0,
    nms: Nms = batched_nms,
) -> Fields:
    """The definition; see :func:`postprocess`. Each step runs by its own kernels or reference."""
    candidates = candidate_selection(logits, num_classes, score_thresh, topk)
    boxes = box_decode(deltas, anchors, candidates.anchors, image_sizes, reg_max)  # (B, M, 4)
    return detections_of(candidates, boxes, image_sizes, original_sizes, iou_thresh, max_detections, nms)


def detections_of(
    candidates: Candidates,
    boxes: Tensor,
    image_sizes: Tensor,
    original_sizes: Tensor,
    iou_thresh: float,
    max_detections: int,
    nms: Nms = batched_nms,
) -> Fields:
    """The last steps, from candidates and their boxes ``(B, M, 4)`` in the pixels of the batch."""
    most = min(max_detections, boxes.shape[1])
    # The candidates lie best first, so that the suppression needs no scores.
    kept = nms(boxes, None, candidates.labels, candidates.counts, iou_thresh, most)
    chosen = candidates.scores, candidates.labels, kept.positions, kept.counts
    return *take_kept(boxes, *chosen, image_sizes, original_sizes), kept.counts


_SCAN = 1024


@triton.jit(do_not_specialize=["width", "max_detections"])
def _write_kept_kernel(
    flags_ptr, counts_ptr, boxes_ptr, scores_ptr, labels_ptr, sizes_ptr, original_ptr, out_boxes_ptr, out_scores_ptr,
    out_labels_ptr, kept_counts_ptr, width, max_detections, SCAN: tl.constexpr,
):  # fmt: skip
    """Program b writes the first flagged boxes of image b, scaled to its original size, and pads the row.

    No flag before the last of these boxes is left unset: a program that ended early had kept max_detections by then.
    """
    image = tl.program_id(0).to(tl.int64)
    count = tl.load(counts_ptr + image).to(tl.int32)
    scale_y = tl.div_rn(tl.load(original_ptr + image * 2).to(tl.float32), tl.load(sizes_ptr + image * 2).to(tl.float32))
    scale_x = tl.div_rn(
        tl.load(original_ptr + image * 2 + 1).to(tl.float32), tl.load(sizes_ptr + image * 2 + 1).to(tl.float32)
    )
    start, kept = 0, 0
    while (kept < max_detections) & (start < count):
        i = start + tl.arange(0, SCAN)
        source = image * width + i
        flag = (tl.load(flags_ptr + image * flags_pitch(width) + i, mask=i < count, other=0) != 0).to(tl.int32)
        slots = kept + tl.cumsum(flag, axis=0) - 1
        chosen = (flag > 0) & (slots < max_detections)
        out = image * max_detections + slots
        for side in tl.static_range(4):
            box = tl.load(boxes_ptr + source * 4 + side, mask=chosen, other=0.0)
            tl.store(out_boxes_ptr + out * 4 + side, box * (scale_x if side % 2 == 0 else scale_y), mask=chosen)
        tl.store(out_scores_ptr + out, tl.load(scores_ptr + source, mask=chosen, other=0.0), mask=chosen)
        tl.store(out_labels_ptr + out, tl.load(labels_ptr + source, mask=chosen, other=0), mask=chosen)
        kept += tl.sum(flag, axis=0)
        start += SCAN
    kept = tl.minimum(kept, max_detections)
    tl.store(kept_counts_ptr + image, kept.to(tl.int64))
    start = kept
    while start < max_detections:
        slots = start + tl.arange(0, SCAN)
        padding, out = slots < max_detections, image * max_detections + slots
        for side in tl.static_range(4):
            tl.store(out_boxes_ptr + out * 4 + side, tl.zeros([SCAN], tl.float32), mask=padding)
        tl.store(out_scores_ptr + out, tl.zeros([SCAN], tl.float32), mask=padding)
        tl.store(out_labels_ptr + out, tl.full([SCAN], -1, tl.int64), mask=padding)
        start += SCAN


@torch.library.custom_op("retina_fast::postprocess", mutates_args=())
def _op(
    logits: list[Tensor],
    deltas: list[Tensor],
    anchors: Tensor,
    image_sizes: Tensor,
    original_sizes: Tensor,
    num_classes: int,
    score_thresh: float,
    topk: int,
    iou_thresh: float,
    max_detections: int,
    reg_max: int,
) -> Fields:
    """See :func:`postprocess`; the levels are ``(B, N_l, K)`` and ``(B, N_l, C)``, and D is at most their width."""
    width = candidates_width(logits, topk)
    decoding = Decoding([level.contiguous() for level in deltas], anchors, image_sizes, reg_max)
    walked = is_walked(width, max_detections, True)
    zeros = progress_blocks(width) if walked else tile_progress(width, True)
    found = search_keys(logits, logit(score_thresh), topk, len(logits[0]) * zeros)
    boxes, scores, labels, counts = write_candidates(found, width, num_classes, decoding)
    given = boxes, labels, None, counts, thresholds_of(iou_thresh), max_detections, found.zeros
    if not walked:
        kept = suppress_by_tiles(*given)
        return *take_kept(boxes, scores, labels, *kept, image_sizes, original_sizes), kept[1]
    flags = flag_by_walks(*given)
    shape = len(boxes), max_detections
    out = boxes.new_empty(*shape, 4), scores.new_empty(shape), labels.new_empty(shape), torch.empty_like(counts)
    with torch.cuda.device_of(boxes):
        _write_kept_kernel[(len(boxes),)](
            flags, counts, boxes, scores, labels, image_sizes, original_sizes, *out, width, max_detections,
            SCAN=_SCAN, num_warps=8, enable_fp_fusion=False,
        )  # fmt: skip
    return out


@_op.register_fake
def _(logits, deltas, anchors, image_sizes, original_sizes, classes, score_thresh, topk, iou_thresh, most, reg_max):
    shape = logits[0].shape[0], most
    scores = anchors.new_empty(shape)
    labels = anchors.new_empty(shape, dtype=torch.int64)
    return anchors.new_empty(*shape, 4), scores, labels, labels.new_empty(shape[:1])


def postprocess(
    logits: Sequence[Tensor],
    deltas: Sequence[Tensor],
    anchors: Tensor,
    image_sizes: Tensor,
    original_sizes: Tensor,
    num_classes: int,
    score_thresh: float = 0.05,
    topk: int = 1000,
    iou_thresh: float = 0.5,
    max_detections: int = 300,
    reg_max: int = 0,
) -> Fields:
    """Boxes ``(B, D, 4)``, scores and labels ``(B, D)``, best first with 0, 0 and -1 as padding, and counts ``(B,)``.

    Args:
        logits: the levels as the heads wrote them, each ``(B, A*K, H, W)`` or ``(B, N_l, K)``; any float dtype.
        deltas: likewise with 4 numbers an anchor, or 4 (reg_max + 1).
        anchors: ``(N, 4)`` xyxy pixels, shared by the images, or ``(B, N, 4)``; read as float32.
        image_sizes: ``(B, 2)`` height and width of each image in the batch, to which boxes are clipped.
        original_sizes: ``(B, 2)`` height and width as it was given, to which boxes are scaled.
        num_classes: K.
        score_thresh: scores must exceed it.
        topk: the most candidates of one image and level.
        iou_thresh: a box goes when its IoU with a better kept one of its class is strictly above.
        max_detections: D, the most detections of an image; lowered to the most candidates that one can have.
        reg_max: n where each side is a distribution over 0, 1, ..., n units, and 0 for deltas.

    Raises:
        ValueError: as :func:`candidate_selection`, :func:`box_decode` and :func:`batched_nms` do.

    Example::

        >>> logits, deltas = [torch.tensor([[[0.0], [3.0]]])], [torch.zeros(1, 2, 4)]
        >>> anchors, sizes = torch.tensor([[0.0, 0, 9, 9], [0, 0, 9, 8]]), torch.tensor([[16, 16]])
        >>> postprocess(logits, deltas, anchors, sizes, 2 * sizes, num_classes=1, max_detections=1)[0]
        tensor([[[ 0.,  0., 18., 16.]]])
    """
    rest = num_classes, score_thresh, topk, iou_thresh, max_detections, reg_max
    tensors = *logits, *deltas
    served = runs_triton(*tensors) and not is_differentiated(*tensors) and topk >= 0 and max_detections >= 0
    count = check_levels(logits, num_classes)
    if not served or count * num_classes >= 2**30 - 2**15:  # the steps say what is wrong
        return postprocess_by_steps(logits, deltas, anchors, image_sizes, original_sizes, *rest)
    batch = logits[0].shape[0]
    channels = box_channels(reg_max)
    check_anchors(anchors, batch, check_levels(deltas, channels))
    if check_levels(deltas, channels) != count or deltas[0].shape[0] != batch:
        raise ValueError(f"deltas must be of {count} anchors in {batch} images, as the logits are")
    check_shape("image_sizes", image_sizes, "(B, 2)", (batch, 2))
    check_shape("original_sizes", original_sizes, "(B, 2)", (batch, 2))
    check_devices(
        logits[0].device, deltas=deltas[0], anchors=anchors, image_sizes=image_sizes, original_sizes=original_sizes
    )
    levels = flatten_all(logits, num_classes)
    most = min(max_detections, candidates_width(levels, topk))
    given = anchors.float().contiguous(), image_sizes.contiguous(), original_sizes.contiguous()
    return _op(
        [level.detach() for level in levels], flatten_all(deltas, channels), *given, num_classes, score_thresh, topk,
        iou_thresh, most, reg_max,
    )  # fmt: skip
