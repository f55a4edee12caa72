"""Choice of pairs to compare: candidates of a prompt, the base of pair selectors, labels, queries of a stream, and regret.

The selectors themselves are providers of the kind `advantage`, one file each in `rlhf_algos.advantage`.
"""
