"""Instruments that the tests and the benchmarks share. Nothing here is part of the installed package.

`fake_gpu` records what a call would launch on a GPU; `kernel_calls` lists a call of every kernel at a size really used;
`agreement` counts the detections that two detectors do not share; `exported` compares an exported file with its model.
"""
