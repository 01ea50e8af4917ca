"""The tree demo: real aerial photographs, brought from the package index, and the detector trained on them."""
