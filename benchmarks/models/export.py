"""Exported files beside the model that they were written from: whether they find the same, and how fast they are.

    python -m benchmarks.models.export [MODEL_FILE...]

Detections are compared on 20 crops of the tree photographs and a grey image, in which nothing is to be found, in
batches of 1 and 4: boxes to 1e-3 px, scores to 1e-5, the same labels. Then the eager model, every format, and
torchvision's own ONNX exports, where they can be written, take turns on the same batches, and their latency is printed.
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
from retina_fast import Detections, export, load_exported
from retina_fast.convert import to_torchvision
from retina_fast.deploy.export.formats import FORMATS
from retina_fast.predict.load import TREES, load_model
from tests.instruments.exported import compare, crops, eager, expectations, quiet

HEIGHT, WIDTH = 180, 240
ROUNDS = 7


def torchvision_onnx(model: Any, image: Tensor, path: Path, dynamo: bool) -> Callable[[Tensor], Detections] | str:
    """Returns what runs torchvision's own export of the model on one image, or the error that it gives."""
    import onnxruntime

    try:
        torch.onnx.export(to_torchvision(model), ([image.float() / 255],), path, dynamo=dynamo, verbose=False)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as problem:  # of whatever kind, it is the result
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
    """Returns the median milliseconds of each; they take turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run(images)
            if turn:  # the first warms up
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def build(path: Path, images: Tensor) -> Any:
    """Loads the detector of a model file, for which images of this benchmark's size are enlarged."""
    model = load_model(path)[0].cpu()
    model.transform.min_size, model.transform.max_size = (192,), 384
    return quiet(model, images[2])


def measure(file: Path, images: Tensor, folder: Path, rounds: int = ROUNDS) -> dict[str, Any]:
    """Exports a model to every format, and returns how the files compare with it and how fast they are."""
    model, name = build(file, images), file.parent.name
    result: dict[str, Any] = {"formats": {}}
    runs: dict[str, Callable[[Tensor], Any]] = {"eager": eager(model)}
    expected = expectations(model, images)
    for format, kind in FORMATS.items():
        path = folder / f"{name}-{format}{kind.suffix}"
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
    """Measures these model files and writes out/export.json."""
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
