"""Triton, or a stand-in on systems that have none (macOS, Windows), under which the kernel files still import."""

from types import SimpleNamespace

import torch

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ImportError:
    triton = SimpleNamespace(jit=lambda fn=None, **_: fn if fn else (lambda fn: fn))
    tl = SimpleNamespace(constexpr=lambda value: value)
    HAS_TRITON = False


@triton.jit
def _probe():
    pass


INTERPRETED = type(_probe).__name__ == "InterpretedFunction"  # TRITON_INTERPRET=1: kernels run on CPU tensors
PTX = HAS_TRITON and not INTERPRETED and torch.version.hip is None  # inline PTX needs NVIDIA's compiler
