"""Rows of four numbers in a Triton kernel, such as boxes: a register for each column."""

from retina_fast.kernels.compiler import tl, triton


@triton.jit
def load_rows(ptr, row, mask):
    """The given rows of a (*, 4) tensor as four float32 vectors; 0 where masked."""
    ptr += row * 4
    return (
        tl.load(ptr, mask=mask, other=0.0).to(tl.float32),
        tl.load(ptr + 1, mask=mask, other=0.0).to(tl.float32),
        tl.load(ptr + 2, mask=mask, other=0.0).to(tl.float32),
        tl.load(ptr + 3, mask=mask, other=0.0).to(tl.float32),
    )


@triton.jit
def store_rows(ptr, row, a, b, c, d, mask):
    """Writes the given rows of a (*, 4) tensor in its dtype."""
    ptr += row * 4
    dtype = ptr.dtype.element_ty
    tl.store(ptr, a.to(dtype), mask=mask)
    tl.store(ptr + 1, b.to(dtype), mask=mask)
    tl.store(ptr + 2, c.to(dtype), mask=mask)
    tl.store(ptr + 3, d.to(dtype), mask=mask)
