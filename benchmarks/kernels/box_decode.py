"""Box decoding of chosen anchors, clipped: torchvision image by image, torch.compile of the reference, ours.

torchvision is given its concatenated deltas ready-made; the others read the levels as the heads' convs write them.
"""

import dataclasses
import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import clip_boxes_to_image

from benchmarks.case import Built, Case, run_benchmark
from benchmarks.models import scenes
from retina_fast.kernels.box_decode import box_decode, box_decode_reference
from retina_fast.kernels.levels import flatten_all


@dataclasses.dataclass(frozen=True)
class Setting:
    batch: int = 8
    size: int = 800
    boxes: int = 5000
    dtype: str = "bfloat16"

    @property
    def name(self) -> str:
        return f"box decoding, batch {self.batch}, {self.size}x{self.size}, {self.boxes} boxes an image"


SETTINGS = [Setting(), Setting(batch=1), Setting(batch=32), Setting(dtype="float32")]
CPU_SETTING = Setting(2, 512, 5000, "float32")


@torch.no_grad()
def build(setting: Setting, device: torch.device, with_compile: bool) -> Built:
    size, batch = setting.size, setting.batch
    anchors = scenes.anchors(size, size, device)
    torch.manual_seed(0)
    made = scenes.levels(batch, 4, size, size, getattr(torch, setting.dtype), device, 0.0, 0.3)
    deltas = [level.detach() for level in made]
    flat = torch.cat(flatten_all(deltas, 4), dim=1)  # (B, N, 4)
    index = torch.randint(0, len(anchors), (batch, setting.boxes), device=device)
    sizes = torch.tensor([[size - 3, size]] * batch, device=device)
    coder = BoxCoder((1.0, 1.0, 1.0, 1.0))

    def ours() -> Tensor:
        return box_decode(deltas, anchors, index, sizes)

    def torchvision_eager() -> list[Tensor]:
        return [
            clip_boxes_to_image(coder.decode_single(flat[b][index[b]], anchors[index[b]]), (size - 3, size))
            for b in range(batch)
        ]

    baselines: dict[str, Any] = {"torchvision eager": torchvision_eager}
    if with_compile:
        compiled = torch.compile(box_decode_reference, dynamic=False)
        baselines["torch.compile"] = functools.partial(compiled, deltas, anchors, index, sizes)

    def check() -> None:
        exact = box_decode_reference(deltas, anchors, index, sizes)
        torch.testing.assert_close(ours(), exact, rtol=1e-6, atol=1e-6 * size)
        if setting.dtype == "float32":  # from bfloat16 deltas torchvision computes in bfloat16
            torch.testing.assert_close(torch.stack(torchvision_eager()), exact, rtol=1e-5, atol=1e-4)

    # the deltas, the anchor and the index of a box in, the box out
    min_bytes = index.numel() * (4 * flat.element_size() + 16 + 8 + 16)
    return Built(ours, baselines, check, min_bytes)


def _case(setting: Setting, with_compile: bool = True) -> Case:
    return Case(setting.name, setting.dtype, functools.partial(build, setting, with_compile=with_compile))


CASES = [_case(setting, with_compile=setting == SETTINGS[0]) for setting in SETTINGS]  # compiling takes long
SMALL = [_case(Setting(2, 64, 70, dtype)) for dtype in ("float32", "bfloat16")]


@pytest.mark.parametrize("setting", SETTINGS if torch.cuda.is_available() else [CPU_SETTING], ids=lambda s: s.name)
@pytest.mark.parametrize("implementation", ["torchvision eager", "torch.compile", "ours"])
def test_box_decode(implementation: str, setting: Setting, benchmark: Any) -> None:
    make = functools.partial(build, with_compile=implementation == "torch.compile")
    run_benchmark(make, setting, setting.dtype, implementation, benchmark)
