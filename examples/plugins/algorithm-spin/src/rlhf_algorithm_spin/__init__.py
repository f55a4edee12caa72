"""SPIN: a policy learns to prefer demonstrations to the samples of its own past."""
