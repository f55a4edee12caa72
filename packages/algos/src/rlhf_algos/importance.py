"""Self-normalized importance weights over the samples of one prompt, and what they imply about target and proposal.

For samples of a proposal q and a target sigma = p phi / Z, the unnormalized weights are w~ = p phi / q; E_q[w~] = Z. All
sums run over the mask only and in float64: a long completion's log-weight is a difference of large numbers. `group_N`
numbers the prompts; groups may have any size. Resampling is left out: credit weighs every sample once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlhf_core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_core.contract.distributed import World

__all__ = ["group_log_softmax", "group_logsumexp", "log_weights", "twist_log_weights", "weight_metrics"]

COLLAPSED = 0.99  # a prompt whose largest weight is beyond this rests on one sample


def group_logsumexp(values: Tensor, group_N: Tensor) -> Tensor:
    """log sum exp over its group, for every row and each column separately; float64."""
    groups, index_N = torch.unique(group_N, return_inverse=True)
    values = values.double()
    shape = (len(groups), *values.shape[1:])
    index = index_N.view(-1, *[1] * (values.dim() - 1)).expand_as(values)
    largest = torch.full(shape, -torch.inf, dtype=torch.float64).scatter_reduce(0, index, values, "amax")
    sums = torch.zeros(shape, dtype=torch.float64).index_add(0, index_N, (values - largest[index_N]).exp())
    return (largest + sums.log())[index_N]


def group_log_softmax(values: Tensor, group_N: Tensor) -> Tensor:
    """Log of weights that sum to one over each group, each column separately; float64."""
    return values.double() - group_logsumexp(values, group_N)


def log_weights(policy_NT: Tensor, proposal_NT: Tensor, log_potential_N: Tensor, mask_NT: Tensor) -> Tensor:
    """log w~ = log p(s) + log phi(s) - log q(s), from the log-probabilities of sampled tokens; float64."""
    return _masked_difference(policy_NT, proposal_NT, mask_NT).sum(1) + log_potential_N.double()


def twist_log_weights(policy_NT: Tensor, proposal_NT: Tensor, log_psi_NT: Tensor, mask_NT: Tensor) -> Tensor:
    """log of p(s_1:t) psi_t(s_1:t) / q(s_1:t), which turn samples of q into samples of pi_t; float64.

    After a completion's end the prefix is the whole completion and its weight stays: the end is absorbing. With the
    parameterization psi_t = q_t / p_t, step t cancels and this is the weight of the tokens before t.
    """
    return _masked_difference(policy_NT, proposal_NT, mask_NT).cumsum(1) + log_psi_NT.double()


def weight_metrics(log_weights_N: Tensor, group_N: Tensor, world: World | None, prefix: str) -> dict[str, float]:
    """Estimates from log w~, means over the prompts of all ranks.

    `ess`: effective sample size, 1 / sum w^2. `largest_weight`: of a prompt's samples, 1 / n at best. `log_z`: log of the mean
    w~. `kl_proposal_target`: KL(q || sigma) as log Z - mean log w~. `kl_target_proposal`: KL(sigma || q) as
    sum w log w~ - log Z, never above log of the group size. `collapsed`: the share of prompts in which one sample holds over
    99 % of the weight. `rlhf_algos.collapse` warns.
    """
    first_P, index_N = _first_of_groups(group_N)
    P = len(first_P)

    def add_up(values_N: Tensor) -> Tensor:
        return torch.zeros(P, dtype=torch.float64).index_add(0, index_N, values_N.double())

    size_P = add_up(torch.ones_like(log_weights_N))
    lse_N = group_logsumexp(log_weights_N, group_N)
    w_N = (log_weights_N - lse_N).exp()
    log_z_P = lse_N[first_P] - size_P.log()
    largest_P = torch.zeros(P, dtype=torch.float64).scatter_reduce(0, index_N, w_N, "amax")
    columns = {
        "ess": 1 / add_up(w_N.square()),
        "largest_weight": largest_P,
        "log_z": log_z_P,
        "kl_proposal_target": log_z_P - add_up(log_weights_N) / size_P,
        "kl_target_proposal": add_up(w_N * log_weights_N) - log_z_P,
        "collapsed": ((largest_P > COLLAPSED) & (size_P > 1)).double(),
    }
    sums = torch.stack([*(values_P.sum() for values_P in columns.values()), torch.tensor(float(P)).double()])
    sums = world.sum(sums) if world is not None else sums
    means = (sums[:-1] / sums[-1].clamp(min=1)).tolist()
    return {f"{prefix}/{name}": value for name, value in zip(columns, means, strict=True)}


def _masked_difference(policy_NT: Tensor, proposal_NT: Tensor, mask_NT: Tensor) -> Tensor:
    """log p - log q of each sampled token, zero elsewhere; float64."""
    return (policy_NT.double() - proposal_NT.double()).masked_fill(~mask_NT, 0.0)


def _first_of_groups(group_N: Tensor) -> tuple[Tensor, Tensor]:
    """A row of each group, and the group's index of every row."""
    groups, index_N = torch.unique(group_N, return_inverse=True)
    first_P = torch.zeros(len(groups), dtype=torch.long).scatter(0, index_N, torch.arange(len(group_N)))
    return first_P, index_N
