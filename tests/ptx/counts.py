"""Prints what each kernel executes: python -m tests.ptx.counts [CASE ...].

Of each element (of the logits, or of what the row names): instructions, and requests of a warp to memory for every 32
elements. Of each request: sectors of 32 bytes in global memory, or wavefronts in shared memory, and how many there
would be if the bytes lay next to each other. Of each program: the barriers that it passes.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from tests.ptx.cases import BF16, F32
from tests.ptx.cases_detection import _anchor_matching_triton, _batched_nms_triton, _candidate_selection_triton
from tests.ptx.inputs import random_boxes
from tests.ptx.launch import emulated
from tests.ptx.traffic import Result

ops = torch.ops.retina_fast
_ANCHORS = 2048


class Count(NamedTuple):
    """A call, how many elements it handles, and how many programs run at once: one where they wait for each other,
    since waiting would count."""

    elements: int
    run: Callable[[], object]
    together: int = 16


def focal_loss(dtype: torch.dtype, foreground: float, num_classes: int = 91) -> Count:
    """Tiles without foreground are background tiles; with enough of it, all are mixed."""
    generator = Generator().manual_seed(0)
    logits = torch.randn(1, _ANCHORS, num_classes, generator=generator).to(dtype)
    labels = torch.where(torch.rand(1, _ANCHORS, generator=generator) < foreground, 0, -1).int()
    arguments = [logits], labels, torch.tensor([3.0]), None, num_classes, 0.25, 2.0, True, True
    return Count(logits.numel(), partial(ops.focal_loss, *arguments))


def sigmoid_focal_loss(output: str) -> Count:
    x, targets, incoming = (torch.rand(1 << 16, generator=Generator().manual_seed(n)).to(BF16) for n in range(3))
    dtype = F32 if output == "sums" else BF16
    given = incoming if output == "gradients" else None
    return Count(x.numel(), partial(ops.sigmoid_focal_loss, x, targets, given, 0.25, 2.0, output, dtype))


def box_loss(loss_type: str, foreground: float) -> Count:
    generator = Generator().manual_seed(0)
    levels = [torch.randn(1, 4096, 4, generator=generator).to(BF16)]
    anchors, boxes = random_boxes(generator, 4096), random_boxes(generator, 32)
    indices = torch.where(torch.rand(1, 4096, generator=generator) < foreground, 1, -1).int()
    rest = anchors, indices, boxes, torch.tensor([0, 32]), torch.tensor([3.0]), None
    return Count(4096, partial(ops.box_loss, levels, *rest, loss_type, True, True, None))


def scale(dtype: torch.dtype) -> Count:
    tensors = [torch.rand(1 << 16).to(dtype)]
    return Count(1 << 16, partial(ops.scale_, tensors, torch.tensor(0.5)))


def image_batch(dtype: torch.dtype, out_dtype: torch.dtype) -> Count:
    """A strip of an image that is made 5/3 as large, as 480x640 pixels to 800, whose rows fill whole blocks."""
    image = torch.randint(0, 256, (3, 20, 615), generator=Generator().manual_seed(0)).to(dtype)
    out = torch.empty(1, 3, 32, 1024, dtype=out_dtype).contiguous(memory_format=torch.channels_last)
    return Count(out.numel(), partial(ops.image_batch_, [image], [32, 1024], [0.5] * 3, [0.2] * 3, out))


def conv_epilogue(dtype: torch.dtype, channels: int, with_z: bool) -> Count:
    generator = Generator().manual_seed(0)
    y, z = (
        torch.randn(1, channels, 16, 16, generator=generator).to(dtype).contiguous(memory_format=torch.channels_last)
        for _ in range(2)
    )
    rest = torch.ones(channels, dtype=dtype), z if with_z else None, "relu"
    return Count(y.numel(), partial(ops.conv_epilogue_, y, *rest))


def group_norm_relu(dtype: torch.dtype, backward: bool) -> Count:
    x = torch.randn(1, 256, 32, 32, generator=Generator().manual_seed(0)).to(dtype)
    levels, weight, stats = [x.contiguous(memory_format=torch.channels_last)], torch.ones(256), torch.ones(1, 1, 32, 2)
    if backward:
        return Count(x.numel(), partial(ops.group_norm_relu_backward, levels, levels, weight, weight, stats))
    return Count(x.numel(), partial(ops.group_norm_relu, levels, weight, weight, 32, 1e-5))


def candidate_selection(dtype: torch.dtype, mean: float) -> Count:
    logits = torch.randn(1, _ANCHORS, 91, generator=Generator().manual_seed(0)) * 1.7 + mean
    return Count(logits.numel(), partial(_candidate_selection_triton, [logits.to(dtype)], 91, 0.05, 1000))


def anchor_matching() -> Count:
    generator = Generator().manual_seed(0)
    anchors, boxes = random_boxes(generator, 4096), random_boxes(generator, 32)
    labels: Tensor = torch.zeros(32, dtype=torch.int64)
    return Count(4096, partial(_anchor_matching_triton, anchors, boxes, labels, torch.tensor([0, 32]), 0.5, 0.4, True))


def batched_nms(overlapping: str, boxes: int = 1024) -> Count:
    """Boxes of one class, of which none overlap, all, or each and the next, in random order."""
    step = {"none": 20.0, "all": 0.0, "chain": 2.5}[overlapping]
    corner = torch.stack((step * torch.randperm(boxes, generator=Generator().manual_seed(0)), torch.zeros(boxes)), 1)
    given = torch.cat((corner, corner + 10), 1)[None], None, None, torch.tensor([boxes]), 0.5, boxes
    return Count(boxes, partial(_batched_nms_triton, *given), together=1)


COUNTS: dict[str, Callable[[], Count]] = {
    "focal_loss bf16 K=91 background tiles": partial(focal_loss, BF16, 0.0),
    "focal_loss bf16 K=91 mixed tiles": partial(focal_loss, BF16, 0.05),
    "focal_loss fp32 K=91 background tiles": partial(focal_loss, F32, 0.0),
    "focal_loss fp32 K=91 mixed tiles": partial(focal_loss, F32, 0.05),
    "sigmoid_focal_loss bf16 losses": partial(sigmoid_focal_loss, "losses"),
    "sigmoid_focal_loss bf16 gradients": partial(sigmoid_focal_loss, "gradients"),
    "box_loss bf16 giou an anchor, no foreground": partial(box_loss, "giou", 0.0),
    "box_loss bf16 giou an anchor, mixed": partial(box_loss, "giou", 0.02),
    "one_pass bf16": partial(scale, BF16),
    "image_batch uint8 to bf16": partial(image_batch, torch.uint8, BF16),
    "group_norm_relu bf16 forward": partial(group_norm_relu, BF16, False),
    "group_norm_relu bf16 backward": partial(group_norm_relu, BF16, True),
    "conv_epilogue bf16 sum": partial(conv_epilogue, BF16, 256, True),
    "conv_epilogue bf16 C=819": partial(conv_epilogue, BF16, 819, False),
    "candidate_selection bf16 none above": partial(candidate_selection, BF16, -20.0),
    "candidate_selection bf16 1% above": partial(candidate_selection, BF16, -7.0),
    "anchor_matching an anchor, 32 ground truths": anchor_matching,
    "batched_nms a box, none overlapping": partial(batched_nms, "none"),
    "batched_nms a box, all overlapping": partial(batched_nms, "all"),
    "batched_nms a box, chain": partial(batched_nms, "chain"),
}


def count(name: str, capability: int = 90) -> list[tuple[Result, float]]:
    """Of each launch: what it did, and the instructions an element."""
    elements, run, together = COUNTS[name]()
    with emulated(capability, count=True, together=together) as log:
        run()
    return [(result, 32 * result.warp_instructions / elements) for result in log.results]


def _row(name: str, elements: int, result: Result) -> list[str]:
    row = [name, result.name, str(result.ctas), f"{32 * result.warp_instructions / elements:.1f}"]
    for kind in ("global ld", "global st", "shared"):
        traffic = result.total(kind)
        requests = max(traffic.requests, 1)
        each = (
            f"{32 * traffic.requests / elements:.2f}: {traffic.moved / requests:.1f} ({traffic.ideal / requests:.1f})"
        )
        row.append(each if traffic.requests else "-")
    return [*row, f"{result.barriers / result.ctas:.1f}"]


def table(parts: Sequence[str] = ()) -> Iterator[str]:
    """Rows of markdown: every case whose name holds one of the parts, or all."""
    columns = "case", "kernel", "programs", "instructions", "loads: sectors (ideal)", "stores: sectors (ideal)"
    yield f"| {' | '.join([*columns, 'shared: wavefronts (ideal)', 'barriers a program'])} |\n|" + "---|" * 8
    for name, make in COUNTS.items():
        if not parts or any(part in name for part in parts):
            elements = make().elements
            for result, _ in count(name):
                yield f"| {' | '.join(_row(name, elements, result))} |"


def main() -> None:
    torch.set_num_threads(1)
    for line in table(sys.argv[1:]):
        print(line, flush=True)


if __name__ == "__main__":
    main()
