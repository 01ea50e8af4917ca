"""A training step as one CUDA graph: image batch, forward, losses, backward, clipping and optimizer in one launch.

    call    images, targets -> checked, uploaded  ->  buffers of the graph  ->  replay

A graph repeats one sequence of kernels on one set of addresses. So it serves one shape of padded batch, and ground
truths are copied into buffers with room for ``max_boxes``. It stays valid until a setting, a part of the model or the
optimizer's state is changed. Steps that it cannot serve run uncaptured, kernel by kernel. Images are not copied: the
graph reads their addresses and sizes from a table.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from retina_fast import forward as network
from retina_fast.anchors import cell_versions, is_stock_generator
from retina_fast.backbones.fused_training import convs_fused, lay_out_weights
from retina_fast.cuda_graph import CaptureStream, own_learning_rates
from retina_fast.device import keep_freed_memory, to_device, uploaded
from retina_fast.forward import Batch
from retina_fast.kernels.conv_calls import fast_convs
from retina_fast.kernels.conv_winograd import Scratch
from retina_fast.kernels.image_batch import batch_shape, image_table, kernel_serves, launch_image_batch
from retina_fast.model import RetinaNet
from retina_fast.stock import has_hooks, has_own_code, overrides
from retina_fast.transform import channels_of, is_stock_transform

_GRAPH_DEVICE = "cuda"
_WARMUP = 3  # repeats of a shape and its settings before a capture, in which cuDNN, Triton and the optimizer set up

Losses = dict[str, Tensor]


class _Graph(NamedTuple):
    graph: Any
    shape: tuple[int, ...]  # of the batch
    settings: Any
    kept_alive: list[Any]  # what settings name by their ids, and the anchors, which the cache may drop
    table: Tensor  # where the images are
    buffers: Batch  # the padded batch and the ground truths that the graph reads
    names: list[str]
    losses: Tensor  # (len(names),), overwritten by each replay


class TrainingStep:
    """A whole training step in one call, and on a CUDA device in one launch.

    Args:
        model: a ``RetinaNet`` in training mode, or one wrapped in ``DistributedDataParallel``.
        optimizer: over parameters of the model. On a CUDA device its learning rates become tensors, in which learning
            rate schedulers and assignments keep working, and it is made capturable (SGD: fused).
        max_boxes: the most ground truths of a batch that the graph has room for, 24 bytes each.
        max_grad_norm: gradients are scaled down to this norm, all together; None leaves them.
        dtype: ``torch.bfloat16`` for mixed precision; None computes in the dtype of the weights.
        accumulate: the number of parts in which a batch is run, one after another, to fit into memory; BatchNorm then
            sees one part at a time.
        loss_weights: factors of the losses in what is minimised, by name; 1 for those not named.

    A call returns the losses, detached, in tensors that no later step overwrites. Only reading them waits. Images
    and targets may lie on the CPU; pinned images are uploaded without a wait. Targets are checked as ``model(images,
    targets)`` checks them. Gradients are not kept: ``p.grad`` is None after a call.

    The first size of padded batch that comes several times in a row is captured. Other sizes, more ground truths than
    ``max_boxes``, hooks, an optimizer that cannot be captured, a loss, transform or anchor generator of the user's own,
    several parts or processes, and a CPU, run uncaptured. ``replayed_steps`` and ``uncaptured_steps`` count both kinds.
    After a change of the model, the optimizer or their settings, a new graph is captured. A backbone or head of the
    user's own is captured, too: it must not read values on the host, nor draw random numbers from other than torch's
    default generator.

    Unless the model has parts or hooks of the user's own, feature maps are kept in channels_last, on a GPU weights as
    well, and convs take frozen norms, bias, sums and ReLU along, on a CPU in float32 only. There large 3x3 convs run by
    Winograd's algorithm, 1e-6 from PyTorch's in relative norm. ``model(images, targets)`` itself rounds as
    torchvision's does.

    Raises:
        TypeError: for a model that is no ``RetinaNet``.
        ValueError: for a ``dtype`` that is neither None nor bfloat16 (float16 needs a GradScaler, whose scale would
            have to be read each step), or for limits that are not positive.
        RuntimeError: by a call, in evaluation mode, under the caller's autocast, or if a part cannot be captured.

    Example::

        >>> from retina_fast import TrainingStep, retinanet_resnet18_fpn_lite
        >>> model = retinanet_resnet18_fpn_lite(num_classes=2).train()
        >>> step = TrainingStep(model, torch.optim.AdamW(model.parameters(), lr=1e-3), max_grad_norm=1.0)
        >>> target = {"boxes": torch.tensor([[4.0, 4.0, 40.0, 30.0]]), "labels": torch.tensor([1])}
        >>> losses = step([torch.rand(3, 64, 64)], [target])
        >>> sorted(losses), step.uncaptured_steps
        (['bbox_regression', 'classification'], 1)
    """

    def __init__(
        self,
        model: RetinaNet | DistributedDataParallel,
        optimizer: torch.optim.Optimizer,
        max_boxes: int = 10_000,
        max_grad_norm: float | None = None,
        dtype: torch.dtype | None = None,
        accumulate: int = 1,
        loss_weights: Mapping[str, float] | None = None,
    ) -> None:
        self._parallel = model if isinstance(model, DistributedDataParallel) else None
        model = model.module if isinstance(model, DistributedDataParallel) else model
        if not isinstance(model, RetinaNet):
            raise TypeError(
                f"model must be a retina_fast.RetinaNet, got {type(model)}: see retina_fast.from_torchvision"
            )
        if dtype not in (None, torch.bfloat16):
            raise ValueError(f"dtype must be None or torch.bfloat16, got {dtype}")
        if max_boxes < 1:
            raise ValueError(f"max_boxes must be at least 1, got {max_boxes}")
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm must be positive, got {max_grad_norm}")
        if accumulate < 1:
            raise ValueError(f"accumulate must be at least 1, got {accumulate}")
        if next(model.parameters()).device.type == "cpu":
            keep_freed_memory()
        self.model, self.optimizer = model, optimizer
        self.accumulate, self.loss_weights = accumulate, dict(loss_weights or {})
        self.max_boxes, self.max_grad_norm, self.dtype = max_boxes, max_grad_norm, dtype
        self.replayed_steps = self.uncaptured_steps = 0
        self._graph: _Graph | None = None
        self._last: Any = None  # batch shape and settings of the last step
        self._repeats = 0  # how many steps in a row repeated them
        self._lrs: list[Tensor] = []
        self._stream: CaptureStream | None = None
        self._scratch = Scratch()

    def __call__(self, images: Sequence[Tensor] | Tensor, targets: Sequence[Mapping[str, Tensor]]) -> Losses:
        """Train on one batch: ``images`` and ``targets`` as ``model.forward`` takes them."""
        device = next(self.model.parameters()).device
        if not self.model.training:
            raise RuntimeError("TrainingStep needs training mode: call model.train() first")
        if torch.is_autocast_enabled(device.type):
            raise RuntimeError(
                "TrainingStep was called under autocast: call it outside, and give it dtype=torch.bfloat16"
            )
        if device.type == "cuda":
            images = uploaded(images, device)
        if not self._capturable(device):
            return self._uncaptured(self._parts(images, targets), device)
        if self._graph is None and not has_own_code(self.model):
            lay_out_weights(self.model)
        own_learning_rates(self.optimizer, self._lrs, device)
        batch = self.model.make_batch(images, targets)
        assert batch.truths is not None
        transform = self.model.transform
        constants = channels_of(transform)
        shape = batch_shape(batch.images, batch.image_sizes, constants, transform.size_divisible)
        settings = self._settings(batch.images[0].dtype)
        if self._graph is not None and self._graph.settings != settings:
            self._graph = None
        fits = len(batch.truths.boxes) <= self.max_boxes and kernel_serves(batch.images, shape[1])
        if self._graph is None:
            self._repeats = self._repeats + 1 if self._last == (shape, settings) else 0
            self._last = shape, settings
            if self._stream is None:
                self._stream = CaptureStream(device)
            if self._repeats < _WARMUP or not fits:  # on the stream that will capture, to warm it up
                return self._stream.run(lambda: self._uncaptured([lambda: self._forward(batch)], device))
            self._graph = self._capture(batch, shape, settings, self._stream, device)
        if self._graph.shape != shape or not fits:
            return self._uncaptured([lambda: self._forward(batch)], device)
        return self._replay(self._graph, batch)

    def _forward(self, batch: Batch) -> Losses:
        return self.model.losses_of(batch, network.run(self.model, batch))

    def _parts(self, images: Any, targets: Any) -> list[Callable[[], Losses]]:
        """The forward passes of the batch's parts, each with losses that add up to those of the batch."""
        network = self._parallel or self.model
        if self.accumulate == 1 or targets is None or len(images) != len(targets):  # what is wrong the model says
            return [lambda: network(images, targets)]
        count, parts = len(images), min(self.accumulate, len(images))
        ends = [count * part // parts for part in range(parts + 1)]

        def forward(start: int, end: int) -> Losses:
            losses = network(images[start:end], targets[start:end])
            return {name: loss * ((end - start) / count) for name, loss in losses.items()}

        return [functools.partial(forward, start, end) for start, end in pairwise(ends)]

    def _step(self, forwards: Sequence[Callable[[], Losses]], device: torch.device) -> Losses:
        """One step, captured or not."""
        self.model.zero_grad(set_to_none=True)
        with self._fast_convs(device):
            parts = [self._backward(forward, forward is forwards[-1], device) for forward in forwards]
        if self.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
        self.optimizer.step()
        self.model.zero_grad(set_to_none=True)  # a graph's gradients stay in its own memory, which nothing else gets
        return {name: functools.reduce(torch.add, [part[name] for part in parts]) for name in parts[0]}

    @contextlib.contextmanager
    def _fast_convs(self, device: torch.device) -> Iterator[None]:
        """Convs that take along what follows them and, on a CPU, run by Winograd's algorithm."""
        on_cpu, stock = device.type == "cpu", not has_own_code(self.model)
        quick = fast_convs(self._scratch, channels_last=stock) if on_cpu else contextlib.nullcontext()
        fused = stock and not (on_cpu and self.dtype)
        with quick, convs_fused(self.model) if fused else contextlib.nullcontext():
            yield

    def _backward(self, forward: Callable[[], Losses], last: bool, device: torch.device) -> Losses:
        """The losses of one part. Its gradients are added to those of earlier parts; the last part all-reduces them."""
        with contextlib.nullcontext() if last or self._parallel is None else self._parallel.no_sync():
            with torch.autocast(device.type, dtype=self.dtype, enabled=self.dtype is not None):
                losses = forward()
            weighted = [
                loss * self.loss_weights[name] if name in self.loss_weights else loss for name, loss in losses.items()
            ]
            functools.reduce(torch.add, weighted).backward()
        return {name: loss.detach() for name, loss in losses.items()}

    def _uncaptured(self, forwards: Sequence[Callable[[], Losses]], device: torch.device) -> Losses:
        self.uncaptured_steps += 1
        return self._step(forwards, device)

    def _capture(
        self, example: Batch, shape: tuple[int, ...], settings: Any, stream: CaptureStream, device: torch.device
    ) -> _Graph:
        truths, image_dtype = example.truths, example.images[0].dtype
        assert truths is not None
        layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format
        # In mixed precision the first conv would cast the pixels at once, so they are made in its dtype.
        pixels = torch.empty(shape, dtype=self.dtype or image_dtype, device=device, memory_format=layout)
        buffers = example._replace(
            images=[],
            pixels=pixels,
            targets=[],
            truths=truths._replace(
                boxes=truths.boxes.new_zeros((self.max_boxes, 4)),
                labels=truths.labels.new_zeros(self.max_boxes),
                offsets=torch.zeros_like(truths.offsets),
            ),
        )
        table = to_device(image_table(example.images, example.image_sizes), device)
        transform = self.model.transform
        constants = transform.image_mean, transform.image_std
        kept_alive: list[Any] = []

        def forward() -> Losses:
            launch_image_batch(table, pixels, image_dtype, *constants)
            outputs = network.run(self.model, buffers)
            kept_alive.append(outputs.anchors)
            return self.model.losses_of(buffers, outputs)

        def step() -> tuple[list[str], Tensor]:
            losses = self._step([forward], device)
            return list(losses), torch.stack(list(losses.values()))

        # In mixed precision the kernel has not been launched for this dtype, and loading one may end a capture.
        stream.run(lambda: launch_image_batch(table, pixels, image_dtype, *constants))
        try:
            graph, (names, losses) = stream.capture(step)
        except RuntimeError as error:
            raise RuntimeError(
                "the training step could not be captured as a CUDA graph: a part of the model or of the optimizer "
                "reads a value on the host, or copies to or from it"
            ) from error
        kept_alive += [*self.model.modules(), *self._lrs, *self.model.anchor_generator.cell_anchors]
        kept_alive += [value for state in self.optimizer.state.values() for value in state.values()]
        return _Graph(graph, shape, settings, kept_alive, table, buffers, names, losses)

    def _replay(self, graph: _Graph, batch: Batch) -> Losses:
        buffers, truths = graph.buffers.truths, batch.truths
        assert buffers is not None
        assert truths is not None
        graph.table.copy_(image_table(batch.images, batch.image_sizes), non_blocking=True)
        count = len(truths.boxes)
        buffers.boxes[:count].copy_(truths.boxes.detach())
        buffers.labels[:count].copy_(truths.labels)
        buffers.offsets.copy_(truths.offsets)
        graph.graph.replay()
        self.replayed_steps += 1
        return dict(zip(graph.names, graph.losses.clone(), strict=True))

    def _capturable(self, device: torch.device) -> bool:
        model, optimizer = self.model, self.optimizer
        own = any(overrides(model, RetinaNet, name) for name in ("forward", "eager_outputs"))
        return (
            device.type == _GRAPH_DEVICE
            and self._parallel is None
            and self.accumulate == 1
            and not own
            and model.uses_fast_losses()
            and is_stock_transform(model.transform)
            and is_stock_generator(model.anchor_generator)
            and all(
                "capturable" in group or (isinstance(optimizer, torch.optim.SGD) and not group["dampening"])
                for group in optimizer.param_groups
            )
            and not (optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks)
            and not any(map(has_hooks, model.modules()))
            and not any(p._backward_hooks or p._post_accumulate_grad_hooks for p in model.parameters())
        )

    def _settings(self, image_dtype: torch.dtype) -> list[Any]:
        """All that a captured graph depends on besides the batch's shape, the images' dtype included."""
        model = self.model
        values: list[Any] = [
            (self.max_boxes, self.max_grad_norm, self.dtype, image_dtype, tuple(self.loss_weights.items())),
            (type(model.proposal_matcher), *vars(model.proposal_matcher).items()),
            (model.head.regression_head._loss_type, model.head.classification_head.num_classes),
            (model.focal_gamma, model.classification_loss, model.box_weights),
            cell_versions(model.anchor_generator),
        ]
        for module in model.modules():
            tensors = chain(module._parameters.values(), module._buffers.values())
            values.append((id(module), module.training))
            values += [(tensor.data_ptr(), tensor.requires_grad) for tensor in tensors if tensor is not None]
        for group in self.optimizer.param_groups:
            values += [(key, _identity(value)) for key, value in group.items() if key != "params"]
            values.append(list(map(id, group["params"])))
        values += [_identity(value) for state in self.optimizer.state.values() for value in state.values()]
        return values


def _identity(value: Any) -> Any:
    return id(value) if isinstance(value, Tensor) else value
