"""Analysis of attacks afterwards: success at any threshold, with intervals, and comparisons of checkpoints."""
