"""Checks and measurements of `benchmarks/gpu.py`: a file per topic, and `check`, `driver`, `worker`, `page` to run them."""
