"""Detecting: models from files, over data sets with metrics, and over image files with pictures."""
