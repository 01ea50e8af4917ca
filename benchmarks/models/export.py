"""Exported files beside the model that they were written from: the same detections, and how fast.

    python -m benchmarks.models.export [MODEL_FILE...]

On 20 crops of the tree photographs and a grey image, in which nothing is to be found, batches of 1 and 4: boxes to
1e-3 px, scores to 1e-5, the same labels. Then latency of the eager model, of every format and of torchvision's own
ONNX exports, where they can be written, taking turns on the same batches.
"""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image

from benchmarks.gpu.records import ROOT, environment
from benchmarks.models.agreement import differing, margin
from retina_fast import Detections, export, load_exported
from retina_fast.convert import to_torchvision
from retina_fast.deploy.export import FORMATS
from retina_fast.predict.load import TREES, load_model

HEIGHT, WIDTH = 180, 240
GREY = torch.tensor([124, 116, 104], dtype=torch.uint8)[:, None, None]  # ImageNet's mean
BOX_PX, SCORE = 1e-3, 1e-5
ROUNDS = 7


def crops(pictures: list[Tensor], count: int, height: int, width: int) -> Tensor:
    """(count + 1, 3, height, width) uint8: windows of the pictures at random, and the third image grey."""
    generator = torch.Generator().manual_seed(0)
    images = []
    for i in range(count):
        picture = pictures[i % len(pictures)]
        y, x = (
            int(torch.randint(side - own + 1, (), generator=generator))
            for side, own in zip(picture.shape[1:], (height, width), strict=True)
        )
        images.append(picture[:, y : y + height, x : x + width])
    return torch.stack([*images[:2], GREY.expand(-1, height, width), *images[2:]])


def apart(ours: Detections, theirs: Detections) -> tuple[float, float, int]:
    """The largest differences of boxes and scores between detections and the nearest one of the same label on the
    other side, and how many have none within the bounds."""
    boxes = scores = 0.0
    lost = 0
    for mine, other in zip(ours.to_list(), theirs.to_list(), strict=True):
        lost += abs(len(mine["boxes"]) - len(other["boxes"]))
        if not len(mine["boxes"]) or not len(other["boxes"]):
            continue
        box = (mine["boxes"][:, None] - other["boxes"]).abs().amax(dim=2)
        score = (mine["scores"][:, None] - other["scores"]).abs()
        distance = torch.maximum(box / BOX_PX, score / SCORE)
        distance[mine["labels"][:, None] != other["labels"]] = torch.inf
        for axis in (0, 1):
            nearest = distance.min(dim=axis)
            near = nearest.values <= 1
            lost += int((~near).sum())
            place = nearest.indices.unsqueeze(axis)
            boxes = max([boxes, *box.gather(axis, place).squeeze(axis)[near].tolist()])
            scores = max([scores, *score.gather(axis, place).squeeze(axis)[near].tolist()])
    return boxes, scores, lost


def eager(model: Any) -> Callable[[Tensor], Detections]:
    @torch.no_grad()
    def run(images: Tensor) -> Detections:
        return model.detect(images.float() / 255)

    return run


Expected = list[tuple[Tensor, Detections]]


def expectations(model: Any, images: Tensor) -> Expected:
    """The model's detections, batch by batch, first of 1 and then of 4; on one image there are none."""
    expected = [(batch, eager(model)(batch)) for size in (1, 4) for batch in images.split(size)]
    assert not expected[2][1].counts.any(), "the grey image has detections"
    return expected


def compare(expected: Expected, run: Callable[[Tensor], Detections]) -> dict[str, Any]:
    """The largest differences, how many detections only one side has, and, over the images with such, the widest margin
    by which an IoU missed the threshold: what lies within rounding of it may go either way."""
    result: dict[str, Any] = {"boxes_px": 0.0, "scores": 0.0, "lost": 0, "margin": 0.0, "detections": 0}
    for batch, theirs in expected:
        ours = run(batch)
        boxes, scores, lost = apart(ours, theirs)
        result["boxes_px"], result["scores"] = max(result["boxes_px"], boxes), max(result["scores"], scores)
        result["lost"] += lost
        result["detections"] += int(theirs.counts.sum())
        for mine, other in zip(ours.to_list(), theirs.to_list(), strict=True):
            if differing(mine, other) or differing(other, mine):
                result["margin"] = max(result["margin"], margin(mine, other))
    return result


def torchvision_onnx(model: Any, image: Tensor, path: Path, dynamo: bool) -> Callable[[Tensor], Detections] | str:
    """What runs torchvision's own export of the model for one image, or the error it gives."""
    import onnxruntime

    try:
        torch.onnx.export(to_torchvision(model), ([image.float() / 255],), path, dynamo=dynamo, verbose=False)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as problem:  # whatever it is, it is the result
        error: BaseException = problem
        while error.__cause__:
            error = error.__cause__
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    name = session.get_inputs()[0].name

    def run(images: Tensor) -> Detections:
        outputs = session.run(None, {name: (images[0].float() / 255).numpy()})
        found = dict(zip(("boxes", "scores", "labels"), map(torch.from_numpy, outputs), strict=True))
        return Detections.from_list([found], 0)

    return run


def latency(runs: dict[str, Callable[[Tensor], Any]], images: Tensor, rounds: int) -> dict[str, float]:
    """Median milliseconds of each, taking turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run(images)
            if turn:  # the first warms up
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def quiet(model: Any, grey: Tensor) -> Any:
    """The model at a threshold above what it finds in a grey image (3, H, W)."""
    best = float(eager(model)(grey[None]).scores.max())
    model.score_thresh = max(model.score_thresh, round(best + 0.01, 2))
    return model


def build(path: Path, images: Tensor) -> Any:
    """The detector of a model file; images of this benchmark's size are enlarged for it."""
    model = load_model(path)[0].cpu()
    model.transform.min_size, model.transform.max_size = (192,), 384
    return quiet(model, images[2])


def measure(file: Path, images: Tensor, folder: Path, rounds: int = ROUNDS) -> dict[str, Any]:
    model, name = build(file, images), file.parent.name
    result: dict[str, Any] = {"formats": {}}
    runs: dict[str, Callable[[Tensor], Any]] = {"eager": eager(model)}
    expected = expectations(model, images)
    for format, suffix in FORMATS.items():
        path = folder / f"{name}-{format}{suffix}"
        start = time.perf_counter()
        export(model, path, format, (images.shape[2], images.shape[3]))
        seconds = time.perf_counter() - start
        runs[format] = load_exported(path)
        result["formats"][format] = {"written_s": seconds, "bytes": path.stat().st_size}
        result["formats"][format] |= compare(expected, runs[format])
        print(name, format, json.dumps(result["formats"][format]), flush=True)
    result["latency_ms"] = {4: latency(runs, images[3:7], rounds)}
    for dynamo in (False, True):
        theirs = torchvision_onnx(model, images[3], folder / "torchvision.onnx", dynamo)
        if isinstance(theirs, str):
            result[f"torchvision, dynamo={dynamo}"] = theirs
        else:
            runs[f"torchvision, dynamo={dynamo}"] = theirs
            result[f"torchvision, dynamo={dynamo}"] = compare(expected[: len(images)], theirs)
    result["latency_ms"][1] = latency(runs, images[3:4], rounds)
    print(name, json.dumps({key: value for key, value in result.items() if key != "formats"}), flush=True)
    return result


def main(paths: list[Path]) -> None:
    from demo.trees import prepare

    files = sorted((prepare() / "heldout").glob("*.png"))
    images = crops([decode_image(str(file), ImageReadMode.RGB) for file in files], 20, HEIGHT, WIDTH)
    print(f"{torch.get_num_threads()} threads, images of {HEIGHT}x{WIDTH}")
    with tempfile.TemporaryDirectory() as folder:
        results = {str(path): measure(path, images, Path(folder)) for path in paths}
    content = {"environment": environment(torch.device("cpu")), "models": results}
    (ROOT / "out").mkdir(exist_ok=True)
    (ROOT / "out" / "export.json").write_text(json.dumps(content, indent=1))


if __name__ == "__main__":
    main([Path(argument) for argument in sys.argv[1:]] or [TREES])
