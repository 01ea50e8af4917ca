"""What FP8 may save on an H200, for the 1x1 convs of ResNet-50's engine: python -m benchmarks.predict.float8.

It writes the table of NOTES.md. Each conv is taken to run at its fastest: in bfloat16 as one kernel, a block's shortcut
and all that follows included, which the engine's ways come near to; or in FP8. As the engine has it, FP8 is a pass that
rounds, which reads 2 bytes and writes 1 for each value, PyTorch's scaled product, at twice the arithmetic a second, and
one pass for sum and activation. The last two columns are kernels that are not there: conv_pointwise rounding what it
reads, which saves both passes, and beyond that layers before it that write FP8.
"""

import functools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.gpu.report import write_between
from benchmarks.predict.hardware import GRAPH_GAP
from benchmarks.predict.predictions import NOTES
from benchmarks.predict.roofline import torch_step
from retina_fast import RetinaNet, compile_inference, retinanet_resnet50_fpn
from retina_fast.deploy.eight_bits.float8 import float8_convs
from retina_fast.forward import run_convs
from tests.instruments.fake_gpu import TorchOp

BEGIN, END = "<!-- float8 -->", "<!-- end of float8 -->"
BATCHES = (1, 8, 32)


@dataclass(frozen=True)
class Product:
    """A 1x1 conv as a product of matrices of pixels by channels, or two in one sum: with a shortcut."""

    pixels: int
    channels: tuple[int, ...]
    """What each reads for a pixel."""
    outputs: int
    added: int = 0
    """Values of a tensor that is added."""
    followed: bool = False
    """Whether a sum or an activation follows."""

    def in_bfloat16(self) -> float:
        """Seconds as one kernel with what follows."""
        return self._product(2, 2, sum(self.channels), self.added)

    def in_float8(self) -> float:
        """Seconds as a pass and a product for each input, and one pass for what follows."""
        seconds = sum(self._pass(3 * self.pixels * n) + self._product(1, 1, n, 0) for n in self.channels)
        moved = (len(self.channels) + 1) * self.pixels * self.outputs + self.added
        return seconds + self._pass(2 * moved) if self.followed else seconds

    def as_one_kernel(self, input_size: int) -> float:
        """Seconds of one FP8 kernel with what follows, which would read inputs of so many bytes."""
        return self._product(input_size, 1, sum(self.channels), self.added)

    def _product(self, input_size: int, weight_size: int, channels: int, added: int) -> float:
        """Of values of so many bytes; with weights in FP8 the arithmetic takes half of bfloat16's time."""
        flop = 2 * self.pixels * channels * self.outputs * weight_size // 2
        read = (input_size * self.pixels + weight_size * self.outputs) * channels
        moved = read + 2 * (self.pixels * self.outputs + added)
        return torch_step(TorchOp("product", moved, flop, (self.pixels, self.outputs))).seconds + GRAPH_GAP

    def _pass(self, moved: int) -> float:
        return torch_step(TorchOp("pass", moved, 0, (self.pixels, self.outputs))).seconds + GRAPH_GAP


@functools.cache
def network() -> RetinaNet:
    """Returns the engine's model, without memory."""
    model = retinanet_resnet50_fpn(weights=None, weights_backbone=None, num_classes=91).eval()
    return compile_inference(model, dtype=torch.bfloat16).model.to("meta")


@torch.no_grad()
def products_of(batch: int) -> Counter[Product]:
    """Returns how often each product occurs in the engine's forward pass at 800x800."""
    model = network()
    found: Counter[Product] = Counter()

    def watch(conv: Any, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        x, z = (*args, None)[:2]
        images, outputs, height, width = conv.output_shape(x)
        shortcut, followed = keywords.get("shortcut"), z is not None or conv.activation != "none"
        channels = (conv.in_channels,) if shortcut is None else (conv.in_channels, shortcut.in_channels)
        added = 0 if z is None or shortcut is not None else z.numel()
        found[Product(images * height * width, channels, outputs, added, followed)] += 1

    handles = [conv.register_forward_pre_hook(watch, with_kwargs=True) for conv in float8_convs(model)]
    run_convs(model, torch.empty(batch, 3, 800, 800, dtype=torch.bfloat16, device="meta"))
    for handle in handles:
        handle.remove()
    return found


def table() -> Iterator[str]:
    """Returns the predictions as rows of markdown."""
    yield "| batch | in bfloat16, ms | or in FP8 | convs in FP8 | by a kernel that rounds | by one that reads FP8 |"
    yield "|---|---|---|---|---|---|"
    for batch in BATCHES:
        sums, convs, faster = [0.0] * 4, 0, 0
        for product, count in products_of(batch).items():
            bfloat16, in_float8 = product.in_bfloat16(), product.in_float8()
            times = bfloat16, in_float8, product.as_one_kernel(2), product.as_one_kernel(1)
            sums = [total + count * min(time, bfloat16) for total, time in zip(sums, times, strict=True)]
            convs += count * len(product.channels)
            faster += count * len(product.channels) * (in_float8 < bfloat16)
        plain, chosen, *others = (f"{1e3 * total:.3f}" for total in sums)
        yield f"| {batch} | {plain} | {chosen} | {faster} of {convs} | {' | '.join(others)} |"


if __name__ == "__main__":
    rows = "\n".join(table())
    write_between(NOTES, BEGIN, END, f"\n{rows}\n")
    print(rows)
