"""A driver for Triton that runs kernels on CPU tensors, as PTX, by the emulator.

    with emulated() as log:
        torch.ops.retina_fast.take_kept(...)  # launches of kernels within run on the emulator
    log.results                               # one traffic.Result a launch

Triton itself binds the arguments, specialises and compiles the kernel, from dtypes, integers and the addresses that the
arguments would have on a GPU; then it hands the binary and the arguments to its driver, which is the one of this file.
"""

import contextlib
import ctypes
import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget

from tests.ptx.code import Code
from tests.ptx.compiling import compilable, up_to_ptx
from tests.ptx.machine import Machine, Options
from tests.ptx.memory import POISON, Buffer, Memory
from tests.ptx.traffic import Result

_NUMPY = {
    "i1": "u1", "i8": "i1", "i16": "i2", "i32": "i4", "i64": "i8", "u1": "u1", "u8": "u1", "u16": "u2", "u32": "u4",
    "u64": "u8", "fp32": "f4", "f32": "f4", "fp64": "f8", "f64": "f8",
}  # fmt: skip
_SHARED_BYTES = {80: 163 << 10, 90: 227 << 10}  # that a CTA may have, by compute capability
_ALLOCATORS = (
    (torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (torch.Tensor, "new_empty"),
    (torch.Tensor, "new_empty_strided"),
)  # fmt: skip
_native_data_ptr = torch.Tensor.data_ptr


@functools.lru_cache(maxsize=256)
def _code(ptx: str) -> Code:
    return Code(ptx)


@dataclass
class Log:
    """What ran: of each launch what it did."""

    results: list[Result] = field(default_factory=list)


@dataclass
class Launch:
    """A kernel that is about to run.

    Args:
        shared: bytes of shared memory of a CTA.
        params: the kernel's parameters, numpy scalars.
    """

    ptx: str
    shared: int
    params: list[Any]
    grid: tuple[int, int, int]
    memory: Memory

    def run(self, ptx: str, options: Options) -> Result:
        """Runs the kernel in the form of ``ptx``, its own or a changed one."""
        code = _code(ptx)
        scratch = [np.uint64(0)] * (len(code.program.params) - len(self.params))  # Triton's, which no kernel here uses
        return Machine(code, self.memory, [*self.params, *scratch], self.grid, self.shared, options).run()


class Device:
    """The emulated GPU: its memory is the storages of the CPU tensors that kernels were given."""

    def __init__(self, capability: int, options: Options) -> None:
        self.target = GPUTarget("cuda", capability, 32)
        self.options = options
        self.edit: Callable[[str], str] | None = None
        self.before: Callable[[Launch], None] | None = None
        self.memory, self.log = Memory(), Log()
        self._buffers: dict[int, tuple[torch.UntypedStorage, Buffer]] = {}  # by the storage's address on the CPU

    def _buffer(self, tensor: torch.Tensor, name: str, is_new: bool = False) -> Buffer:
        storage = tensor.untyped_storage()
        key, size = storage.data_ptr(), storage.nbytes()
        if key in self._buffers:
            _, buffer = self._buffers[key]
            if len(buffer.data) == size and not is_new:
                buffer.granule = min(buffer.granule, tensor.element_size())
                return buffer
            self.memory.drop(buffer)
        pointer = ctypes.cast(key, ctypes.POINTER(ctypes.c_uint8))
        buffer = self.memory.add(name, np.ctypeslib.as_array(pointer, (size,)), tensor.element_size())
        self._buffers[key] = storage, buffer  # the storage is held, so that its address is not given away
        return buffer

    def address(self, tensor: torch.Tensor) -> int:
        """Where the tensor's first element would lie on the GPU."""
        if tensor.untyped_storage().nbytes() == 0:
            return self.memory.add("an empty tensor", np.zeros(0, np.uint8)).base
        name = f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
        return self._buffer(tensor, name).base + int(tensor.storage_offset()) * tensor.element_size()

    def poison(self, tensor: torch.Tensor) -> None:
        """Marks a new tensor, so that a read of what nobody wrote is seen."""
        if tensor.device.type == "cpu" and tensor.numel():
            buffer = self._buffer(tensor, f"new {str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}", True)
            buffer.data[:] = POISON
            buffer.poisoned = True

    def launch(self, ptx: str, shared: int, params: list[Any], grid: tuple[int, int, int]) -> None:
        launch = Launch(ptx, shared, params, grid, self.memory)
        if self.before:
            self.before(launch)
        self.log.results.append(launch.run(self.edit(ptx) if self.edit else ptx, self.options))


class _Driver:
    """What Triton asks of a driver (triton.backends.driver.DriverBase), as far as a launch asks it."""

    def __init__(self, device: Device) -> None:
        self.device, self.launcher_cls = device, _Launcher
        shared = _SHARED_BYTES[device.target.arch]
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": shared},
            load_binary=lambda name, binary, shared, device: (None, binary.decode(), 0, 0, 1024),
        )

    def get_current_target(self) -> GPUTarget:
        return self.device.target

    def get_current_device(self) -> GPUTarget:
        return self.device.target  # by which Triton looks up what it has compiled

    def get_current_stream(self, device: Any) -> int:
        return 0


class _Launcher:
    """A compiled kernel's launcher; it outlives the device that it was made for."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.kinds, self.shared = list(source.signature.values()), metadata.shared

    def __call__(self, x: int, y: int, z: int, stream: int, ptx: str, *arguments: Any) -> None:
        _metadata, _launch_metadata, _enter, _exit, *values = arguments
        flat = [self._parameter(value, kind) for value, kind in _flattened(tuple(values), tuple(self.kinds))]
        triton.runtime.driver.active.device.launch(ptx, self.shared, flat, (x, y, z))

    def _parameter(self, value: Any, kind: str) -> Any:
        if kind[0] == "*":
            return np.uint64(value.data_ptr())
        return np.array(value).astype(_NUMPY[kind])[()]


def _flattened(value: Any, kind: Any) -> Iterator[tuple[Any, str]]:
    """The parameters that are left after specialisation; a tuple's entries are parameters of their own."""
    if isinstance(kind, tuple):
        for entry, kind_of_entry in zip(value, kind, strict=True):
            yield from _flattened(entry, kind_of_entry)
    elif kind != "constexpr":
        yield value, kind


def _poisoning(device: Device, allocate: Callable[..., Any], modules: tuple[str, ...]) -> Callable[..., Any]:
    def allocate_and_poison(*args: Any, **kwargs: Any) -> Any:
        out = allocate(*args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if type(out) is torch.Tensor and caller.startswith(modules):
            device.poison(out)
        return out

    return allocate_and_poison


@contextlib.contextmanager
def emulated(
    capability: int = 90,
    seed: int = 0,
    shuffle: bool = False,
    perturb: float = 0,
    together: int = 16,
    count: bool = False,
    edit: Callable[[str], str] | None = None,
    before: Callable[[Launch], None] | None = None,
    modules: tuple[str, ...] = ("retina_fast.kernels", "tests."),
) -> Iterator[Log]:
    """Launches of Triton kernels on CPU tensors within are compiled for a GPU and run on the emulator.

    Args:
        capability: the GPU's compute capability: 80 (A100) or 90 (H100, H200).
        seed, shuffle, perturb, together, count: see machine.Options.
        edit: changes the PTX before it runs, to plant a fault.
        before: is called with each launch before it runs.
        modules: the beginnings of the names of the modules whose kernels are compiled, and whose uninitialised tensors
            (torch.empty) are poisoned.

    Raises:
        Fault: from a launch that does what would be undefined on a GPU.

    Example::

        >>> import retina_fast
        >>> with emulated() as log:
        ...     out = torch.ops.retina_fast.scale_([torch.ones(5)], torch.tensor(0.5))
        >>> log.results[0].name
        '_scale_kernel'
    """
    device = Device(capability, Options(seed, shuffle, perturb, together, count))
    device.edit, device.before = edit, before

    def data_ptr(tensor: torch.Tensor) -> int:
        return device.address(tensor) if tensor.device.type == "cpu" else _native_data_ptr(tensor)

    with contextlib.ExitStack() as stack:
        stack.enter_context(compilable(modules))
        stack.enter_context(up_to_ptx())
        stack.enter_context(mock.patch.object(triton.runtime.driver, "_active", _Driver(device)))
        stack.enter_context(mock.patch.object(torch.Tensor, "data_ptr", data_ptr))
        for owner, name in _ALLOCATORS:
            allocate = _poisoning(device, getattr(owner, name), modules)
            stack.enter_context(mock.patch.object(owner, name, allocate))
        yield device.log
