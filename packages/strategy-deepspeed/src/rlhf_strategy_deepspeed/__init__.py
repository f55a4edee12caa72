"""DeepSpeed ZeRO as a training strategy for rlhf-core."""
