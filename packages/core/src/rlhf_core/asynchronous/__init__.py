"""Asynchronous sampling: iterations are sampled while earlier ones are trained on, and how old their tokens may be."""
