"""Contract tests of this package's providers, and the composition of presets."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from rlhf_algos import plugin
from rlhf_algos.loss.delay import DelayedLoss
from rlhf_core import Run
from rlhf_core.config.builder import make_config
from rlhf_core.contract.batch import StepInfo
from rlhf_core.contract.options import KL
from rlhf_core.contract.plan import Plan
from rlhf_core.contract.terms import Term
from rlhf_core.errors import UsageError
from rlhf_core.plugins.registry import default_registry
from rlhf_core.testing import check_advantage, check_algorithm, check_light, check_loss, tiny_rollouts
from rlhf_core.testing.batches import make_batch
from rlhf_core.training.planner import make_plan
from rlhf_core.training.reduction import count, weighted_sum

PROVIDERS = {"advantage": plugin.rlhf_advantage(), "loss": plugin.rlhf_loss(), "algorithm": plugin.rlhf_algorithm()}


UNCERTAIN = ("delta_ucb", "drts", "max_uncertainty", "optimistic")
"""Advantages that read a reward's uncertainty."""
MODEL = "tiny:hidden=16,layers=1"
REQUIRED = {"prm": {"placeholder": 0}}
"""Options without a default."""


def resolve(kind: str, name: str, **options: object):
    return default_registry().resolve(kind, name)(**options)


def test_listing_and_showing_options_imports_no_torch():
    check_light(*sorted({str(target).partition(":")[0] for table in PROVIDERS.values() for target in table.values()}))


@pytest.mark.parametrize("name", PROVIDERS["advantage"])
def test_every_advantage_keeps_its_contract(name):
    rollouts = tiny_rollouts()
    rollouts.labels = [i % 2 == 0 for i in range(len(rollouts))]
    metrics = {"uncertainty": torch.linspace(0.1, 1, len(rollouts))} if name in UNCERTAIN else None
    check_advantage(resolve("advantage", name), rollouts, metrics)


@pytest.mark.parametrize("name", PROVIDERS["loss"])
def test_every_loss_keeps_its_contract(name):
    rollouts, options = tiny_rollouts(), REQUIRED.get(name, {})
    rollouts.labels = [["+"]] * len(rollouts)  # for prm, whose steps end in the token 0
    rollouts.tokens_NT[-1, rollouts.lengths_N[-1] - 1] = 0  # all completions but the last end in it anyhow
    loss = resolve("loss", name, **options)
    check_loss(replace(loss, length=16) if getattr(loss, "length", None) == 0 else loss, rollouts)


@pytest.mark.parametrize("name", PROVIDERS["algorithm"])
def test_every_algorithm_keeps_its_contract(name):
    algorithm = resolve("algorithm", name)
    loss = algorithm.defaults["loss"]
    check_algorithm(algorithm, loss=resolve("loss", loss, **REQUIRED.get(loss, {})))


# ----------------------------------------------------------------------------------------------------------------------
# what presets are made of
# ----------------------------------------------------------------------------------------------------------------------


def planned(name: str, **options: object) -> Plan:
    usual = resolve("algorithm", name).defaults["data"]
    if usual in ("json", "conditional"):
        options = {"data": {"use": usual, "path": "rows.jsonl"}, **options}
    if name == "gdpo":
        options = {"reward": {"use": "sum", "parts": ["length"]}, **options}
    if name in REQUIRED:
        options = {"loss": {"use": name, **REQUIRED[name]}, **options}
    return make_plan(make_config(name, model="tiny", **options))


def terms(plan: Plan) -> list[str]:
    return [f"{term.role} <- {term.source} : {type(term.loss).__name__}" for term in plan.terms]


@pytest.mark.parametrize(
    ("name", "expected", "roles"),
    [
        ("sft", ["actor <- data : SFTLoss"], {"actor"}),
        ("csft", ["actor <- data : SFTLoss"], {"actor"}),
        ("distill", ["actor <- data : DistillLoss"], {"actor", "teacher"}),
        ("reward", ["reward <- data : BradleyTerryLoss"], {"reward"}),
        ("active_reward", ["reward <- data : BradleyTerryLoss"], {"reward"}),
        ("dpo", ["actor <- data : DPOLoss"], {"actor", "reference"}),
        ("ipo", ["actor <- data : IPOLoss"], {"actor", "reference"}),
        ("cdpo", ["actor <- data : CDPOLoss"], {"actor", "reference"}),
        ("aot", ["actor <- data : AOTLoss"], {"actor", "reference"}),
        ("bco_pair", ["actor <- data : BCOPairLoss"], {"actor", "reference"}),
        ("kto", ["actor <- data : KTOLoss"], {"actor", "reference"}),
        ("prm", ["reward <- data : PRMLoss"], {"reward"}),
        ("on_policy_distill", ["actor <- actor : ClipLoss"], {"actor", "teacher"}),
        ("simpo", ["actor <- data : SimPOLoss"], {"actor"}),
        ("orpo", ["actor <- data : ORPOLoss"], {"actor"}),
        ("ppo", ["actor <- actor : ClipLoss", "critic <- actor : ValueLoss"], {"actor", "critic", "reference"}),
        ("grpo", ["actor <- actor : GRPOLoss", "actor <- actor : KLLoss"], {"actor", "reference"}),
        ("gdpo", ["actor <- actor : GRPOLoss", "actor <- actor : KLLoss"], {"actor", "reference"}),
        ("dr_grpo", ["actor <- actor : DrGRPOLoss"], {"actor"}),
        ("dapo", ["actor <- actor : DAPOLoss"], {"actor"}),
        ("gspo", ["actor <- actor : GSPOLoss"], {"actor"}),
        ("cispo", ["actor <- actor : CISPOLoss"], {"actor"}),
        ("sapo", ["actor <- actor : SAPOLoss"], {"actor"}),
        ("dppo", ["actor <- actor : DPPOLoss"], {"actor"}),
        ("rloo", ["actor <- actor : ReinforceLoss"], {"actor", "reference"}),
        ("reinforce", ["actor <- actor : ReinforceLoss"], {"actor", "reference"}),
        ("reinforce_pp", ["actor <- actor : ClipLoss"], {"actor", "reference"}),
        ("reinforce_pp_baseline", ["actor <- actor : ClipLoss", "actor <- actor : KLLoss"], {"actor", "reference"}),
        ("online_dpo", ["actor <- actor : DPOLoss"], {"actor", "reference"}),
        ("rejection_sampling", ["actor <- actor : SFTLoss"], {"actor"}),
        (
            "repulse",
            [
                "actor <- actor : ReinforceLoss",
                "actor <- proposal : WeightedNLLLoss",
                "proposal <- proposal : WeightedNLLLoss",
            ],
            {"actor", "proposal"},
        ),
    ],
)
def test_presets_train_these_roles_on_these_terms(name, expected, roles):
    plan = planned(name)
    assert terms(plan) == expected
    assert set(plan.roles) == roles, "a role exists only because something needs it"


def test_every_preset_is_in_the_table_above():
    (mark,) = test_presets_train_these_roles_on_these_terms.pytestmark
    assert {row[0] for row in mark.args[1]} == set(PROVIDERS["algorithm"])


def test_terms_of_one_credit_share_it():
    for name in ("ppo", "grpo", "dpo"):
        assert len(planned(name).credits) == 1, name


def test_switching_a_penalty_off_leaves_its_model_away():
    config = make_config("ppo", model="tiny")
    assert "reference" in make_plan(config).roles
    without = make_plan(replace(config, algorithm=replace(config.algorithm, kl=KL(coef=0.0))))
    assert set(without.roles) == {"actor", "critic"}


def test_a_constant_length_is_the_longest_completion_of_the_run():
    (term,) = planned("dr_grpo", sampling={"max_new_tokens": 77}).terms
    assert term.loss.length == 77


def test_critic_warmup_delays_the_policy_and_not_the_critic():
    config = make_config("ppo", model="tiny")
    plan = make_plan(replace(config, algorithm=replace(config.algorithm, critic_warmup=0.2, entropy=0.1, ptx=0.5)))
    assert [isinstance(term.loss, DelayedLoss) for term in plan.terms] == [True, True, True, False]
    assert [term.source for term in plan.terms] == ["actor", "actor", "data", "actor"]
    assert [term.weight for term in plan.terms] == [1.0, 0.1, 0.5, 1.0]


# ----------------------------------------------------------------------------------------------------------------------
# mistakes
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rloo", "grpo", "dapo", "reinforce_pp_baseline", "online_dpo", "rejection_sampling"])
def test_one_completion_per_prompt_is_refused_where_they_are_compared(name):
    with pytest.raises(UsageError, match=r"set sampling.n to at least 2, not 1"):
        planned(name, sampling={"n": 1})


def test_ppo_without_a_use_for_its_critic_is_refused():
    with pytest.raises(UsageError, match='choose advantage = "gae"'):
        planned("ppo", advantage="grpo")


def test_a_critic_free_algorithm_with_a_critic_s_advantage_is_refused():
    with pytest.raises(UsageError, match="needs a role 'critic'"):
        planned("grpo", advantage="gae")


def test_a_reference_free_algorithm_with_a_loss_that_compares_with_one_is_refused():
    with pytest.raises(UsageError, match="needs a role 'reference'"):
        planned("simpo", loss="dpo")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "grpo",
            {"loss": "dpo"},
            "DPOLoss compares a chosen with a rejected completion, but the advantage GRPOAdvantage selects no pairs",
        ),
        ("online_dpo", {"advantage": "rloo"}, 'selects no pairs; choose advantage = "pairs"'),
        ("ppo", {"loss": "bradley_terry"}, "BradleyTerryLoss needs scores_N, which a policy does not produce"),
        ("grpo", {"loss": "value"}, "ValueLoss needs values_NT"),
        ("grpo", {"loss": "sft"}, "SFTLoss does not read advantages, so it would learn good and bad samples alike"),
        (
            "sft",
            {"loss": "grpo"},
            "GRPOLoss needs advantages_NT, but the term that trains actor on data assigns no credit",
        ),
        ("dpo", {"loss": "sft"}, "SFTLoss does not compare pairs, so it would also learn the rejected completions"),
        ("kto", {"loss": "sft"}, "SFTLoss does not read which rows are desirable"),
    ],
)
def test_a_loss_that_does_not_fit_what_there_is_is_refused(name, options, message):
    with pytest.raises(UsageError, match=message):
        planned(name, **options)


def test_losses_that_selections_fit_are_not():
    for name, loss in (("online_dpo", "ipo"), ("online_dpo", "grpo"), ("rejection_sampling", "grpo")):
        assert planned(name, loss=loss).terms


def test_supervised_learning_does_not_take_rejected_completions_for_good_ones(tmp_path):
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"} for _ in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"use": "json", "path": str(tmp_path / "rows.jsonl")}
    options = {"model": MODEL, "batch_size": 2, "steps": 1}
    with pytest.raises(
        UsageError, match='would learn the rejected completions too; pass data.completion_key = "chosen"'
    ):
        Run(make_config("sft", data=data, output=str(tmp_path / "pairs"), **options)).train()
    assert not (tmp_path / "pairs").exists(), "said before anything is written"
    run = Run(make_config("sft", data={**data, "completion_key": "chosen"}, output=str(tmp_path / "chosen"), **options))
    run.train()
    assert run.samples["data"].texts == ["b", "b"]


@pytest.mark.parametrize("algorithm", ["dpo", "reward", "orpo"])
def test_demonstrations_are_no_preferences_and_no_model_is_loaded_to_say_so(algorithm, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    data = {"use": "json", "path": str(tmp_path / "rows.jsonl")}
    run = Run(make_config(algorithm, model=MODEL, data=data, batch_size=1, steps=1, output=str(tmp_path / "run")))
    with pytest.raises(UsageError, match="chosen and rejected"):
        run.train()
    assert run.placed is None


@pytest.mark.parametrize("batch_size", [3, 4])
def test_rows_without_a_rejected_completion_are_found_among_preferences_too(batch_size, tmp_path, monkeypatch):
    monkeypatch.setattr("rlhf_core.run.lifetime.check_rows", lambda plan, rows: None)  # which sees the first row only
    rows = [{"prompt": "a", "response": "b"} for _ in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"use": "json", "path": str(tmp_path / "rows.jsonl")}
    run = Run(make_config("dpo", model=MODEL, data=data, batch_size=batch_size, steps=1, output=str(tmp_path / "run")))
    with pytest.raises(UsageError, match="chosen and rejected"):
        run.train()


@pytest.mark.parametrize(
    ("name", "per_completion", "per_token"),
    [
        ("grpo", (0.5, 0.5), (1, 99)),
        ("dapo", (1, 1), (100, 100)),
        ("dr_grpo", (0.5, 0.5), (128, 128)),
        ("rloo", (0.5, 0.5), (1, 1)),
    ],
)
def test_penalty_and_entropy_are_averaged_as_the_objective_is(name, per_completion, per_token):
    """Completions of 1 and 99 tokens. DeepSeekMath, eq. 3: the KL is inside the mean over a completion's tokens."""
    algorithm = replace(resolve("algorithm", name), kl=KL(coef=0.3, estimator="k3", where="loss"), entropy=0.1)
    _, penalty, bonus = make_plan(make_config(algorithm, model="tiny", sampling={"n": 2, "max_new_tokens": 128})).terms
    batch = make_batch([1, 99])
    batch.step = StepInfo(kl_coef=0.3)
    now_NT, ref_NT, entropy_NT = torch.rand(3, 2, 99, generator=torch.Generator().manual_seed(0))
    batch.extras["ref_logprobs_NT"] = -ref_NT

    def mean(values: list[list[float]]) -> float:
        shares = zip(values, per_completion, per_token, strict=True)
        return sum(share * sum(row) / tokens for row, share, tokens in shares)

    def found(term: Term) -> float:
        outputs = {"logprobs_NT": -now_NT, "full_logprobs_NT": -now_NT, "entropy_NT": entropy_NT}
        result = term.loss(outputs, batch)
        return float(weighted_sum(result.values, result.reduction, batch)) / count(result.reduction, batch)

    gaps = [(ref_NT - now_NT)[i, :length].double().tolist() for i, length in enumerate((1, 99))]  # log pi - log ref
    assert found(penalty) == pytest.approx(0.3 * mean([[math.exp(-d) - 1 + d for d in row] for row in gaps]), rel=1e-5)
    assert found(bonus) == pytest.approx(
        -mean([entropy_NT[i, :length].tolist() for i, length in enumerate((1, 99))]), rel=1e-5
    )


def test_the_data_s_completions_are_not_learned_at_the_temperature_that_samples():
    ppo = resolve("algorithm", "ppo", ptx=1.0)
    for temperature in (0.0, 1.0):  # greedy log-probabilities are those at 1
        assert (
            make_plan(make_config(ppo, model="tiny", sampling={"temperature": temperature})).roles["actor"].temperature
            == 1.0
        )
    with pytest.raises(
        UsageError,
        match=r"^the actor is trained on samples drawn at sampling.temperature 0.5 and on data at temperature 1",
    ):
        make_plan(make_config(ppo, model="tiny", sampling={"temperature": 0.5}))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_policy_that_does_not_move_has_a_ratio_of_one_in_every_minibatch(dtype, tmp_path):
    """Cached decoding rounds otherwise than a training pass: what it says of bfloat16 is no old log-probability."""
    actor = {"dtype": dtype, "optim": {"lr": 0.0}}
    options = {"model": MODEL, "actor": actor, "batch_size": 4, "minibatches": 2, "steps": 1}
    sampling = {"n": 2, "max_new_tokens": 16}
    metrics = Run(make_config("dapo", sampling=sampling, output=str(tmp_path / "run"), **options)).train().metrics
    assert metrics["actor/ratio"] == pytest.approx(1.0, abs=1e-6 if dtype == "float32" else 0.0)
    assert metrics["actor/approx_kl"] == pytest.approx(0.0, abs=1e-7 if dtype == "float32" else 0.0)


def test_a_step_in_which_all_completions_are_equally_good_trains_nothing(tmp_path):
    (tmp_path / "reward.py").write_text("def reward_func(completions):\n    return [1.0] * len(completions)\n")
    reward = {"use": "func", "path": str(tmp_path / "reward.py")}
    sampling = {"n": 2, "max_new_tokens": 2}
    options = {"batch_size": 2, "steps": 2, "output": str(tmp_path / "run")}
    metrics = Run(make_config("online_dpo", model=MODEL, reward=reward, sampling=sampling, **options)).train().metrics
    assert metrics["pairs/share"] == 0
    assert metrics["skipped/actor"] == 1
    assert "loss/actor" not in metrics
