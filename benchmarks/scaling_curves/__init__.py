"""Curves of `benchmarks/scaling.py`: a module a topic, which registers its curves when it is imported."""
