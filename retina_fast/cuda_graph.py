"""The one place in the package where work is captured as a CUDA graph."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch

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
