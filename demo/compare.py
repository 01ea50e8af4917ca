"""`python -m demo.compare`: torchvision's training path and ours, from the same weights, on the same crops of trees.

Both train for 200 steps in float32 from the embedded weights, with the SGD and the warm-up of torchvision's training
script; the losses are written to out/compare.csv and out/compare.png. The weights are not random, since from random
ones rounding grows too fast: with weights changed by 1e-7 at the start, torchvision's path is 5e-3 away from itself
after 30 steps.
"""

import csv
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.progress import track

from demo.trees import prepare
from retina_fast import checkpoint
from retina_fast.convert import to_torchvision
from retina_fast.data.augment import Flips, TrainingSet, augmentation, batches
from retina_fast.data.coco import CocoDataset, plain
from retina_fast.predict.load import TREES

OUTPUT = Path("out")
_STEPS = 200
_AGREEING_STEPS = 50
_BATCH = 2


def compare(data: CocoDataset, weights: Path, steps: int, crop: int) -> list[dict[str, float]]:
    """Train both from the weights of a model file; return the sum of the two losses of each, step by step.

    Args:
        data: the images to train on.
        weights: the model file.
        steps: how many steps of two images.
        crop: side of the crops in pixels.

    Example::

        >>> compare(dataset, TREES, steps=2, crop=64)  # doctest: +SKIP
        [{'step': 0, 'torchvision': 1.83, 'retina_fast': 1.83}, ...]
    """
    ours = checkpoint.load(weights).build()
    models = {"torchvision": to_torchvision(ours).train(), "retina_fast": ours.train()}
    optimizers = {
        name: torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
        for name, model in models.items()
    }
    warmups = [
        torch.optim.lr_scheduler.LinearLR(optimizer, 0.001, total_iters=1000) for optimizer in optimizers.values()
    ]
    training_set = TrainingSet(data, augmentation(crop, Flips.ALL), seed=0)
    rows = []
    for step, keys in enumerate(track(batches(len(data), _BATCH, 0, range(steps)), "Training both", total=steps)):
        samples = [plain(training_set[key]) for key in keys]
        images = [image.float() / 255 for image, _ in samples]
        row: dict[str, float] = {"step": step}
        for name, model in models.items():
            targets = [{key: target[key].clone() for key in ("boxes", "labels")} for _, target in samples]
            loss: Any = sum(model(images, targets).values())
            optimizers[name].zero_grad()
            loss.backward()
            optimizers[name].step()
            row[name] = loss.item()
        for warmup in warmups:
            warmup.step()
        rows.append(row)
    return rows


def difference(rows: list[dict[str, float]]) -> float:
    """The largest difference of the two losses of a step, relative to torchvision's."""
    return max(abs(row["retina_fast"] - row["torchvision"]) / row["torchvision"] for row in rows)


def main() -> None:
    folder = prepare()
    rows = compare(CocoDataset(folder / "train.json", folder / "train"), TREES, _STEPS, crop=256)
    OUTPUT.mkdir(exist_ok=True)
    with (OUTPUT / "compare.csv").open("w", newline="") as lines:
        writer = csv.DictWriter(lines, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss")
    for name, style in (("torchvision", "-"), ("retina_fast", "--")):
        axes.plot([row["step"] for row in rows], [row[name] for row in rows], style, label=name)
    axes.legend()
    figure.savefig(OUTPUT / "compare.png", dpi=100)
    for steps in (_AGREEING_STEPS, _STEPS):
        worst = difference(rows[:steps])
        print(f"first {steps} steps: the losses differ by at most {worst:.1e}, relative")


if __name__ == "__main__":
    main()
