"""Small batches with everything that trips providers: ragged lengths, an answer that is only its end, one that was cut,
tokens of an environment in the middle, rewards that are all equal in one group."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from rlhf_core.contract.batch import Rollouts, StepInfo
from rlhf_core.contract.distributed import World
from rlhf_core.contract.requirements import letters, per_token, shape_of
from rlhf_core.contract.results import RewardOutput
from rlhf_core.lazy import torch
from rlhf_core.util.padding import pad_rows

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from rlhf_core.contract.batch import Batch
    from rlhf_core.plugins.registry import Registry
    from rlhf_core.run.run import Run

__all__ = ["tiny_extras", "tiny_outputs", "tiny_rewards", "tiny_rollouts", "tiny_run"]

EOS = 0

ANSWERS = ("Yes.", "", "No, never!", "I am so happy", "4", "42 is it", "awful", "good, good")
"""Texts of completions, in turn; the second is only the token that ends it."""


def tiny_rollouts(prompts: int = 2, completions: int = 4) -> Rollouts:
    """P prompts with G completions each. Tokens are bytes; the last completion was cut and has no end token."""
    N = prompts * completions
    texts = [ANSWERS[i % len(ANSWERS)] for i in range(N)]
    tokens = [[*text.encode(), EOS] for text in texts]
    tokens[-1] = tokens[-1][:-1] or [EOS]
    asked = [f"Question {i}?" + "?" * (i % 3) for i in range(prompts) for _ in range(completions)]
    tokens_NT, lengths_N = pad_rows(tokens)
    prompt_NL, prompt_lengths_N = pad_rows([list(text.encode()) for text in asked])
    mask_NT = torch.arange(tokens_NT.shape[1])[None] < lengths_N[:, None]
    longest = int(lengths_N.argmax())
    mask_NT[longest, 2:4] = False  # a tool answered here: part of the completion, not sampled
    group_N = torch.arange(prompts).repeat_interleave(completions)
    rollouts = Rollouts(
        prompts=asked,
        texts=texts,
        prompt_NL=prompt_NL,
        prompt_lengths_N=prompt_lengths_N,
        tokens_NT=tokens_NT,
        lengths_N=lengths_N,
        mask_NT=mask_NT,
        group_N=group_N,
        labels=[f"label {i}" for i in group_N.tolist()],
        meta=[{"datasource": "tiny"} for _ in range(N)],
        step=StepInfo(progress=0.5, kl_coef=0.1),
        world=World(),
        finish=["length" if i == N - 1 else "stop" for i in range(N)],
    )
    return rollouts.with_extras(**tiny_extras(["sampler_logprobs_NT"], rollouts))


def tiny_rewards(rollouts: Batch, equal: bool = False) -> RewardOutput:
    """Rewards between 0 and 1: all different, or all the same."""
    N = len(rollouts)
    rewards_N = torch.full((N,), 0.5) if equal else torch.rand(N, generator=_generator("rewards"))
    return RewardOutput(rewards_N, torch.zeros(rollouts.mask_NT.shape), rewards_N)


def tiny_extras(needs: Iterable[str], batch: Batch) -> dict[str, Tensor]:
    """A plausible value of each need, the same for the same name and shape; zero where there is no completion."""
    return {name: _plausible(name, batch) for name in sorted(needs)}


def tiny_outputs(names: Iterable[str], batch: Batch) -> dict[str, Tensor]:
    """Return outputs like those of a forward pass, as leaves that collect gradients."""
    return {name: _plausible(name, batch).requires_grad_() for name in sorted(names)}


def tiny_run(output: str | Path, algorithm: Any = None, registry: Registry | None = None, **options: Any) -> Run:
    """A run of two steps on the model `tiny`, not started; nothing is written before it starts.

    Args:
        output: its folder.
        algorithm: as in `make_config`; a plain policy gradient that needs no package but core if absent.
        registry: where names are looked up and observers found; everything installed if absent.
        options: as in `make_config`, and they win.
    """
    from rlhf_core.config.builder import make_config
    from rlhf_core.run.run import Run
    from rlhf_core.testing.tiny_algorithm import TINY_SAMPLING, TinyAlgorithm

    small: dict[str, Any] = {"model": "tiny", "steps": 2, "batch_size": 2, "output": str(output)}
    if "epochs" in options:
        del small["steps"]
    if algorithm is None:
        small["sampling"] = TINY_SAMPLING
    return Run(make_config(algorithm or TinyAlgorithm(), registry, **(small | options)), registry)


def _plausible(name: str, batch: Batch) -> Tensor:
    sizes = {"H": 8, "K": 3}
    rest = [sizes.get(letter, 5) for letter in letters(name)[2 if per_token(name) else 1 :]]
    noise = torch.randn(shape_of(name, batch.mask_NT.shape, rest), generator=_generator(name))
    if not per_token(name):
        return noise.sigmoid() if letters(name) in ("N", "") else noise
    if name.endswith("logprobs_NT"):  # near each other, as those of a policy and its past are
        common = torch.rand(batch.mask_NT.shape, generator=_generator("logprobs"))
        noise = -2 * common - 0.05 * noise.abs()
    elif name.endswith("entropy_NT"):
        noise = noise.abs()
    inside = batch.mask_NT if name in ("advantages_NT", "returns_NT") else _inside(batch)
    return torch.where(inside.view(*inside.shape, *(1 for _ in rest)), noise, 0.0)


def _inside(batch: Batch) -> Tensor:
    """(N, T) where there is a completion, sampled or not."""
    return torch.arange(batch.tokens_NT.shape[1])[None] < batch.lengths_N[:, None]


def _generator(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(sum(name.encode()))
