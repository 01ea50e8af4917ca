"""Takes costs out of Triton's interpreter that change nothing of what it computes, and a fault out of that of 3.6.

Tests of kernels spend most of their time in the interpreter, and with these a third of that is left at most:

- each call of a function within a kernel searches the whole of ``triton.language`` for what it must replace, which the
  launch has done before, and each launch searches it anew, though it always finds the same;
- each builtin function is called by way of two others, which look for an argument;
- each integer sum and product is computed again in int64 to see whether it overflowed, and what is seen is thrown away,
  since only ``debug=True`` would make an error of it;
- each reduction and scan by a function of the kernel's own goes from element to element, where slices will do;
- each tensor and type makes anew what depends on its shape alone, shapes are compared and broadcast number by number
  though most are one and the same, and each constant makes the table of NumPy's types;
- each number becomes a tensor twice, and which type two operands have in common is asked anew, though most have one.

All are in Triton 3.6 to 3.9. The minimum or maximum of a number and NaN is the number, as on a GPU; 3.6 returns NaN.
"""

import dataclasses
import functools
import inspect
import math
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def quicken() -> None:
    """Makes every kernel that this process interprets run without these costs and this fault."""
    builder = interpreter.InterpreterBuilder
    builder.create_minnumf = lambda self, a, b: self.binary_op(a, b, np.fmin)
    builder.create_maxnumf = lambda self, a, b: self.binary_op(a, b, np.fmax)
    options = interpreter.interpreter_builder.options
    if not options.debug:
        interpreter.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=False)
    reduce, scan = interpreter.ReduceOps, interpreter.ScanOps
    reduce.generic_reduce = _unless_it_branches(_reduce_slices, reduce.generic_reduce)
    scan.generic_scan = _unless_it_branches(_scan_slices, scan.generic_scan)
    _replace_once_a_launch()
    _call_builtins_directly()
    _remember_shapes()
    _remember_types()


def _replace_once_a_launch() -> None:
    launch, replace = interpreter.GridExecutor.__call__, interpreter._patch_lang
    replaced: set[frozenset[str]] = set()  # during this launch: the names of the modules whose functions were
    seen: set[int] = set()  # and the modules that were looked through for these

    def launch_afresh(executor: Any, *args: Any, **kwargs: Any) -> None:
        replaced.clear()
        seen.clear()
        launch(executor, *args, **kwargs)

    def replace_once(function: Any) -> Any:
        if id(function.__globals__) in seen:
            return interpreter._LangPatchScope()
        seen.add(id(function.__globals__))
        used = frozenset(value.__name__ for value in function.__globals__.values() if value is tl or value is tl.core)
        if used in replaced:
            return interpreter._LangPatchScope()
        replaced.add(used)
        return replace(function)

    interpreter.GridExecutor.__call__ = launch_afresh
    interpreter._patch_lang = replace_once


class _Semantic(interpreter.TritonSemantic):
    """What builtin functions do, in which the same tensors and types are asked for once."""

    def __init__(self, builder: Any) -> None:
        super().__init__(builder)
        self._constants: dict[tuple[Any, ...], Any] = {}
        self._common_types: dict[tuple[Any, ...], Any] = {}
        self._kept = {id(kind) for kind in (tl.int32, tl.int64, tl.float32, tl.float64)}  # by operations on two of them

    def scalar_constant(self, value: Any, dtype: Any) -> Any:
        if dtype is None or value != value:
            return super().scalar_constant(value, dtype)
        key = (type(value), value, dtype.name)
        if key not in self._constants:
            self._constants[key] = super().scalar_constant(value, dtype)
            self._constants[key].handle.data.setflags(write=False)
        return self._constants[key]

    def computation_type_impl(self, *types: Any) -> Any:
        key = tuple(kind.name if isinstance(kind, tl.dtype) else kind for kind in types)
        if key not in self._common_types:
            self._common_types[key] = super().computation_type_impl(*types)
        return self._common_types[key]

    def binary_op_type_checking_impl(self, lhs: Any, rhs: Any, *args: Any, **kwargs: Any) -> Any:
        are_tensors = isinstance(lhs, tl.tensor) and isinstance(rhs, tl.tensor)
        if are_tensors and lhs.dtype is rhs.dtype and id(lhs.dtype) in self._kept:
            return self.broadcast_impl_value(lhs, rhs)
        return super().binary_op_type_checking_impl(lhs, rhs, *args, **kwargs)

    def broadcast_impl_value(self, lhs: Any, rhs: Any) -> Any:
        return (lhs, rhs) if lhs.shape is rhs.shape else super().broadcast_impl_value(lhs, rhs)


def _call_builtins_directly() -> None:
    found: dict[Any, list[tuple[str, Any]]] = {}  # of a module or class, which is whole again after each launch
    semantic_of = functools.cache(_Semantic)

    def direct(member: Any, semantic: Any) -> Any:
        function = getattr(member, "__wrapped__", member)
        return lambda *args, _semantic=None, **kwargs: function(*args, _semantic=semantic, **kwargs)

    def replace(package: Any, builder: Any, scope: Any) -> None:
        if package not in found:
            members = [(name, member) for name, member in inspect.getmembers(package) if tl.core.is_builtin(member)]
            found[package] = [(name, direct(member, semantic_of(builder))) for name, member in members]
        for name, function in found[package]:
            scope.set_attr(package, name, function)

    interpreter._patch_builtin = replace


def _remember_shapes() -> None:
    make, make_type, equal = tl.tensor.__init__, tl.block_type.__init__, tl.tuple.__eq__
    made: dict[tuple[int, ...], dict[str, Any]] = {}  # of each shape: the attributes of a tensor
    made_types: dict[tuple[Any, ...], dict[str, Any]] = {}
    of_shapes: dict[tuple[str, int], dict[str, Any]] = {}  # the same types, by which of the shapes in them it is

    def make_alike(tensor: Any, handle: Any, kind: Any) -> None:
        shape = kind.remembered if kind.is_block() else ()
        if shape not in made:
            make(tensor, handle, kind)
            made[shape] = {"shape": tensor.shape, "numel": tensor.numel}
        tensor.__dict__.update(made[shape])
        tensor.handle, tensor.type, tensor.dtype = handle, kind, kind.scalar

    def make_type_alike(kind: Any, element: Any, shape: Any) -> None:
        attributes = of_shapes.get((element.name, id(shape)))
        if attributes is None:
            sides = [side.value if isinstance(side, tl.constexpr) else side for side in shape]
            key = (element.name, *sides, *map(type, sides))
            if key not in made_types:
                make_type(kind, element, shape)
                made_types[key] = {**kind.__dict__, "remembered": tuple(kind.shape)}
            attributes = made_types[key]
            of_shapes[element.name, id(attributes["shape"])] = attributes
        kind.__dict__.update(attributes)
        kind.element_ty = element

    def equal_if_the_same(one: Any, other: Any) -> Any:
        return tl.constexpr(True) if one is other else equal(one, other)

    tl.tensor.__init__, tl.block_type.__init__ = make_alike, make_type_alike
    tl.tuple.__eq__ = equal_if_the_same


def _remember_types() -> None:
    find = interpreter._get_np_dtype
    found: dict[str, np.dtype] = {}

    def find_once(dtype: Any) -> np.dtype:
        name = dtype.scalar.name
        if name not in found:
            found[name] = find(dtype.scalar)
        return found[name]

    interpreter._get_np_dtype = find_once


class _Branch(Exception):
    """A function of the kernel's own asks whether a value holds, which of a slice it does and does not."""


def _unless_it_branches(by_slices: Any, by_elements: Any) -> Any:
    def refuse(value: Any) -> bool:
        if value.handle.data.size > 1:
            raise _Branch
        return bool(value.handle.data)

    def combine(operation: Any, tensors: tuple[Any, ...]) -> list[Any]:
        holds, tl.tensor.__bool__ = tl.tensor.__bool__, refuse
        try:
            return by_slices(operation, tensors)
        except _Branch:
            pass
        finally:
            tl.tensor.__bool__ = holds
        return by_elements(operation, tensors)

    return combine


def _reduce_slices(operation: Any, tensors: tuple[Any, ...]) -> list[Any]:
    """What ``generic_reduce`` gives: all that lies beside each other is combined at once, in the same order."""
    flat = list(tensors)
    if operation.axis is None:
        flat = [operation.to_tensor(tensor.handle.data.flatten(), tensor.dtype) for tensor in tensors]
    axis = operation.axis or 0
    *_, last = _running(operation, flat, axis)
    if operation.keep_dims:
        last = [np.expand_dims(data, axis) for data in last]
    return [operation.to_tensor(data, tensor.dtype) for data, tensor in zip(last, tensors, strict=True)]


def _scan_slices(operation: Any, tensors: tuple[Any, ...]) -> list[Any]:
    """What ``generic_scan`` gives, likewise."""
    slices = zip(*_running(operation, list(tensors), operation.axis), strict=True)
    whole = [np.stack(parts, operation.axis) for parts in slices]
    return [operation.to_tensor(data, tensor.dtype) for data, tensor in zip(whole, tensors, strict=True)]


def _running(operation: Any, tensors: list[Any], axis: int) -> list[list[np.ndarray]]:
    """For each index of the axis, all up to it combined: for each of the tensors an array without that axis."""
    shape = tensors[0].handle.data.shape
    beside = shape[:axis] + shape[axis + 1 :]

    def at(index: int) -> tuple[Any, ...]:
        return tuple(operation.to_tensor(x.handle.data.take(index, axis), x.dtype) for x in tensors)

    def arrays(values: tuple[Any, ...]) -> list[np.ndarray]:
        plain = [value.handle.data if isinstance(value, tl.tensor) else value for value in values]
        data = [np.asarray(value, x.handle.data.dtype) for value, x in zip(plain, tensors, strict=True)]
        return [x.reshape(beside) if x.size == math.prod(beside) else np.broadcast_to(x, beside) for x in data]

    combined = at(0)
    running = [arrays(combined)]
    for index in range(1, shape[axis]):
        values = operation.combine_fn.fn(*combined, *at(index))
        running.append(arrays(values if isinstance(values, tuple) else (values,)))
        combined = tuple(operation.to_tensor(data, x.dtype) for data, x in zip(running[-1], tensors, strict=True))
    return running
