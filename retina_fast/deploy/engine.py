"""The engine: a model made ready to detect, from images as they are to detections, as fast as the device allows.

A copy of the model has its BatchNorm folded into its convs, its weights in channels_last memory and in half precision.
For each batch shape that comes, the engine keeps what that shape needs: a batch to be filled, the anchors, and on a GPU
the whole way from images to detections as one CUDA graph. Images have any sizes: the graph reads addresses and sizes
from a table that one small upload replaces. Only so many shapes are kept; the one used longest ago goes.
"""

import contextlib
import copy
import math
import statistics
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import retinanet as tv

from retina_fast.anchors import is_stock_generator, shared_anchors
from retina_fast.convert import from_torchvision
from retina_fast.deploy.fold import count_norms, fold_batch_norm
from retina_fast.deploy.report import Report, difference
from retina_fast.detections import Detections
from retina_fast.kernels.compiler import HAS_TRITON
from retina_fast.kernels.image_batch import batch_shape, image_batch, image_table, launch_image_batch
from retina_fast.model import RetinaNet
from retina_fast.stock import has_hooks, overrides
from retina_fast.transform import check_images, is_stock_transform, resized_sizes

Sizes = list[tuple[int, int]]
Run = Callable[[], Detections]
Trunk = Callable[[RetinaNet, Tensor], tuple[list[Tensor], dict[str, Any]]]


class Engine:
    """What :func:`compile_inference` returns: call it with images; ``print`` it to see what was done.

    Not for several threads or CUDA streams at once: calls share their buffers.
    """

    def __init__(self, model: RetinaNet, report: Report, try_compile: bool = False) -> None:
        self.model, self.report = model, report
        self.detections_per_img = model.detections_per_img
        self._device = next(model.parameters()).device
        self._place = torch.cuda.device_of(next(model.parameters()))  # streams and graphs are the current device's
        self._trunks: tuple[Trunk, ...] = (_trunk, torch.compile(_trunk, dynamic=False)) if try_compile else (_trunk,)
        self._plans: OrderedDict[tuple[Any, ...], _Plan] = OrderedDict()
        self._captures = graph_place(self._device) if report.graphs else None

    def __call__(self, images: Sequence[Tensor] | Tensor) -> list[dict[str, Tensor]]:
        """Detections in torchvision's form: a dict of ``boxes``, ``scores`` and ``labels`` an image.

        Args:
            images: B tensors ``(C, H, W)``, or one ``(B, C, H, W)``: floating point in [0, 1], or uint8 in [0, 255].
                Those that lie on another device are copied to the engine's.
        """
        return self.detect(images).to_list()

    def detect(self, images: Sequence[Tensor] | Tensor) -> Detections:
        """The same, padded; nothing waits for the GPU."""
        transform = self.model.transform
        constants = max(len(transform.image_mean), len(transform.image_std))
        images = check_images(images, constants, take_uint8=True)
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            self._place,
            torch.autocast(self._device.type, enabled=False),
        ):
            images = _alike([image.detach().to(self._device, non_blocking=True) for image in images])
            sizes = resized_sizes(transform, images)
            shape = batch_shape(images, sizes, constants, transform.size_divisible)
            return self._plan(shape, images, sizes)(images, sizes)

    def parameters(self) -> Iterator[nn.Parameter]:
        return self.model.parameters()

    def __str__(self) -> str:
        return str(self.report)

    def _plan(self, shape: tuple[int, ...], images: list[Tensor], sizes: Sizes) -> "_Plan":
        key = *shape, images[0].dtype
        plan = self._plans.pop(key, None)
        if plan is None:
            while self._plans and len(self._plans) >= self.report.max_shapes:
                self._plans.popitem(last=False)  # before the new one is made: its memory serves again
            plan = min(self._tried(shape, images, sizes), key=lambda plan: plan.seconds)
        if self.report.max_shapes:
            self._plans[key] = plan
        return plan

    def _tried(self, shape: tuple[int, ...], images: list[Tensor], sizes: Sizes) -> list["_Plan"]:
        plans = [_Plan(self.model, trunk, shape, images[0].dtype, self.report) for trunk in self._trunks]
        for plan in plans:
            plan.make(images, sizes, self._captures)
            if len(plans) > 1:
                plan.seconds = _seconds(plan, images, sizes)
        if len(plans) > 1:
            self.report.compiled[shape] = plans[1].seconds / plans[0].seconds
        return plans


class _Plan:
    """What one batch shape needs: the batch, the table of its images, the anchors, and the graph, if there are any."""

    seconds = 0.0

    def __init__(
        self, model: RetinaNet, trunk: Trunk, shape: tuple[int, ...], image_dtype: torch.dtype, report: Report
    ) -> None:
        device = next(model.parameters()).device
        self.model, self.trunk, self.image_dtype, self.graphs = model, trunk, image_dtype, report.graphs
        self.batch = torch.empty(shape, dtype=report.dtype, device=device, memory_format=torch.channels_last)
        self.table = torch.empty((shape[0], 8), dtype=torch.int64, device=device)
        self.anchors: Tensor | None = None

    def make(self, images: list[Tensor], sizes: Sizes, captures: Any) -> None:
        if self.graphs:
            self.table.copy_(image_table(images, sizes), non_blocking=True)
            self.replay = capture(self.run, captures)

    def __call__(self, images: list[Tensor], sizes: Sizes) -> Detections:
        self.table.copy_(image_table(images, sizes), non_blocking=True)
        if self.graphs:
            return Detections(*(tensor.clone() for tensor in self.replay()))  # the next replay writes over the graph's
        constants = self.model.transform.image_mean, self.model.transform.image_std
        image_batch(images, sizes, *constants, self.model.transform.size_divisible, self.batch)
        return self.detect_in_batch()

    def run(self) -> Detections:
        """From the images of the table to detections, every address the same at each call."""
        transform = self.model.transform
        launch_image_batch(self.table, self.batch, self.image_dtype, transform.image_mean, transform.image_std)
        return self.detect_in_batch()

    def detect_in_batch(self) -> Detections:
        features, outputs = self.trunk(self.model, self.batch)
        if self.anchors is None:
            self.anchors = shared_anchors(self.model.anchor_generator, self.batch, features)
        outputs = self.model._by_level(outputs, [level.shape[2] * level.shape[3] for level in features], self.anchors)
        return self.model._detect(outputs, self.anchors, self.table[:, 3:5], self.table[:, 1:3])


@contextlib.contextmanager
def timed_convs() -> Iterator[None]:
    """Convs of a new shape are chosen by timing them."""
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def graph_place(device: torch.device) -> tuple[Any, Any]:
    """Where an engine captures all its graphs: a memory pool, which outlives each of them, and a stream. Graphs share
    memory only within a stream, and torch's own for captures is of the device that captured first."""
    with torch.cuda.device(device):
        return torch.cuda.MemPool(), torch.cuda.Stream()


def capture(run: Run, place: tuple[Any, Any]) -> Run:
    """The work as a CUDA graph. Before, it runs on the same stream, where kernels are compiled and convs chosen."""
    pool, side = place
    side.wait_stream(torch.cuda.current_stream())
    with timed_convs():
        with torch.cuda.stream(side):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # thread_local: other threads may go on allocating and pinning memory
        with torch.cuda.graph(graph, pool=pool.id, stream=side, capture_error_mode="thread_local"):
            outputs = run()

    def replay() -> Detections:
        graph.replay()
        return outputs

    return replay


def _seconds(plan: _Plan, images: list[Tensor], sizes: Sizes) -> float:
    times = []
    for _ in range(8):
        start = time.perf_counter()
        plan(images, sizes).counts.tolist()  # waits for the device
        times.append(time.perf_counter() - start)
    return statistics.median(times[3:])


def _trunk(model: RetinaNet, batch: Tensor) -> tuple[list[Tensor], dict[str, Any]]:
    """The levels, and the head's outputs."""
    _, features = model._trunk(batch)
    return features, model._head_outputs(features)


def _alike(images: list[Tensor]) -> list[Tensor]:
    """Images of one dtype that the kernel knows."""
    dtypes = {image.dtype for image in images}
    if len(dtypes) == 1 and dtypes <= {torch.uint8, torch.float32, torch.float16, torch.bfloat16}:
        return images
    return [image.float() / (1 if image.is_floating_point() else 255) for image in images]


def best_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device computes in it natively; else float16 on a GPU and float32 on a CPU."""
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0) or torch.version.hip is not None
        return torch.bfloat16 if native else torch.float16
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32


def refuse_own_parts(model: RetinaNet, what: str) -> None:
    """A part of the user's own that would not run in ``what``."""
    for part, stock in (
        ("forward", not overrides(model, RetinaNet, "forward") and not has_hooks(model)),
        ("transform", is_stock_transform(model.transform)),
        ("anchor_generator", is_stock_generator(model.anchor_generator)),
        ("box_coder, or its postprocessing,", model._detects_fast()),
    ):
        if not stock:
            raise TypeError(f"the model has a {part} of its own, which {what} would not run: call the model itself")


def compile_inference(
    model: tv.RetinaNet,
    images: Sequence[Tensor] = (),
    dtype: torch.dtype | None = None,
    max_shapes: int = 8,
    try_compile: bool = False,
) -> Engine:
    """Turn a model into an engine that goes from raw images to detections, on the model's device.

    The model itself is not changed, and the engine does not follow later changes to it. BatchNorm is folded, memory is
    channels_last. On a GPU each batch shape (B, and the padded height and width) becomes one CUDA graph, which takes a
    moment at its first batch; give ``size_divisible`` a larger value when building the model to have fewer shapes.

    Args:
        model: a RetinaNet of this package or of torchvision. Backbone and head may be anything.
        images: sample images, ``(C, H, W)`` each, on which the engine's difference from the model is measured.
        dtype: to compute in; by default bfloat16 where the device has it natively, else float16 on a GPU and float32
            on a CPU. Anchors, boxes and scores are float32 always.
        max_shapes: how many batch shapes are kept ready; 0 keeps none, and captures no graph.
        try_compile: whether to time torch.compile's trunk against the eager one at each new shape, and keep the faster.
            That takes a minute a shape.

    Raises:
        TypeError: for anything but a RetinaNet, or if a part of the user's own would not run: a forward, transform,
            anchor generator, box coder or postprocessing.
        ValueError: for a dtype that is not floating point, or a negative ``max_shapes``.

    Example::

        >>> from retina_fast import retinanet_resnet18_fpn
        >>> model = retinanet_resnet18_fpn(num_classes=3, weights_backbone=None)
        >>> engine = compile_inference(model, dtype=torch.float32)
        >>> [sorted(image) for image in engine([torch.zeros(3, 64, 96, dtype=torch.uint8)])]
        [['boxes', 'labels', 'scores']]
    """
    model = from_torchvision(model)
    refuse_own_parts(model, "an engine")
    device = next(model.parameters()).device
    dtype = dtype or best_dtype(device)
    if not dtype.is_floating_point:
        raise ValueError(f"dtype must be floating point, got {dtype}")
    if max_shapes < 0:
        raise ValueError(f"max_shapes must be at least 0, got {max_shapes}")
    own = copy.deepcopy(model).eval().requires_grad_(False)
    # What the backbone would pad, the batch has from the start.
    own.transform.size_divisible = math.lcm(own.transform.size_divisible, getattr(own.backbone, "size_divisible", 1))
    norms = count_norms(own)
    channels = next(module.in_channels for module in own.modules() if isinstance(module, nn.Conv2d))
    sample = torch.rand(1, channels, 128, 128, device=device, dtype=next(own.parameters()).dtype)

    def outputs() -> list[Tensor]:
        features, outputs = _trunk(own, sample)
        return [*features, *(level for output in outputs.values() for level in output)]

    with torch.no_grad():
        folded = fold_batch_norm(own, outputs)
    own = own.to(dtype=dtype, memory_format=torch.channels_last)
    graphs = device.type == "cuda" and HAS_TRITON and max_shapes > 0
    engine = Engine(own, Report(str(device), dtype, norms, folded, graphs, max_shapes), try_compile)
    if len(images):
        plain = copy.deepcopy(model).eval() if model.training else model
        engine.report.difference = difference(plain, engine, images)
    return engine
