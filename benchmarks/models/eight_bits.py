"""The embedded detector in eight bits on the tree photographs: AP50 in each runtime, and the time against float32.

    python -m benchmarks.models.eight_bits

It is calibrated on 12 tiles of the training photographs, and judged on the held-out parts and two other forests. The
engines take turns on one picture; beside the median of the wall clock stands that of the processor's time, which other
work on the machine disturbs less.
"""

import copy
import statistics
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from demo.trees import prepare
from retina_fast import compile_inference
from retina_fast.data.coco import CocoDataset, read_image
from retina_fast.deploy.engine import Engine
from retina_fast.deploy.onnx_network import RUNTIMES, Network
from retina_fast.predict.evaluate import evaluate
from retina_fast.predict.load import TREES, load_model

SPLITS = ("heldout", "OSBS_029", "SOAP_061")
SIDES = (512, 800)
ROUNDS = 7


def by_runtime(engine: Engine) -> dict[str, Engine]:
    """The engine in eight bits by each runtime that is installed."""
    network = engine.settings.network
    assert network is not None
    assert engine.report.runtime_choice is not None
    engines = {}
    for runtime in RUNTIMES:
        if runtime in engine.report.runtime_choice.seconds:
            engines[f"int8, {runtime}"] = own = copy.deepcopy(engine)
            own.settings = replace(own.settings, network=Network(network.content, runtime))
            own.prepare()
    return engines


def medians(engines: Mapping[str, Any], image: Tensor) -> dict[str, tuple[float, float]]:
    """The seconds of each on the wall clock and on the processor; they take turns, and the first does not count."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in engines}
    for _ in range(ROUNDS + 1):
        for name, engine in engines.items():
            wall, processor = time.perf_counter(), time.process_time()
            engine([image])
            times[name].append((time.perf_counter() - wall, time.process_time() - processor))
    return {
        name: (statistics.median(wall for wall, _ in pairs[1:]), statistics.median(used for _, used in pairs[1:]))
        for name, pairs in times.items()
    }


def main() -> None:
    """Print the report of the engine in eight bits, then the times, then AP50."""
    folder = prepare()
    model, content = load_model(TREES)
    tiles = [read_image(path).as_subclass(Tensor) for path in sorted((folder / "train").glob("*.png"))[::3][:12]]
    engine = compile_inference(model, tiles, dtype=torch.int8)
    print(engine, flush=True)
    engines = {"float32, PyTorch": compile_inference(model, dtype=torch.float32), **by_runtime(engine)}
    for side in SIDES:
        image = F.interpolate(tiles[0][None].float(), size=side)[0].to(torch.uint8)
        found = medians(engines, image)
        base = found["float32, PyTorch"]
        for name, (wall, used) in found.items():
            print(
                f"{side}x{side}, {torch.get_num_threads()} threads, {name}: {1000 * wall:.0f} ms, {base[0] / wall:.2f} "
                f"times the speed; {1000 * used:.0f} ms of the processor, {base[1] / used:.2f} times",
                flush=True,
            )
    for split in SPLITS:
        data = CocoDataset(folder / f"{split}.json", folder / split)
        for name, detector in engines.items():
            judged = evaluate(detector, content.classes, data, workers=0)
            if judged:
                print(f"{name}: AP50 of {split} {100 * judged.metrics.values['AP50']:.2f}", flush=True)


if __name__ == "__main__":
    main()
