"""Measurements of speed and memory, each compared with what a user would run instead.

`kernels/` has a benchmark for each operation and `models/` for whole models; `gpu/` runs their cases on a GPU and
reports them; `static/` reads compiled kernels without a GPU; `predict/` computes what an H200 will take. `case` says
what a benchmark is made of, and `timing` how it is timed.
"""
