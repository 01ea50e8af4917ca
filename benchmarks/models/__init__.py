"""Benchmarks of what the operations add up to: the loss path, postprocessing, inference, the training step, loading.

Those with CASES and SMALL are recorded by `make gpu`, as the operations are. `agreement`, `export` and `loader` are
commands of their own, which measure on a CPU.
"""
