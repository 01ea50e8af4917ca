"""The benchmark of the data loader, on one short pass."""

import torch
from torchvision.io import write_png

from benchmarks.models import loader


def test_every_stage_is_measured(tmp_path, one_thread):
    (tmp_path / "source").mkdir()
    noise = torch.randint(0, 256, (3, 500, 700), dtype=torch.uint8)
    write_png(noise, str(tmp_path / "source" / "noise.png"))
    data = loader.write_photos(tmp_path / "photos", 8, tmp_path / "source")
    image, target = data[7]
    assert image.shape == (3, 480, 640)
    assert len(target["boxes"]) == 7
    rates = loader.measure(data, passes=1)
    assert list(rates) == [
        "decoded",
        "colours alone",
        "colours alone, torchvision",
        "whole images, augmented",
        "whole images, loaded by a worker",
        "256-px crops, augmented",
        "256-px crops, loaded by a worker",
    ]
    assert all(1 < rate < 10_000 for rate in rates.values())
    assert rates["decoded"] > rates["whole images, augmented"]


def test_cpu_time_of_a_worker_counts(tmp_path):
    def work() -> int:
        torch.rand(1 << 20).sort()
        return 100

    assert 1 < loader.images_a_second(work) < 1e5
