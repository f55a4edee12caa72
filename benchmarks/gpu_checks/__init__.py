"""What `benchmarks/gpu.py` checks and measures: a file per topic, and `check`, `driver`, `worker` and `page` that run them."""
