"""`python -m demo.engine`: speed and accuracy of the engine on photographs of trees.

It prints AP50 of the embedded weights, by the float32 model and by engines, on the held-out parts and on two forests
that were not trained on; how far the engines' scores and boxes are from the model's; and the time for one photograph,
for which torchvision's model with the same weights, the model and the engines take turns.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from demo.trees import prepare
from retina_fast import compile_inference
from retina_fast.convert import to_torchvision
from retina_fast.data.coco import CocoDataset
from retina_fast.deploy.bench import machine
from retina_fast.deploy.report import difference
from retina_fast.predict.evaluate import evaluate
from retina_fast.predict.load import TREES, load_model

_SPLITS = ("heldout", "OSBS_029", "SOAP_061")
_ROUNDS = 7


@torch.no_grad()
def milliseconds(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """The median time of each call. In each round the calls take turns; the first round does not count."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            float(call()[0]["scores"].sum())  # waits for the device
            times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def main(rounds: int = _ROUNDS) -> None:
    console = Console(width=120, highlight=False)
    folder = prepare()
    model, content = load_model(TREES)
    data = {split: CocoDataset(folder / f"{split}.json", folder / split) for split in _SPLITS}
    photographs = {
        split: [images[i][0].as_subclass(Tensor) for i in range(len(images))] for split, images in data.items()
    }
    engines = {
        f"engine, {str(dtype).removeprefix('torch.')}": compile_inference(model, dtype=dtype)
        for dtype in (torch.float32, torch.bfloat16)
    }

    table = Table("AP50", *_SPLITS, box=None)
    for name, detector in {"model, float32": model, **engines}.items():
        found = [evaluate(detector, content.classes, data[split], workers=0) for split in _SPLITS]
        table.add_row(name, *(f"{evaluation.metrics.values['AP50']:.4f}" for evaluation in found if evaluation))
    console.print(table)
    for name, engine in engines.items():
        seen = difference(model, engine.model, [photo for photos in photographs.values() for photo in photos])
        console.print(
            f"{name}: scores differ from the model's by at most {seen.scores:.2g}, boxes by at most "
            f"{seen.boxes:.2g} px, {seen.boxes_mean:.2g} px in the mean, over {seen.images} photographs",
            soft_wrap=True,
        )

    theirs = to_torchvision(model)
    image = min(photographs["heldout"], key=Tensor.numel).to(next(model.parameters()).device)
    calls: dict[str, Callable[[], Any]] = {
        "torchvision": lambda: theirs([image.float() / 255]),
        "model": lambda: model([image.float() / 255]),
    }
    for name, engine in engines.items():
        calls[name] = lambda engine=engine: engine([image])
    console.print(f"One photograph, {image.shape[1]}x{image.shape[2]}, {machine(image.device)}, medians of {rounds}:")
    medians = milliseconds(calls, rounds)
    for name, ms in medians.items():
        console.print(f"{name}: {ms:.0f} ms, {medians['torchvision'] / ms:.2f} times torchvision's speed")


if __name__ == "__main__":
    main()
