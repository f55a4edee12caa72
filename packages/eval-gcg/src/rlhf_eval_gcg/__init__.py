"""GCG attack evaluation for rlhf-core."""
