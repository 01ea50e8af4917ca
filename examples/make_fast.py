"""Turn a live torchvision RetinaNet fast, and compare both on a photograph.

python -m examples.make_fast [photograph]
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torchvision.io import ImageReadMode, decode_image
from torchvision.models.detection.retinanet import RetinaNet

import retina_fast
from retina_fast.convert import to_torchvision
from retina_fast.predict.load import TREES, load_model

PHOTOGRAPH = Path(__file__).parent / "photographs" / "yellowstone.jpg"


def your_model() -> RetinaNet:
    """Stands for a model of your own: the embedded tree detector as torchvision's class and code."""
    return to_torchvision(load_model(TREES)[0])


def milliseconds(call: Callable[[], list[dict[str, Any]]]) -> float:
    """The least time of five calls, after one that does not count."""
    times = []
    for _ in range(6):
        start = time.perf_counter()
        call()[0]["scores"].tolist()  # waits for a GPU
        times.append(1000 * (time.perf_counter() - start))
    return min(times[1:])


@torch.no_grad()
def main(photograph: Path = PHOTOGRAPH) -> None:
    model = your_model()
    device = next(model.parameters()).device
    image = decode_image(str(photograph), ImageReadMode.RGB).to(device)

    fast = retina_fast.from_torchvision(model)  # shares the parameters; trains and detects as the model does
    engine = retina_fast.compile_inference(model, images=[image])  # a copy that only detects
    print(engine)

    calls: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "torchvision": lambda: model([image / 255]),
        "from_torchvision": lambda: fast([image / 255]),
        "compile_inference": lambda: engine([image]),
    }
    for name, call in calls.items():
        found = call()[0]["scores"]
        print(f"{name:18} {milliseconds(call):7.1f} ms, {int((found > 0.3).sum())} trees of score 0.3 and above")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
