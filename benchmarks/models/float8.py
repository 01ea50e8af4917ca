"""What FP8 in the 1x1 convs costs: AP50 on the tree photographs, in float32 and with FP8 simulated.

    python -m benchmarks.models.float8 runs/mine/model.pt
    python -m benchmarks.models.float8 runs/mine/model.pt --any-channels

The embedded detector, or a model file, is calibrated on 12 tiles of the training photographs and judged on the held-out
parts and two other forests. All but the rounding to FP8 is float32 in both, so that the difference is FP8's alone. A
scaled product of PyTorch takes channels in multiples of 16; ``--any-channels`` simulates the 1x1 convs of other
networks, too, to learn what FP8 costs where a network consists of them.
"""

import argparse
import contextlib
from pathlib import Path
from unittest import mock

import torch

from benchmarks.models.eight_bits import SPLITS, training_tiles
from demo.trees import prepare
from retina_fast import compile_inference
from retina_fast.data.coco import CocoDataset
from retina_fast.deploy.eight_bits import float8
from retina_fast.deploy.fusion import layers
from retina_fast.deploy.simulate import simulate_float8
from retina_fast.predict.evaluate import evaluate
from retina_fast.predict.load import TREES, load_model


@contextlib.contextmanager
def any_channels():
    """Lets the simulation take convs of any number of channels."""
    with contextlib.ExitStack() as stack:
        for module in (float8, layers):
            stack.enter_context(mock.patch.object(module, "suits_float8", return_value=True))
        yield


def trees(file: Path) -> None:
    """Print the report of the engine with FP8 simulated, and AP50 without and with it."""
    folder = prepare()
    model, content = load_model(file)
    model = model.cpu()
    simulated = simulate_float8(model, training_tiles(), torch.float32)
    print(simulated, flush=True)
    engines = {"float32": compile_inference(model, dtype=torch.float32), "FP8, simulated": simulated}
    for split in SPLITS:
        data = CocoDataset(folder / f"{split}.json", folder / split)
        for name, detector in engines.items():
            judged = evaluate(detector, content.classes, data, workers=0)
            if judged:
                print(f"{name}: AP50 of {split} {100 * judged.metrics.values['AP50']:.2f}", flush=True)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, nargs="?", default=TREES)
    parser.add_argument("--any-channels", action="store_true")
    given = parser.parse_args()
    with any_channels() if given.any_channels else contextlib.nullcontext():
        trees(given.file)


if __name__ == "__main__":
    main()
