"""Reads what the compiler makes of every kernel, for GPUs that are not at hand: registers, spilled bytes, instructions.

`compiled` compiles the launches of `tests.instruments.kernel_calls` for four targets, `sass` reads NVIDIA's machine
code, and `python -m benchmarks.static` prints the table.
"""
