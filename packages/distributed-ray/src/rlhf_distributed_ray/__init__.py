"""Ray as a launcher for rlhf-core."""
