"""What the runtimes' own tools make of a detector in eight bits: ONNX Runtime's and OpenVINO's.

ONNX Runtime's ``quantize_static``, with a scale a channel and uint8 activations, and ``nncf.quantize`` for OpenVINO,
where nncf is installed. Each makes two networks: one with the last convs in float32, as the engine has them, and one
with the last convs in eight bits, too. Each also quantises the whole of an exported file, which then runs without the
engine; ONNX Runtime's runs in OpenVINO, too.
"""

import copy
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from retina_fast import RetinaNet
from retina_fast.deploy.eight_bits.parts import last_convs
from retina_fast.deploy.engine import Engine
from retina_fast.deploy.export.onnx_file import onnx_session
from retina_fast.deploy.export.write import export
from retina_fast.deploy.fusion.fold import conv_outputs, fold_batch_norm
from retina_fast.deploy.onnx_network import Network, Run, trace
from retina_fast.deploy.report import pixels_of


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
    """An exported file that a runtime's own quantiser has changed, from an image to its detections."""

    def __init__(self, open_it: Callable[[], Run]) -> None:
        self.opened = Opened(open_it)

    def __call__(self, images: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        boxes, scores, labels, counts = (torch.from_numpy(x) for x in self.opened(images[0][None].numpy()))
        found = {"boxes": boxes, "scores": scores, "labels": labels}
        return [{name: values[0, : int(counts)] for name, values in found.items()}]


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


def rivals(model: RetinaNet, engine: Engine, pictures: Sequence[Tensor]) -> dict[str, Any]:
    """What the runtimes' own quantisers make of the model: trunk and heads, with the engine around them, and files."""
    import onnx

    own = copy.deepcopy(model).eval().requires_grad_(False)
    fold_batch_norm(own, partial(conv_outputs, own, torch.rand(1, 3, 128, 128)))
    proto, (_, height, width) = trace(own, own.transform.size_divisible), pictures[0].shape
    with tempfile.TemporaryDirectory() as folder:
        export(own, Path(folder) / "file.onnx", "onnx", (height, width))
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
