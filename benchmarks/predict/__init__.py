"""Computes what the goals will take on an H200, and what training will cost, before anything is measured.

No record has judged these figures yet, so nothing outside this folder imports it: `make report` reads
predictions.json alone. `python -m benchmarks.predict` writes that file and the table of NOTES.md, and `python -m
benchmarks.predict.cost` prints the tables of docs/coco.md.
"""
