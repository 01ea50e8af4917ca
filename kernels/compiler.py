"""Triton, or a stand-in on systems that have none (macOS, Windows), under which the kernel files still import."""

from types import SimpleNamespace
from typing import Any

import torch

triton: Any
tl: Any
try:
    import triton
    import triton.language as tl
except ImportError:
    triton = SimpleNamespace(jit=lambda fn=None, **_: fn if fn else (lambda fn: fn))
    tl = SimpleNamespace(constexpr=lambda value: value)


@triton.jit
def _probe():
    pass


HAS_TRITON = hasattr(triton, "language")
INTERPRETED = type(_probe).__name__ == "InterpretedFunction"  # TRITON_INTERPRET=1: kernels run on CPU tensors
PTX = HAS_TRITON and not INTERPRETED and torch.version.hip is None  # inline PTX needs NVIDIA's compiler
