"""What the engine's convs gain on a CPU: unfused, fused, and with Winograd's algorithm, too, in turns on one image.

`python -m benchmarks.models.fused [--threads 2] [--rounds 9]` prints a row a model: medians, and the medians of each
turn's ratios to the unfused engine. With one thread, the time is what the processor spent on it, which other processes
disturb less.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from unittest import mock

import torch
from torch import Tensor

from retina_fast import compile_inference
from retina_fast.builders import MODELS
from retina_fast.deploy import engine as engine_module
from retina_fast.deploy.fusion import layers

Run = Callable[[list[Tensor]], object]

CASES = [
    ("retinanet_resnet50_fpn", 800, torch.float32),
    ("retinanet_resnet50_fpn", 800, torch.bfloat16),
    ("retinanet_resnet50_fpn_v2", 800, torch.float32),
    ("retinanet_resnext50_32x4d_fpn", 800, torch.float32),
    ("retinanet_resnet18_fpn", 512, torch.float32),
    ("retinanet_resnet18_fpn_lite", 512, torch.float32),
    ("retinanet_spinenet49s", 640, torch.float32),
]


def engines(name: str, size: int, dtype: torch.dtype) -> dict[str, Run]:
    """Engines of one model of 91 classes: without fused convs, with them, and as users have it."""
    torch.manual_seed(0)
    options = {"num_classes": 91, "weights": None, "weights_backbone": None, "min_size": size, "max_size": 1333}
    model = MODELS[name](**options).eval()
    with mock.patch.object(engine_module, "fuse_convs", return_value=0):
        plain = compile_inference(model, dtype=dtype)
    engine = compile_inference(model, dtype=dtype)

    def fused(images: list[Tensor]) -> object:
        with mock.patch.object(layers, "gains_from_winograd", return_value=False):
            return engine.detect(images)

    return {"unfused": plain.detect, "fused": fused, "engine": engine.detect}


def turns(
    runs: dict[str, Run], images: list[Tensor], rounds: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Seconds of each engine in every round but the first; they swap places from round to round."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name in sorted(runs, reverse=turn % 2 == 1):
            start = clock()
            runs[name](images)
            seconds[name].append(clock() - start)
    return {name: times[1:] for name, times in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"{arguments.threads} CPU threads, torch {torch.__version__}, {arguments.rounds} rounds in turns")
    for name, size, dtype in CASES:
        images = [torch.randint(0, 256, (3, size, size), dtype=torch.uint8)]
        clock = time.thread_time if arguments.threads == 1 else time.perf_counter
        seconds = turns(engines(name, size, dtype), images, arguments.rounds, clock)
        row = [f"{name}, {size}x{size}, {dtype}: unfused {1000 * statistics.median(seconds['unfused']):.0f} ms"]
        for which in ("fused", "engine"):
            ratios = sorted(a / b for a, b in zip(seconds["unfused"], seconds[which], strict=True))
            row.append(
                f"{which} {1000 * statistics.median(seconds[which]):.0f} ms, "
                f"ratio {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
            )
        print("; ".join(row), flush=True)


if __name__ == "__main__":
    main()
