"""Detectors in eight bits: their speed beside the runtimes' own 8-bit, and AP50 on the tree photographs.

    python -m benchmarks.models.eight_bits speed --threads 1 2
    python -m benchmarks.models.eight_bits trees runs/mine/model.pt

``speed`` takes the embedded detector and ResNet-50 v1 and v2 with 91 classes, at 800x800, from image to detections.
The engine in float32 is the unit. Beside it runs the engine in eight bits by each runtime, and the same engine around
trunk and heads as the runtimes' own tools quantise them: ONNX Runtime's ``quantize_static`` with a scale a channel and
uint8 activations, and ``nncf.quantize`` for OpenVINO, where nncf is installed. Each makes two networks: one with the
last convs in float32, as the engine has them, and one with the last convs in eight bits, too. Each also quantises the
whole of an exported file, which then runs without the engine; ONNX Runtime's runs in OpenVINO, too. The ResNet-50s
have random weights; their norms have seen the picture, and their logits are scaled and shifted so that one cell in
twenty has a score above the threshold. The engines take turns; medians are given of the wall clock and of the
processor's time, which other work on the machine disturbs less.

``trees`` is AP50 of the embedded detector, or of a model file, in float32 and in eight bits by each runtime: calibrated
on 12 tiles of the training photographs, judged on the held-out parts, on two other forests, and on all of these
together. Between which bounds the difference from float32 lies if squares of the photographs are drawn anew is what
``resampled.py`` says.
"""

import argparse
import copy
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.models.resampled import Matched, matched, print_ap50, together
from demo.trees import prepare
from retina_fast import RetinaNet, compile_inference, retinanet_resnet50_fpn, retinanet_resnet50_fpn_v2
from retina_fast.data.coco import CocoDataset, read_image
from retina_fast.deploy.eight_bits.parts import last_convs
from retina_fast.deploy.engine import Engine
from retina_fast.deploy.export.onnx_file import onnx_session
from retina_fast.deploy.export.write import export
from retina_fast.deploy.fusion.fold import conv_outputs, fold_batch_norm
from retina_fast.deploy.onnx_network import PAUSE, RUNTIMES, Network, Run, trace
from retina_fast.deploy.report import pixels_of
from retina_fast.forward import LOGITS, cells_of, run_convs
from retina_fast.predict.evaluate import evaluate
from retina_fast.predict.load import TREES, load_model

SPLITS = ("heldout", "OSBS_029", "SOAP_061")
SIDE = 800
ROUNDS = 15
SAMPLES = slice(1, 3)
"""The tiles for calibration where only the speed is asked for. The first of these is timed: a tenth of the embedded
detector's cells have a score above the threshold there, and next to none in the tile before."""
CELLS = 0.05
"""The share of cells with a score above the threshold, of random weights."""


class Opened:
    """What runs a quantised graph, opened anew for each number of threads."""

    def __init__(self, open_it: Callable[[], Run]) -> None:
        self.open_it = open_it
        self.opened: dict[int, Run] = {}

    def __deepcopy__(self, memo: object) -> "Opened":
        return Opened(self.open_it)

    def __call__(self, array: Any) -> Sequence[Any]:
        threads = torch.get_num_threads()
        if threads not in self.opened:
            self.opened[threads] = self.open_it()
        return self.opened[threads](array)


class Rival(Network):
    """Trunk and heads in the hands of another quantiser."""

    def __init__(self, runtime: str, open_it: Callable[[], Run]) -> None:
        super().__init__(b"", runtime)
        self.opened = Opened(open_it)

    def run(self, pixels: Tensor) -> list[Tensor]:
        """The outputs of the graph."""
        return [torch.from_numpy(output) for output in self.opened(pixels.contiguous().numpy())]


class WholeFile:
    """An exported file that a runtime's own quantiser has changed, from image to detections."""

    def __init__(self, open_it: Callable[[], Run]) -> None:
        self.opened = Opened(open_it)

    def __call__(self, images: Sequence[Tensor]) -> Sequence[Any]:
        return self.opened(images[0][None].numpy())


def by_onnxruntime(proto: Any, arrays: Sequence[Any], but: Sequence[str]) -> bytes:
    """onnxruntime.quantization by its defaults for processors with AVX-512 VNNI, but for the convs of these names."""
    import onnx
    from onnxruntime import quantization

    class Reader(quantization.CalibrationDataReader):
        left = iter([{proto.graph.input[0].name: array} for array in arrays])

        def get_next(self) -> Any:
            return next(self.left, None)

    with tempfile.TemporaryDirectory() as folder:
        given, folded, made = (str(Path(folder) / f"{name}.onnx") for name in ("given", "folded", "made"))
        onnx.save(proto, given)
        quantization.quant_pre_process(given, folded, skip_symbolic_shape=True)
        quantization.quantize_static(
            folded,
            made,
            Reader(),
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            # Not InstanceNormalization, of which GroupNorm is made: the quantiser raises an error at its weights.
            op_types_to_quantize=["Conv", "Relu", "Add", "MaxPool", "Resize"],
            nodes_to_exclude=list(but),
        )
        return Path(made).read_bytes()


def by_nncf(proto: Any, arrays: Sequence[Any], but: Sequence[str]) -> Any:
    """nncf.quantize by its defaults, but for the convs of these names: a model of OpenVINO's."""
    import nncf

    model = openvino_model(proto.SerializeToString())
    convs = [node.get_friendly_name() for node in model.get_ops() if node.get_type_name() == "Convolution"]
    ignored = [name for name in convs if name.removesuffix("/WithoutBiases") in but]
    if len(ignored) != len(but):
        raise ValueError(f"OpenVINO has other names for some of the convs {but}: it has {convs}")
    scope = nncf.IgnoredScope(names=ignored)
    return nncf.quantize(model, nncf.Dataset(arrays), subset_size=len(arrays), ignored_scope=scope)


def openvino_model(content: bytes) -> Any:
    """An ONNX file as a model of OpenVINO's."""
    import openvino

    return openvino.Core().read_model(content, b"")


def in_openvino(model: Any, shape: Sequence[int]) -> Run:
    """Compile a model for one shape of its input."""
    import openvino

    model.reshape(list(shape))
    options = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    threads = {"INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = openvino.Core().compile_model(model, "CPU", options | threads)

    def run(array: Any) -> list[Any]:
        outputs = compiled(array, share_inputs=True, share_outputs=True)
        return [outputs[i] for i in range(len(outputs))]

    return run


def in_onnxruntime(content: bytes) -> Run:
    """Open an ONNX file with one input."""
    session = onnx_session(content)
    name = session.get_inputs()[0].name
    return lambda array: session.run(None, {name: array})


def with_network(engine: Engine, network: Network) -> Engine:
    """A copy of the engine around another network."""
    own = copy.deepcopy(engine)
    own.settings = replace(own.settings, network=network)
    own.prepare()
    return own


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


def rivals(model: RetinaNet, engine: Engine, pictures: Sequence[Tensor]) -> dict[str, Any]:
    """What the runtimes' own quantisers make of the model: trunk and heads, with the engine around them, and files."""
    import onnx

    own = copy.deepcopy(model).eval().requires_grad_(False)
    fold_batch_norm(own, partial(conv_outputs, own, torch.rand(1, 3, 128, 128)))
    proto = trace(own, own.transform.size_divisible)
    with tempfile.TemporaryDirectory() as folder:
        export(own, Path(folder) / "file.onnx", "onnx", (SIDE, SIDE))
        file = onnx.load(Path(folder) / "file.onnx")
    arrays = [pixels_of(own, picture).numpy() for picture in pictures]
    images = [picture[None].numpy() for picture in pictures]
    convs = [conv.name for conv in last_convs(proto)]
    ways: dict[str, Any] = {}
    for name, but in (("last convs in float32", convs), ("last convs, too", [])):
        opened = partial(in_onnxruntime, by_onnxruntime(proto, arrays, but))
        ways[f"ONNX Runtime's own int8, {name}"] = with_network(engine, Rival("ONNX Runtime", opened))
    content = by_onnxruntime(file, images, [])
    shape = images[0].shape
    ways["ONNX Runtime's own int8, the whole file"] = WholeFile(partial(in_onnxruntime, content))
    try:
        for name, but in (("last convs in float32", convs), ("last convs, too", [])):
            opened = partial(in_openvino, by_nncf(proto, arrays, but), arrays[0].shape)
            ways[f"OpenVINO's own int8, {name}"] = with_network(engine, Rival("OpenVINO", opened))
        opened = partial(in_openvino, by_nncf(file, images, []), shape)
        ways["OpenVINO's own int8, the whole file"] = WholeFile(opened)
        opened = partial(in_openvino, openvino_model(content), shape)
        ways["ONNX Runtime's own int8, the whole file, in OpenVINO"] = WholeFile(opened)
    except ModuleNotFoundError as error:
        print(f"OpenVINO's own int8 was left out: {error}")
    return ways


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


def medians(engines: Mapping[str, Any], image: Tensor) -> dict[str, tuple[float, float]]:
    """The seconds of each on the wall clock and on the processor. They take turns, in another order in each round, of
    which the first does not count.

    Before each is a pause, see :data:`retina_fast.deploy.onnx_network.PAUSE`.
    """
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in engines}
    order, shuffle = list(engines), random.Random(0).shuffle
    for _ in range(ROUNDS + 1):
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


def speed(names: Sequence[str], threads: Sequence[int]) -> None:
    """Print the time of each network in each way."""
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
        print(f"{name}: {100 * candidates(engine, pictures[0]):.1f}% of the cells have a candidate", flush=True)
        for count in threads:
            torch.set_num_threads(count)
            found = medians({way: copy.deepcopy(engine) for way, engine in engines.items()}, pictures[0])
            base = found["float32, PyTorch"]
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
    part = parts.add_parser("trees")
    part.add_argument("file", type=Path, nargs="?", default=TREES)
    part.add_argument("--float32-share", type=float, default=0.0)
    given = parser.parse_args()
    if given.part == "speed":
        speed(given.networks, given.threads)
    else:
        trees(given.file, given.float32_share)


if __name__ == "__main__":
    main()
