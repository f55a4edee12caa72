"""The rest of the published checks: exact quantities of the fixture, early ends, order and padding.

docs/repulse.md has the list of all checks and where each is tested.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from repulse_fixture import ALL, BAD, P0, TARGET, P, Q, credit, near, on_q, reward, sigma
from torch import Tensor

from rlhf_algos.advantage.ctl import CTLAdvantage
from rlhf_algos.advantage.negative import NegativeAdvantage
from rlhf_algos.advantage.sixo_negatives import SixoNegativesAdvantage
from rlhf_algos.evaluator.bad_probability import enumerate_bad
from rlhf_core.contract.batch import Rollouts
from rlhf_core.testing.batches import make_batch


def test_the_fixture_has_every_published_quantity():
    log_p, log_q = P(ALL).sum(1), Q(ALL).sum(1)
    p, q, r = log_p.exp(), log_q.exp(), reward(ALL)
    assert (ALL[r.argmin()].tolist(), ALL[r.argmax()].tolist()) == ([4, 7], [7, 5])
    near(torch.stack([r.min(), r.max()]), [-3.4972886788, 3.4488163600])
    near(-p @ log_p, 3.7152852434)
    target, _ = sigma(-1)
    near(q @ (log_q - target.log()), 1.8257929972)
    near(target @ (target.log() - log_p), 1.4494641804)
    near(target.view(8, 8).sum(1), [0.09095312, 0.05366867, 0.04665636, 0.13714249, 0.54809106, 0.10637952, 0.00654586,
                                    0.01056293], 5e-9)  # fmt: skip
    extreme, _ = sigma(-10)
    near(extreme @ (extreme.log() - log_q), 4.4145589189)
    near(p @ (r < -2).double(), 0.0665135861)
    assert int((r < -2).sum()) == 9


def test_a_penalised_return_is_its_bound_less_the_divergence_from_the_best_policy():
    """E_p[r] - c KL(p || p0) = c log Z* - c KL(p || p*), with p* proportional to p0 exp(r / c)."""
    c, log_p, log_p0 = 0.2, P(ALL).sum(1), P0(ALL).sum(1)
    log_z = (log_p0 + reward(ALL) / c).logsumexp(0)
    best = log_p0 + reward(ALL) / c - log_z
    near(c * log_z, 2.7884785092)
    near(c * log_z - c * log_p.exp() @ (log_p - best), 0.6915855154)


def test_the_two_cases_of_a_bad_output_have_the_published_probabilities():
    first, second = P.first_V.log_softmax(0), P.second_VV.log_softmax(1)
    near(first[BAD].logsumexp(0), -1.9313028137)
    whole = enumerate_bad(first, lambda tokens_B: second[tokens_B], BAD)
    near(math.log(math.exp(whole.logprob) - math.exp(-1.9313028137)), -1.3875905797)
    near(whole.logprob, -0.9297930395)
    assert whole.bound == whole.logprob == whole.eos_unaware


def test_outputs_that_end_with_their_first_token_are_whole():
    """Token 0 ends an output: 57 outputs, the one of a single token with the reward of (0, 0)."""
    first, second = P.first_V.log_softmax(0), P.second_VV.log_softmax(1)
    found = enumerate_bad(first, lambda tokens_B: second[tokens_B], BAD, ends=[0])
    near([math.exp(found.logprob), math.exp(found.eos_unaware)], [0.3273767261, 0.3946353758])
    outputs = ALL[7:].clone()  # (0, 7) stands for the end; (1, 0) and on follow
    outputs[0] = torch.tensor([0, 0])
    log_p = torch.cat([first[:1], P(ALL)[8:].sum(1)])
    assert len(outputs) == 57
    near(log_p.exp() @ reward(outputs), 1.0870818369)
    log_z = (log_p - reward(outputs)).logsumexp(0)
    near(log_z, 0.4740922308)
    near((log_p - reward(outputs) - log_z)[0].exp(), 0.0177649705)


@pytest.mark.parametrize(("tolerance", "most"), [(0.3, 0), (0.0, 2), (0.05, 3)])
def test_what_is_left_out_is_bounded(tolerance, most):
    """The least likely first tokens are left out; the truth lies between what was found and the bound."""
    first, second = P.first_V.log_softmax(0), P.second_VV.log_softmax(1)
    asked: list[int] = []

    def following(tokens_B: Tensor) -> Tensor:
        asked.extend(tokens_B.tolist())
        return second[tokens_B]

    whole = enumerate_bad(first, following, BAD).logprob
    asked.clear()
    found = enumerate_bad(first, following, BAD, batch=1, tolerance=tolerance, most=most)
    likeliest = [i for i in first.argsort(descending=True).tolist() if i not in BAD]
    assert asked == likeliest[: len(asked)] and len(asked) < 6
    assert found.logprob < whole < found.bound
    if tolerance and not most:
        assert found.bound - found.logprob <= math.log1p(tolerance) + 1e-12
    if most:
        assert len(asked) <= most


CREDITS = [
    CTLAdvantage(TARGET),
    CTLAdvantage(TARGET, psi="q_p_s_1_to_t"),
    CTLAdvantage(TARGET, contrast="sixo"),
    NegativeAdvantage(TARGET, alpha=0.5),
]
ids = lambda each: f"{type(each).__name__}-{getattr(each, 'psi', '')}-{getattr(each, 'contrast', '')}"


def ragged() -> Rollouts:
    """Two prompts with three and four samples of unequal length, float64 log-probabilities of two models."""
    lengths, noise = [3, 1, 5, 2, 4, 4, 1], torch.Generator().manual_seed(0)
    batch = make_batch(lengths, groups=[0, 0, 0, 1, 1, 1, 1])
    p, q = (-3 * torch.rand(batch.mask_NT.shape, generator=noise).double() for _ in range(2))
    return batch.with_extras(**{"actor.logprobs_NT": p, "old_logprobs_NT": q, "<trained>.logprobs_NT": p - 0.1})


REWARDS = torch.linspace(-2, 2, 7, dtype=torch.float64)


@pytest.mark.parametrize("advantage", [*CREDITS, SixoNegativesAdvantage()], ids=ids)
def test_the_order_of_prompts_and_of_samples_changes_no_credit(advantage):
    batch = ragged()
    order = torch.tensor([5, 3, 6, 4, 2, 0, 1])  # groups stay together
    found = credit(advantage, batch.rows(order), REWARDS[order])
    near(found, credit(advantage, batch, REWARDS)[order], 1e-12)


@pytest.mark.parametrize("advantage", [*CREDITS, SixoNegativesAdvantage()], ids=ids)
def test_padding_changes_no_credit_whatever_it_holds(advantage):
    batch = ragged()
    wide = {name: torch.nn.functional.pad(tensor, (0, 3), value=-7.0) for name, tensor in batch.extras.items()}
    pad = lambda tensor: torch.nn.functional.pad(tensor, (0, 3))
    padded = replace(batch, tokens_NT=pad(batch.tokens_NT), mask_NT=pad(batch.mask_NT), extras=wide)
    found = credit(advantage, padded, REWARDS)
    near(found[:, :5], credit(advantage, batch, REWARDS), 1e-12)
    assert not found[:, 5:].any()


@pytest.mark.parametrize("advantage", CREDITS, ids=ids)
def test_nothing_is_learnt_about_the_policy_from_the_proposal_s_credit(advantage):
    """Credit is a constant: only the output that a loss multiplies it with is differentiated."""
    batch = on_q(ALL[:4])
    live = batch.with_extras(**{name: tensor.clone().requires_grad_() for name, tensor in batch.extras.items()})
    with torch.no_grad():
        assert not credit(advantage, live).requires_grad
