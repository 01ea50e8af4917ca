"""The last part of an exported file: from the heads' outputs to padded detections, in ATen operations alone.

Candidates are chosen by a top-k a level, lower index first on a tie; what lies below the score threshold is masked, so
that every shape but the batch's is static. Suppression is exact per class, the rule of
:mod:`retina_fast.kernels.batched_nms`.
"""

import math

import torch
from torch import Tensor, nn

from retina_fast.heads import reg_max_of
from retina_fast.kernels.batched_nms import rounded_down
from retina_fast.kernels.box_decode import decode
from retina_fast.kernels.candidate_selection import logit
from retina_fast.kernels.levels import flatten_all
from retina_fast.kernels.side_distributions import box_channels
from retina_fast.model import RetinaNet

MASK = 0x7FFFFFFF
WINDOW = 128  # boxes a turn; the quickest of 32 to 512 on a CPU, batch 4, 512x640, one class


def taken(x: Tensor, index: Tensor) -> Tensor:
    """(B, K, ...): of each image's rows in x (B, N, ...), those at ``index`` (B, K).

    One list of rows of all images is written to ONNX as Gather. GatherElements, as which ``gather`` is written, is
    limited to 64 places in onnx's own evaluator.
    """
    first = torch.arange(x.shape[0], device=x.device)[:, None] * x.shape[1]
    return x.flatten(0, 1).index_select(0, (index + first).flatten()).unflatten(0, index.shape)


def best_by_key(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k highest of rows (B, n) and where they lie, the lower index first on a tie.

    ATen's top-k leaves the order of ties open, so it is given distinct integers: the high 32 bits order as the floats
    do, and the low 32 bits fall as the index rises.
    """
    bits = torch.where(values == 0, 0.0, values).view(torch.int32)  # -0 and 0 tie
    rising = torch.where(bits < 0, bits ^ MASK, bits).long()
    keys = (rising << 32) + (MASK - torch.arange(values.shape[1], device=values.device))
    index = MASK - (keys.topk(k).values & 0xFFFFFFFF)
    return values.gather(1, index), index


def _overlaps(above: Tensor, below: Tensor, iou_thresh: Tensor) -> Tensor:
    """Whether a box of ``above`` suppresses one of ``below``; both are (6, ...): corners, area and label."""
    a, b = above, below
    width, height = (torch.minimum(a[i + 2], b[i + 2]) - torch.maximum(a[i], b[i]) for i in (0, 1))
    intersection = width.clamp(min=0) * height.clamp(min=0)
    return (intersection / (a[4] + b[4] - intersection) > iou_thresh) & (a[5] == b[5])


def suppress(boxes: Tensor, labels: Tensor, valid: Tensor, iou_thresh: float, most: int) -> Tensor:
    """Which boxes (B, M, 4) are kept, (B, M): a loop over windows of them, which ends when every image has its most.

    A window is tested against the boxes kept before it, then within itself. Within it, a box stays unless a better box
    that itself stays suppresses it. Repeating this rule for all boxes at once, until nothing changes, finds the only
    solution.

    Args:
        boxes: best first.
        labels: (B, M).
        valid: (B, M), which of them count.
        iou_thresh: float32, above which a box goes.
        most: how many boxes of an image are wanted; what is marked as kept after them means nothing.
    """
    count = boxes.shape[1]
    window, most = min(WINDOW, count), min(most, count)
    threshold = torch.tensor(iou_thresh, device=boxes.device)  # while_loop makes symbols of numbers that change
    falling = torch.arange(count, 0, -1, device=boxes.device)
    places = torch.arange(window, device=boxes.device)
    earlier = places[:, None] < places
    x1, y1, x2, y2 = boxes.unbind(dim=2)
    # Within a loop each operation is traced several times: one gather and one comparison do for all boxes of a turn.
    columns = torch.stack([x1, y1, x2, y2, (x2 - x1) * (y2 - y1), labels.to(boxes.dtype)])  # (6, B, M), labels to 2^24

    def going(start: Tensor, kept: Tensor) -> Tensor:
        waiting = valid & (falling <= count - start)
        return (waiting.any(dim=1) & (kept.sum(dim=1) < most)).any()

    def take_window(start: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        ranks = torch.where(kept, falling, 0).topk(most).values
        here = places + start
        index = torch.cat([count - ranks, here.expand(len(boxes), -1)], dim=1).clamp(max=count - 1)  # (B, R + W)
        rows = columns.gather(2, index.expand(6, -1, -1))
        overlaps = _overlaps(rows[..., None], rows[:, :, None, most:], threshold)  # (B, R + W, W)
        index = index[:, most:]
        gone = (overlaps[:, :most] & (ranks > 0)[..., None]).any(dim=1)
        free = valid.gather(1, index) & (here < count) & ~gone
        inside = overlaps[:, most:] & earlier  # (B, W, W)

        def unsettled(stays: Tensor, last: Tensor) -> Tensor:
            return (stays != last).any()

        def settle(stays: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
            return free & ~(inside & stays[..., None]).any(dim=1), stays.clone()

        stays = torch.while_loop(unsettled, settle, (free.clone(), ~free))[0]
        return start + window, kept.long().scatter_add(1, index, stays.long()) > 0

    start = torch.zeros((), dtype=torch.int64, device=boxes.device)
    return torch.while_loop(going, take_window, (start, torch.zeros_like(valid)))[1]


class Postprocess(nn.Module):
    """From the heads' outputs, level by level, to the four tensors of ``Detections``.

    Args:
        model: whose thresholds count.
        anchors: (N, 4).
        num_classes: K.
        image_size: height and width of the images as they are given.
        inside: their height and width in the batch.
    """

    anchors: Tensor
    limits: Tensor
    scale: Tensor

    def __init__(
        self,
        model: RetinaNet,
        anchors: Tensor,
        num_classes: int,
        image_size: tuple[int, int],
        inside: tuple[int, int],
    ) -> None:
        super().__init__()
        self.num_classes, self.box_channels = num_classes, box_channels(reg_max_of(model.head))
        self.score_thresh, self.topk, self.most = model.score_thresh, model.topk_candidates, model.detections_per_img
        self.register_buffer("anchors", anchors.clone())
        height, width = inside
        self.register_buffer("limits", torch.tensor([width, height, width, height], dtype=torch.float32, device="cpu"))
        scale = torch.tensor(image_size, device="cpu").float() / torch.tensor(inside, device="cpu").float()
        self.register_buffer("scale", scale.flip(0).repeat(2))
        self.iou_thresh = rounded_down(model.nms_thresh)

    def best(self, values: Tensor, k: int) -> tuple[Tensor, Tensor]:
        return best_by_key(values, k)

    def suppress(self, boxes: Tensor, labels: Tensor, valid: Tensor, most: int) -> Tensor:
        return suppress(boxes, labels, valid, self.iou_thresh, most)

    def candidates(self, level: Tensor) -> tuple[Tensor, Tensor]:
        """The best logits of a level (B, N, K) and where they lie in (B, N*K); -inf is none."""
        level = level.float()
        level = torch.where(level > logit(self.score_thresh), level, -math.inf)
        anchors, classes = level.shape[1:]
        k = min(self.topk, anchors * classes)
        if anchors <= k or classes == 1:
            return self.best(level.flatten(1), k)
        # Choosing anchors first is quicker and loses nothing: before any logit of an anchor outside the k best come k
        # logits of others.
        rows = self.best(level.amax(dim=2), k)[1].sort(dim=1).values
        best, index = self.best(taken(level, rows).flatten(1), k)
        return best, taken(rows, index // classes) * classes + index % classes

    def forward(self, cls_logits: list[Tensor], bbox_regression: list[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        values, indices, first = [], [], 0
        for level in flatten_all(cls_logits, self.num_classes):
            best, index = self.candidates(level)
            values.append(best)
            indices.append(index + first)
            first += level.shape[1] * level.shape[2]
        count = sum(level.shape[1] for level in values)
        logits, order = self.best(torch.cat(values, dim=1), count)  # (B, M), best first
        chosen = taken(torch.cat(indices, dim=1), order)
        anchors, labels = chosen // self.num_classes, chosen % self.num_classes
        deltas = taken(torch.cat(flatten_all(bbox_regression, self.box_channels), dim=1), anchors).float()
        boxes = torch.minimum(decode(deltas, self.anchors[anchors]).clamp(min=0), self.limits)

        most = min(self.most, count)
        kept = self.suppress(boxes, labels, logits > -math.inf, most)
        falling = torch.arange(count, 0, -1, device=boxes.device)
        ranks = torch.where(kept, falling, 0).topk(most).values  # (B, D); 0 is padding
        real, position = ranks > 0, (count - ranks).clamp(max=count - 1)
        boxes = taken(boxes, position) * self.scale
        return (
            torch.where(real[..., None], boxes, 0.0),
            torch.where(real, taken(logits, position).sigmoid(), 0.0),
            torch.where(real, taken(labels, position), -1),
            real.sum(dim=1),
        )
