"""One benchmark for each operation, in a file of the operation's name: PyTorch or torchvision eager, compiled, ours.

Each file has CASES, which `make gpu` records, and SMALL, the same at sizes that a CPU can bear, by which the tests run
them. Each case is checked against the operation's reference before it is timed. `make bench` runs the files with
pytest-benchmark on whatever device is there.
"""
