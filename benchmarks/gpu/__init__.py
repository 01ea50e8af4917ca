"""Runs the cases of `benchmarks.kernels` and `benchmarks.models` on the GPU at hand, and shows what came of them.

`python -m benchmarks.gpu` (`make gpu`) measures and writes benchmarks/results/<gpu>.json, `python -m
benchmarks.gpu.report` (`make report`) draws it beside the goals of `goals`, and `python -m benchmarks.gpu.bring_up`
(`make gpu-test`) says whether everything is right on this GPU.
"""
