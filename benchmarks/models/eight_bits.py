"""Detectors in eight bits: their speed beside the runtimes' own 8-bit, and AP50 on the tree photographs.

    python -m benchmarks.models.eight_bits speed --threads 1 2
    python -m benchmarks.models.eight_bits trees runs/mine/model.pt

``speed`` takes the embedded detector and ResNet-50 v1 and v2 with 91 classes, at 800x800, from image to detections.
The engine in float32 is the unit. Beside it runs the engine in eight bits by each runtime, and what the runtimes' own
tools make of the same detector (``eight_bits_rivals.py``). The ResNet-50s have random weights; their norms have seen
the picture, and their logits are scaled and shifted so that one cell in twenty has a score above the threshold. The
engines take turns; medians are given of the wall clock and of the processor's time, which other work on the machine
disturbs less. How many detections each makes is said, too, and how many of float32's it keeps.

``trees`` is AP50 of the embedded detector, or of a model file, in float32 and in eight bits by each runtime: calibrated
on 12 tiles of the training photographs, judged on the held-out parts, on two other forests, and on all of these
together. Between which bounds the difference from float32 lies if squares of the photographs are drawn anew is what
``resampled.py`` says.
"""

import argparse
import copy
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.models.eight_bits_rivals import rivals, with_network
from benchmarks.models.resampled import Matched, matched, print_ap50, together
from demo.trees import prepare
from retina_fast import RetinaNet, compile_inference, retinanet_resnet50_fpn, retinanet_resnet50_fpn_v2
from retina_fast.data.coco import CocoDataset, read_image
from retina_fast.deploy.eight_bits.agreement import compare
from retina_fast.deploy.engine import Engine
from retina_fast.deploy.onnx_network import PAUSE, RUNTIMES, Network
from retina_fast.deploy.report import pixels_of
from retina_fast.forward import LOGITS, cells_of, run_convs
from retina_fast.predict.evaluate import evaluate
from retina_fast.predict.load import TREES, load_model

SPLITS = ("heldout", "OSBS_029", "SOAP_061")
SIDE = 800
SAMPLES = slice(1, 3)
"""The tiles for calibration where only the speed is asked for. The first of these is timed: a tenth of the embedded
detector's cells have a score above the threshold there, and next to none in the tile before."""
CELLS = 0.05
"""The share of cells with a score above the threshold, of random weights."""


def by_runtime(engine: Engine) -> dict[str, Engine]:
    """The engine in eight bits by each runtime that is installed."""
    network, choice = engine.settings.network, engine.report.runtime_choice
    assert network is not None
    assert choice is not None
    return {
        f"int8, {runtime}": with_network(engine, Network(network.content, runtime, network.sieve))
        for runtime in RUNTIMES
        if runtime in choice.seconds
    }


@torch.no_grad()
def random_model(build: Callable[..., RetinaNet], picture: Tensor) -> RetinaNet:
    """A model with random weights, of whose cells a share of ``CELLS`` has a score above the threshold."""
    torch.manual_seed(0)
    model = build(num_classes=91, weights=None, weights_backbone=None, min_size=SIDE, max_size=SIDE)
    pixels = pixels_of(model.eval(), picture)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None
    model.backbone.train()(pixels)
    model.eval()
    last: Any = model.head.classification_head.cls_logits
    last.weight.copy_(last.weight[:1] + last.weight / 5)  # what all classes share makes foreground and background
    last.bias.zero_()
    levels = run_convs(model, pixels)[1][LOGITS]
    logits = torch.cat([level.permute(0, 2, 3, 1).flatten(0, 2) for level in levels])  # (cells, A*K)
    scale, offsets = 2 / logits.std(), -4 * torch.rand(len(last.bias))
    above = torch.quantile((scale * logits + offsets).amax(dim=1), 1 - CELLS)
    last.weight *= scale
    last.bias.copy_(offsets - above + torch.logit(torch.tensor(model.score_thresh)))
    return model


def candidates(engine: Engine, image: Tensor) -> float:
    """The share of cells that have a candidate."""
    network, model = engine.settings.network, engine.model
    assert network is not None
    features, found, _ = network.candidates(model, network.run(pixels_of(model, image)))
    per_cell = model.anchor_generator.num_anchors_per_location()[0]
    cells = found.anchors[0, : int(found.counts)] // per_cell
    return len(cells.unique()) / sum(cells_of(features))


def medians(engines: Mapping[str, Any], image: Tensor, rounds: int) -> dict[str, tuple[float, float]]:
    """The seconds of each on the wall clock and on the processor. They take turns, in another order in each round, of
    which the first does not count.

    Before each is a pause, see :data:`retina_fast.deploy.onnx_network.PAUSE`.
    """
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in engines}
    order, shuffle = list(engines), random.Random(0).shuffle
    for _ in range(rounds + 1):
        shuffle(order)
        for name in order:
            engine = engines[name]
            time.sleep(PAUSE)
            wall, processor = time.perf_counter(), time.process_time()
            engine([image])
            times[name].append((time.perf_counter() - wall, time.process_time() - processor))
    return {
        name: (statistics.median(wall for wall, _ in pairs[1:]), statistics.median(used for _, used in pairs[1:]))
        for name, pairs in times.items()
    }


def speed(names: Sequence[str], threads: Sequence[int], rounds: int, ways: str) -> None:
    """Print the detections and the time of each network in each way whose name holds ``ways``."""
    tiles = training_tiles()[SAMPLES]
    pictures = [F.interpolate(tile[None].float(), size=SIDE)[0].to(torch.uint8) for tile in tiles]
    for name in names:
        if name == "embedded":
            model = load_model(TREES)[0].cpu()
            model.transform.min_size, model.transform.max_size = (SIDE,), SIDE
        else:
            build = {"resnet50": retinanet_resnet50_fpn, "resnet50_v2": retinanet_resnet50_fpn_v2}[name]
            model = random_model(build, pictures[0])
        engine = compile_inference(model, pictures, dtype=torch.int8)
        engines = {"float32, PyTorch": compile_inference(model, dtype=torch.float32), **by_runtime(engine)}
        engines |= rivals(model, engine, pictures)
        theirs = engines["float32, PyTorch"]([pictures[0]])[0]
        engines = {way: one for way, one in engines.items() if ways in way}
        print(f"{name}: {100 * candidates(engine, pictures[0]):.1f}% of the cells have a candidate", flush=True)
        for way, one in engines.items():
            ours = one([pictures[0]])[0]
            print(f"{name}, {way}: {len(ours['boxes'])} detections; {compare([(theirs, ours)])}", flush=True)
        for count in threads:
            torch.set_num_threads(count)
            found = medians({way: copy.deepcopy(one) for way, one in engines.items()}, pictures[0], rounds)
            base = found[next(iter(found))]
            for way, (wall, used) in found.items():
                print(
                    f"{name} at {SIDE}x{SIDE}, {count} threads, {way}: {1000 * wall:.0f} ms, {base[0] / wall:.2f} "
                    f"times the speed; {1000 * used:.0f} ms of the processor, {base[1] / used:.2f} times",
                    flush=True,
                )


def training_tiles() -> list[Tensor]:
    """Twelve tiles of the training photographs."""
    return [read_image(path).as_subclass(Tensor) for path in sorted((prepare() / "train").glob("*.png"))[::3][:12]]


def trees(file: Path, float32_share: float) -> None:
    """Print the report of the engine in eight bits, and AP50 in each runtime."""
    folder = prepare()
    model, content = load_model(file)
    model = model.cpu()
    engine = compile_inference(model, training_tiles(), dtype=torch.int8, float32_share=float32_share)
    print(engine, flush=True)
    engines = {"float32, PyTorch": compile_inference(model, dtype=torch.float32), **by_runtime(engine)}
    parts: dict[str, list[Matched]] = {name: [] for name in engines}
    for split in SPLITS:
        data = CocoDataset(folder / f"{split}.json", folder / split)
        for name, detector in engines.items():
            judged = evaluate(detector, content.classes, data, workers=0)
            assert judged is not None
            parts[name].append(matched(judged.results, data.coco))
        print_ap50(split, {name: found[-1] for name, found in parts.items()})
    print_ap50("all of them together", {name: together(found) for name, found in parts.items()})


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    part = parts.add_parser("speed")
    part.add_argument("--threads", type=int, nargs="+", default=[torch.get_num_threads()])
    part.add_argument("--networks", nargs="+", default=["embedded", "resnet50", "resnet50_v2"])
    part.add_argument("--rounds", type=int, default=15)
    part.add_argument("--ways", default="", help="what the names of the ways hold; the first of these is the unit")
    part = parts.add_parser("trees")
    part.add_argument("file", type=Path, nargs="?", default=TREES)
    part.add_argument("--float32-share", type=float, default=0.0)
    given = parser.parse_args()
    if given.part == "speed":
        speed(given.networks, given.threads, given.rounds, given.ways)
    else:
        trees(given.file, given.float32_share)


if __name__ == "__main__":
    main()
