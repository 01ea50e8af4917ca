"""The tree demo: aerial photographs from a package on PyPI, and the detector that was trained on them."""
