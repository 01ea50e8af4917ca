"""Many batches of random sizes through one engine: every result right, the shapes kept bounded, memory flat.

    python -m tests.deploy.engine_soak [batches]

Without a GPU, a stand-in takes the place of graph capture and of the kernel: as in a graph, outputs lie where they lay
when it was captured, and images are read through the addresses of the table, which are all that a call may change.
"""

import contextlib
import ctypes
import gc
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator

from retina_fast import RetinaNet
from retina_fast.deploy import engine, plan
from retina_fast.deploy.engine import Engine, compile_inference
from retina_fast.detections import Detections
from retina_fast.kernels.image_batch import image_batch

_C_TYPES: dict[torch.dtype, Any] = {torch.uint8: ctypes.c_uint8, torch.float32: ctypes.c_float}


def small_model() -> RetinaNet:
    """Two levels, one scale, BatchNorm in the trunk: a batch takes milliseconds."""
    torch.manual_seed(0)

    class Trunk(nn.Module):
        out_channels = 8

        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
            self.down = nn.Conv2d(8, 8, 3, 2, 1)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            x = self.stem(x)
            return {"0": x, "1": self.down(x)}

    generator = AnchorGenerator(((24,), (48,)), ((1.0,),) * 2)
    model = RetinaNet(Trunk(), 3, anchor_generator=generator, min_size=None, score_thresh=0.3, detections_per_img=20)
    for name, parameter in model.named_parameters():
        if name.endswith("weight"):
            nn.init.normal_(parameter, std=0.2)
    nn.init.zeros_(model.head.classification_head.cls_logits.bias)
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu")


def random_images(generator: torch.Generator, dtype: torch.dtype) -> list[Tensor]:
    batch = int(torch.randint(1, 4, (), generator=generator))
    sides = torch.randint(8, 120, (batch, 2), generator=generator).tolist()
    images = [torch.randint(0, 256, (3, h, w), generator=generator, dtype=torch.uint8) for h, w in sides]
    return [image.float() / 255 for image in images] if dtype == torch.float32 else images


def _image_at(row: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The image that a row of the table tells of."""
    address, h, w, _, _, *strides = row
    size = 1 + sum(stride * (n - 1) for stride, n in zip(strides, (3, h, w), strict=True))
    memory = (_C_TYPES[dtype] * size).from_address(address)
    return torch.frombuffer(memory, dtype=dtype).as_strided((3, h, w), strides)


def _launch(table: Tensor, out: Tensor, dtype: torch.dtype, mean: Sequence[float], std: Sequence[float]) -> None:
    rows = table.tolist()
    images = [_image_at(row, dtype) for row in rows]
    image_batch(images, [(row[3], row[4]) for row in rows], mean, std, 32, out)


def _capture(run: plan.Run, stream: Any) -> plan.Run:
    outputs = run()

    def replay() -> Detections:
        for output, value in zip(outputs, run(), strict=True):
            output.copy_(value)
        return outputs

    return replay


@contextlib.contextmanager
def graphs_or_stand_ins() -> Iterator[None]:
    if torch.cuda.is_available():
        yield
        return
    with (
        mock.patch.object(plan, "captured", _capture),
        mock.patch.object(plan, "launch_image_batch", _launch),
        mock.patch.object(engine, "CaptureStream"),
    ):
        yield


def memory() -> int:
    """Bytes that live: of the GPU's memory, or of the process."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return torch.cuda.memory_reserved()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def soak(batches: int, max_shapes: int = 8) -> dict[str, Any]:
    """Raises AssertionError on a wrong result or a shape too many; returns what was seen.

    Each result is compared with that of the same weights without graphs or buffers, and also looked at again after the
    next batch, which must not have written over it.
    """
    model = small_model()
    plain = compile_inference(model, dtype=torch.float32, max_shapes=0)
    own = compile_inference(model, dtype=torch.float32, max_shapes=max_shapes)
    with graphs_or_stand_ins():
        tested = Engine(own.model, replace(own.settings, graphs=True), own.report)
        generator = torch.Generator().manual_seed(0)
        seen: set[tuple[Any, ...]] = set()
        reserved: list[int] = []
        previous: tuple[Detections, Detections] | None = None
        found = made = 0
        for i in range(batches):
            dtype = (torch.uint8, torch.float32)[int(torch.randint(2, (), generator=generator))]
            images = random_images(generator, dtype)
            kept = set(tested.shapes())
            detections = tested.detect(images)
            with engine.timed_convs():  # as capture does
                expected = plain.detect(images)
            for ours, theirs in [(detections, expected), *([previous] if previous else [])]:
                torch.testing.assert_close(tuple(ours), tuple(theirs), rtol=0, atol=1e-4)
            previous = detections, expected
            made += len(set(tested.shapes()) - kept)
            seen |= set(tested.shapes())
            found += int(expected.counts.sum())
            assert len(tested.shapes()) <= max_shapes
            if (i + 1) % max(1, batches // 10) == 0:
                reserved.append(memory())
    return {"batches": batches, "shapes": len(seen), "captures": made, "detections": found, "bytes": reserved}


def main() -> None:
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False  # results are compared at float32's precision
    seen = soak(int(sys.argv[1]) if len(sys.argv) > 1 else 5000)
    print(
        f"{seen['batches']} batches of {seen['shapes']} shapes, {seen['captures']} captures, "
        f"{seen['detections']} detections, all right"
    )
    print("MB after each tenth: " + " ".join(f"{count / 1e6:.0f}" for count in seen["bytes"]))


if __name__ == "__main__":
    main()
