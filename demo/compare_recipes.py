"""`python -m demo.compare_recipes`: ways to train the embedded detector side by side, and the means of their weights.

A run trains with flips, then twice without, each from the end of the first and with a seed of its own. What a
recipe is chosen by is the part of the training data that :func:`demo.compare_losses.split` leaves out; the held-out
parts and the unseen forests judge it. Every run adds its lines to out/compare_recipes.csv, and runs that are there are
not made again.
"""

import argparse
import csv
import json
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from demo.average import average
from demo.compare_losses import judged, split
from demo.trees import prepare
from retina_fast import checkpoint
from retina_fast.data.augment import Flips
from retina_fast.data.coco import CocoDataset
from retina_fast.train import TrainSettings, train

OUTPUT = Path("out/compare_recipes.csv")


@dataclass(frozen=True)
class Recipe:
    """How a run trains: arguments of the network, and the steps with flips and without."""

    arguments: dict[str, Any] = field(default_factory=dict)
    batch_size: int = 4
    crop: int = 256
    steps: int = 6000
    steps_without: int = 1000


_GIOU = {"box_loss": "giou"}
_QUALITY = {"classification_loss": "quality_focal", **_GIOU}
_ALIGNED = {"matcher": "task_aligned", "box_weights": "quality", **_QUALITY}
_DISTRIBUTIONS = {"matcher": "atss", "classification_loss": "quality_focal", "reg_max": 16, "box_weights": "quality"}
RECIPES = {
    "thresholds, focal, L1": Recipe(),
    "thresholds, focal, L1, crops of 384": Recipe(crop=384, steps=5000),
    "thresholds, focal, GIoU": Recipe(_GIOU),
    "thresholds, focal, GIoU, batches of 8": Recipe(_GIOU, batch_size=8, steps=4000, steps_without=800),
    "thresholds, quality focal, GIoU": Recipe(_QUALITY),
    "ATSS, quality focal, distributions, by quality": Recipe(_DISTRIBUTIONS),
    "task-aligned, quality focal, GIoU, by quality": Recipe(_ALIGNED),
}


def run(folder: Path, recipe: Recipe, seed: int, whole: bool) -> list[dict[str, Any]]:
    """Train by a recipe and measure all weights that come of it: a line of the table each.

    Args:
        folder: of the data, from `demo.trees`.
        recipe: how to train.
        seed: of the run with flips; those without have the same and 10 more.
        whole: whether all of the training data trains, so that nothing is left to choose by.

    Example::

        >>> run(prepare(), RECIPES["thresholds, focal, L1"], seed=0, whole=False)[0]["weights"]  # doctest: +SKIP
        'with flips'
    """
    contents = [json.loads((folder / "train.json").read_text())]
    data, *parts = (
        CocoDataset(folder / "train.json", folder / "train", content=content)
        for content in (contents if whole else split(contents[0]))
    )
    settings = TrainSettings(
        "retinanet_resnet18_fpn_lite", steps=recipe.steps, batch_size=recipe.batch_size, crop=recipe.crop, seed=seed,
        flips=Flips.ALL, image_scale=1.25, bf16=True, arguments=recipe.arguments,
    )  # fmt: skip
    without = replace(settings, steps=recipe.steps_without, lr=settings.resolve(data).lr / 2, flips=Flips.NONE)
    with tempfile.TemporaryDirectory() as output:
        files = [train(settings, data, output=Path(output, "0"), workers=1)]
        for k in range(2):
            again = replace(without, seed=seed + 10 * k)
            files.append(train(again, data, output=Path(output, f"{k + 1}"), start_from=files[0], workers=1))
        means = {"with flips": files[:1], "without": files[1:2], "mean of both": files[:2], "mean of three": files}
        lines = []
        for name, several in means.items():
            checkpoint.save(average([checkpoint.load(file) for file in several]), mean := Path(output, "mean.pt"))
            lines.append({"weights": name, "seed": seed, "whole": whole} | judged(folder, mean, *parts))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--whole", action="store_true", help="train on all of the training data")
    arguments = parser.parse_args()
    console, folder = Console(), prepare()
    OUTPUT.parent.mkdir(exist_ok=True)
    lines: list[dict[str, Any]] = list(csv.DictReader(OUTPUT.open())) if OUTPUT.exists() else []
    done = {(line["recipe"], int(line["seed"]), line["whole"]) for line in lines}
    for seed in range(arguments.seeds):
        for name, recipe in RECIPES.items():
            if (name, seed, str(arguments.whole)) in done:
                continue
            lines += ({"recipe": name} | line for line in run(folder, recipe, seed, arguments.whole))
            with OUTPUT.open("w", newline="") as file:
                writer = csv.DictWriter(file, list(dict.fromkeys(key for line in lines for key in line)))
                writer.writeheader()
                writer.writerows(lines)
            console.print(lines[-1])


if __name__ == "__main__":
    main()
