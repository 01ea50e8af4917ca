"""What the engine keeps for one batch shape, and how long a call of it takes."""

import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from retina_fast.anchors import batch_anchors
from retina_fast.cuda_graph import CaptureStream
from retina_fast.deploy.onnx_network import Network
from retina_fast.deploy.tuned import timed_convs
from retina_fast.detections import Detections, Thresholds, detect, detect_candidates
from retina_fast.device import one_thread
from retina_fast.forward import Convs, Sizes, run_network
from retina_fast.kernels.image_batch import image_batch, image_table, launch_image_batch
from retina_fast.model import RetinaNet

Run = Callable[[], Detections]
_FEW_VALUES = 2**23
"""Of images and batch: one thread prepares so many in less time than another runtime would then wait for cores."""
_FEW_LOGITS = 2**20
"""Of a batch: beside cores without a common cache, one thread makes detections of so many in less time than two."""


@dataclass(frozen=True)
class EngineSettings:
    """The settings of an engine.

    Attributes:
        dtype: of images, weights and activations; anchors, boxes and scores are float32 always.
        graphs: whether each batch shape becomes a CUDA graph.
        max_shapes: how many batch shapes are kept ready.
        try_compile: whether torch.compile's convs are timed against the eager ones at each new shape.
        choices: the file that remembers which way each conv is the fastest; None does not time the ways.
        network: what runs trunk and heads in place of PyTorch.
    """

    dtype: torch.dtype
    graphs: bool
    max_shapes: int = 8
    try_compile: bool = False
    choices: Path | None = None
    network: Network | None = None


class Plan:
    """A batch to be filled, the table of its images, the anchors and any CUDA graph."""

    seconds = 0.0

    def __init__(
        self,
        model: RetinaNet,
        convs: Convs,
        shape: tuple[int, ...],
        image_dtype: torch.dtype,
        settings: EngineSettings,
    ) -> None:
        device = next(model.parameters()).device
        self.model, self.convs, self.image_dtype, self.graphs = model, convs, image_dtype, settings.graphs
        layout = torch.contiguous_format if isinstance(convs, Network) else torch.channels_last
        self.batch = torch.empty(shape, dtype=settings.dtype, device=device, memory_format=layout)
        self.table = torch.empty((shape[0], 8), dtype=torch.int64, device=device)
        self.anchors: Tensor | None = None  # held, since a graph reads them where they lie and the cache may drop them

    def make(self, images: list[Tensor], sizes: Sizes, captures: CaptureStream | None) -> None:
        """Capture the graph, if there is to be one; ``images`` serve to warm up."""
        if self.graphs:
            self.table.copy_(image_table(images, sizes), non_blocking=True)
            self.replay = captured(self.run, captures)

    def __call__(self, images: list[Tensor], sizes: Sizes) -> Detections:
        self.table.copy_(image_table(images, sizes), non_blocking=True)
        if self.graphs:
            return Detections(*(tensor.clone() for tensor in self.replay()))  # the next replay writes over the graph's
        constants = self.model.transform.image_mean, self.model.transform.image_std
        values = self.batch.numel() + sum(image.numel() for image in images)
        with one_thread() if isinstance(self.convs, Network) and values <= _FEW_VALUES else nullcontext():
            image_batch(images, sizes, *constants, self.model.transform.size_divisible, self.batch)
        return self.detect_in_batch()

    def run(self) -> Detections:
        """From the images of the table to detections, every address the same at each call."""
        transform = self.model.transform
        launch_image_batch(self.table, self.batch, self.image_dtype, transform.image_mean, transform.image_std)
        return self.detect_in_batch()

    def detect_in_batch(self) -> Detections:
        """From the batch to detections."""
        sizes, thresholds = (self.table[:, 3:5], self.table[:, 1:3]), Thresholds.of(self.model)
        if isinstance(self.convs, Network) and self.convs.sieve:
            levels, nms = self.convs.run(self.batch), self.convs.nms()  # opened here, with all threads
            logits = sum(level.numel() for level in levels[: len(self.convs.sieve.codes)])
            with one_thread() if logits <= _FEW_LOGITS else nullcontext():
                features, candidates, deltas = self.convs.candidates(self.model, levels)
                anchors = batch_anchors(self.model.anchor_generator, self.batch, (), features)
                return detect_candidates(candidates, deltas, anchors, *sizes, thresholds, nms)
        outputs = run_network(self.model, self.batch, convs=self.convs)
        self.anchors = outputs.anchors
        return detect(outputs, *sizes, thresholds, self.convs.nms() if isinstance(self.convs, Network) else None)


def captured(run: Run, stream: Any) -> Run:
    """Capture ``run`` as a CUDA graph, after three runs on the same stream that compile kernels and choose convs."""
    with timed_convs():
        for _ in range(3):
            stream.run(run)
        graph, outputs = stream.capture(run)

    def replay() -> Detections:
        graph.replay()
        return outputs

    return replay


def seconds_of(plan: Plan, images: list[Tensor], sizes: Sizes) -> float:
    """The median seconds of a call that is waited for."""
    times = []
    for _ in range(8):
        start = time.perf_counter()
        plan(images, sizes).counts.tolist()  # waits for the device
        times.append(time.perf_counter() - start)
    return statistics.median(times[3:])
