"""RePULSe at work: runs on the model `tiny`, and the exact probability of a bad output.

On `tiny` every output is enumerated (259 tokens, two of them), so that the identities hold for a transformer too.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_algos.advantage.ctl import CTLAdvantage
from rlhf_algos.algorithm import rloo
from rlhf_algos.algorithm.repulse import RePULSe
from rlhf_algos.evaluator.bad_probability import BadProbability, log_bad_probability
from rlhf_algos.importance import log_weights, twist_log_weights
from rlhf_algos.loss.grpo import GRPOLoss
from rlhf_algos.target import Target
from rlhf_algos.twist import log_psi, to_tokens
from rlhf_core import Run, make_config
from rlhf_core.contract.options import KL
from rlhf_core.errors import UsageError
from rlhf_core.loop import collect, credit, update
from rlhf_core.testing import check_evaluator
from rlhf_core.training.planner import make_plan

MODEL = "tiny:hidden=16,layers=1"

# ----------------------------------------------------------------------------------------------------------------------
# terms, roles and needs
# ----------------------------------------------------------------------------------------------------------------------


def planned(algorithm: Any = "repulse", **options: Any) -> Any:
    return make_plan(make_config(algorithm, model=MODEL, **options))


def test_the_terms_are_the_paper_s():
    plan = planned()
    assert [(t.role, t.source, type(t.advantage).__name__, type(t.loss).__name__) for t in plan.terms] == [
        ("actor", "actor", "RLOOAdvantage", "ReinforceLoss"),
        ("actor", "proposal", "NegativeAdvantage", "WeightedNLLLoss"),
        ("proposal", "proposal", "CTLAdvantage", "WeightedNLLLoss"),
    ]
    assert set(plan.roles) == {"actor", "proposal"}, "no penalty, no reference"
    assert plan.trained_roles[0] == "actor", "the policy is what is exported"


def test_the_base_model_as_proposal_is_no_second_model():
    plan = planned(RePULSe(proposal="base"))
    assert set(plan.roles) == {"actor"}
    assert plan.sources == ("actor",)
    assert [need.name for credit in plan.credits.values() for need in credit.needs] == ["advantages_NT"] * 2


def test_a_penalty_is_on_the_policy_s_samples_only():
    plan = planned(RePULSe(kl=KL(coef=0.2)))
    assert set(plan.roles) == {"actor", "proposal", "reference"}
    needs = {key: {need.name for need in credit.needs} for key, credit in plan.credits.items()}
    assert "ref_logprobs_NT" in needs["actor"]
    assert not any("ref_logprobs_NT" in names for key, names in needs.items() if key.startswith("proposal"))


def test_the_original_scale_is_a_mean_over_tokens_everywhere():
    terms = planned(RePULSe(compat="original")).terms
    policy, *weighted = terms
    assert policy.loss.aggregate == "sequence"
    assert [term.loss.scale for term in weighted] == ["sequence"] * 2


def test_the_negative_term_and_the_proposal_compose_with_any_policy_loss():
    terms = planned(advantage="grpo", loss="grpo").terms
    assert isinstance(terms[0].loss, GRPOLoss)
    assert isinstance(terms[-1].advantage, CTLAdvantage)


def test_the_proposal_and_the_negative_term_join_ppo_with_its_critic(tmp_path):
    run = run_of(tmp_path, advantage="gae", loss="clip", critic={"optim": {"lr": 1e-2}})
    assert [(term.role, term.source) for term in run.plan.terms] == [
        ("actor", "actor"), ("actor", "proposal"), ("critic", "actor"), ("proposal", "proposal"),
    ]  # fmt: skip
    with run.open():
        before = weights(run)
        iteration = next(run.iterations(collect))
        update(run, iteration, credit(run, iteration))
        after = weights(run)
    for name in ("actor", "critic", "proposal"):
        assert any(not torch.equal(after[name][key], tensor) for key, tensor in before[name].items()), name
    assert "critic" not in planned().roles, "no critic where nobody asks for its values"


def test_a_separate_beta_is_the_negative_term_s_alone():
    terms = planned(RePULSe(Target(beta=-20.0), weighting_beta=-3.0)).terms
    assert [getattr(term.advantage, "target", Target(beta=0)).beta for term in terms] == [0, -3.0, -20.0]


# ----------------------------------------------------------------------------------------------------------------------
# runs
# ----------------------------------------------------------------------------------------------------------------------


def first_token(token_ids: list[list[int]]) -> list[float]:
    """Reward whatever is sampled differently: equal rewards would be no credit, on some CPUs."""
    return [float(ids[0] % 7) for ids in token_ids]


def run_of(tmp_path: Path, algorithm: Any = "repulse", **options: Any) -> Run:
    """One step on two prompts, three completions each."""
    small: dict[str, Any] = {"sampling": {"n": 3, "max_new_tokens": 2}, "batch_size": 2, "steps": 1}
    small |= {"output": str(tmp_path / "run"), "reward": first_token}
    return Run(make_config(algorithm, model=MODEL, actor={"optim": {"lr": 1e-3}}, **(small | options)))


def weights(run: Run) -> dict[str, dict[str, Tensor]]:
    return {name: {key: value.clone() for key, value in role.weights()} for name, role in run.roles.items()}


@pytest.mark.parametrize(
    ("algorithm", "moved", "samples"),
    [
        (rloo.RLOO(kl=KL(coef=0.1)), {"actor"}, 6),
        (RePULSe(kl=KL(coef=0.1)), {"actor", "proposal"}, 12),
        (RePULSe(kl=KL(coef=0.1), proposal="base"), {"actor"}, 6),
    ],
    ids=["rloo", "learned proposal", "base proposal"],
)
def test_one_iteration_touches_exactly_the_right_models(algorithm, moved, samples, tmp_path):
    """Check that RePULSe also samples twice as much: 2N per prompt."""
    with run_of(tmp_path, algorithm).open() as run:
        before = weights(run)
        iteration = next(run.iterations(collect))
        update(run, iteration, credit(run, iteration))
        after = weights(run)
    changed = {name for name in before if any(not torch.equal(after[name][key], t) for key, t in before[name].items())}
    assert changed == moved
    assert set(before) == moved | {"reference"}
    assert sum(len(batch) for batch in iteration.batches.values()) == samples


def test_a_run_logs_what_the_weights_say_and_leaves_a_policy(tmp_path):
    run = run_of(tmp_path, steps=2)
    run.train()
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        assert 1 <= row["repulse/ess"] <= 3
        assert row["repulse/kl_proposal_target"] >= -1e-9
        assert 0 <= row["repulse/kl_target_proposal"] <= math.log(3) + 1e-9
        assert "proposal/reward/mean" in row
    assert (tmp_path / "run" / "model").exists()


# ----------------------------------------------------------------------------------------------------------------------
# the exact probability of a bad output
# ----------------------------------------------------------------------------------------------------------------------

v = torch.arange(8, dtype=torch.float64)
FIRST = (1 + 0.7 * v).sin().log_softmax(0)
SECOND = (3.1 + 1.3 * v[:, None] + 0.7 * v).sin().log_softmax(1)
second = lambda tokens_B: SECOND[tokens_B]


def near(value: float, expected: float, atol: float = 1e-9) -> None:
    assert value == pytest.approx(expected, abs=atol)


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_enumeration_in_two_cases_is_the_sum_over_all_outputs(batch):
    joint = (FIRST[:, None] + SECOND).exp()
    good = [i for i in range(8) if i not in (3, 6)]
    near(
        math.exp(log_bad_probability(FIRST, second, [3, 6], batch=batch)), float(1 - joint[good][:, good].sum()), 1e-12
    )
    near(log_bad_probability(FIRST, second, [3, 6], batch=batch), -0.9297930395)
    near(math.exp(log_bad_probability(FIRST, None, [3, 6])), float(FIRST[[3, 6]].exp().sum()), 1e-12)


def test_nothing_bad_has_probability_zero_and_everything_bad_one():
    assert log_bad_probability(FIRST, second, []) == -math.inf
    near(log_bad_probability(FIRST, second, range(8)), 0.0, 1e-12)


def test_an_output_that_ends_with_its_first_token_has_no_second():
    near(math.exp(log_bad_probability(FIRST, second, [3, 6], ends=[0])), 0.3273767261)
    near(math.exp(log_bad_probability(FIRST, second, [3, 6])), 0.3946353758)


def test_sampling_agrees_with_the_exact_probability():
    """Five standard errors of 2e5 samples."""
    joint = (FIRST[:, None] + SECOND).exp().flatten()
    drawn = torch.multinomial(joint, 200_000, replacement=True, generator=torch.Generator().manual_seed(0))
    bad = torch.isin(torch.stack([drawn // 8, drawn % 8], 1), torch.tensor([3, 6])).any(1).double()
    p = math.exp(log_bad_probability(FIRST, second, [3, 6]))
    near(float(bad.mean()), p, 5 * math.sqrt(p * (1 - p) / 200_000))


EVALUATOR = BadProbability(prompt="Hi", words=("a", "b"), batch=100)


def test_the_evaluator_enumerates_a_transformer_s_outputs(tmp_path):
    """Against the run's own log-probabilities of all 259 x 259 outputs."""
    from rlhf_core.models.loading.end_tokens import end_ids

    run = run_of(tmp_path, evaluator=EVALUATOR)
    with run.open():
        found = check_evaluator(EVALUATOR, run)
        role: Any = run.roles["actor"]
        size = role.causal_lm.config.vocab_size
        pairs = torch.cartesian_prod(torch.arange(size), torch.arange(size))
        logprobs = outputs_of(role, pairs, prompt_ids(run))
        bad = torch.tensor([ord("a"), ord("b")])
        assert role.tokenizer.encode("ab", add_special_tokens=False) == bad.tolist()
        is_bad = torch.isin(pairs, bad)
        near(found["bad/logprob_eos_unaware"], float(logprobs[is_bad.any(1)].sum(1).logsumexp(0)), 1e-4)
        ended = torch.isin(pairs[:, 0], torch.tensor(sorted(end_ids(role.spec, role.tokenizer))))
        aware = is_bad[:, 0] | (is_bad[:, 1] & ~ended)
        near(found["bad/logprob"], float(logprobs[aware].sum(1).logsumexp(0)), 1e-4)
        near(found["bad/probability"], math.exp(found["bad/logprob"]), 1e-12)


def prompt_ids(run: Run) -> list[int]:
    from rlhf_core.contract.batch import Example

    return run.encoder.prompts([Example("Hi")], [0]).token_ids[0]


def outputs_of(role: Any, pairs: Tensor, prompt: list[int]) -> Tensor:
    """log p of both tokens, from plain forward passes over whole sequences."""
    first_tokens = pairs[:, 0].unique()
    with torch.inference_mode():
        rows = torch.cat([torch.tensor(prompt).expand(len(first_tokens), -1), first_tokens[:, None]], 1)
        log_softmax = role.causal_lm(rows).logits[:, -2:].double().log_softmax(-1)
    first = log_softmax[0, 0][pairs[:, 0]]
    return torch.stack([first, log_softmax[pairs[:, 0], 1, pairs[:, 1]]], 1)


@pytest.mark.parametrize(
    ("evaluator", "message"),
    [
        (BadProbability(), "needs prompt, and words or ids"),
        (BadProbability(prompt="Hi"), "and words or ids"),
        (BadProbability(prompt="Hi", words=("two",)), "is 3 tokens"),
    ],
)
def test_mistakes_are_answered_in_one_line(evaluator, message, tmp_path):
    with run_of(tmp_path).open() as run, pytest.raises(UsageError, match=message):
        evaluator(run)
    with pytest.raises(UsageError, match="1 or 2 tokens"):
        BadProbability(tokens=3)


# ----------------------------------------------------------------------------------------------------------------------
# the identities on a transformer whose outputs are all enumerated
# ----------------------------------------------------------------------------------------------------------------------


def test_weights_and_ctl_have_their_expectations_on_a_transformer(tmp_path):
    """All 259 x 259 outputs, each weighed by q's probability: golden checks A2, C1 and C2, with this package's weights."""
    with run_of(tmp_path).open() as run:
        policy, proposal, prompt = run.roles["actor"], run.roles["proposal"], prompt_ids(run)
        size = policy.causal_lm.config.vocab_size  # type: ignore[attr-defined]
        pairs = torch.cartesian_prod(torch.arange(size), torch.arange(size))
        log_p = outputs_of(policy, pairs, prompt)
        lm: Any = proposal.causal_lm.double()  # type: ignore[attr-defined]
        torch.manual_seed(0)
        for parameter in lm.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
        reward_N, mask_NT = -(pairs.double() / size).sum(1), torch.ones(len(pairs), 2).bool()
        log_q = live_outputs(lm, pairs, prompt)
        old = log_q.detach()
        log_z = (log_p.sum(1) - 2 * reward_N).logsumexp(0)
        target = (log_p.sum(1) - 2 * reward_N - log_z).exp()
        divergence = target @ (target.log() - log_q.sum(1))
        q, log_w = old.sum(1).exp(), log_weights(log_p, old, -2 * reward_N, mask_NT)
        near(float(q @ log_w.exp()), float(log_z.exp()))
        near(float(q @ log_w), float(log_z - q @ (old.sum(1) - target.log())))
        near(float(target @ log_w), float(log_z + divergence.detach()))
        first = target.view(size, size).sum(1)
        divergence_1 = first @ (first.log() - log_q[:, 0].view(size, size)[:, 0])
        parameters = [parameter for parameter in lm.parameters() if parameter.requires_grad]
        for psi, exact in {"q_p_s_t": divergence, "q_p_s_1_to_t": divergence_1 + divergence}.items():
            v_tilde = twist_log_weights(log_p, old, log_psi(psi, log_p, old, {}, mask_NT), mask_NT).exp()
            credit_NT = to_tokens(psi, (log_w - log_z).exp()[:, None] - v_tilde / (q @ v_tilde), mask_NT)
            ctl = -(q[:, None] * credit_NT * log_q).sum()
            found = torch.autograd.grad(ctl, parameters, retain_graph=True)
            for mine, expected in zip(found, torch.autograd.grad(exact, parameters, retain_graph=True)):
                torch.testing.assert_close(mine, expected, atol=1e-9, rtol=0)


def test_the_negative_term_in_expectation_is_a_reward_transformation_on_a_transformer(tmp_path):
    """-E_p[(r - b) grad log p] + alpha E_target[grad log p] is REINFORCE on r - (alpha / Z) phi, for any proposal's weights
    (R8); and a penalty in the reward has the gradient of the divergence itself (R5)."""
    with run_of(tmp_path).open() as run:
        policy: Any = run.roles["actor"]
        lm, prompt = policy.causal_lm.double(), prompt_ids(run)
        size = lm.config.vocab_size
        pairs = torch.cartesian_prod(torch.arange(size), torch.arange(size))
        log_p = live_outputs(lm, pairs, prompt).sum(1)
        reward_N, alpha = -(pairs.double() / size).sum(1), 0.3
        p = log_p.detach().exp()
        log_q = (log_p.detach() + 0.5 * (7.0 * reward_N).sin()).log_softmax(0)  # a proposal of full support
        w_tilde = (log_p.detach() - 2 * reward_N - log_q).exp()
        z = log_q.exp() @ w_tilde
        transformed = reward_N - alpha / z * (-2 * reward_N).exp()
        baseline = p @ reward_N
        repulse = -(p * (reward_N - baseline)) @ log_p + alpha * (log_q.exp() * w_tilde / z) @ log_p
        parameters = list(lm.parameters())
        found = torch.autograd.grad(repulse, parameters, retain_graph=True)
        for mine, exact in zip(found, torch.autograd.grad(-(p * transformed) @ log_p, parameters, retain_graph=True)):
            torch.testing.assert_close(mine, exact, atol=1e-9, rtol=0)
        log_ref = (log_p.detach() + 0.3 * (5.0 * reward_N).cos()).log_softmax(0)
        score = (p * (reward_N - 0.2 * (log_p.detach() - log_ref))) @ log_p
        found = torch.autograd.grad(score, parameters, retain_graph=True)
        penalized = log_p.exp() @ (reward_N - 0.2 * (log_p - log_ref))
        for mine, exact in zip(found, torch.autograd.grad(penalized, parameters)):
            torch.testing.assert_close(mine, exact, atol=1e-9, rtol=0)


def live_outputs(lm: Any, pairs: Tensor, prompt: list[int]) -> Tensor:
    first_tokens = pairs[:, 0].unique()
    rows = torch.cat([torch.tensor(prompt).expand(len(first_tokens), -1), first_tokens[:, None]], 1)
    log_softmax = lm(rows).logits[:, -2:].log_softmax(-1)
    return torch.stack([log_softmax[0, 0][pairs[:, 0]], log_softmax[pairs[:, 0], 1, pairs[:, 1]]], 1)
