"""`python -m demo.compare_losses`: the matchers and losses of this package side by side on the photographs of trees.

Each choice of `OPTIONS` trains the network of the embedded detector from random weights, with the same crops, steps and
seeds. A part of the training data does not train (see :func:`split`): it is there to choose an option by. The held-out
parts and the unseen forests judge it. Every run adds a line to out/compare_losses.csv, and lines that are
there are not run again.
"""

import argparse
import csv
import json
import statistics
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from demo.trees import prepare
from retina_fast.data.augment import Flips
from retina_fast.data.coco import CocoDataset
from retina_fast.predict.evaluate import evaluate
from retina_fast.predict.load import load_model
from retina_fast.train import TrainSettings, train

OUTPUT = Path("out/compare_losses.csv")
OPTIONS: dict[str, dict[str, Any]] = {
    "torchvision's: thresholds, focal, L1": {},
    "thresholds, focal, GIoU": {"box_loss": "giou"},
    "ATSS, focal, GIoU": {"matcher": "atss", "box_loss": "giou"},
    "thresholds, quality focal, GIoU": {"classification_loss": "quality_focal", "box_loss": "giou"},
    "ATSS, quality focal, GIoU": {"matcher": "atss", "classification_loss": "quality_focal", "box_loss": "giou"},
    "ATSS, varifocal, GIoU": {"matcher": "atss", "classification_loss": "varifocal", "box_loss": "giou"},
    "task-aligned, quality focal, GIoU, by quality": {
        "matcher": "task_aligned",
        "classification_loss": "quality_focal",
        "box_loss": "giou",
        "box_weights": "quality",
    },
    "ATSS, quality focal, distributions": {"matcher": "atss", "classification_loss": "quality_focal", "reg_max": 16},
    "ATSS, quality focal, distributions, by quality": {
        "matcher": "atss",
        "classification_loss": "quality_focal",
        "reg_max": 16,
        "box_weights": "quality",
    },
}
METRICS = ("AP50", "AP")
_SPLITS = ("heldout", "OSBS_029", "SOAP_061")
_TILE = 512


def split(content: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tiles to train on, and tiles to choose by: these are the last column of the widest photograph. Tiles that overlap
    it are left out, so that no pixel is in both.

    Args:
        content: of train.json, whose images are named `<photograph>_<x>_<y>.png` by `demo.trees`.

    Example::

        >>> names = ["a_0_0.png", "a_362_0.png", *(f"b_{x}_0.png" for x in (0, 256, 512, 768, 1024, 1097))]
        >>> images = [{"id": i, "file_name": name} for i, name in enumerate(names)]
        >>> parts = split({"images": images, "annotations": [], "categories": []})
        >>> [[image["file_name"] for image in part["images"]] for part in parts]
        [['a_0_0.png', 'a_362_0.png', 'b_0_0.png', 'b_256_0.png', 'b_512_0.png'], ['b_1097_0.png']]
    """
    found = {image["id"]: image["file_name"].rsplit("_", 2) for image in content["images"]}
    places = {number: (int(x), name) for number, (name, x, _) in found.items()}
    last, widest = max(places.values())
    train_on = {number for number, (x, name) in places.items() if name != widest or x + _TILE <= last}
    return _part(content, train_on), _part(content, {n for n, place in places.items() if place == (last, widest)})


def _part(content: dict[str, Any], numbers: set[int]) -> dict[str, Any]:
    return content | {
        "images": [image for image in content["images"] if image["id"] in numbers],
        "annotations": [box for box in content["annotations"] if box["image_id"] in numbers],
    }


def run(folder: Path, option: str, seed: int, steps: int) -> dict[str, Any]:
    """Train one option and measure it: a line of the table.

    Example::

        >>> run(prepare(), "ATSS, focal, GIoU", seed=0, steps=500)["chosen by AP50"]  # doctest: +SKIP
        0.31
    """
    both = split(json.loads((folder / "train.json").read_text()))
    data, part = (CocoDataset(folder / "train.json", folder / "train", content=content) for content in both)
    settings = TrainSettings(
        "retinanet_resnet18_fpn_lite", steps=steps, seed=seed, flips=Flips.ALL, image_scale=1.25, bf16=False,
        arguments=OPTIONS[option],
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as output:
        file = train(settings, data, output=output, workers=1)
        return {"option": option, "seed": seed, "steps": steps} | judged(folder, file, part)


def judged(folder: Path, file: Path, part: CocoDataset | None = None) -> dict[str, float]:
    """The metrics of a model file on the part to choose by, where there is one, and on what was never trained on.

    Example::

        >>> judged(prepare(), TREES)["heldout AP50"]  # doctest: +SKIP
        0.5195
    """
    model, about = load_model(file)
    sets = {"chosen by": part} if part else {}
    sets |= {name: CocoDataset(folder / f"{name}.json", folder / name) for name in _SPLITS}
    line: dict[str, float] = {}
    for name, images in sets.items():
        evaluation = evaluate(model, about.classes, images, workers=0)
        assert evaluation
        line |= {f"{name} {metric}": round(evaluation.metrics.values[metric], 4) for metric in METRICS}
    return line


def table(lines: Iterable[dict[str, Any]]) -> Table:
    """The mean over the seeds, and the range from the least to the greatest, of each option that was run."""
    made, lines = Table("option", "seeds"), list(lines)
    columns = [f"{name} {metric}" for name in ("chosen by", *_SPLITS) for metric in METRICS]
    for column in columns:
        made.add_column(column)
    for option in OPTIONS:
        of = [line for line in lines if line["option"] == option]
        cells = []
        for column in columns:
            values = [float(line[column]) for line in of]
            cells.append(f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})" if of else "")
        made.add_row(option, str(len(of)), *cells)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    console, folder = Console(), prepare()
    OUTPUT.parent.mkdir(exist_ok=True)
    lines: list[dict[str, Any]] = list(csv.DictReader(OUTPUT.open())) if OUTPUT.exists() else []
    done = {(line["option"], int(line["seed"]), int(line["steps"])) for line in lines}
    for seed in range(arguments.seeds):  # all options with one seed first, so that a run cut short compares them
        for option in OPTIONS:
            if (option, seed, arguments.steps) in done:
                continue
            lines.append(run(folder, option, seed, arguments.steps))
            with OUTPUT.open("w", newline="") as file:
                writer = csv.DictWriter(file, list(lines[-1]))
                writer.writeheader()
                writer.writerows(lines)
            console.print(lines[-1])
    console.print(table(line for line in lines if int(line["steps"]) == arguments.steps))


if __name__ == "__main__":
    main()
