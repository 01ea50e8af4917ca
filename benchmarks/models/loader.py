"""The speed of loading: images a second of one core for decoding, augmenting and handing over; the cores a rate needs.

    python -m benchmarks.models.loader             the tree photographs as 640x480 JPEGs, which `make demo` downloads
    python -m benchmarks.models.loader --rate 420

It counts CPU time, of the loading process and of the one that receives, so that waiting on a busy machine does not
count. A machine with other cores needs its own run. Images stay uint8 up to the device, where the model converts them
to float, normalises, resizes and pads them.
"""

import argparse
import json
import math
import platform
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch.utils.data import DataLoader
from torchvision.io import write_jpeg
from torchvision.transforms import v2

from demo.trees import prepare
from retina_fast.data.augment import ColorJitter, Flips, TrainingSet, augmentation, batches
from retina_fast.data.coco import CocoDataset, Sample, plain, read_image

WIDTH, HEIGHT = 640, 480
_QUALITY = 86  # about 150 kB an image, as COCO's have in the mean (18 GB, 118,287 images)


def write_photos(folder: Path, count: int, source: Path) -> CocoDataset:
    """Cuts `count` JPEGs of 640x480 from the pictures in `source`, with 7 boxes each, as COCO has in the mean."""
    (folder / "images").mkdir(parents=True)
    pictures = [read_image(path) for path in sorted(source.glob("*.png"))]
    pictures = [picture for picture in pictures if picture.shape[1] >= HEIGHT and picture.shape[2] >= WIDTH]
    generator = torch.Generator().manual_seed(0)
    images, annotations = [], []
    for number in range(count):
        picture = pictures[number % len(pictures)]
        top, left = (
            int(torch.randint(0, side - length + 1, (), generator=generator))
            for side, length in zip(picture.shape[1:], (HEIGHT, WIDTH), strict=True)
        )
        crop = picture[:, top : top + HEIGHT, left : left + WIDTH].contiguous()
        write_jpeg(crop, str(folder / "images" / f"{number}.jpg"), quality=_QUALITY)
        images.append({"id": number, "file_name": f"{number}.jpg", "width": WIDTH, "height": HEIGHT})
        for box in (torch.rand(7, 2, generator=generator) * 400).tolist():
            annotations.append({"image_id": number, "category_id": 1, "bbox": [*box, 60.0, 60.0]})
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "tree"}]}
    (folder / "photos.json").write_text(json.dumps(content))
    return CocoDataset(folder / "photos.json", folder / "images")


def images_a_second(work: Callable[[], int]) -> float:
    """Returns the images that `work` handles in a second of CPU time, its child processes' included."""
    start = _cpu_seconds()
    count = work()
    return count / (_cpu_seconds() - start)


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + usage.ru_utime + usage.ru_stime


def measure(data: CocoDataset, passes: int = 3) -> dict[str, float]:
    """Returns images a second of one core: decoded, also augmented, and also handed to the training process."""

    def decoded() -> int:
        for _ in range(passes):
            for index in range(len(data)):
                data[index]
        return passes * len(data)

    images = [data[index][0] for index in range(len(data))]

    def changed(jitter: Callable[..., object]) -> int:
        for image in images:
            jitter(image, {})
        return len(images)

    ranges: dict[str, Any] = dict(brightness=(0.6, 1.4), contrast=(0.5, 1.5), saturation=(0.3, 1.7), hue=0.08)
    rates = {
        "decoded": images_a_second(decoded),
        "colours alone": images_a_second(lambda: changed(ColorJitter(**ranges))),
        "colours alone, torchvision": images_a_second(lambda: changed(v2.ColorJitter(**ranges))),
    }
    for name, crop in (("whole images", 0), ("256-px crops", 256)):
        training_set = TrainingSet(data, augmentation(crop, Flips.HORIZONTAL), seed=0)

        def augmented(training_set: TrainingSet = training_set) -> int:
            for epoch in range(passes):
                for index in range(len(data)):
                    training_set[epoch, index]
            return passes * len(data)

        def loaded(training_set: TrainingSet = training_set) -> int:
            steps = range(passes * len(data) // 8)
            sampler = list(batches(len(data), 8, 0, steps))
            loader = DataLoader(training_set, batch_sampler=sampler, collate_fn=_collated, num_workers=1)
            return sum(len(samples) for samples in loader)

        rates[f"{name}, augmented"] = images_a_second(augmented)
        rates[f"{name}, loaded by a worker"] = images_a_second(loaded)
    return rates


def _collated(samples: list[Sample]) -> list[Sample]:
    return [plain(sample) for sample in samples]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=64, help="images")
    parser.add_argument("--rate", type=float, default=420, help="images a second that a training step takes")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        data = write_photos(Path(folder) / "photos", arguments.count, prepare() / "heldout")
        size = sum(path.stat().st_size for path in data.folder.iterdir()) / len(data)
        print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, ", end="")
        print(
            f"torchvision {torchvision.__version__}; {len(data)} JPEGs of {WIDTH}x{HEIGHT}, {size / 1000:.0f} kB each"
        )
        for name, rate in measure(data).items():
            cores = math.ceil(arguments.rate / rate)
            print(f"{name:36} {rate:6.0f} images/s a core; {cores} cores for {arguments.rate:.0f} images/s")


if __name__ == "__main__":
    main()
