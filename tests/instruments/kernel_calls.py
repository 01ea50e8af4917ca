"""A call of every kernel of the project, at a size really used.

KERNEL_CALLS is the one list of kernels. Each entry calls an operation on fake CUDA tensors (fake_gpu.py).
`python -m benchmarks.static` compiles what it launches for every target, and tests/kernels/test_launches.py checks that
its launcher neither reads a device value nor copies between devices. A kernel is a `@triton.jit` function whose name
ends in `_kernel`.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from retina_fast import detections
from retina_fast.detections import Thresholds
from retina_fast.forward import DELTAS, LOGITS, HeadOutputs
from retina_fast.kernels import (
    anchor_matching,
    atss_matching,
    batched_nms,
    box_decode,
    box_loss,
    box_quality,
    box_voting,
    candidate_selection,
    distribution_loss,
    focal_loss,
    greedy_nmm,
    image_batch,
    soft_focal_loss,
    soft_nms,
    take_kept,
    task_aligned_matching,
)
from retina_fast.kernels.group_norm_relu import group_norm_relu
from retina_fast.kernels.levels import flatten_all
from tests.instruments.conv_calls import (
    call_conv_chain,
    call_conv_epilogue,
    call_conv_pointwise,
    call_epilogue_gradients,
    call_first_channels,
    call_max_pool_relu,
    call_stem_conv,
)
from tests.instruments.fake_gpu import Launch

LIMITS_HOLD_FOR = ("3.6", "3.8", "3.9")  # the versions of Triton whose machine code chose the limits below


@dataclass(frozen=True)
class KernelCall:
    """A call of an operation on fake CUDA tensors, and what the compiled kernel must hold.

    Args:
        run: the call.
        tile: the names of the launch's constants whose product is the number of elements that one program handles.
            Without them no figure per element is reported.
        bytes_per_element: how many bytes an element of the tile reads and writes by 16-byte accesses.
        instructions, mufu: the most instructions and special-function (MUFU) instructions an element, on NVIDIA.
        kernel: the kernel that the tile and the limits are about, where the call launches several.
    """

    run: Callable[[], Any]
    tile: tuple[str, ...] = ()
    bytes_per_element: int = 0
    instructions: float = float("inf")
    mufu: float = float("inf")
    kernel: str | None = None

    def elements(self, launch: Launch) -> int | None:
        """Returns how many elements a program of this launch handles, or None if the figures are not about it."""
        if not self.tile or self.kernel not in (None, launch.kernel.__name__):
            return None
        return math.prod(launch.kwargs[name] for name in self.tile)


def levels_of(dtype: torch.dtype, channels: int, batch: int = 8) -> list[torch.Tensor]:
    """Returns the five levels of images of 800x800 as a head writes them: (B, A*channels, H, W), channels_last."""
    layout = torch.channels_last
    return [
        torch.empty(batch, 9 * channels, n, n, dtype=dtype, device="cuda", memory_format=layout).requires_grad_()
        for n in (100, 50, 25, 13, 7)
    ]


def call_focal_loss(dtype: torch.dtype, num_classes: int = 91) -> None:
    labels = torch.empty(8, 120087, dtype=torch.int32, device="cuda")
    focal_loss.focal_loss(levels_of(dtype, num_classes), labels, torch.empty(8, device="cuda"), num_classes)


def _focal_loss_backward(dtype: torch.dtype) -> None:
    """Calls the backward kernel, which runs where forward wrote no gradient; autograd itself would need a GPU."""
    levels = [level.detach() for level in flatten_all(levels_of(dtype, 91), 91)]
    labels = torch.empty(8, 120087, dtype=torch.int32, device="cuda")
    normalizers, factor = torch.empty(8, device="cuda"), torch.empty((), device="cuda")
    torch.ops.retina_fast.focal_loss(levels, labels, normalizers, factor, 91, 0.25, 2.0, False, True)


def _soft_focal_loss(dtype: torch.dtype, loss_type: str) -> None:
    labels, quality = (torch.empty(8, 120087, dtype=kind, device="cuda") for kind in (torch.int32, torch.float32))
    normalizers = torch.empty(8, device="cuda")
    soft_focal_loss.soft_focal_loss(levels_of(dtype, 91), labels, quality, normalizers, 91, loss_type)


def call_scale(dtype: torch.dtype) -> None:
    levels = [level.detach() for level in flatten_all(levels_of(dtype, 91), 91)]
    torch.ops.retina_fast.scale_(levels, torch.empty((), device="cuda"))


def _sigmoid_focal_loss(dtype: torch.dtype, output: str) -> None:
    x, targets = (torch.empty(8, 120087, 91, dtype=dtype, device="cuda") for _ in range(2))
    incoming = torch.empty_like(x) if output == "gradients" else None
    torch.ops.retina_fast.sigmoid_focal_loss(
        x, targets, incoming, 0.25, 2.0, output, torch.float32 if output == "sums" else dtype
    )


def call_image_batch(dtype: torch.dtype, out_dtype: torch.dtype) -> None:
    """Batches eight images of 480x640, resized to 800 as torchvision does."""
    images = [torch.empty(3, 480, 640, dtype=dtype, device="cuda")] * 8
    layout = torch.channels_last
    out = torch.empty(8, 3, 800, 1088, dtype=out_dtype, device="cuda", memory_format=layout)
    image_batch.image_batch(images, [(800, 1066)] * 8, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), out=out)


def _block_levels(dtype: torch.dtype) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Returns the five levels of 8 images of 800x800 within a v2 head, and a weight for its 256 channels."""
    layout = torch.channels_last
    levels = [torch.empty(8, 256, n, n, dtype=dtype, device="cuda", memory_format=layout) for n in (100, 50, 25, 13, 7)]
    return levels, torch.empty(256, device="cuda")


def _group_norm_relu(dtype: torch.dtype, num_groups: int = 32) -> None:
    levels, weight = _block_levels(dtype)
    group_norm_relu(levels, weight, weight, num_groups)


def _group_norm_relu_backward(dtype: torch.dtype, num_groups: int = 32) -> None:
    levels, weight = _block_levels(dtype)
    torch.ops.retina_fast.group_norm_relu_backward(
        levels, levels, weight, weight, torch.empty(8, 5, num_groups, 2, device="cuda")
    )


def _candidate_selection(dtype: torch.dtype, topk: int = 1000, batch: int = 8) -> None:
    levels = [level.detach() for level in levels_of(dtype, 91, batch)]
    candidate_selection.candidate_selection(levels, 91, 0.05, topk)


def call_batched_nms(by_class: bool, best_first: bool, batch: int = 8, count: int = 5000, most: int = 300) -> None:
    boxes, counts = torch.empty(batch, count, 4, device="cuda"), torch.empty(batch, dtype=torch.int64, device="cuda")
    scores = None if best_first else torch.empty(batch, count, device="cuda")
    labels = torch.empty(batch, count, dtype=torch.int64, device="cuda") if by_class else None
    batched_nms.batched_nms(boxes, scores, labels, counts, max_detections=most)


def _box_decode(dtype: torch.dtype, reg_max: int = 0) -> None:
    levels = [level.detach() for level in levels_of(dtype, 4 * (reg_max + 1))]
    index = torch.empty(8, 5000, dtype=torch.int64, device="cuda")
    sizes = torch.empty(8, 2, dtype=torch.int64, device="cuda")
    box_decode.box_decode(levels, torch.empty(120087, 4, device="cuda"), index, sizes, reg_max)


def _soft_nms() -> None:
    boxes, counts = torch.empty(8, 5000, 4, device="cuda"), torch.empty(8, dtype=torch.int64, device="cuda")
    labels = torch.empty(8, 5000, dtype=torch.int64, device="cuda")
    soft_nms.soft_nms(boxes, boxes[..., 0], labels, counts)


def _box_voting() -> None:
    boxes, counts = torch.empty(8, 5000, 4, device="cuda"), torch.empty(8, dtype=torch.int64, device="cuda")
    labels, positions = (torch.empty(8, n, dtype=torch.int64, device="cuda") for n in (5000, 300))
    box_voting.box_voting(boxes, boxes[..., 0], labels, counts, positions, counts)


def _greedy_nmm(match_metric: str) -> None:
    boxes, counts = torch.empty(1, 5000, 4, device="cuda"), torch.empty(1, dtype=torch.int64, device="cuda")
    labels = torch.empty(1, 5000, dtype=torch.int64, device="cuda")
    greedy_nmm.greedy_nmm(boxes, boxes[..., 0], labels, counts, match_metric, 0.5, 5000)


def _take_kept() -> None:
    boxes, scores = torch.empty(8, 5000, 4, device="cuda"), torch.empty(8, 5000, device="cuda")
    labels, positions, counts, sizes = (
        torch.empty(8, *shape, dtype=torch.int64, device="cuda") for shape in ((5000,), (300,), (), (2,))
    )
    take_kept.take_kept(boxes, scores, labels, positions, counts, sizes, sizes)


def detect(dtype: torch.dtype, batch: int = 8, reg_max: int = 0) -> detections.Detections:
    """Calls the whole postprocess, from the heads' outputs at 800x800 to detections."""
    widths = 91, 4 * (reg_max + 1)
    logits, deltas = ([level.detach() for level in levels_of(dtype, channels, batch)] for channels in widths)
    anchors = torch.empty(120087, 4, device="cuda")
    sizes = torch.empty(2, batch, 2, dtype=torch.int64, device="cuda")
    outputs = HeadOutputs({LOGITS: logits, DELTAS: deltas}, anchors, 91, {}, reg_max=reg_max)
    return detections.detect(outputs, sizes[0], sizes[1], Thresholds(0.05, 1000, 0.5, 300))


def ground_truths(num_boxes: int, batch: int = 8) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the boxes, the labels and the offsets of all images."""
    boxes, labels = torch.empty(num_boxes, 4, device="cuda"), torch.empty(num_boxes, dtype=torch.int64, device="cuda")
    return boxes, labels, torch.empty(batch + 1, dtype=torch.int64, device="cuda")


def call_anchor_matching(low_quality: bool, num_boxes: int = 4000, batch: int = 8) -> None:
    anchors = torch.empty(120087, 4, device="cuda")
    anchor_matching.anchor_matching(anchors, *ground_truths(num_boxes, batch), allow_low_quality_matches=low_quality)


def _atss_matching(per_cell: int) -> None:
    sizes = [n * n * per_cell for n in (100, 50, 25, 13, 7)]
    anchors = torch.empty(sum(sizes), 4, device="cuda")
    atss_matching.atss_matching(anchors, *ground_truths(4000), sizes, 9 * per_cell)


def _task_aligned_matching(dtype: torch.dtype, num_classes: int = 91, reg_max: int = 0, top_k: int = 13) -> None:
    levels = levels_of(dtype, num_classes), levels_of(dtype, 4 * (reg_max + 1))
    given = *levels, torch.empty(120087, 4, device="cuda"), *ground_truths(4000), num_classes
    task_aligned_matching.task_aligned_matching(*given, top_k=top_k, reg_max=reg_max)


def _box_loss(dtype: torch.dtype, loss_type: str) -> None:
    boxes, _, offsets = ground_truths(4000)
    anchors = torch.empty(120087, 4, device="cuda")
    indices = torch.empty(8, 120087, dtype=torch.int32, device="cuda")
    normalizers = torch.empty(8, device="cuda")
    box_loss.box_loss(levels_of(dtype, channels=4), anchors, indices, boxes, offsets, normalizers, loss_type)


def _distribution_loss(dtype: torch.dtype, loss_type: str) -> None:
    boxes, _, offsets = ground_truths(4000)
    anchors = torch.empty(120087, 4, device="cuda")
    indices = torch.empty(8, 120087, dtype=torch.int32, device="cuda")
    arguments = anchors, indices, boxes, offsets, torch.empty(8, device="cuda"), 16, loss_type
    distribution_loss.distribution_loss(levels_of(dtype, channels=4 * 17), *arguments)


def _box_quality(reg_max: int = 0) -> None:
    boxes, _, offsets = ground_truths(4000)
    anchors = torch.empty(120087, 4, device="cuda")
    indices = torch.empty(8, 120087, dtype=torch.int32, device="cuda")
    levels = levels_of(torch.bfloat16, channels=4 * (reg_max + 1))
    box_quality.box_quality(levels, anchors, indices, boxes, offsets, reg_max)


_TILE, _FOCAL = ("TILE",), "_focal_loss_kernel"

KERNEL_CALLS = {
    "anchor_matching": KernelCall(lambda: call_anchor_matching(True)),
    "anchor_matching without low quality": KernelCall(lambda: call_anchor_matching(False)),
    "atss_matching": KernelCall(lambda: _atss_matching(1)),
    "atss_matching nine anchors a cell": KernelCall(lambda: _atss_matching(9)),
    "task_aligned_matching bf16": KernelCall(lambda: _task_aligned_matching(torch.bfloat16)),
    "task_aligned_matching fp32 K=1 n=16": KernelCall(lambda: _task_aligned_matching(torch.float32, 1, 16)),
    "task_aligned_matching bf16 topk=128": KernelCall(lambda: _task_aligned_matching(torch.bfloat16, top_k=128)),
    **{
        f"box_loss bf16 {name}": KernelCall(functools.partial(_box_loss, torch.bfloat16, name))
        for name in box_loss.LOSS_TYPES
    },
    "focal_loss bf16": KernelCall(lambda: call_focal_loss(torch.bfloat16), _TILE, 4, 28, 3, _FOCAL),
    "focal_loss fp32": KernelCall(lambda: call_focal_loss(torch.float32), _TILE, 8, 30, 3, _FOCAL),
    "focal_loss fp16 forward": KernelCall(lambda: call_focal_loss(torch.float16), _TILE, 2, 28, 3, _FOCAL),
    "focal_loss fp16 backward": KernelCall(lambda: _focal_loss_backward(torch.float16), _TILE, 4, 28, 3),
    "focal_loss bf16 K=1": KernelCall(lambda: call_focal_loss(torch.bfloat16, 1), _TILE, 4, kernel=_FOCAL),
    "soft_focal_loss bf16 quality_focal": KernelCall(
        lambda: _soft_focal_loss(torch.bfloat16, "quality_focal"), _TILE, 4, kernel=_FOCAL
    ),
    "soft_focal_loss bf16 varifocal": KernelCall(
        lambda: _soft_focal_loss(torch.bfloat16, "varifocal"), _TILE, 4, kernel=_FOCAL
    ),
    "box_quality bf16": KernelCall(_box_quality),
    "box_quality bf16 n=16": KernelCall(lambda: _box_quality(16)),
    "distribution_loss bf16": KernelCall(lambda: _distribution_loss(torch.bfloat16, "giou")),
    "one_pass scale bf16": KernelCall(lambda: call_scale(torch.bfloat16)),
    "sigmoid_focal_loss bf16 losses": KernelCall(lambda: _sigmoid_focal_loss(torch.bfloat16, "losses"), _TILE, 6),
    "sigmoid_focal_loss bf16 sum": KernelCall(lambda: _sigmoid_focal_loss(torch.bfloat16, "sums"), _TILE, 4),
    "sigmoid_focal_loss bf16 backward": KernelCall(lambda: _sigmoid_focal_loss(torch.bfloat16, "gradients"), _TILE, 8),
    "image_batch uint8 to bf16": KernelCall(lambda: call_image_batch(torch.uint8, torch.bfloat16)),
    "image_batch fp32": KernelCall(lambda: call_image_batch(torch.float32, torch.float32)),
    "group_norm_relu bf16": KernelCall(lambda: _group_norm_relu(torch.bfloat16)),
    "group_norm_relu fp32": KernelCall(lambda: _group_norm_relu(torch.float32)),
    "group_norm_relu bf16 backward": KernelCall(lambda: _group_norm_relu_backward(torch.bfloat16)),
    "group_norm_relu fp32 backward": KernelCall(lambda: _group_norm_relu_backward(torch.float32)),
    "group_norm_relu bf16 one group": KernelCall(lambda: _group_norm_relu(torch.bfloat16, 1)),
    "group_norm_relu bf16 one group backward": KernelCall(lambda: _group_norm_relu_backward(torch.bfloat16, 1)),
    "candidate_selection bf16": KernelCall(
        lambda: _candidate_selection(torch.bfloat16), _TILE, 2, 6.6, 0.02, "_list_kernel"
    ),
    "candidate_selection fp32": KernelCall(
        lambda: _candidate_selection(torch.float32), _TILE, 4, 8, 0.02, "_list_kernel"
    ),
    "candidate_selection bf16 topk=5000": KernelCall(lambda: _candidate_selection(torch.bfloat16, 5000)),
    "candidate_selection bf16 one image": KernelCall(lambda: _candidate_selection(torch.bfloat16, batch=1)),
    "postprocess bf16": KernelCall(lambda: detect(torch.bfloat16)),
    "postprocess bf16 n=16": KernelCall(lambda: detect(torch.bfloat16, 1, 16)),
    "postprocess bf16 one image": KernelCall(lambda: detect(torch.bfloat16, 1)),
    "postprocess bf16 32 images": KernelCall(lambda: detect(torch.bfloat16, 32)),
    "box_decode bf16": KernelCall(lambda: _box_decode(torch.bfloat16)),
    "box_decode bf16 n=16": KernelCall(lambda: _box_decode(torch.bfloat16, 16)),
    "batched_nms": KernelCall(lambda: call_batched_nms(by_class=True, best_first=False)),
    "batched_nms best first": KernelCall(lambda: call_batched_nms(by_class=True, best_first=True)),
    "batched_nms one image": KernelCall(lambda: call_batched_nms(by_class=True, best_first=False, batch=1)),
    "batched_nms 32 images": KernelCall(lambda: call_batched_nms(by_class=True, best_first=False, batch=32)),
    "batched_nms class-agnostic": KernelCall(lambda: call_batched_nms(by_class=False, best_first=True)),
    "batched_nms class-agnostic, few": KernelCall(lambda: call_batched_nms(by_class=False, best_first=True, count=200)),
    "batched_nms all kept": KernelCall(
        lambda: call_batched_nms(by_class=True, best_first=False, batch=1, count=7000, most=7000)
    ),
    "batched_nms class-agnostic, all kept": KernelCall(
        lambda: call_batched_nms(by_class=False, best_first=False, batch=1, count=7000, most=7000)
    ),
    "batched_nms all kept of many": KernelCall(
        lambda: call_batched_nms(by_class=True, best_first=False, batch=1, count=100_000, most=100_000)
    ),
    "batched_nms class-agnostic, all kept of many": KernelCall(
        lambda: call_batched_nms(by_class=False, best_first=False, batch=1, count=100_000, most=100_000)
    ),
    "soft_nms": KernelCall(_soft_nms),
    "box_voting": KernelCall(_box_voting),
    "greedy_nmm IOU": KernelCall(lambda: _greedy_nmm("IOU")),
    "greedy_nmm IOS": KernelCall(lambda: _greedy_nmm("IOS")),
    "take_kept": KernelCall(_take_kept),
    "conv_epilogue bf16 sum": KernelCall(lambda: call_conv_epilogue(256, "relu", True), ("BLOCK",), 6),
    "conv_epilogue bf16": KernelCall(lambda: call_conv_epilogue(256, "relu", False), ("BLOCK",), 4),
    "conv_chain bf16, two": KernelCall(lambda: call_conv_chain(whole=False)),
    "conv_chain bf16, three": KernelCall(lambda: call_conv_chain(whole=True)),
    "conv_pointwise bf16": KernelCall(lambda: call_conv_pointwise(second=False)),
    "conv_pointwise bf16 shortcut, resized": KernelCall(lambda: call_conv_pointwise(second=True)),
    "conv_epilogue bf16 C=819": KernelCall(lambda: call_conv_epilogue(819, "none", False), ("BLOCK",), 4),
    "epilogue_gradients bf16": KernelCall(
        lambda: call_epilogue_gradients(256, True), ("ROWS", "CHANNELS"), 6, kernel="_epilogue_gradients_kernel"
    ),
    "epilogue_gradients bf16 C=819": KernelCall(
        lambda: call_epilogue_gradients(819, False), ("ROWS", "CHANNELS"), 2, kernel="_epilogue_gradients_kernel"
    ),
    "stem_conv bf16": KernelCall(call_stem_conv),
    "max_pool_relu bf16": KernelCall(lambda: call_max_pool_relu(torch.bfloat16)),
    "max_pool_relu fp32": KernelCall(lambda: call_max_pool_relu(torch.float32)),
    "first_channels bf16 C=819": KernelCall(lambda: call_first_channels(819, 824)),
    "first_channels bf16 C=36": KernelCall(lambda: call_first_channels(36, 40)),
}
