"""Records what a call would do on a GPU, on a machine without one.

The call works on fake CUDA tensors, which have a shape and no memory. The launchers of our operations run for real, and
their kernels are recorded instead of launched; so are the kernels that torch itself would launch. A read of a device
value by the host, and a copy between devices for which the host would wait, raise an error.
"""

import contextlib
import functools
import importlib
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch._library.custom_ops import CustomOpDef
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from triton.runtime.autotuner import Autotuner
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

import retina_fast.kernels


@dataclass
class Launch:
    """One launch of a Triton kernel."""

    kernel: Any  # a JITFunction, or an InterpretedFunction under TRITON_INTERPRET=1
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    grid: Any = field(repr=False)

    @property
    def variant(self) -> tuple[str, ...]:
        """The kernel's name, the kinds of its arguments, and its constants: equal where Triton makes one binary."""

        def kind(arg: Any) -> str:
            return str(arg.dtype) if isinstance(arg, torch.Tensor) else type(arg).__name__

        kinds = [str(tuple(map(kind, arg))) if isinstance(arg, tuple) else kind(arg) for arg in self.args]
        return self.kernel.__name__, *kinds, str(self.kwargs)


def _modules() -> list[Any]:
    return [
        importlib.import_module(f"retina_fast.kernels.{info.name}")
        for info in pkgutil.iter_modules(retina_fast.kernels.__path__)
    ]


def kernels() -> dict[str, Any]:
    """Returns every kernel of the package by its name, which ends in `_kernel`."""
    return {name: value for module in _modules() for name, value in vars(module).items() if name.endswith("_kernel")}


@dataclass
class TorchOp:
    """One operation of torch, taken as one kernel that reads its inputs and writes its outputs."""

    name: str
    bytes: int
    flop: int
    shape: tuple[int, ...]  # of the first output


def launches_of(call: Callable[..., Any], prepare: Callable[[], Any] | None = None) -> list[Launch]:
    """Returns the kernels of ours that a call launches, in order.

    Args:
        call: makes its own tensors on "cuda", or takes what `prepare` returns.
        prepare: makes what may be copied to the device beforehand, such as a model's weights. It is not recorded.

    Raises:
        RuntimeError: if the call copies between devices and the host would wait, or (from torch) reads a device value.

    Example::

        >>> launches_of(lambda: torch.ones(3, device="cuda") + 1)
        []
    """
    return [step for step in gpu_work_of(call, prepare) if isinstance(step, Launch)]


def gpu_work_of(call: Callable[..., Any], prepare: Callable[[], Any] | None = None) -> list[Launch | TorchOp]:
    """Returns all that the GPU does for a call, in order: our launches, and torch's operations between them.

    Arguments and errors are those of :func:`launches_of`.
    """
    steps: list[Launch | TorchOp] = []
    watch = _Watch(steps)
    with _bodies_as_fakes(watch), recording_launches(steps), _no_device(), FakeTensorMode():
        prepared = () if prepare is None else (prepare(),)
        steps.clear()
        with watch:
            call(*prepared)
    return steps


def names_in_bfloat16(call: Callable[..., Any], prepare: Callable[[], Any] | None = None) -> list[str]:
    """Returns the names of :func:`gpu_work_of`, where tensors are bfloat16 by default."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        work = gpu_work_of(call, prepare)
    finally:
        torch.set_default_dtype(before)
    return [step.name if isinstance(step, TorchOp) else step.kernel.__name__ for step in work]


@contextlib.contextmanager
def _bodies_as_fakes(watch: TorchDispatchMode) -> Iterator[None]:
    """Makes the body of each custom operation its own fake, so that it runs on fake tensors, watched as the call is."""

    def watched(body: Callable[..., Any], *args: Any) -> Any:
        with watch:
            return body(*args)

    ops = {value for module in _modules() for value in vars(module).values() if isinstance(value, CustomOpDef)}
    fakes = {op: op._abstract_fn for op in ops}
    try:
        for op in ops:
            op._abstract_fn = functools.partial(watched, op._init_fn)
        yield
    finally:
        for op, fake in fakes.items():
            op._abstract_fn = fake


@contextlib.contextmanager
def recording_launches(launches: list[Any]) -> Iterator[None]:
    """Appends every launch of a Triton kernel to the list instead of running it."""

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> None:
        launches.append(Launch(kernel, args, kwargs, grid))

    def run_all(tuner: Any, *args: Any, **kwargs: Any) -> None:
        for config in tuner.configs:
            tuner.fn.run(*args, **kwargs, **config.all_kwargs())

    with (
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(InterpretedFunction, "run", run),
        mock.patch.object(Autotuner, "run", run_all),
    ):
        yield


@contextlib.contextmanager
def _no_device() -> Iterator[None]:
    """Replaces what needs a driver (entering a device, pinning memory) or memory (a tensor's address)."""
    with (
        mock.patch.object(torch.Tensor, "data_ptr", return_value=0),
        mock.patch.object(torch.Tensor, "pin_memory", torch.Tensor.clone),
        mock.patch.object(torch.backends.cudnn, "is_acceptable", return_value=True),
        mock.patch.object(torch.cuda.device, "__enter__"),
        mock.patch.object(torch.cuda.device, "__exit__", return_value=False),
    ):
        yield


class _Watch(TorchDispatchMode):
    """Records what torch launches, and refuses operations that move data between devices while the host waits."""

    def __init__(self, steps: list[Any]) -> None:
        super().__init__()
        self.steps = steps

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = (_plain_conv if func in _FUSED_CONVS else func)(*args, **kwargs)
        if (
            (func is torch.ops.aten.convolution.default or func in _FUSED_CONVS)
            and out.is_cuda
            and any(map(_is_channels_last, args[:2]))
        ):
            out = torch.empty_like(out, memory_format=torch.channels_last)  # as cuDNN's is, and the fake's is not
        positional = func is torch.ops.aten.copy_.default and args[2:] == (True,)
        if not (positional or kwargs.get("non_blocking")):
            devices = {
                t.device.type for t in _tensors(args, kwargs, out) if t.dim() or func.overloadpacket.__name__ in _COPIES
            }
            if len(devices) > 1:
                raise RuntimeError(f"{func} copies between {sorted(devices)} and makes the host wait")
        if _launches(func, _tensors(args, kwargs), _tensors(out)):
            self.steps.append(_torch_op(func, args, kwargs, out))
            if self.steps[-1].name == "convolution" and args[2] is not None:  # cuDNN's adds none
                self.steps.append(TorchOp("bias of convolution", 2 * out.nbytes, 0, tuple(out.shape)))
        return out


_FUSED_CONVS = (torch.ops.aten.cudnn_convolution_relu.default, torch.ops.aten.cudnn_convolution_add_relu.default)


def _plain_conv(x: torch.Tensor, weight: torch.Tensor, *args: Any) -> torch.Tensor:
    """In place of cuDNN's fused convs, which have no fake: a conv of the same geometry."""
    stride, padding, dilation, groups = args[-4:]
    return torch.ops.aten.convolution.default(x, weight, None, stride, padding, dilation, False, [0, 0], groups)


_COPIES = ("_to_copy", "copy_", "to")


def _is_channels_last(tensor: torch.Tensor) -> bool:
    return tensor.is_contiguous(memory_format=torch.channels_last)


def _tensors(*values: Any) -> list[torch.Tensor]:
    return [value for value in torch.utils._pytree.tree_leaves(values) if isinstance(value, torch.Tensor)]


def _launches(func: Any, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> bool:
    """Returns whether torch launches a kernel: it does not for a view, nor to allocate, nor for operations of ours."""
    own = {tensor.untyped_storage()._cdata for tensor in inputs}
    writes = func._schema.is_mutable or any(tensor.untyped_storage()._cdata not in own for tensor in outputs)
    allocates = func.overloadpacket.__name__.removeprefix("new_").startswith("empty")
    on_gpu = any(tensor.is_cuda and tensor.numel() for tensor in outputs)
    return on_gpu and writes and not (allocates or func.namespace == "retina_fast")


def _torch_op(func: Any, args: Any, kwargs: Any, out: Any) -> TorchOp:
    packet, outputs = func.overloadpacket, _tensors(out)
    fills = packet.__name__.startswith(("new_", "zero", "full", "ones", "fill"))  # which read nothing
    read = {} if fills else {id(tensor): tensor for tensor in _tensors(args, kwargs)}
    flop = flop_registry[packet](*args, **kwargs, out_val=out) if packet in flop_registry else 0
    if func in _FUSED_CONVS:
        flop = flop_registry[torch.ops.aten.convolution](*args[:2], None, *args[-4:-1], False, out_val=out)
    size = sum(min(tensor.nbytes, tensor.untyped_storage().nbytes()) for tensor in (*read.values(), *outputs))
    return TorchOp(packet.__name__, size, flop, tuple(outputs[0].shape))
