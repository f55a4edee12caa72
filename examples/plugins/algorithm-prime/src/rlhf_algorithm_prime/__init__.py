"""PRIME: a policy and an implicit process reward model that learn from the same samples."""
