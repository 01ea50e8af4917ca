"""The one place in the package where work is captured as a CUDA graph."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from retina_fast.device import to_device

Result = TypeVar("Result")


class CaptureStream:
    """A stream beside the current one, on which work runs to warm up and is then captured.

    cuDNN, Triton and the allocator set themselves up while work runs for the first time, which a capture does not
    allow, and work before a capture must not have been on the default stream. So the warm-up runs on this stream, too.

    Args:
        device: the CUDA device whose stream it is.
        share_memory: whether all graphs captured here share one memory pool, which outlives each of them. Graphs that
            share memory must not be replayed at the same time.

    Example::

        >>> stream = CaptureStream(torch.device("cuda"))  # doctest: +SKIP
        >>> stream.run(work)  # doctest: +SKIP
        >>> graph, outputs = stream.capture(work)  # doctest: +SKIP
        >>> graph.replay()  # the outputs are overwritten  # doctest: +SKIP
    """

    def __init__(self, device: torch.device, share_memory: bool = False) -> None:
        self._device = device
        with torch.cuda.device(device):  # a pool and a stream belong to the current device
            self._stream = torch.cuda.Stream(device)
            self._pool = torch.cuda.MemPool() if share_memory else None

    def run(self, work: Callable[[], Result]) -> Result:
        """Run the work on this stream; the current stream and this one wait for each other, the host does not."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                return work()
        finally:
            current.wait_stream(self._stream)

    def capture(self, work: Callable[[], Result]) -> tuple[Any, Result]:
        """The work as a graph, and what it returned: the tensors that each replay overwrites.

        Raises:
            RuntimeError: from torch, if the work waits for the device.
        """
        graph = torch.cuda.CUDAGraph()
        pool: Any = None if self._pool is None else self._pool.id
        # thread_local: other threads may go on allocating and pinning memory, for instance to load data.
        with torch.cuda.graph(graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"):
            result = work()
        return graph, result


def own_learning_rates(optimizer: torch.optim.Optimizer, lrs: list[Tensor], device: torch.device) -> None:
    """Put an optimizer's learning rates into tensors that a replay reads, even after a scheduler or a load replaced
    them, and make it capturable.

    Args:
        optimizer: SGD, or one that can be made capturable.
        lrs: the tensors, one a parameter group; those that are missing are added.
        device: where the graph runs.
    """
    for i, group in enumerate(optimizer.param_groups):
        if i == len(lrs):
            lrs.append(torch.zeros((), dtype=torch.float32, device=device))
        ours, lr = lrs[i], group["lr"]
        _lay_out_state(optimizer, group)
        if lr is ours:
            continue
        ours.fill_(lr.squeeze() if isinstance(lr, Tensor) else lr)
        group["lr"] = ours
        if "capturable" in group:
            group["capturable"] = True
        else:
            group["fused"], group["foreach"] = True, False
        for state in map(optimizer.state.get, group["params"]):
            if state and isinstance(state.get("step"), Tensor):
                state["step"] = to_device(state["step"], device)


def _lay_out_state(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> None:
    """Bring optimizer state into the memory layout of its parameter, and make any momentum buffer that is missing:
    fused SGD needs both. Without dampening, a momentum that starts at zero gives the same steps as torch's."""
    for p in group["params"]:
        state = optimizer.state.get(p, {})
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == p.shape and value.stride() != p.stride():
                state[key] = torch.empty_like(p, dtype=value.dtype).copy_(value)
        if isinstance(optimizer, torch.optim.SGD) and group["momentum"] and p.requires_grad:
            state = optimizer.state[p]
            if state.get("momentum_buffer") is None:
                state["momentum_buffer"] = torch.zeros_like(p)
