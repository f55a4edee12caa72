"""PyTorch FSDP2 as a training strategy for rlhf-core."""
