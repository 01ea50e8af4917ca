"""Cases of matching and of the operations from logits to detections. Discrete results are compared exactly."""

from collections.abc import Iterator
from unittest import mock

import torch
from torch import Generator, Tensor

from retina_fast.kernels import batched_nms as batched_nms_module
from retina_fast.kernels import candidate_list, nms_tiles
from retina_fast.kernels import key_sort as key_sort_module
from retina_fast.kernels.anchor_matching import _anchor_matching_triton, anchor_matching_reference
from retina_fast.kernels.atss_matching import _atss_matching_triton, atss_matching_reference
from retina_fast.kernels.batched_nms import _batched_nms_triton, batched_nms_reference
from retina_fast.kernels.box_decode import box_decode_reference
from retina_fast.kernels.box_voting import box_voting_reference
from retina_fast.kernels.candidate_selection import _candidate_selection_triton, candidate_selection_reference
from retina_fast.kernels.greedy_nmm import greedy_nmm_reference
from retina_fast.kernels.key_sort import sort_keys
from retina_fast.kernels.postprocess import postprocess_by_steps
from retina_fast.kernels.soft_nms import soft_nms_reference
from retina_fast.kernels.take_kept import take_kept_reference
from retina_fast.kernels.task_aligned_matching import _task_aligned_matching_triton, task_aligned_matching_reference
from tests.ptx.inputs import (
    SHAPES,
    Comparison,
    Run,
    Shapes,
    boxes_near,
    close,
    equal,
    head_outputs,
    random_boxes,
    shifted,
)

ops = torch.ops.retina_fast


def anchor_matching(
    generator: Generator, low_quality: bool, boxes_each: int = 37, anchors: int = 500, shift: int = 0
) -> Run:
    """Four images: with equal ground truths, without any, with a single one, and with one far from every anchor, which
    all of them tie for. Many anchors have an IoU that is a threshold but for rounding."""
    drawn = random_boxes(generator, boxes_each)
    near = torch.cat((boxes_near(drawn, 0.5), boxes_near(drawn, 0.4)))
    places = shifted(torch.cat((random_boxes(generator, anchors), near)), shift)
    far = torch.tensor([[900.0, 900.0, 910.0, 910.0]])
    boxes = torch.cat((drawn, places[[40 % anchors] * 2], places[77 % anchors][None], drawn[:1], far))
    boxes = shifted(boxes, shift)
    offsets = torch.tensor([0, 2, 2, 3, 5])
    offsets[1:] += boxes_each
    labels = torch.randint(0, 91, (len(boxes),), generator=generator)
    arguments = places, boxes, labels, offsets, 0.5, 0.4, low_quality
    expected = anchor_matching_reference(*arguments)

    def run() -> Iterator[Comparison]:
        yield equal("matches", _anchor_matching_triton(*arguments), expected)

    return run


def atss_matching(
    generator: Generator, per_cell: int = 1, top_k: int = 9, boxes_each: int = 7,
    shapes: Shapes = ((22, 17), (6, 5), (1, 1)), own: bool = False, shift: int = 0,
) -> Run:  # fmt: skip
    """Three images: one with equal ground truths and one far from every anchor, one without any, one with a single.
    Distances tie, since all anchors of a cell have its centre."""
    levels = []
    for stride, (height, width) in zip((8, 16, 32, 64, 128), shapes, strict=False):
        y, x = torch.meshgrid(torch.arange(height) * stride, torch.arange(width) * stride, indexing="ij")
        centre = torch.stack((x, y), dim=-1).reshape(-1, 1, 2)
        half = stride * (1 + torch.rand(per_cell, 2, generator=generator))
        levels.append(torch.cat((centre - half, centre + half), dim=2).flatten(0, 1))
    sizes, places = [len(level) for level in levels], torch.cat(levels)
    places = shifted(torch.stack([places + b for b in range(3)]) if own else places, shift)
    drawn, far = random_boxes(generator, boxes_each, 120.0), torch.tensor([[9000.0, 9000.0, 9010.0, 9010.0]])
    boxes = shifted(torch.cat((drawn, drawn[:1], far, drawn[:1] + 3)), shift)
    offsets = torch.tensor([0, boxes_each + 2, boxes_each + 2, boxes_each + 3])
    labels = torch.randint(0, 91, (len(boxes),), generator=generator)
    arguments = places, boxes, labels, offsets, sizes, top_k
    expected = atss_matching_reference(*arguments)

    def run() -> Iterator[Comparison]:
        yield equal("matches", _atss_matching_triton(*arguments), expected)

    return run


def task_aligned_matching(
    generator: Generator, dtype: torch.dtype = torch.float32, num_classes: int = 7, reg_max: int = 0, top_k: int = 5,
    boxes_each: int = 6, shapes: Shapes = SHAPES, own: bool = False, shift: int = 0,
) -> Run:  # fmt: skip
    """Three images: one with equal ground truths and one far from every anchor, one without any, one with a single.
    Some anchors predict NaN. Outputs are drawn until a little noise changes no match: the kernel rounds otherwise."""
    channels, count = 4 * (reg_max + 1), 9 * sum(h * w for h, w in shapes)
    places = random_boxes(generator, count)
    places = shifted(torch.stack([places + b for b in range(3)]) if own else places, shift)
    drawn, far = random_boxes(generator, boxes_each, 60.0), torch.tensor([[9000.0, 9000.0, 9010.0, 9010.0]])
    boxes = shifted(torch.cat((drawn, drawn[:1], far, drawn[:1] + 3)), shift)
    offsets = torch.tensor([0, boxes_each + 2, boxes_each + 2, boxes_each + 3])
    labels = torch.randint(0, num_classes, (len(boxes),), generator=generator)
    given = places, boxes, labels, offsets, num_classes, top_k, 1.0, 6.0, reg_max

    def noisy(levels: list[Tensor]) -> list[Tensor]:
        return [level + 1e-5 * torch.randn(level.shape, generator=generator) for level in levels]

    while True:
        logits = head_outputs(generator, dtype, num_classes, shapes, 2.0, -2.0, shift, batch=3)
        deltas = head_outputs(generator, dtype, channels, shapes, 2.0 if reg_max else 0.3, 0.0, shift, batch=3)
        logits[0][0, :3], deltas[-1][0, 0, 0] = float("nan"), float("nan")
        expected = task_aligned_matching_reference(logits, deltas, *given)
        others = [task_aligned_matching_reference(noisy(logits), noisy(deltas), *given) for _ in "123"]
        if all(torch.equal(expected.indices, other.indices) for other in others):
            break

    def run() -> Iterator[Comparison]:
        *matches, targets = _task_aligned_matching_triton(logits, deltas, *given)
        yield equal("matches", matches, expected[:3])
        yield close("targets", [targets], [expected.targets], 1e-4)

    return run


def candidate_selection(
    generator: Generator, dtype: torch.dtype, num_classes: int, topk: int, score_thresh: float = 0.05,
    ties: bool = False, shapes: Shapes = SHAPES, shift: int = 0, scale: float = 2.0, mixed: bool = False,
) -> Run:  # fmt: skip
    """``ties`` rounds the logits, so that many are equal; with a scale of 0 all are. With ``mixed`` 1% survive in the
    largest level of one image and 3% in that of the other, and in the next level half of them, and all, being equal."""
    levels = head_outputs(generator, dtype, num_classes, shapes, scale, -4.0 if scale else -0.5, shift)
    if mixed:
        levels[0] -= torch.tensor([3.6, 2.6])[:, None, None].to(dtype)
        levels[1 % len(levels)][0] += 1
        levels[1 % len(levels)][1] = -0.5
    if ties:
        levels = [shifted((level * 4).round() / 4, shift) for level in levels]
    levels[0][0, : min(3, levels[0].shape[1]), 0] = float("nan")
    levels[-1][-1, 0, 0], levels[-1][0, 0, -1] = float("inf"), -float("inf")
    expected = candidate_selection_reference(levels, num_classes, score_thresh, topk)

    def run() -> Iterator[Comparison]:
        with mock.patch.object(candidate_list, "_AT_ONCE", 0 if mixed else 2048):  # with floors
            anchors, scores, labels, counts = _candidate_selection_triton(levels, num_classes, score_thresh, topk)
        discrete = expected.anchors, expected.labels, expected.counts
        yield equal("candidates", [anchors, labels, counts], discrete)
        yield close("scores", [scores], [expected.scores], 2e-6)

    return run


def key_sort(generator: Generator, width: int = 700, counted: bool = True) -> Run:
    counts = torch.tensor([width, 0, 1, min(width, 257)])
    keys = torch.stack([torch.randperm(2 * width, generator=generator)[:width] << 31 for _ in counts])
    keys[0, 0] = 2**63 - 1
    keys = torch.where(torch.arange(width) < counts[:, None], keys, -1)
    expected = keys.sort(dim=1, descending=True).values

    def run() -> Iterator[Comparison]:
        with mock.patch.object(key_sort_module, "_PAIRS", 10**8 if counted else 0):
            yield equal("order", [sort_keys(keys, counts)], [expected])

    return run


def batched_nms(
    generator: Generator, by_class: bool, best_first: bool, count: int = 700, iou_thresh: float = 0.5,
    limit: int = 300, shift: int = 0, classes: int = 91, small_tiles: bool = False, chain: bool = False,
) -> Run:  # fmt: skip
    """Clusters of boxes with few distinct scores, in three images of which one is empty. In the first, many pairs have
    an IoU that is the threshold but for rounding. With `small_tiles` a class has several tiles. With `chain` each box
    of an image but the first overlaps with the next, and none with the one after."""
    which = torch.randint(0, max(count // 5, 1), (3, count, 1), generator=generator).expand(-1, -1, 2)
    corner = torch.rand(3, max(count // 5, 1), 2, generator=generator).gather(1, which) * 300
    corner = corner + torch.randn(3, count, 2, generator=generator) * 3
    boxes = torch.cat((corner, corner + 10 + torch.rand(3, count, 2, generator=generator) * 8), dim=2)
    if chain:
        corner = torch.stack((torch.arange(count) * 2.5, torch.zeros(count)), dim=1).repeat(3, 1, 1)
        corner[:, 0] = -1000
        boxes = torch.cat((corner, corner + 10), dim=2)
    scores: Tensor | None = torch.rand(3, count, generator=generator).mul(50).round() / 50
    labels = shifted(torch.randint(0, classes, (3, count), generator=generator), shift) if by_class else None
    pairs = torch.arange(0 if chain else count // 3)
    boxes[0, pairs] = boxes_near(boxes[0, -len(pairs) :], iou_thresh).view(-1, 9, 4)[pairs, pairs % 9]
    if labels is not None:
        labels[0, pairs] = labels[0, -len(pairs) :].clone()
    counts = torch.tensor([count, 0, count // 2 + 1])
    scores = None if best_first or scores is None else shifted(scores, shift)
    arguments = shifted(boxes, shift), scores, labels, counts, iou_thresh, limit
    expected = batched_nms_reference(*arguments)

    small = {"_TILE": 128, "_GROUPS": 4, "_PROGRAMS": 24} if small_tiles else {}
    walked = 0 if small_tiles else batched_nms_module._WALKED

    def run() -> Iterator[Comparison]:
        with mock.patch.object(batched_nms_module, "_WALKED", walked), mock.patch.dict(vars(nms_tiles), small):
            yield equal("kept boxes", _batched_nms_triton(*arguments), expected)

    return run


def box_decode(generator: Generator, dtype: torch.dtype, reg_max: int = 0, shift: int = 0) -> Run:
    levels = head_outputs(generator, dtype, 4 * (reg_max + 1), scale=1.5, shift=shift)
    count = sum(level.shape[1] for level in levels)
    anchors = shifted(random_boxes(generator, count), shift)
    index = torch.randint(0, count, (2, 301), generator=generator)
    sizes = torch.tensor([[70, 90], [80, 60]])
    expected = box_decode_reference([level.float() for level in levels], anchors, index, sizes, reg_max)

    def run() -> Iterator[Comparison]:
        yield close("boxes", [ops.box_decode(levels, anchors, index, sizes, reg_max)], [expected], 1e-6)

    return run


def take_kept(generator: Generator, shift: int = 0) -> Run:
    boxes = shifted(random_boxes(generator, 1500).reshape(3, 500, 4), shift)
    scores = shifted(torch.rand(3, 500, generator=generator), shift)
    labels, positions = (torch.randint(0, n, (3, m), generator=generator) for n, m in ((91, 500), (500, 300)))
    sizes, original_sizes = (torch.randint(50, 900, (3, 2), generator=generator) for _ in range(2))
    arguments = boxes, scores, labels, positions, torch.tensor([300, 0, 131]), sizes, original_sizes
    expected = take_kept_reference(*arguments)

    def run() -> Iterator[Comparison]:
        yield equal("detections", ops.take_kept(*arguments), expected)

    return run


def postprocess(
    generator: Generator, dtype: torch.dtype, limit: int = 40, images: int = 2, reg_max: int = 0,
    shapes: Shapes = SHAPES,
) -> Run:  # fmt: skip
    """The kernels decode and suppress what the references do, up to the last bit of exp."""
    levels = [level[:images] for level in head_outputs(generator, dtype, 7, shapes, 2.0, -3.0)]
    deltas = [level[:images] for level in head_outputs(generator, dtype, 4 * (reg_max + 1), shapes, 0.3)]
    anchors = random_boxes(generator, sum(level.shape[1] for level in levels))
    sizes = torch.tensor([[70, 90], [80, 60]])[:images], torch.tensor([[140, 135], [40, 61]])[:images]
    arguments = levels, deltas, anchors, *sizes, 7, 0.05, 150, 0.5, limit, reg_max
    boxes, scores, labels, counts = postprocess_by_steps(*arguments)

    def run() -> Iterator[Comparison]:
        ours = ops.postprocess(*arguments)
        yield equal("labels and counts", ours[2:], (labels, counts))
        yield close("boxes", ours[:1], [boxes], 1e-6)
        yield close("scores", ours[1:2], [scores], 2e-6)

    return run


def _clusters(generator: Generator, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Boxes, scores, classes and counts of two images."""
    corner = torch.rand(2, count, 2, generator=generator) * 60
    boxes = torch.cat((corner, corner + 8 + torch.rand(2, count, 2, generator=generator) * 8), dim=2)
    labels = torch.randint(0, 91, (2, count), generator=generator)
    return boxes, torch.rand(2, count, generator=generator), labels, torch.tensor([count, count // 3])


def soft_nms(generator: Generator, method: str, by_class: bool, count: int = 150, limit: int = 20) -> Run:
    boxes, scores, labels, counts = _clusters(generator, count)
    arguments = boxes, scores, labels if by_class else None, counts, method, 0.3, 0.5, 0.05, limit
    positions, taken, lengths = soft_nms_reference(*arguments)

    def run() -> Iterator[Comparison]:
        ours = ops.soft_nms(*arguments)
        yield equal("boxes taken", ours[::2], (positions, lengths))
        yield close("scores", ours[1:2], [taken], 2e-6)

    return run


def greedy_nmm(
    generator: Generator, match_metric: str, by_class: bool, count: int = 60, limit: int = 60, threshold: float = 0.5
) -> Run:
    boxes, scores, labels, counts = _clusters(generator, count)
    boxes, scores = boxes.round(), (scores * 20).round() / 20  # many are equal, and many overlaps are the threshold
    arguments = boxes, scores, labels % 4 if by_class else None, counts, match_metric, threshold, limit
    expected = greedy_nmm_reference(*arguments)

    def run() -> Iterator[Comparison]:
        yield equal("merged boxes", ops.greedy_nmm(*arguments), expected)

    return run


def box_voting(generator: Generator, by_class: bool, count: int = 300, shift: int = 0) -> Run:
    boxes, scores, labels, counts = _clusters(generator, count)
    positions = torch.randint(0, count // 3, (2, 37), generator=generator)
    rest = labels if by_class else None, counts, positions, torch.tensor([37, 5])
    given = shifted(boxes, shift), shifted(scores, shift)
    expected = box_voting_reference(given[0].double(), given[1].double(), *rest)

    def run() -> Iterator[Comparison]:
        yield close("boxes", [ops.box_voting(*given, *rest, 0.5)], [expected.float()], 2e-6)

    return run
