"""Transfers between host and device that do not wait for queued work, the dtype to compute in, threads and memory."""

import ctypes
import functools
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Upload a small CPU tensor without waiting for the GPU.

    Example::

        >>> to_device(torch.tensor([1, 2]), torch.device("cpu"))
        tensor([1, 2])
    """
    if device.type == "cuda" and values.device.type == "cpu":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


def uploaded(images: Sequence[Tensor] | Tensor, device: torch.device) -> Sequence[Tensor] | Tensor:
    """The images on the device. Anything but a tensor is left alone, so that the model's check can refuse it."""
    if isinstance(images, Tensor):
        return to_device(images, device)
    return [to_device(image, device) if isinstance(image, Tensor) else image for image in images]


def stream_id(device: torch.device) -> int:
    """Which stream of the device is the current one; 0 on a CPU, and where CUDA is not in use."""
    if device.type != "cuda" or not torch.cuda.is_initialized():
        return 0
    return torch.cuda.current_stream(device).cuda_stream


class Uploads:
    """Copies images to a device so that host memory may be refilled as soon as a call returns.

    Copies out of pinned memory run on a stream of their own: the host waits for them alone, and not for the work that
    the device was given before.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream | None = None

    def to_device(self, images: Sequence[Tensor]) -> list[Tensor]:
        """The images on the device, ready for the current stream."""
        if self._device.type != "cuda" or not any(image.device.type == "cpu" and image.is_pinned() for image in images):
            return [image.to(self._device, non_blocking=True) for image in images]
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)
        current = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._stream):
            copies = [image.to(self._device, non_blocking=True) for image in images]
            copied = self._stream.record_event()
        current.wait_event(copied)
        for copy in copies:
            copy.record_stream(current)  # its memory must not serve again while the current stream reads it
        copied.synchronize()
        return copies


class LateRead:
    """Values of the device that the host reads once they have arrived, so that it does not wait for them.

    On a CUDA device the copy into pinned memory is queued behind the work that computes the values, and an event marks
    its end. Elsewhere the values are there at once.

    Example::

        >>> late = LateRead(torch.tensor([1.0, 2.0]))
        >>> late.arrived(), late.wait().tolist()
        (True, [1.0, 2.0])
    """

    def __init__(self, values: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._host = values
        if values.device.type == "cuda":
            self._host = torch.empty(values.shape, dtype=values.dtype, device="cpu", pin_memory=True)
            self._host.copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(values.device))

    def arrived(self) -> bool:
        """Whether the values are on the host; this never waits."""
        return self._event is None or self._event.query()

    def wait(self) -> Tensor:
        """The values on the host; this waits until they have arrived."""
        if self._event is not None:
            self._event.synchronize()
        return self._host


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices faster than float32: from compute capability 8.0, or with AMX."""
    if device.type == "cuda":
        return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.cpu._is_amx_tile_supported()


def has_float8(device: torch.device) -> bool:
    """Whether the device multiplies matrices in FP8 (E4M3): an NVIDIA GPU from compute capability 8.9 on. AMD's gfx942
    has a format of its own, ``float8_e4m3fnuz``."""
    nvidia = device.type == "cuda" and torch.version.hip is None
    return nvidia and torch.cuda.get_device_capability(device) >= (8, 9)


@functools.cache
def convs_gain_by_bfloat16() -> bool:
    """Whether a CPU that has AVX512-BF16 and no AMX computes a conv in less time in bfloat16 than in float32.

    One conv is timed, once in a process, for 0.1 s: of such processors an AMD EPYC takes half the time in bfloat16, and
    an Intel Xeon twice.
    """
    if not torch.cpu._is_avx512_bf16_supported():
        return False
    x, weight = torch.zeros(1, 256, 32, 32, device="cpu"), torch.zeros(256, 256, 3, 3, device="cpu")
    pairs = [
        [value.to(dtype, memory_format=torch.channels_last) for value in (x, weight)]
        for dtype in (torch.float32, torch.bfloat16)
    ]

    def seconds(pair: list[Tensor]) -> float:
        start = time.perf_counter()
        F.conv2d(pair[0], pair[1], padding=1)
        return time.perf_counter() - start

    with torch.inference_mode():
        rounds = [[seconds(pair) for pair in pairs] for _ in range(6)][1:]
    in_float32, in_bfloat16 = (statistics.median(times) for times in zip(*rounds, strict=True))
    return in_bfloat16 < in_float32


def best_dtype(device: torch.device) -> torch.dtype:
    """For inference, bfloat16 where it is faster; else float16 on a GPU and float32 on a CPU."""
    if has_bfloat16(device) or (device.type == "cpu" and convs_gain_by_bfloat16()):
        return torch.bfloat16
    return torch.float16 if device.type == "cuda" else torch.float32


def lay_out(model: nn.Module) -> None:
    """Bring the 4-D weights that lie on a GPU, and their gradients, into channels_last memory, in place."""
    for weight in (*model.parameters(), *model.buffers()):
        for tensor in (weight, weight.grad):
            if tensor is not None and tensor.is_cuda and tensor.dim() == 4:
                tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)


@functools.cache
def _openmp() -> Any:
    """The library of PyTorch's operations, by which those of OpenMP and MKL are found; None without OpenMP."""
    found = [*(Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*")] if os.name == "posix" else []
    library = ctypes.CDLL(str(found[0])) if found else None
    return library if library is not None and hasattr(library, "omp_set_num_threads") else None


@contextmanager
def one_thread() -> Iterator[None]:
    """Let PyTorch compute in the calling thread alone; other threads of the program keep theirs.

    OpenMP's threads wait busily for milliseconds after a parallel loop, and so take the cores from another runtime that
    starts meanwhile. And what one thread wrote, and another reads, goes from core to core, which between cores without
    a common cache takes longer than small operations do. ``torch.set_num_threads`` would also hold for threads that the
    program starts meanwhile.

    Example::

        >>> with one_thread():
        ...     image = torch.rand(3, 800, 800).div_(2)
    """
    openmp, threads = _openmp(), torch.get_num_threads()
    if openmp is None:
        yield
        return
    of_mkl = getattr(openmp, "MKL_Set_Num_Threads_Local", None)  # matrix products do not follow OpenMP's setting
    before = of_mkl(1) if of_mkl else 0
    openmp.omp_set_num_threads(1)
    try:
        yield
    finally:
        openmp.omp_set_num_threads(threads)
        if of_mkl:
            of_mkl(before)


_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # of mallopt, in glibc's malloc.h
_LARGE, _NEVER = 2**30, -1  # bytes


@functools.cache
def keep_freed_memory() -> bool:
    """Let this process keep the memory of freed tensors for the next ones, on Linux with glibc.

    By default glibc hands blocks of more than 32 MB back to the system as soon as they are freed, and the free end of
    its heap. A network's next feature map then touches fresh pages, each of which costs a fault and is filled with
    zeros. What was once used remains with the process. Heaps of other threads than the main one hold 64 MB at most.

    Returns:
        whether this was set. Settings of malloc in the environment stand, and other C libraries are left alone.

    Example::

        >>> kept = keep_freed_memory()
    """
    own = any(name.startswith("MALLOC_") for name in os.environ) or "malloc" in os.environ.get("GLIBC_TUNABLES", "")
    libc = ctypes.CDLL(None) if os.name == "posix" and not own else None
    if libc is None or not hasattr(libc, "gnu_get_libc_version"):
        return False
    return bool(libc.mallopt(_MMAP_THRESHOLD, _LARGE)) and bool(libc.mallopt(_TRIM_THRESHOLD, _NEVER))
