"""Costs of estimators, in gradients of one pair, products and stored numbers: constant in t, while a refit's grow."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from streams import stream
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf_algos.one_pass import Estimator, Mle, Omd, OmdCg, OmdMemoryless


def stored(estimator: Estimator) -> int:
    """Return how many numbers the state has."""
    values: list[Any] = list(estimator.state_dict().values())
    return sum(value.numel() if isinstance(value, torch.Tensor) else 1 for value in values)


class CountSigmoids(TorchDispatchMode):
    """Records the number of elements of every logistic function: one for each gradient or slope of a pair."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.sigmoid.default:
            self.sizes.append(args[0].numel())
        return func(*args, **(kwargs or {}))


def test_one_pass_takes_one_gradient_and_one_look_ahead_a_pair() -> None:
    omd, z_TD = Omd(16), stream(300)[0]
    with CountSigmoids() as count:
        for z in z_TD.split(1):
            omd.step(z)
    assert count.sizes == [1] * 600  # T gradients and T look-ahead points


def test_a_refit_at_every_pair_takes_its_iterations_times_all_pairs_so_far() -> None:
    z_TD, _ = stream(300)
    mle, costs = Mle(16), []
    for z in z_TD.split(1):
        before = mle.gradients
        mle.step(z)
        costs.append(mle.gradients - before)
    for t, cost in enumerate(costs, 1):
        assert cost % t == 0 and 2 <= cost // t <= 8  # one gradient a Newton step, and two that see it end
    half = 300 * 301 / 2
    assert 2 * half <= mle.gradients <= 8 * half
    assert sum(costs[240:]) / sum(costs[:60]) > 6  # the last fifth against the first; one pass has 1


@pytest.mark.parametrize(
    ("make", "numbers"),
    [
        (lambda: Omd(16), 16 * 16 + 2 * 16),
        (lambda: OmdCg(16, rank=3), (2 * 3 + 1) * 16 + 2 * 16),
        (lambda: OmdMemoryless(16, total=80), 10 * 16 + 2 * 16),
    ],
    ids=["omd", "omd_cg", "omd_memoryless"],
)
def test_a_one_pass_state_has_one_size(make: Any, numbers: int) -> None:
    estimator = make()
    sizes = []
    for z in stream(800)[0].split(10):
        estimator.step(z)
        sizes.append(stored(estimator))
    assert len(set(sizes)) == 1 and numbers < sizes[0] < numbers + 12  # a few counts beside tensors


def test_the_state_of_a_refit_grows_with_the_pairs() -> None:
    estimator = Mle(16)
    estimator.step(stream(10)[0])
    small = stored(estimator)
    estimator.step(stream(90, seed=1)[0])
    assert stored(estimator) - small == 90 * 16


@pytest.mark.parametrize("steps", [1, 3])
def test_conjugate_gradient_takes_its_number_of_products_at_every_update(steps: int) -> None:
    estimator = OmdCg(16, steps=steps, tolerance=0.0)
    for t, z in enumerate(stream(200)[0].split(1), 1):
        before = estimator.products
        estimator.step(z)
        # The gradient of the first pair is an eigenvector of its system: one product, up to rounding, solves it.
        assert estimator.products - before == steps or t == 1
