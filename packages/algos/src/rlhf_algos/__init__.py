"""Algorithms for rlhf-core: advantage estimators, losses, and the presets that compose them.

One file per estimator in `advantage`, per objective in `loss`, per preset in `algorithm`. The mathematics they share is
in `groups`, `returns`, `whitening`, `ratios` and `pairs`, as pure functions. Importing any of it imports no torch.
"""
