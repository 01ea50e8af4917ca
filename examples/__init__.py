"""Short scripts, each of which tests/test_examples.py runs: `python -m examples.NAME` from the root of the checkout."""
