"""Trunk and heads as an ONNX graph, which another runtime runs in place of PyTorch: ONNX Runtime or OpenVINO.

The graph takes the engine's batch as it lies in memory, (B, H, W, 3) with any B, H and W, and gives the outputs of the
heads; images, anchors and detections stay the engine's. What runs it is imported only when it is asked for.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from retina_fast.convert import copied
from retina_fast.deploy.eight_bits.group_norm import norms_by_sums
from retina_fast.deploy.eight_bits.products import convs_as_products
from retina_fast.deploy.eight_bits.sieve import Sieve
from retina_fast.deploy.export.onnx_file import QUANTIZED_OPSET, onnx_session, translate
from retina_fast.forward import DELTAS, LOGITS, run_convs
from retina_fast.kernels.candidate_selection import Candidates
from retina_fast.model import RetinaNet

Run = Callable[[Any], Sequence[Any]]
_ROUNDS = 5  # after one that is not counted
PAUSE = 0.1
"""Seconds before a call is timed: a runtime's threads wait busily for a while after a call, and slow down the next."""
_COMPILED = 8  # shapes; the one compiled longest ago goes


class _Outputs(nn.Module):
    """What is traced: from pixels (B, H, W, 3) to the logits' levels, then the box offsets', (B, H, W, channels) each.

    That is how tensors in channels_last memory lie, so that neither a runtime nor the postprocess turns them.
    """

    def __init__(self, model: RetinaNet) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> list[Tensor]:
        returned = run_convs(self.model, pixels.permute(0, 3, 1, 2))[1]
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
    pixels = torch.zeros(2, 8 * multiple, 12 * multiple, 3, device="cpu")
    height, width = (multiple * torch.export.Dim(name, min=1) for name in ("height", "width"))
    shapes = {"pixels": {0: torch.export.Dim("batch", min=1), 1: height, 2: width}}
    with torch.no_grad():
        outputs = _Outputs(model).eval()
        program = torch.export.export(outputs, (pixels,), dynamic_shapes=shapes)
        count = len(outputs(torch.zeros(1, multiple, multiple, 3, device="cpu")))
    return translate(program, shapes, [f"output{i}" for i in range(count)], QUANTIZED_OPSET)


def graph_input(pixels: Tensor) -> Any:
    """The array (B, H, W, 3) that the graph takes for ``pixels`` (B, 3, H, W); no copy if they are channels_last.

    Example::

        >>> graph_input(torch.zeros(2, 3, 64, 96)).shape
        (2, 64, 96, 3)
    """
    return pixels.permute(0, 2, 3, 1).contiguous().numpy()


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
        self._forms: dict[tuple[int, ...], tuple[list[Tensor], dict[str, int | None]]] = {}

    def __call__(self, model: Any, pixels: Tensor) -> tuple[list[Tensor], Mapping[str, Any]]:
        """``pixels`` (B, 3, H, W) float32. Of the features only the shapes are right: anchors need no more."""
        features, counts = self._form(model, pixels)
        outputs = self.run(pixels)
        if self.sieve:
            return features, dict(zip((LOGITS, DELTAS), self.sieve.everywhere(outputs), strict=True))
        returned: dict[str, Any] = {}
        outputs = [level.permute(0, 3, 1, 2) if level.dim() == 4 else level for level in outputs]
        for name, count in counts.items():
            returned[name] = outputs[0] if count is None else outputs[:count]
            outputs = outputs[count or 1 :]
        return features, returned

    def candidates(self, model: Any, pixels: Tensor) -> tuple[list[Tensor], Candidates, Tensor]:
        """Features as above, candidates, and their box offsets (B, M, C), by the sieve."""
        assert self.sieve is not None
        features, outputs = self._form(model, pixels)[0], self.run(pixels)
        num_classes = int(model.head.classification_head.num_classes)
        found = self.sieve.candidates(outputs, num_classes, model.score_thresh, model.topk_candidates)
        return features, found, self.sieve.offsets(outputs, found.anchors, outputs[0].shape[3] // num_classes)

    def run(self, pixels: Tensor) -> list[Tensor]:
        """The outputs of the graph."""
        if self._run is None:
            self._run = RUNTIMES[self.runtime](self.content)
        return [torch.from_numpy(output) for output in self._run(graph_input(pixels))]

    def _form(self, model: Any, pixels: Tensor) -> tuple[list[Tensor], dict[str, int | None]]:
        """The features, empty, and how many levels the heads return of each output."""
        size = tuple(pixels.shape[1:])
        if size not in self._forms:
            features, returned = run_convs(model, pixels[:1])
            levels = [level.new_zeros(()).expand(level.shape) for level in features]
            counts = {
                name: None if isinstance(returned[name], Tensor) else len(returned[name]) for name in (LOGITS, DELTAS)
            }
            self._forms[size] = levels, counts
        levels, counts = self._forms[size]
        return [level.expand(len(pixels), -1, -1, -1) for level in levels], counts

    def __getstate__(self) -> dict[str, Any]:
        """A copy opens the graph anew: a session can be neither copied nor pickled."""
        return vars(self) | {"_run": None}


def _onnxruntime(content: bytes) -> Run:
    import onnx

    session = onnx_session(convs_as_products(onnx.load_from_string(content)).SerializeToString())
    return lambda pixels: session.run(None, {"pixels": pixels})


def _openvino(content: bytes) -> Run:
    """OpenVINO, with a graph compiled for each shape of pixels."""
    import onnx
    import openvino

    core = openvino.Core()
    model = core.read_model(norms_by_sums(onnx.load_from_string(content)).SerializeToString(), b"")
    options = {
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled: dict[tuple[int, ...], Any] = {}

    def run(pixels: Any) -> list[Any]:
        if pixels.shape not in compiled:
            if len(compiled) == _COMPILED:
                del compiled[next(iter(compiled))]
            model.reshape(list(pixels.shape))
            compiled[pixels.shape] = core.compile_model(model, "CPU", options)
        outputs = compiled[pixels.shape](
            pixels, share_inputs=True, share_outputs=True
        )  # the next call writes over them
        return [outputs[i] for i in range(len(outputs))]

    return run


RUNTIMES: dict[str, Callable[[bytes], Run]] = {"ONNX Runtime": _onnxruntime, "OpenVINO": _openvino}
"""How a graph is opened, by the name of the runtime."""


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
