"""Trunk and heads as an ONNX graph, which another runtime runs in place of PyTorch: ONNX Runtime or OpenVINO.

The graph takes the engine's batch (B, 3, H, W), of any B, H and W, and gives the outputs of the heads; images, anchors
and detections stay the engine's. What runs it is imported only when it is asked for.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from retina_fast.convert import copied
from retina_fast.deploy.eight_bits.box_tower import Run as TowerRun
from retina_fast.deploy.eight_bits.products import convs_as_products
from retina_fast.deploy.eight_bits.sieve import Sieve
from retina_fast.deploy.export.onnx_file import QUANTIZED_OPSET, onnx_session, translate
from retina_fast.deploy.openvino_graph import OpenVinoGraph, opened
from retina_fast.deploy.openvino_nms import OpenVinoNms
from retina_fast.forward import DELTAS, LOGITS, input_channels, run_convs
from retina_fast.kernels.batched_nms import batched_nms
from retina_fast.kernels.candidate_selection import Candidates
from retina_fast.kernels.postprocess import Nms
from retina_fast.model import RetinaNet

Run = Callable[[Any], Sequence[Any]]
_ROUNDS = 5  # after one that is not counted
PAUSE = 0.1
"""Seconds before a call is timed: a runtime's threads wait busily for a while after a call, and slow down the next."""


class _Outputs(nn.Module):
    """What is traced: from pixels (B, 3, H, W) to the logits' levels, then the box offsets', (B, H, W, channels) each.

    So lie the runtimes' feature maps in memory, and so the postprocess reads them. The pixels lie channel by channel as
    images do: their codes of one byte, which the runtimes turn, are a quarter of the batch.
    """

    def __init__(self, model: RetinaNet) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> list[Tensor]:
        returned = run_convs(self.model, pixels)[1]
        levels = [level for name in (LOGITS, DELTAS) for level in _levels(returned[name])]
        return [level.permute(0, 2, 3, 1) if level.dim() == 4 else level for level in levels]


def _levels(output: Any) -> list[Tensor]:
    return [output] if isinstance(output, Tensor) else list(output)


def trace(model: RetinaNet, multiple: int) -> Any:
    """The ModelProto of a model's trunk and heads.

    Args:
        model: in evaluation mode, on the CPU, in float32.
        multiple: of which H and W are multiples.
    """
    model = copied(model).to(memory_format=torch.contiguous_format)
    # Large enough that no level has a single row, which the exporter would take for a constant.
    sides = input_channels(model), 8 * multiple, 12 * multiple
    pixels = torch.zeros(2, *sides, dtype=torch.float32, device="cpu")
    height, width = (multiple * torch.export.Dim(name, min=1) for name in ("height", "width"))
    shapes = {"pixels": {0: torch.export.Dim("batch", min=1), 2: height, 3: width}}
    with torch.no_grad():
        outputs = _Outputs(model).eval()
        program = torch.export.export(outputs, (pixels,), dynamic_shapes=shapes)
        count = len(outputs(pixels[:1, :, :multiple, :multiple]))
    return translate(program, shapes, [f"output{i}" for i in range(count)], QUANTIZED_OPSET)


def _features(batch: int, sizes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """Empty features (B, 1, H, W) of the heights and widths."""
    return [torch.zeros((), device="cpu").expand(batch, 1, *size) for size in sizes]


class Network:
    """Trunk and heads in another runtime: called in place of :func:`retina_fast.forward.run_convs`.

    Args:
        content: an ONNX file of :func:`trace`, quantised or not; with a sieve, that of
            :func:`retina_fast.deploy.eight_bits.sieved_graph.sieved`.
        runtime: a key of :data:`RUNTIMES`.
        sieve: what computes the last convs.
    """

    def __init__(self, content: bytes, runtime: str, sieve: Sieve | None = None) -> None:
        self.content, self.runtime, self.sieve = content, runtime, sieve
        self._run: Run | None = None
        self._run_tower: TowerRun | None = None
        self._nms: Nms | None = None
        self._counts: dict[str, int | None] = {}  # how many levels the heads return of each output; None is one tensor
        self._flattened: dict[tuple[int, ...], list[tuple[int, ...]]] = {}  # by the pixels' size

    def __call__(self, model: Any, pixels: Tensor) -> tuple[list[Tensor], Mapping[str, Any]]:
        """``pixels`` (B, 3, H, W) float32. Of the features only height and width are right: anchors need no more."""
        returned: dict[str, Any]
        outputs = self.run(pixels)
        if self.sieve:
            logits, deltas = self.sieve.everywhere(outputs, self._run_tower)
            returned = {LOGITS: logits, DELTAS: deltas}
            return _features(len(pixels), self._sizes(model, pixels, logits)), returned
        outputs = [level.permute(0, 3, 1, 2) if level.dim() == 4 else level for level in outputs]
        returned = {}
        for name, count in self._counts_of(model, pixels).items():
            returned[name] = outputs[0] if count is None else outputs[:count]
            outputs = outputs[count or 1 :]
        return _features(len(pixels), self._sizes(model, pixels, _levels(returned[LOGITS]))), returned

    def candidates(self, model: Any, outputs: Sequence[Tensor]) -> tuple[list[Tensor], Candidates, Tensor]:
        """From the outputs of a graph with a sieve: features as above, candidates, and their box offsets (B, M, C)."""
        assert self.sieve is not None
        sizes = [tuple(level.shape[1:3]) for level in outputs[: len(self.sieve.codes)]]
        features = _features(len(outputs[0]), sizes)
        num_classes = int(model.head.classification_head.num_classes)
        found = self.sieve.candidates(outputs, num_classes, model.score_thresh, model.topk_candidates)
        per_cell = len(self.sieve.logits.bias) // num_classes
        return features, found, self.sieve.offsets(outputs, found.anchors, per_cell, self._run_tower)

    def run(self, pixels: Tensor) -> list[Tensor]:
        """The outputs of the graph."""
        if self._run is None:
            if self.sieve and self.sieve.tower:
                self._run_tower = TOWERS[self.runtime](self.sieve.tower.content)
            self._run = RUNTIMES[self.runtime](self.content)  # the last, by which the tower is known to be open
        return [torch.from_numpy(output) for output in self._run(pixels.contiguous().numpy())]

    def nms(self) -> Nms:
        """What suppresses boxes beside this runtime."""
        if self._nms is None:
            self._nms = OpenVinoNms() if self.runtime == "OpenVINO" else batched_nms
        return self._nms

    def _counts_of(self, model: Any, pixels: Tensor) -> dict[str, int | None]:
        if not self._counts:
            side = model.transform.size_divisible
            returned = run_convs(model, pixels.new_zeros(1, pixels.shape[1], side, side))[1]
            self._counts = {
                name: None if isinstance(returned[name], Tensor) else len(returned[name]) for name in (LOGITS, DELTAS)
            }
        return self._counts

    def _sizes(self, model: Any, pixels: Tensor, logits: Sequence[Tensor]) -> list[tuple[int, ...]]:
        """The heights and widths of the features: those of the logits, but where a user's own head flattens these."""
        if all(level.dim() == 4 for level in logits):
            return [tuple(level.shape[2:]) for level in logits]
        size = tuple(pixels.shape[1:])
        if size not in self._flattened:
            self._flattened[size] = [tuple(level.shape[2:]) for level in run_convs(model, pixels[:1])[0]]
        return self._flattened[size]

    def __getstate__(self) -> dict[str, Any]:
        """A copy opens the graph anew: a session can be neither copied nor pickled."""
        return vars(self) | {"_run": None, "_run_tower": None, "_nms": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """
        Raises:
            ValueError: for what a version with other graphs pickled.
        """
        if vars(Network(b"", "")).keys() - state.keys():
            raise ValueError("this engine was pickled by another version of retina_fast: compile the model anew")
        vars(self).update(state)


def _onnxruntime(content: bytes) -> Run:
    import onnx

    session = onnx_session(convs_as_products(onnx.load_from_string(content)).SerializeToString())
    return lambda pixels: session.run(None, {"pixels": pixels})


def _tower_in_onnxruntime(content: bytes) -> TowerRun:
    session = onnx_session(content)
    names = [given.name for given in session.get_inputs()]
    return lambda arrays: session.run(None, dict(zip(names, arrays, strict=True)))


RUNTIMES: dict[str, Callable[[bytes], Run]] = {"ONNX Runtime": _onnxruntime, "OpenVINO": OpenVinoGraph}
"""How a graph is opened, by the name of the runtime."""
TOWERS: dict[str, Callable[[bytes], TowerRun]] = {"ONNX Runtime": _tower_in_onnxruntime, "OpenVINO": opened}
"""How the tower of a box head is opened, likewise."""


def fastest(runs: Mapping[str, Callable[[], Any]]) -> tuple[dict[str, float], dict[str, str]]:
    """The median seconds of each, which take turns with a pause before each; and of those that fail, why.

    Example::

        >>> seconds, failed = fastest({"quick": lambda: 0, "broken": lambda: 1 // 0})
        >>> list(seconds), failed
        (['quick'], {'broken': 'ZeroDivisionError: integer division or modulo by zero'})
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    failed: dict[str, str] = {}
    for _ in range(_ROUNDS + 1):
        for name in [name for name in runs if name not in failed]:
            time.sleep(PAUSE)
            start = time.perf_counter()
            try:
                runs[name]()
            except Exception as error:  # of whatever kind: packages that are missing, graphs that they do not take
                failed[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(times[name][1:]) for name in runs if name not in failed}, failed
