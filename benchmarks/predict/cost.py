"""Computes what training costs, from the convolutions' arithmetic and a rate: the tables of docs/coco.md.

    python -m benchmarks.predict.cost                   at 519 images a second at 800x800, as one H200 was measured
    python -m benchmarks.predict.cost --rate 300        at another rate

Every figure is computed. The convolutions are counted for retinanet_resnet50_fpn with 3 trainable stages. The rest of a
step is assumed to grow with them, and eight GPUs are assumed to be eight times as fast as one.
"""

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

MEASURED_RATE = 519  # images a second at 800x800, batch 16: E3 in benchmarks/results/nvidia-h200.json
LIMIT_RATE = 850  # the same where the tensor cores, at 700 TFLOP/s of bf16, bound the whole step
COCO_IMAGES, EPOCHS = 117_266, 26  # the images that have objects

_TRUNK_GFLOP = 125  # ResNet-50 and FPN forward at 800x800
_FROZEN = 1.3  # backward of the trunk over its forward, the first two stages being frozen; for the heads it is 2
_FOCAL_US = 109 / 8 / (120_087 * 91)  # a bf16 logit, and
_MATCHING_US = 134 / 8 / (120_087 * 500)  # a pair of anchor and ground truth: K1-bf16 and K3-g500 there


@dataclass(frozen=True)
class Training:
    """A training run. The sizes are those of the padded images that the network sees."""

    images: int = COCO_IMAGES
    classes: int = 91
    ground_truths: int = 7
    height: int = 800
    width: int = 1088  # an image of 640x480, resized to 1066x800 and padded
    epochs: int = EPOCHS

    @property
    def cells(self) -> int:
        """Returns the cells of the five levels."""
        return sum(math.ceil(self.height / stride) * math.ceil(self.width / stride) for stride in (8, 16, 32, 64, 128))

    def _heads_gflop(self) -> float:
        tower = 4 * 256 * 256
        return 2 * 9 * self.cells * (2 * tower + 256 * 9 * (self.classes + 4)) / 1e9

    def _trunk_gflop(self) -> float:
        return _TRUNK_GFLOP * self.height * self.width / 800**2

    @property
    def forward_gflop(self) -> float:
        """Returns the arithmetic of one image's forward pass."""
        return self._trunk_gflop() + self._heads_gflop()

    @property
    def step_gflop(self) -> float:
        """Returns the arithmetic of one image's forward and backward pass."""
        return (1 + _FROZEN) * self._trunk_gflop() + 3 * self._heads_gflop()

    @property
    def focal_us(self) -> float:
        """Returns the microseconds that the focal loss takes for an image."""
        return _FOCAL_US * 9 * self.cells * self.classes

    @property
    def matching_us(self) -> float:
        """Returns the microseconds that matching takes for an image."""
        return _MATCHING_US * 9 * self.cells * self.ground_truths

    def rate(self, at_800: float) -> float:
        """Returns the images a second of a GPU that trains on `at_800` images a second of 800x800 and 91 classes."""
        return at_800 * Training(width=800).step_gflop / self.step_gflop

    def hours(self, at_800: float, gpus: int) -> float:
        """Returns the hours of the whole training, if GPUs never slow each other down nor wait for images."""
        return self.images * self.epochs / self.rate(at_800) / gpus / 3600


def coco_table(rate: float) -> Iterator[str]:
    """Returns rows of markdown: COCO on one and on eight GPUs."""
    yield "| 26 epochs of COCO train2017; all computed | img/s a GPU | hours, 1 GPU | hours, 8 GPUs |"
    yield "|---|---|---|---|"
    run = Training()
    for name, at_800 in (("at the limit of the tensor cores", LIMIT_RATE), (f"at {rate:g} img/s of 800x800", rate)):
        yield f"| {name} | {run.rate(at_800):.0f} | {run.hours(at_800, 1):.1f} | {run.hours(at_800, 8):.2f} |"


def growth_table(rate: float) -> Iterator[str]:
    """Returns rows of markdown, in which one factor is changed at a time."""
    yield "| all computed | GFLOP a step and image | focal loss, us | matching, us | hours, 1 GPU | hours, 8 GPUs |"
    yield "|---|---|---|---|---|---|"
    base = Training()
    changes: list[tuple[str, Training]] = [("COCO", base)]
    changes += [(f"{n:,} images", replace(base, images=n)) for n in (10_000, 1_000_000)]
    changes += [(f"{n} classes", replace(base, classes=n)) for n in (2, 20, 365, 1000)]
    changes += [(f"{n} ground truths an image", replace(base, ground_truths=n)) for n in (100, 500)]
    changes += [(f"{n}x{n} px", replace(base, height=n, width=n)) for n in (512, 800, 1024, 1536)]
    for name, run in changes:
        costs = f"{run.step_gflop:.0f} | {run.focal_us:.1f} | {run.matching_us:.1f}"
        yield f"| {name} | {costs} | {run.hours(rate, 1):.1f} | {run.hours(rate, 8):.2f} |"


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=MEASURED_RATE, help="images of 800x800 a second of one GPU")
    arguments = parser.parse_args()
    print("\n".join(coco_table(arguments.rate)), end="\n\n")
    print("\n".join(growth_table(arguments.rate)))


if __name__ == "__main__":
    main()
