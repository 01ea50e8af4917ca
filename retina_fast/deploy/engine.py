"""The engine: a model made ready to detect, from images as they are to detections, as fast as the device allows.

A copy of the model has its BatchNorm folded into its convs, which add bias and residual and apply the activation
themselves; its weights lie in channels_last memory, in half precision where that is faster.
For each batch shape that comes, the engine keeps what that shape needs: a batch to be filled, the anchors, and on a GPU
the whole way from images to detections as one CUDA graph. Images have any sizes: the graph reads addresses and sizes
from a table that one small upload replaces. At most `max_shapes` are kept; the least recently used one goes.
"""

import math
import warnings
from collections import OrderedDict
from collections.abc import Sequence, Sized
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection import retinanet as tv

from retina_fast.convert import copied, from_torchvision
from retina_fast.cuda_graph import CaptureStream
from retina_fast.deploy.branches import MOST_PIXELS, STREAMS, Branches
from retina_fast.deploy.detector_module import DetectorModule, refuse_own_parts
from retina_fast.deploy.eight_bits.float8 import forget_float8, keeps_float8, require_float8
from retina_fast.deploy.engine_float8 import add_float8
from retina_fast.deploy.engine_runtime import choose_network, compare_with
from retina_fast.deploy.fusion.fold import conv_outputs, count_norms, fold_batch_norm
from retina_fast.deploy.fusion.fuse import count_convs, fuse_convs
from retina_fast.deploy.plan import EngineSettings, Plan, seconds_of
from retina_fast.deploy.report import Report, difference
from retina_fast.deploy.tuned import Chooser, choose_ways, timed_convs, user_cache_file
from retina_fast.detections import Detections, Thresholds
from retina_fast.device import Uploads, best_dtype, keep_freed_memory
from retina_fast.forward import Convs, Sizes, input_channels, run_convs
from retina_fast.kernels.conv_float8 import FLOAT8
from retina_fast.kernels.dispatch import HAS_TRITON, is_transformed
from retina_fast.kernels.image_batch import batch_shape
from retina_fast.model import RetinaNet
from retina_fast.transform import channels_of, check_images, resized_sizes


class Engine(DetectorModule):
    """What :func:`compile_inference` returns: call it with images; ``print`` it to see what was done.

    It is a module in evaluation mode, and may stand where a detector stands. Moved to another device or dtype, copied
    or pickled, it makes its batch shapes ready anew. It cannot be trained.

    All calls share its buffers: threads take turns, and only one CUDA stream may use it.
    """

    of_the_device = ("_device", "_place", "_convs", "_thresholds", "_plans", "_captures", "_sides", "_uploads")

    def __init__(self, model: RetinaNet, settings: EngineSettings, report: Report) -> None:
        super().__init__(model)
        self.settings, self.report = settings, report
        self.prepare()

    def prepare(self) -> None:
        """Make what belongs to the device of the model's weights. No batch shape is ready then."""
        weight = next(self.model.parameters())
        self._device = weight.device
        self._place = torch.cuda.device_of(weight)  # streams and graphs are the current device's
        self._convs: tuple[Convs, ...] = (self.settings.network or run_convs,)
        if self.settings.try_compile:
            self._convs += (torch.compile(run_convs, dynamic=False),)
        self._thresholds = Thresholds.of(self.model)  # those of the plans, whose graphs hold them as constants
        self._plans: OrderedDict[tuple[Any, ...], Plan] = OrderedDict()
        self._captures = CaptureStream(self._device, share_memory=True) if self.settings.graphs else None
        self._sides: list[Any] = []  # streams beside that of the captures
        self._uploads = Uploads(self._device)

    def check_move(self, weight: Tensor) -> None:
        """Raise TypeError for weights that another runtime does not follow."""
        network = self.settings.network
        if network and (weight.device.type, weight.dtype) != ("cpu", torch.float32):
            raise TypeError(f"what {network.runtime} runs stays in float32 on the CPU: compile the model anew")

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Raise TypeError for weights that another runtime would not take over."""
        if self.settings.network:
            runtime = self.settings.network.runtime
            raise TypeError(f"what {runtime} runs keeps its weights: load others into the model, and compile it anew")
        super()._load_from_state_dict(*args, **kwargs)

    def moved(self) -> None:
        """Compute in the dtype that the weights have now, and capture graphs if they lie on a GPU now. What was
        measured before holds no longer."""
        self.model.to(memory_format=torch.channels_last)
        weight = next(self.model.parameters())
        way = {"dtype": weight.dtype, "graphs": _takes_graphs(weight.device, self.settings.max_shapes)}
        self.settings = replace(self.settings, **way)
        if self.report.float8 and not self.report.float8.simulated and not keeps_float8(weight):
            forget_float8(self.model)
            self.report.float8 = None
        none: Any = {"difference": None, "ways": {}, "streams": {}, "compiled": {}, "not_compiled": {}}
        self.report = replace(self.report, device=str(weight.device), **way, **none)

    def forward(
        self, images: Sequence[Tensor] | Tensor, targets: Sequence[Any] | None = None
    ) -> list[dict[str, Tensor]]:
        """Detections in torchvision's form: a dict of ``boxes``, ``scores`` and ``labels`` an image.

        Args:
            images: B tensors ``(C, H, W)``, or one ``(B, C, H, W)``: floating point in [0, 1], or uint8 in [0, 255].
                Those that lie on another device are copied to the engine's. Memory of the host, pinned or not, may be
                refilled when the call returns; memory of the GPU when the stream has passed the call.
            targets: ignored, as they are by a model in evaluation mode.
        """
        return self.detect(images).to_list()

    def detect(self, images: Sequence[Tensor] | Tensor) -> Detections:
        """The same, padded; the host waits for no more than uploads."""
        self.check_mode()
        transform = self.model.transform
        constants = channels_of(transform)
        images = check_images(images, constants, take_uint8=True)
        if torch.jit.is_tracing() or torch.compiler.is_exporting() or is_transformed(*images):
            raise NotImplementedError(
                "an engine can be neither traced, exported nor differentiated: use retina_fast.export, or the model"
            )
        with (
            self.turns,
            torch.inference_mode(False),
            torch.no_grad(),
            self._place,
            torch.autocast(self._device.type, enabled=False),
        ):
            images = _of_one_dtype(self._uploads.to_device([image.detach() for image in images]))
            sizes = resized_sizes(transform, images)
            shape = batch_shape(images, sizes, constants, transform.size_divisible)
            return self._plan(shape, images, sizes)(images, sizes)

    def __str__(self) -> str:
        return str(self.report)

    def shapes(self) -> list[tuple[Any, ...]]:
        """The batch shapes that are kept ready, each with the images' dtype; the one used longest ago first."""
        return list(self._plans)

    def _plan(self, shape: tuple[int, ...], images: list[Tensor], sizes: Sizes) -> Plan:
        if self._thresholds != Thresholds.of(self.model):
            self._thresholds = Thresholds.of(self.model)
            self._plans.clear()
        key = *shape, images[0].dtype
        plan = self._plans.pop(key, None)
        if plan is None:
            while self._plans and len(self._plans) >= self.settings.max_shapes:
                self._plans.popitem(last=False)  # before the new plan is made, so that it can reuse the memory
            self._choose_ways(shape)
            plan = min(self._candidates(shape, images, sizes), key=lambda plan: plan.seconds)
        if self.settings.max_shapes:
            self._plans[key] = plan
        return plan

    def _choose_ways(self, shape: tuple[int, ...]) -> None:
        """Each conv's fastest way at a batch shape that is new."""
        if self.settings.choices is None or shape in self.report.ways:
            return
        pixels = torch.rand(shape, dtype=self.settings.dtype, device=self._device)
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        with timed_convs():
            chooser = Chooser(self.settings.choices, self._device)
            self.report.ways[shape] = choose_ways(self.model, lambda: run_convs(self.model, pixels), chooser)

    def _with_branches(self, plan: Plan, shape: tuple[int, ...], images: list[Tensor], sizes: Sizes) -> Plan:
        """The plan, whose work runs on one stream, or one with branches on side streams where that is faster."""
        batch, _, height, width = shape
        if not self.settings.graphs or self.settings.choices is None or batch * height * width > MOST_PIXELS:
            return plan
        while len(self._sides) < STREAMS - 1:
            self._sides.append(torch.cuda.Stream(self._device))
        plans = {1: plan}

        def run(count: int) -> Tensor:
            if count not in plans:
                plans[count] = Plan(self.model, Branches(self._sides), shape, images[0].dtype, self.settings)
                plans[count].make(images, sizes, self._captures)
            return plans[count](images, sizes).scores

        weights = sum(weight.numel() for weight in self.model.parameters())
        name = f"graph, {weights} weights, of {'x'.join(map(str, shape))} {self.settings.dtype}"
        chooser = Chooser(self.settings.choices, self._device)
        ways = {f"{count} streams": partial(run, count) for count in (1, STREAMS)}
        count = int(chooser.choose(name, ways).split()[0])
        chooser.save()
        run(count)
        self.report.streams[shape] = count
        return plans[count]

    def _candidates(self, shape: tuple[int, ...], images: list[Tensor], sizes: Sizes) -> list[Plan]:
        """A plan for each way to run the convs, timed where there are several."""
        first, *compiled = (Plan(self.model, convs, shape, images[0].dtype, self.settings) for convs in self._convs)
        first.make(images, sizes, self._captures)
        eager = self._with_branches(first, shape, images, sizes)
        if not compiled:
            return [eager]
        eager.seconds = seconds_of(eager, images, sizes)
        try:
            for plan in compiled:
                plan.make(images, sizes, self._captures)
                plan.seconds = seconds_of(plan, images, sizes)
                self.report.compiled[shape] = plan.seconds / eager.seconds
        except Exception as error:  # whatever the compiler raises, the eager plan is there
            reason = str(error).strip().splitlines()[0] if str(error).strip() else ""
            self.report.not_compiled[shape] = f"{type(error).__name__}: {reason}"
            warnings.warn(f"torch.compile failed at {shape}, the engine runs eagerly: {reason}", stacklevel=2)
            return [eager]
        return [eager, *compiled]


def _takes_graphs(device: torch.device, max_shapes: int) -> bool:
    """Whether batch shapes become CUDA graphs."""
    return device.type == "cuda" and HAS_TRITON and max_shapes > 0


def _of_one_dtype(images: list[Tensor]) -> list[Tensor]:
    """Images of one dtype that the kernel knows: those of mixed or other dtypes become float32."""
    dtypes = {image.dtype for image in images}
    if len(dtypes) == 1 and dtypes <= {torch.uint8, torch.float32, torch.float16, torch.bfloat16}:
        return images
    return [image.float() / (1 if image.is_floating_point() else 255) for image in images]


@torch.inference_mode(False)
def compile_inference(
    model: tv.RetinaNet,
    images: Sequence[Tensor] = (),
    dtype: torch.dtype | None = None,
    max_shapes: int = 8,
    try_compile: bool = False,
    choices: str | Path | None = None,
    try_runtimes: bool = False,
    float32_share: float = 0.0,
) -> Engine:
    """Turn a model into an engine that goes from raw images to detections, on the model's device.

    The model itself is not changed, and the engine does not follow later changes to it. BatchNorm is folded, convs take
    sums and activations with them, memory is channels_last. On a GPU each batch shape (B, and the padded height and
    width) becomes one CUDA graph, which takes a moment at its first batch; give ``size_divisible`` a larger value when
    building the model to have fewer shapes.

    Args:
        model: a RetinaNet of this package or of torchvision. Backbone and head may be anything.
        images: sample images, ``(C, H, W)`` each, on which the engine's difference from the model is measured; at least
            one for int8, FP8 and ``try_runtimes``.
        dtype: to compute in; by default bfloat16 on a GPU that has it and on a CPU whose convs are faster in it, else
            float16 on a GPU and float32 on a CPU. Anchors, boxes and scores are float32 always. int8, on a CPU,
            calibrates eight bits on the images, and runs trunk and heads by ONNX Runtime or OpenVINO, whichever is the
            faster. float8_e4m3fn, on an NVIDIA GPU of compute capability 8.9 or newer, is bfloat16 whose 1x1 convs may
            compute in FP8 (E4M3), calibrated on the images; it was simulated, and not run on a GPU.
        max_shapes: how many batch shapes are kept ready; 0 keeps none, and captures no graph.
        try_compile: whether to time torch.compile's trunk against the eager one at each new shape, and keep the faster.
            That takes a minute a shape.
        choices: a file that remembers which way each conv is the fastest, fused or not; at a new shape the ways are
            timed. By default it lies in the user's cache folder on a GPU. On a CPU, where this takes as long as a dozen
            batches and the fused way nearly always wins, nothing is timed unless a file is given.
        try_runtimes: whether to time ONNX Runtime and OpenVINO on the first image, in float32 on a CPU, and keep the
            fastest.
        float32_share: the share, from 0 to 1, of int8's multiplications that may stay in float32: those of the layers
            that lose the most.

    Raises:
        TypeError: for anything but a RetinaNet, or if a part of the user's own would not run: a forward, transform,
            anchor generator, box coder or postprocessing.
        ValueError: for a dtype that no engine computes in, or not on this device; a negative ``max_shapes``; weights on
            the meta device; images of a wrong shape, or none where they are needed; a missing package.

    Example::

        >>> from retina_fast import retinanet_resnet18_fpn
        >>> model = retinanet_resnet18_fpn(num_classes=3, weights_backbone=None, min_size=64)
        >>> engine = compile_inference(model, dtype=torch.float32)
        >>> [sorted(image) for image in engine([torch.zeros(3, 64, 96, dtype=torch.uint8)])]
        [['boxes', 'labels', 'scores']]
    """
    model = from_torchvision(model)
    refuse_own_parts(model, "an engine")
    device = next(model.parameters()).device
    dtype = dtype or best_dtype(device)
    weights = {torch.int8: torch.float32, FLOAT8: torch.bfloat16}.get(dtype, dtype)
    if not isinstance(dtype, torch.dtype) or not weights.is_floating_point or weights.itemsize == 1:
        raise ValueError(f"dtype must be floating point of at least 16 bits, {FLOAT8} or int8, got {dtype!r}")
    if dtype == FLOAT8:
        require_float8(device)
    if device.type == "meta":
        raise ValueError("the model's weights are on the meta device, where they have no values")
    if max_shapes < 0:
        raise ValueError(f"max_shapes must be at least 0, got {max_shapes}")
    if device.type == "cpu":
        keep_freed_memory()
    if float32_share and dtype != torch.int8:
        raise ValueError(f"float32_share={float32_share} is of an engine in eight bits: give dtype=torch.int8, too")
    if not isinstance(images, Sized) or len(images):
        images = check_images(images, channels_of(model.transform), take_uint8=True)
    own = copied(model).eval().requires_grad_(False)
    # The batch is padded for the backbone at once, which then need not pad.
    own.transform.size_divisible = math.lcm(own.transform.size_divisible, getattr(own.backbone, "size_divisible", 1))
    norms = count_norms(own)
    own = own.to(torch.promote_types(next(own.parameters()).dtype, weights))  # norms are folded in the wider dtype
    sample = torch.rand(1, input_channels(own), 128, 128, device=device, dtype=next(own.parameters()).dtype)
    outputs = partial(conv_outputs, own, sample)
    with torch.no_grad(), timed_convs():  # else cuDNN would keep what its heuristics chose for these shapes
        folded = fold_batch_norm(own, outputs)
        fused = fuse_convs(own, outputs)
    own = own.to(dtype=weights, memory_format=torch.channels_last)
    network, other = None, None
    if dtype == torch.int8 or try_runtimes:
        network, other = choose_network(own, images, dtype, float32_share)
    graphs = _takes_graphs(device, max_shapes)
    file = Path(choices or user_cache_file()) if choices is not None or device.type == "cuda" else None
    settings = EngineSettings(next(own.parameters()).dtype, graphs, max_shapes, try_compile, file, network)
    report = Report(str(device), dtype, graphs, max_shapes, norms, folded, count_convs(own), fused)
    report.runtime_choice = other
    engine = Engine(own, settings, report)
    plain = copied(model).eval() if model.training else model
    if dtype == FLOAT8:
        with timed_convs():
            report.float8, report.difference = add_float8(plain, engine, images, "float8")
    elif len(images):
        with timed_convs():
            engine.report.difference = difference(plain, own, images, network or run_convs)
            if dtype == torch.int8 and other:
                other.kept = compare_with(plain, engine, images)
    return engine
