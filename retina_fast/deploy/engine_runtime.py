"""What runs an engine's trunk and heads on a CPU: PyTorch, ONNX Runtime or OpenVINO, in float32 or in eight bits.

The graph is written once; the runtimes that are installed take turns on the first image, and the fastest stays.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.exc import UserError as ConstraintError

from retina_fast.convert import copied
from retina_fast.data.errors import UserError
from retina_fast.deploy.eight_bits.agreement import COMPARED, SEARCHED, Found, Kept, compare
from retina_fast.deploy.eight_bits.calibration import calibration_images
from retina_fast.deploy.eight_bits.quantize import Quantizer
from retina_fast.deploy.eight_bits.sieve import Sieve
from retina_fast.deploy.eight_bits.sieved_graph import sieved
from retina_fast.deploy.onnx_network import RUNTIMES, Network, fastest, trace
from retina_fast.deploy.report import RuntimeChoice, pixels_of
from retina_fast.forward import run_convs
from retina_fast.model import RetinaNet

PYTORCH = "PyTorch"
BY_CELLS = " with the box head at few cells"


def choose_network(
    model: RetinaNet, images: Sequence[Tensor], dtype: torch.dtype, float32_share: float = 0.0
) -> tuple[Network | None, RuntimeChoice]:
    """What runs trunk and heads the fastest, and what was measured; None is PyTorch.

    Args:
        model: of an engine, in evaluation mode, folded, in float32 on a CPU.
        images: samples; the first one is timed, and in eight bits all of them are for calibration.
        dtype: float32, or int8 to quantise the graph. PyTorch then takes no part.
        float32_share: how much of the work may then stay in float32, see
            :meth:`retina_fast.deploy.eight_bits.quantize.Quantizer.most_changing`.

    Warns:
        UserWarning: for modules with forward hooks.

    Raises:
        UserError: for another dtype or device, without an image, for images that cannot serve for calibration, for a
            model that needs other sizes than its ``size_divisible`` says, or if no runtime is installed that runs the
            graph.
        ModuleNotFoundError: without the packages that write the graph.
    """
    if not 0 <= float32_share <= 1:
        raise UserError(f"float32_share must lie in [0, 1], got {float32_share}")
    if not len(images):
        raise UserError("images must be at least one: the runtimes are timed, and eight bits calibrated, on them")
    if dtype not in (torch.float32, torch.int8):
        raise UserError(f"other runtimes compute in float32 or int8, got {dtype}: give dtype=torch.float32")
    eight_bits = dtype == torch.int8
    device = next(model.parameters()).device
    if device.type != "cpu":
        raise UserError(f"other runtimes, and eight bits, serve a CPU alone, but the model is on {device}")
    if hooked := [name or "the model" for name, module in model.named_modules() if module._forward_hooks]:
        warnings.warn(
            f"another runtime calls no forward hooks, which were traced once: of {', '.join(hooked)}",
            stacklevel=4,
        )
    pixels = pixels_of(model, images[0])
    calibration = calibration_images(images, channels=pixels.shape[1]) if eight_bits else None
    multiple = model.transform.size_divisible
    try:
        proto = trace(model, multiple)
    except ConstraintError as error:
        raise UserError(
            f"no graph serves all heights and widths that are multiples of the model's size_divisible, {multiple}: "
            "give it a multiple of 32"
        ) from error
    layers, left, graphs = 0, [], {"": (proto, None)}
    if calibration is not None:
        quantizer = Quantizer(proto, (pixels_of(model, image).numpy() for image in calibration))
        searched = [pixels_of(model, image).numpy() for image in images[:SEARCHED]]
        left += quantizer.most_changing(float32_share, searched) if float32_share else []
        proto, layers = quantizer.quantized(left), len(quantizer.layers) - len(left)
        graphs = _sieved_graphs(proto, quantizer.ranges, [torch.from_numpy(array) for array in searched])
    networks = {
        name + way: Network(graph.SerializeToString(), name, sieve)
        for name in RUNTIMES
        for way, (graph, sieve) in graphs.items()
    }
    runs: dict[str, Callable[[], Any]] = {
        name: partial(_as_in_an_engine, network, model, pixels) for name, network in networks.items()
    }
    if not eight_bits:
        batch = pixels.contiguous(memory_format=torch.channels_last)
        runs[PYTORCH] = partial(run_convs, model, batch)
    with torch.no_grad():
        seconds, failed = fastest(runs)
    if not seconds:
        raise UserError(f"no runtime runs the graph: {'; '.join(f'{name}: {why}' for name, why in failed.items())}")
    best = min(seconds, key=lambda name: seconds[name])
    sieve, size = networks[best].sieve if best in networks else None, tuple(pixels.shape[2:])
    margin = max(sieve.margins) if sieve else None
    return networks.get(best), RuntimeChoice(best, size, seconds, failed, layers, left, len(images), margin)


def _sieved_graphs(proto: Any, ranges: Any, samples: Sequence[Tensor]) -> dict[str, tuple[Any, Sieve | None]]:
    """The ways to run a graph in eight bits, by what is added to a runtime's name: as it is, or with a sieve; and where
    that can be, with a sieve that computes the tower of the box head, too."""
    graphs: dict[str, tuple[Any, Sieve | None]] = {"": sieved(proto, ranges) or (proto, None)}
    graph, sieve = graphs[""]
    if sieve:
        run = Network(graph.SerializeToString(), "ONNX Runtime").run
        sieve = sieve.measured(map(run, samples))
        graphs[""] = graph, sieve
        if by_cells := sieved(proto, ranges, by_cells=True):
            graph, own = by_cells
            graphs[BY_CELLS] = graph, replace(own, margins=sieve.margins, excesses=sieve.excesses)
    return graphs


def _as_in_an_engine(network: Network, model: RetinaNet, pixels: Tensor) -> None:
    """Run what an engine asks of a network: with a sieve, the last convs of few cells."""
    if network.sieve:
        network.candidates(model, network.run(pixels))
    else:
        network(model, pixels)


def compare_with(model: RetinaNet, engine: Callable[..., Any], images: Sequence[Tensor]) -> Kept:
    """What became of the model's detections in the first 16 images, with a warning if too much did.

    Args:
        model: as the user gave it; it detects in float32.
        engine: of it, in eight bits.
        images: uint8 or floating point.
    """
    if next(model.parameters()).dtype != torch.float32:
        model = copied(model).float()

    @torch.no_grad()
    def pairs() -> Iterator[tuple[Found, Found]]:
        for image in images[:COMPARED]:
            yield model([image.float() / (1 if image.is_floating_point() else 255)])[0], engine([image])[0]

    kept = compare(pairs())
    kept.warn("the engine", stacklevel=4)
    return kept
