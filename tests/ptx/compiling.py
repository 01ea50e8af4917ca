"""Lets Triton compile kernels for a GPU, up to PTX, within a process in which they are interpreted.

With TRITON_INTERPRET=1, which the tests set, ``@triton.jit`` makes InterpretedFunctions, also of the functions of
Triton's own library. :func:`compilable` puts a JITFunction in the place of each and undoes what the interpreter left
changed in ``triton.language``; :func:`up_to_ptx` has the compiler stop before the assembler.
"""

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

_CHANGED_BY_THE_INTERPRETER = (tl, tl.core, tl.math, tl.tensor, tl.dtype, tl.core.tensor_descriptor_base)
_BEFORE = [(owner, dict(vars(owner))) for owner in _CHANGED_BY_THE_INTERPRETER]  # taken before any kernel ran
_SWITCHES = {"PTX": True, "INTERPRETED": False}  # of retina_fast.kernels.dispatch, wherever they were imported


@functools.cache
def compiled_form(function: InterpretedFunction) -> JITFunction:
    """The function as ``@triton.jit`` would have made it without the interpreter."""
    return JITFunction(function.fn, **function.kwargs)


def _restore_language() -> None:
    """The interpreter does not take back all that it replaces (Triton 3.6 to 3.9)."""
    for owner, before in _BEFORE:
        for name, value in before.items():
            if not name.startswith("__") and vars(owner).get(name) is not value:
                setattr(owner, name, value)


def _replacements(modules: tuple[str, ...]) -> Iterator[tuple[Any, str, Any]]:
    """What is to be replaced: (owner, name, new value)."""
    for module_name, module in [*sys.modules.items()]:
        if not module_name.startswith(("triton.language", *modules)):
            continue
        for name, value in [*vars(module).items()]:
            if isinstance(value, InterpretedFunction):
                yield module, name, compiled_form(value)
                if module is tl.standard and hasattr(tl.tensor, name):
                    yield tl.tensor, name, compiled_form(value)  # x.sum(), for tl.sum(x)
            elif name in _SWITCHES and isinstance(value, bool):
                yield module, name, _SWITCHES[name]


def _own_environment() -> Any:
    """Within, Triton does not write its settings into the environment, where they would outlast the context."""
    return mock.patch.object(triton.knobs, "propagate_env", False)


@contextlib.contextmanager
def compilable(modules: tuple[str, ...]) -> Iterator[None]:
    """Within, the kernels of these modules, given by the beginnings of their names, are compiled."""
    _restore_language()
    replaced = []
    with _own_environment(), mock.patch.object(triton.knobs.runtime, "interpret", False):
        try:
            for owner, name, value in _replacements(modules):
                replaced.append((owner, name, vars(owner)[name]))
                setattr(owner, name, value)
            yield
        finally:
            for owner, name, value in reversed(replaced):
                setattr(owner, name, value)


def _stages_hook(backend: Any = None, stages: dict[str, Callable[..., Any]] | None = None, *_: Any) -> Any:
    """Called without arguments, by Triton 3.8 and newer, it gives what sets its binaries apart."""
    if stages is None:
        return "ptx", "ptx"
    stages["cubin"] = lambda ptx, metadata: ptx.encode()
    return None


@contextlib.contextmanager
def up_to_ptx() -> Iterator[None]:
    """Within, a compiled kernel's binary is its PTX. Such binaries are cached in a folder of their own."""
    folder = str(Path(triton.knobs.cache.dir) / "ptx")
    with (
        _own_environment(),
        mock.patch.object(triton.knobs.runtime, "add_stages_inspection_hook", _stages_hook),
        mock.patch.object(triton.knobs.cache, "dir", folder),
    ):
        yield
