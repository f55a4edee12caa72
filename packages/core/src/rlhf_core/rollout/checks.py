"""Check what a rollout engine returned against its contract, before anything is computed of it."""

from __future__ import annotations

from rlhf_core.contract.batch import Prompts, Rollouts
from rlhf_core.contract.options import Sampling
from rlhf_core.errors import ContractError
from rlhf_core.lazy import torch

__all__ = ["check_rollouts"]

EXTRAS = ("sampler_logprobs_NT", "versions_NT")
"""Extras that every engine gives."""


def check_rollouts(engine: object, prompts: Prompts, sampling: Sampling, result: object) -> Rollouts:
    """Return `result`, if it has the completions that were asked for.

    Raises:
        ContractError: it has other numbers, shapes or types; the message names the class of the engine.
    """
    who = f"rollout {type(engine).__qualname__} of {type(engine).__module__}"
    if not isinstance(result, Rollouts):
        raise ContractError(
            f"{who} returned {type(result).__name__}; an engine returns Rollouts, such as those of assemble"
        )
    asked = len(prompts) * sampling.n
    if len(result) != asked:
        raise ContractError(
            f"{who} returned {len(result)} completions for {len(prompts)} prompts; with sampling.n {sampling.n} it must "
            f"return {asked}, those of a prompt adjacent"
        )
    shape = tuple(result.tokens_NT.shape)
    for name, values_NT, dtype in (
        ("tokens_NT", result.tokens_NT, torch.int64),
        ("mask_NT", result.mask_NT, torch.bool),
    ):
        if values_NT.dtype != dtype or tuple(values_NT.shape) != shape:
            raise ContractError(
                f"{who}: {name} must be {dtype} of the shape {shape}, not {values_NT.dtype} of {tuple(values_NT.shape)}"
            )
    for name in EXTRAS:
        if name not in result or tuple(result[name].shape) != shape:
            raise ContractError(f"{who}: the extra {name!r} must be given, of the shape {shape}; see assemble")
    if asked and (longest := int(result.lengths_N.max())) > sampling.max_new_tokens:
        raise ContractError(
            f"{who} returned a completion of {longest} tokens, above sampling.max_new_tokens {sampling.max_new_tokens}"
        )
    return result
