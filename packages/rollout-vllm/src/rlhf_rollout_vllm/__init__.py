"""vLLM as a rollout engine for rlhf-core."""
