"""Credit assignment: one estimator a file."""
