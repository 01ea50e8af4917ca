"""CUDA graphs played on a CPU, so that what is captured, replayed and left out can be tested there."""

import contextlib
import ctypes
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from retina_fast import training_step
from retina_fast.forward import DELTAS, LOGITS, HeadOutputs
from retina_fast.kernels.image_batch import image_batch_reference
from retina_fast.losses import AtssMatcher, TaskAlignedMatcher, detection_losses
from retina_fast.targets import GroundTruths


class RecordedGraph(TorchDispatchMode):
    """CUDA graphs, played on a CPU: a capture records ops and leaves no trace, a replay runs them on the same tensors.

    As with a graph, what Python read while it was captured stays as it was, and results lie where they lay.
    """

    def __init__(self):
        super().__init__()
        self.ops, self.before, self.made = [], {}, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for tensor in tensors((args, kwargs)):
            storage = tensor.untyped_storage()._cdata
            if storage not in self.made and storage not in self.before:
                self.before[storage] = tensor, tensor.detach().clone()
        out = func(*args, **kwargs)
        self.made |= {tensor.untyped_storage()._cdata for tensor in tensors(out)} - self.before.keys()
        self.ops.append((func, args, kwargs, out))
        return out

    def __exit__(self, exc_type, exc_val, exc_tb):
        super().__exit__(exc_type, exc_val, exc_tb)
        with torch.no_grad():
            for tensor, value in self.before.values():
                tensor.copy_(value)

    @torch.no_grad()
    def replay(self):
        for func, args, kwargs, out in self.ops:
            for recorded, result in zip(tensors(out), tensors(func(*args, **kwargs)), strict=True):
                if recorded.untyped_storage()._cdata != result.untyped_storage()._cdata:
                    recorded.copy_(result)


def tensors(tree) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


# The reference operations read values on the host, where the kernels do not: here they are one op.
_ANOTHER_THREAD = ThreadPoolExecutor(1)


@torch.library.custom_op("tests::losses", mutates_args=())
def _losses_op(
    logits: list[Tensor], deltas: list[Tensor], anchors: Tensor, boxes: Tensor, labels: Tensor, offsets: Tensor,
    num_classes: int, reg_max: int, low: float, top_k: int, exponents: list[float], loss_type: str, gamma: float,
    classification_loss: str, box_weights: str,
) -> list[Tensor]:  # fmt: skip
    def work() -> list[Tensor]:
        leaves = [level.detach().requires_grad_() for level in (*logits, *deltas)]
        levels = leaves[: len(logits)], leaves[len(logits) :]
        outputs = HeadOutputs(dict(zip((LOGITS, DELTAS), levels, strict=True)), anchors, num_classes, {}, (), reg_max)
        losses = detection_losses(outputs, truths, matcher, loss_type, gamma, classification_loss, box_weights or None)
        grads = torch.autograd.grad(losses["classification"] + losses["bbox_regression"], leaves)
        return [tensor.detach().clone() for tensor in (*losses.values(), *grads)]

    thresholds = SimpleNamespace(high_threshold=0.5, low_threshold=low, allow_low_quality_matches=True)
    matcher: Any = AtssMatcher(top_k) if top_k else thresholds
    if exponents:
        matcher = TaskAlignedMatcher(top_k, *exponents)
    truths = GroundTruths(boxes, labels, offsets, offsets.diff().tolist())
    return _ANOTHER_THREAD.submit(work).result()  # in this one autograd is off, below an op


class _Losses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, split, anchors, truths, settings, *levels):
        logits, deltas = list(levels[:split]), list(levels[split:])
        cls, box, *grads = _losses_op(logits, deltas, anchors, truths.boxes, truths.labels, truths.offsets, *settings)
        ctx.split = split
        ctx.save_for_backward(*grads)
        return cls, box

    @staticmethod
    def backward(ctx, *incoming):
        cls, box = incoming
        grads = [grad * (cls if i < ctx.split else box) for i, grad in enumerate(ctx.saved_tensors)]
        return None, None, None, None, *grads


def opaque_losses(outputs, truths, matcher, loss_type, gamma, classification_loss, box_weights):
    logits, deltas = outputs.levels.values()
    low, top_k = getattr(matcher, "low_threshold", 0.0), getattr(matcher, "top_k", 0)
    settings = (
        outputs.num_classes,
        outputs.reg_max,
        low,
        top_k,
        [getattr(matcher, name) for name in ("alpha", "beta") if hasattr(matcher, name)],
        loss_type,
        gamma,
        classification_loss,
        box_weights or "",
    )
    cls, box = _Losses.apply(len(logits), outputs.anchors, truths, settings, *logits, *deltas)
    return {"classification": cls, "bbox_regression": box}


def _image_at(row: list[int], dtype: torch.dtype, channels: int) -> Tensor:
    address, height, width, _, _, *strides = row
    sizes = (channels, height, width)
    length = 1 + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    memory = (ctypes.c_char * (length * dtype.itemsize)).from_address(address)
    return torch.frombuffer(memory, dtype=dtype).as_strided(sizes, strides)


@torch.library.custom_op("tests::fill_batch", mutates_args=("out",))
def _fill_batch(table: Tensor, out: Tensor, dtype: torch.dtype, mean: list[float], std: list[float]) -> None:
    """What the kernel does, by its reference: from the images at the table's addresses."""
    rows = table.tolist()
    images = [_image_at(row, dtype, out.shape[1]) for row in rows]
    image_batch_reference(images, [(row[3], row[4]) for row in rows], mean, std, out)


def play_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have TrainingStep capture on a CPU."""
    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(training_step, "_GRAPH_DEVICE", "cpu")
    monkeypatch.setattr("retina_fast.model.detection_losses", opaque_losses)
    monkeypatch.setattr(training_step, "launch_image_batch", _fill_batch)
    for name, value in {
        "device": lambda device: contextlib.nullcontext(),
        "Stream": lambda device: stream,
        "current_stream": lambda device: stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "CUDAGraph": RecordedGraph,
        "graph": lambda graph, pool, stream, capture_error_mode: graph,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
