"""Twists: estimates by a proposal network of the future of a prefix, from its log-probabilities or logits.

A twist psi_t turns samples of the policy's prefixes into those of pi_t(s_1:t) = p(s_1:t) psi_t(s_1:t) / Z_t. Three ways to read
it off the network q with logits z (RePULSe's `--parameterization`), where only q is differentiated:

    q_p_s_t          log psi_t = log q(s_t | s_<t) - log p(s_t | s_<t)
    q_p_s_1_to_t     the same of all tokens up to t
    unnormalized     log psi_t = z_t(s_t) - log p(s_t | s_<t)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from rlhf_core.contract.requirements import TRAINED

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Psi", "log_psi", "psi_needs", "to_tokens"]

Psi = Literal["q_p_s_t", "q_p_s_1_to_t", "unnormalized"]

LOGITS = f"{TRAINED}.logits_NT"


def psi_needs(psi: Psi) -> frozenset[str]:
    """Return the outputs of the trained proposal that the batch must contain."""
    return frozenset({LOGITS}) if psi == "unnormalized" else frozenset()


def log_psi(psi: Psi, policy_NT: Tensor, proposal_NT: Tensor, extras: Mapping[str, Tensor], mask_NT: Tensor) -> Tensor:
    """log psi_t of every sampled token, zero elsewhere; float64."""
    own_NT = extras[LOGITS] if psi == "unnormalized" else proposal_NT
    log_psi_NT = (own_NT.double() - policy_NT.double()).masked_fill(~mask_NT, 0.0)
    return log_psi_NT.cumsum(1) if psi == "q_p_s_1_to_t" else log_psi_NT


def to_tokens(psi: Psi, credit_NT: Tensor, mask_NT: Tensor) -> Tensor:
    """Credit of grad log psi_t as credit of each token's own output: a cumulated log psi_t holds every token up to t."""
    credit_NT = credit_NT * mask_NT
    return credit_NT.flip(1).cumsum(1).flip(1) * mask_NT if psi == "q_p_s_1_to_t" else credit_NT
