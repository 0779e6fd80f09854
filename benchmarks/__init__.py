"""Experiments: what is compared with what, once. Run from the repository's folder: `python -m benchmarks.quality`."""
