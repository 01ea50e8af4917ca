"""Exported files: writing them in each format, and running them."""
