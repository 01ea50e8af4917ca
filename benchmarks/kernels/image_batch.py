"""Image batching: torchvision's transform, which works image by image, and ours, which launches once a batch."""

import dataclasses
import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from benchmarks.case import Built, Case, run_benchmark
from retina_fast.kernels.image_batch import batch_shape, image_batch, image_table, launch_image_batch
from retina_fast.transform import resized_sizes

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


@dataclasses.dataclass(frozen=True)
class Setting:
    """`dtype` is the batch's. A bfloat16 batch is made from uint8 images, as in the engine; float32, from float32."""

    batch: int = 8
    height: int = 480
    width: int = 640
    min_size: int = 800
    dtype: str = "float32"

    @property
    def name(self) -> str:
        return f"image batch, batch {self.batch}, {self.height}x{self.width} to {self.min_size}"


BASE = Setting()
SETTINGS = [Setting(batch=batch, dtype=dtype) for batch in (BASE.batch, 1, 32) for dtype in ("float32", "bfloat16")]
CPU_SETTINGS = [Setting(batch=2, min_size=256, dtype=dtype) for dtype in ("float32", "bfloat16")]


def build(setting: Setting, device: torch.device) -> Built:
    transform = GeneralizedRCNNTransform(setting.min_size, 1333, MEAN, STD).eval()
    generator = torch.Generator().manual_seed(0)
    sides = 3, setting.height, setting.width
    images = [
        torch.randint(0, 256, sides, generator=generator, dtype=torch.uint8).to(device) for _ in range(setting.batch)
    ]
    dtype = getattr(torch, setting.dtype)
    if dtype == torch.float32:
        images = [image / 255 for image in images]
    sizes = resized_sizes(transform, images)
    shape = batch_shape(images, sizes, 3, 32)

    def ours() -> Tensor:
        out = torch.empty(shape, dtype=dtype, device=device, memory_format=torch.channels_last)
        return image_batch(images, sizes, MEAN, STD, out=out)

    table, kept = image_table(images, sizes).to(device), torch.empty(shape, dtype=dtype, device=device)
    kept = kept.contiguous(memory_format=torch.channels_last)

    def captured() -> None:  # as in the engine's graph, where the table has been uploaded
        launch_image_batch(table, kept, images[0].dtype, MEAN, STD)

    def torchvision() -> Tensor:
        floats = [image if image.is_floating_point() else image.float() / 255 for image in images]
        batch = transform(floats)[0].tensors
        return batch if dtype == torch.float32 else batch.to(dtype, memory_format=torch.channels_last)

    def check() -> None:
        tolerance = 1e-5 if dtype == torch.float32 else 2**-7
        torch.testing.assert_close(ours(), torchvision(), rtol=tolerance * (dtype != torch.float32), atol=tolerance)

    min_bytes = sum(image.nbytes for image in images) + ours().nbytes
    return Built(ours, {"torchvision eager": torchvision}, check, min_bytes, captured=captured)


def _case(setting: Setting, goal: str | None = None) -> Case:
    return Case(setting.name, setting.dtype, functools.partial(build, setting), goal)


CASES = [_case(setting, "K6" if setting == BASE else None) for setting in SETTINGS]
SMALL = [_case(Setting(2, 48, 64, 80), "K6"), _case(Setting(2, 48, 64, 80, "bfloat16"))]


@pytest.mark.parametrize("setting", SETTINGS if torch.cuda.is_available() else CPU_SETTINGS, ids=str)
@pytest.mark.parametrize("implementation", ["torchvision eager", "ours"])
def test_image_batch(implementation: str, setting: Setting, benchmark: Any) -> None:
    run_benchmark(build, setting, setting.dtype, implementation, benchmark)
