"""GCG attack evaluation for rlhf-core. Its public names are those of `rlhf_eval_gcg.attack`."""
