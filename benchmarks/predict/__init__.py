"""Computes what the goals take on an H200, and what training costs, without a GPU.

These are predictions, and nothing outside this folder imports it: `make report` reads predictions.json alone. `python
-m benchmarks.predict` writes that file and the table of NOTES.md, and `python -m benchmarks.predict.cost` prints the
tables of docs/coco.md.
"""
