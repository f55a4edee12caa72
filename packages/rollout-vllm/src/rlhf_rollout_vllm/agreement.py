"""Compare the engine with its trainer: the log-probabilities of a few sampled tokens, by both.

A weight that did not arrive, a head that stayed as it was, another attention mask or another tokenizer all show here, before
a step is trained on wrong ratios. An error smaller than rounding does not show: the bound is that of the dtypes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from rlhf_core.contract.options import Sampling
from rlhf_core.errors import RunStopped, option, run_option
from rlhf_core.lazy import torch
from rlhf_core.util.messages import log
from rlhf_rollout_vllm.checksums import add_checksums, describe_groups, differing

if TYPE_CHECKING:
    from rlhf_core.contract.batch import Prompts, Rollouts
    from rlhf_core.contract.roles import Role
    from rlhf_rollout_vllm.session import Engine

__all__ = ["check", "compare_weights", "kept_mass"]

LOGPROBS = frozenset({"logprobs_NT"})

PROMPTS, TOKENS = 4, 16
"""Size of the comparison: small compared with a batch, and enough to see any layer."""

BOUNDS = {"float32": 1e-3}
"""Largest mean difference by dtype. Engines agree to 1e-5 in float32; 16-bit ones differ by 0.01 to 0.03."""

BOUND_16 = 0.05


def check(engine: Engine, role: Role, prompts: Prompts, when: str) -> dict[str, float]:
    """Mean and largest difference over tokens that the engine samples for this, as metrics.

    The tokens are sampled at the temperature of the role's own log-probabilities and without truncation, whatever the run
    asks for: other distributions could not be compared.

    Raises:
        RunStopped: the mean is beyond the bound.
    """
    engine.probe = prompts.rows(range(min(PROMPTS, len(prompts))))
    longest = max(map(len, engine.probe.token_ids))
    room = max(1, min(TOKENS, engine.window - longest))
    sampling = Sampling(n=1, max_new_tokens=room, temperature=role.spec.temperature)
    rollouts = engine.sample(engine.probe, sampling, whole_head=True)
    trainer_NT = role.infer(rollouts, LOGPROBS)["logprobs_NT"]
    apart = (rollouts["sampler_logprobs_NT"] - trainer_NT)[rollouts.mask_NT].abs()
    mean, largest = float(apart.mean()), float(apart.max())
    bound = engine.options.max_logprob_diff or max(
        BOUNDS.get(d, BOUND_16) for d in (engine.dtype, role.spec.options.compute_dtype)
    )
    if not mean <= bound:  # written so that nan stops
        raise RunStopped(
            f"after {when}, log-probabilities of rollout 'vllm' differ from those of role {role.name!r} by "
            f"{mean:.2g} on average and {largest:.2g} at most, above {option('max_logprob_diff')} {bound:g}: vLLM "
            "did not receive the right weights, or it computes this model differently; use "
            f"{run_option('rollout', 'hf')}"
        )
    return {"sync/logprob_diff_mean": mean, "sync/logprob_diff_max": largest}


def compare_weights(engine: Engine, role: Role, when: str) -> None:
    """Compare all weights by checksums, exactly, wherever the engine gives some.

    Models whose weights vLLM changes on loading are found when the engine opens: layers that differ then are never compared. A
    layer that was left out at that time shows in `check`.

    Raises:
        RunStopped: weights differ.
    """
    found = engine.host.checksums()
    if not found:
        return
    weights = role.weights() if engine.adapters is None else role.base_weights()
    expected = add_checksums(weights, getattr(torch, engine.dtype))
    wrong = set[int]().union(*(differing(expected, each) for each in found))
    if engine.changed_layers is None:
        engine.changed_layers = frozenset(wrong)
        if wrong:
            log.warning(
                f"rollout 'vllm' changes weights of {describe_groups(wrong)} on loading, so that checksums cannot compare them"
            )
    wrong -= engine.changed_layers
    if wrong:
        raise RunStopped(
            f"after {when}, weights of rollout 'vllm' in {describe_groups(wrong)} differ from those of role {role.name!r}: "
            f"they did not arrive as they are; report it, and use {run_option('rollout', 'hf')}"
        )


def kept_mass(role: Role, rollouts: Rollouts) -> float:
    """The mean share of the probability that truncated sampling kept, from a few completions.

    vLLM gives log-probabilities over the kept set only; the role's are over the whole vocabulary, so that their difference is
    the log of the kept share (at equal temperatures).
    """
    few = replace(rollouts.rows([i * len(rollouts) // PROMPTS for i in range(PROMPTS)]), kept_sets=[])
    log_mass_NT = role.infer(few, LOGPROBS)["logprobs_NT"] - few["sampler_logprobs_NT"]
    return float(log_mass_NT[few.mask_NT].exp().mean())
