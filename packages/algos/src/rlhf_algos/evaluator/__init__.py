"""Measuring a policy: one evaluator a file."""
