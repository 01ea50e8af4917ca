"""A graph in OpenVINO: compiled for single shapes of its input, and once more for all others.

A graph that is compiled for one shape is the fastest, but compiling takes longer than several images do, and
photographs have dozens of shapes. So the first two shapes get a graph each, as does any that comes often. The others
share one of any shape, which is up to a third slower. OpenVINO 2026.4.1 computes wrong values of GroupNorm by sums
where the shape is open: so this one keeps the norms as they were given, and serves only if its outputs are those of a
graph for one shape.
"""

from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from retina_fast.deploy.eight_bits.group_norm import norms_by_sums, norms_in_float32

_FIRST = 2  # shapes that get a graph each at once
_OFTEN = 16  # calls of a shape, in which the graph of any shape loses about the time that compiling takes
_MOST = 8  # graphs of one shape; the one used longest ago goes
_UNLIKE = 0.05  # of an output's deviation: the least mean difference between two graphs that are not the same


class OpenVinoGraph:
    """An ONNX file in OpenVINO, with as many threads as PyTorch has. The arrays of a call are written over by the next.

    Args:
        content: of a file with one input, ``pixels``, of any shape.

    Raises:
        ModuleNotFoundError: without the package ``openvino``.
    """

    def __init__(self, content: bytes) -> None:
        import onnx
        import openvino

        proto = norms_in_float32(onnx.load_from_string(content))
        self._content, self._core = proto.SerializeToString(), openvino.Core()
        self._model = self._read(norms_by_sums(proto).SerializeToString())
        self._options = cpu_options()
        self._compiled: OrderedDict[tuple[int, ...], Any] = OrderedDict()  # the shape used longest ago first
        self._calls: Counter[tuple[int, ...]] = Counter()  # of shapes that have no graph of their own
        self._of_any_shape: Any = None
        self._tried = False  # whether there was to be one of any shape

    def __call__(self, pixels: Any) -> list[Any]:
        shape = pixels.shape
        if shape not in self._compiled:
            self._calls[shape] += 1
            if self._of_any_shape and self._calls[shape] <= _OFTEN:
                return _run(self._of_any_shape, pixels)
            self._compile(shape)
        self._compiled.move_to_end(shape)
        outputs = _run(self._compiled[shape], pixels)
        if len(self._compiled) > _FIRST and not self._tried and np.isfinite(pixels).all():  # NaN has no certain code
            self._tried, self._of_any_shape = True, self._open_shape(pixels, outputs)
        return outputs

    def _read(self, content: bytes) -> Any:
        return self._core.read_model(content, b"")

    def _compile(self, shape: tuple[int, ...]) -> None:
        if len(self._compiled) == _MOST:
            self._compiled.popitem(last=False)
        self._model.reshape(list(shape))
        self._compiled[shape] = self._core.compile_model(self._model, "CPU", self._options)
        del self._calls[shape]

    def _open_shape(self, pixels: Any, outputs: Sequence[Any]) -> Any:
        """A graph of any shape, if there can be one that gives the same outputs but for rounding."""
        try:
            graph = self._core.compile_model(self._read(self._content), "CPU", self._options)
            others = _run(graph, pixels)
        except Exception:  # whatever OpenVINO raises, there is a graph for each shape
            return None
        same = all(
            np.abs(a.astype(np.float32) - b).mean() <= _UNLIKE * a.std(dtype=np.float32)
            for a, b in zip(outputs, others, strict=True)
        )
        return graph if same else None


def opened(content: bytes) -> Callable[[Sequence[Any]], list[Any]]:
    """An ONNX file with inputs of any shapes, opened. The arrays of a call are written over by the next."""
    import openvino

    core = openvino.Core()
    return partial(_run, core.compile_model(core.read_model(content, b""), "CPU", cpu_options()))


def cpu_options() -> dict[str, Any]:
    """How graphs are compiled: in float32 where they are not in eight bits, with as many threads as PyTorch has."""
    threads = torch.get_num_threads()
    return {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}


def _run(graph: Any, given: Any) -> list[Any]:
    outputs = graph(given, share_inputs=True, share_outputs=True)
    return [outputs[i] for i in range(len(outputs))]
