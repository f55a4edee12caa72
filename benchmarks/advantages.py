"""Credit for 8 completions of 65,536 tokens: our estimators beside a plain loop over tokens.

    python benchmarks/advantages.py

The loop is what a direct reading of the papers gives, vectorized over completions only; many systems run it on the
controller for every batch. Prints milliseconds and the largest difference from the same loop in float64, relative to
the largest advantage.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import torch

from rlhf_algos.returns import discounted_returns, gae

Result = TypeVar("Result")


def loop_gae(rewards_NT: torch.Tensor, values_NT: torch.Tensor, gamma: float, lam: float) -> torch.Tensor:
    """A_t = r_t + gamma V_{t+1} - V_t + gamma lam A_{t+1}, token by token."""
    advantages_NT = torch.zeros_like(rewards_NT)
    next_value_N = next_advantage_N = torch.zeros_like(rewards_NT[:, 0])
    for t in reversed(range(rewards_NT.shape[1])):
        delta_N = rewards_NT[:, t] + gamma * next_value_N - values_NT[:, t]
        next_advantage_N = delta_N + gamma * lam * next_advantage_N
        next_value_N = values_NT[:, t]
        advantages_NT[:, t] = next_advantage_N
    return advantages_NT


def loop_returns(rewards_NT: torch.Tensor, gamma: float) -> torch.Tensor:
    """G_t = r_t + gamma G_{t+1}, token by token."""
    return loop_gae(rewards_NT, torch.zeros_like(rewards_NT), gamma, 1.0)


def best_of(repeats: int, function: Callable[[], Result]) -> tuple[float, Result]:
    """The shortest of some runs in milliseconds, and the result."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = function()
        times.append(time.perf_counter() - start)
    return 1000 * min(times), result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--completions", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=65_536)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    noise = torch.Generator().manual_seed(0)
    shape = (arguments.completions, arguments.tokens)
    rewards_NT, values_NT = 0.1 * torch.randn(shape, generator=noise), torch.randn(shape, generator=noise)
    everywhere_NT = torch.ones(shape, dtype=torch.bool)
    gaps_NT = torch.rand(shape, generator=noise) < 0.8

    print(f"{shape[0]} completions of {shape[1]:,} tokens, {arguments.threads} thread(s), best of several runs\n")
    print(f"{'':<28}{'loop ms':>10}{'ours ms':>10}{'times':>8}{'error':>10}")
    for gamma, lam in ((1.0, 0.95), (0.999, 0.99), (1.0, 1.0)):
        loop, _ = best_of(2, partial(loop_gae, rewards_NT, values_NT, gamma, lam))
        ours, (got, _) = best_of(7, partial(gae, rewards_NT, values_NT, everywhere_NT, gamma, lam))
        exact = loop_gae(rewards_NT.double(), values_NT.double(), gamma, lam)
        report(f"GAE gamma {gamma} lambda {lam}", loop, ours, got, exact)
    loop, _ = best_of(2, lambda: loop_returns(rewards_NT, 1.0))
    ours, got = best_of(7, lambda: discounted_returns(rewards_NT, everywhere_NT, 1.0))
    report("returns gamma 1.0", loop, ours, got, loop_returns(rewards_NT.double(), 1.0))
    ours, _ = best_of(7, lambda: gae(rewards_NT, values_NT, gaps_NT, 1.0, 0.95)[0])
    print(f"{'GAE over environment gaps':<28}{'':>10}{ours:>10.1f}")


def report(name: str, loop: float, ours: float, got: torch.Tensor, exact: torch.Tensor) -> None:
    error = float((got - exact).abs().max() / exact.abs().max())
    print(f"{name:<28}{loop:>10.1f}{ours:>10.1f}{loop / ours:>8.0f}{error:>10.1e}")


if __name__ == "__main__":
    main()
