"""DeepForest's `predict_tile` beside the same call with a fast network, and beside `predict`: time and boxes.

`python -m benchmarks.models.predict_tile` needs the package `deepforest`, whose wheel holds the photographs. The
embedded detector looks at four patches of one, so that there are boxes to compare: torchvision's code runs its weights
in DeepForest. DeepForest's own network, a ResNet-50 that enlarges each patch to 800 pixels, comes with random weights,
for which two patches are enough. The ways take turns in one process; it takes some four minutes on a core.
"""

import contextlib
import io
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.io import write_png

import retina_fast
from retina_fast import checkpoint, compile_inference
from retina_fast.convert import to_torchvision
from retina_fast.data.images import read_image

PHOTOGRAPH = "2019_YELL_2_541000_4977000_image_crop.png"
PATCH, OVERLAP, SCORE, BETWEEN, WITHIN = 400, 0.05, 0.1, 0.15, 0.05  # DeepForest's defaults
NEAR = 2.0  # px: DeepForest cuts coordinates to whole pixels, and then lets the better of two boxes be
SECONDS = 60  # that the turns of one network may take; three turns are taken in any case


def deepforest_with(network: Any) -> Any:
    """Returns a DeepForest model with that network, which prints nothing and draws no bars."""
    from deepforest import main

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    arguments = {"num_classes": 1, "label_dict": {"Tree": 0}, "model": {"name": None}, "accelerator": "cpu"}
    forest = main.deepforest(model=network, config_args=arguments)
    forest.set_labels({"Tree": 0})
    forest.create_trainer(logger=False, enable_progress_bar=False, enable_model_summary=False)
    return forest


def ways(model: Any, path: Path) -> dict[str, Callable[[], Tensor]]:
    """Returns three ways to find objects in an image, each of which gives boxes (N, 4)."""
    model.score_thresh, model.nms_thresh = SCORE, WITHIN

    def tile(network: Any) -> Callable[[], Tensor]:
        forest = deepforest_with(network)

        def call() -> Tensor:
            with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = forest.predict_tile(str(path), patch_size=PATCH, patch_overlap=OVERLAP, iou_threshold=BETWEEN)
            columns = ["xmin", "ymin", "xmax", "ymax"]
            return torch.zeros(0, 4) if found is None else torch.tensor(found[columns].to_numpy(dtype="float32"))

        return call

    def predict() -> Tensor:
        options: Any = {"tile": PATCH, "overlap": OVERLAP, "merge": "nms", "merge_thresh": BETWEEN}
        boxes: Tensor = model.predict(path, SCORE, **options).boxes
        return boxes

    return {
        "DeepForest's predict_tile, torchvision's network": tile(to_torchvision(model)),
        "DeepForest's predict_tile, the engine": tile(compile_inference(model, dtype=torch.float32)),
        "retina_fast's predict": predict,
    }


def lacking(boxes: Tensor, others: Tensor) -> int:
    """Returns how many boxes (N, 4) have none among the others (M, 4) whose every side lies near theirs."""
    if not len(others):
        return len(boxes)
    return int((torch.cdist(boxes, others, p=float("inf")).amin(dim=1) > NEAR).sum())


def compare(name: str, model: Any, path: Path) -> None:
    """Prints what each way finds, and the median time of its turns."""
    calls = ways(model, path)
    found = {way: call() for way, call in calls.items()}
    theirs = next(iter(found.values()))
    seconds: dict[str, list[float]] = {way: [] for way in calls}
    while len(seconds["retina_fast's predict"]) < 3 or sum(map(sum, seconds.values())) < SECONDS:
        for way, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[way].append(time.perf_counter() - start)
    medians = {way: statistics.median(times) for way, times in seconds.items()}
    first = next(iter(medians.values()))
    height, width = read_image(path).shape[1:]
    print(f"\n{name}, {width}x{height} pixels, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print("| way | median of turns | least to most | times as fast | boxes | not there | not here |")
    print("|---|---|---|---|---|---|---|")
    for way, times in seconds.items():
        boxes = found[way]
        print(
            f"| {way} | {medians[way]:.2f} s of {len(times)} | {min(times):.2f} to {max(times):.2f} s | "
            f"{first / medians[way]:.2f} | {len(boxes)} | {lacking(boxes, theirs)} | {lacking(theirs, boxes)} |",
            flush=True,
        )


def part(photograph: Path, folder: Path, rows: int, columns: int) -> Path:
    """Returns the path of the upper left part of a photograph that has so many patches."""
    height, width = (round(PATCH * (1 + (1 - OVERLAP) * (number - 1))) for number in (rows, columns))
    file = folder / f"{width}x{height}.png"
    write_png(read_image(photograph)[:, :height, :width].contiguous(), str(file))
    return file


def main() -> None:
    photograph = Path(str(files("deepforest") / "data" / PHOTOGRAPH))
    torch.manual_seed(0)
    network: Any = checkpoint.build("retinanet_resnet50_fpn", 1, weights_backbone="IMAGENET1K_V1")  # frozen norms
    network.classes = ["Tree"]
    with tempfile.TemporaryDirectory() as folder:
        compare("the embedded detector", retina_fast.load("trees").cpu(), part(photograph, Path(folder), 2, 2))
        compare("a ResNet-50 with random weights", network.eval(), part(photograph, Path(folder), 1, 2))


if __name__ == "__main__":
    main()
