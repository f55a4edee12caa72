"""Outputs of a role's forward pass: core's, and those that plugins bring, through planning, training, saving and inference."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from rlhf_core import (
    AdamW,
    Advantage,
    Algorithm,
    Batch,
    Credit,
    Loss,
    LossTerms,
    ModelOptions,
    Output,
    Outputs,
    ProviderChoices,
    Providers,
    Reduction,
    Registry,
    RewardOutput,
    Rollouts,
    States,
    Term,
    TrainedOptions,
    UsageError,
    hookimpl,
)
from rlhf_core.config.builder import from_names, make_config, to_names
from rlhf_core.contract import requirements
from rlhf_core.contract.plan import Plan
from rlhf_core.errors import ContractError
from rlhf_core.testing import check_output, tiny_rollouts, tiny_run
from rlhf_core.testing.tiny_algorithm import TINY_SAMPLING
from rlhf_core.training import reference_cache
from rlhf_core.training.local_role import LocalRole
from rlhf_core.training.microbatch import micro_batch
from rlhf_core.training.planner import make_plan

K = 4
LEVELS = torch.arange(1, K + 1) / (K + 1)
FEATURES = frozenset({"values_NT", "features_NTH", "scores_N", "features_NH"})


@dataclass(frozen=True)
class Quantiles(Output):
    """Quantiles of the return at each completion token."""

    levels: int = K
    """how many"""

    def head(self, hidden: int) -> nn.Module:
        return nn.Linear(hidden, self.levels)

    def __call__(self, states: States, head: nn.Module | None) -> Tensor:
        assert head is not None
        return states.per_token(head(states.tokens_MH))


@dataclass(frozen=True)
class Tsallis(Output):
    """Tsallis entropy of index 2 of the next-token distribution, 1 - sum p^2."""

    language: ClassVar[bool] = True

    def __call__(self, states: States, head: nn.Module | None) -> Tensor:
        return states.per_token(states.distribution(lambda logits_mV: 1 - logits_mV.softmax(-1).square().sum(-1)))


@dataclass(frozen=True)
class MeanState(Output):
    """Mean of the states before a completion's tokens."""

    def __call__(self, states: States, head: nn.Module | None) -> Tensor:
        states_MH = states.tokens_MH.float()
        sums = states_MH.new_zeros(len(states.last_NH), states_MH.shape[1]).index_add(0, states.rows_M, states_MH)
        return sums / torch.bincount(states.rows_M, minlength=len(sums))[:, None]


@dataclass(frozen=True)
class AllLogits(Output):
    """The largest logit, out of all logits of all tokens: what is forbidden."""

    language: ClassVar[bool] = True

    def __call__(self, states: States, head: nn.Module | None) -> Tensor:
        return states.per_token(states.language_head()(states.tokens_MH, scaled=True).amax(-1))  # type: ignore[attr-defined]


@dataclass(frozen=True)
class WrongShape(Output):
    """One number a token under a name that says several."""

    def __call__(self, states: States, head: nn.Module | None) -> Tensor:
        return states.per_token(states.tokens_MH.float().sum(1))


@dataclass(frozen=True)
class Leaky(Output):
    """Depends on the other rows of the micro-batch."""

    def __call__(self, states: States, head: nn.Module | None) -> Tensor:
        return states.last_NH.float().mean(1) - states.last_NH.float().mean()


@dataclass(frozen=True)
class Pinball(Loss):
    """Quantile regression (Koenker and Bassett 1978) on the advantage that stands for a return."""

    outputs: ClassVar[frozenset[str]] = frozenset({"quantiles_NTK"})
    needs: ClassVar[frozenset[str]] = frozenset({"returns_NT"})

    def __call__(self, outputs: Outputs, batch: Batch) -> LossTerms:
        error_NTK = batch["returns_NT"][..., None] - outputs["quantiles_NTK"]
        return LossTerms(torch.maximum(LEVELS * error_NTK, (LEVELS - 1) * error_NTK).mean(-1), Reduction("token"))


@dataclass(frozen=True)
class PolicyLoss(Loss):
    """Policy gradient."""

    needs: ClassVar[frozenset[str]] = frozenset({"advantages_NT"})

    def __call__(self, outputs: Outputs, batch: Batch) -> LossTerms:
        return LossTerms(-batch["advantages_NT"] * outputs["logprobs_NT"], Reduction("token"))


@dataclass(frozen=True)
class Novelty(Advantage):
    """The reward plus the distance of a completion's features from their mean, per token returns of both."""

    needs: ClassVar[frozenset[str]] = frozenset({"critic.features_NH", "critic.quantiles_NTK"})

    def __call__(self, rewards: RewardOutput, rollouts: Rollouts, extras: Mapping[str, Tensor]) -> Credit:
        features_NH = extras["critic.features_NH"]
        assert features_NH.dim() == 2 and extras["critic.quantiles_NTK"].shape == (*rollouts.mask_NT.shape, K)
        earned_N = rewards.rewards_N + (features_NH - features_NH.mean(0)).norm(dim=1)
        returns_NT = torch.where(rollouts.mask_NT, earned_N[:, None], 0.0)
        baseline_NT = extras["critic.quantiles_NTK"].mean(-1)
        return Credit(torch.where(rollouts.mask_NT, returns_NT - baseline_NT, 0.0), returns_NT)


@dataclass(frozen=True)
class Distributional(Algorithm):
    """An actor and a critic of quantiles."""

    loss: str = ""
    """an output that the critic's loss asks for in addition"""
    need: str = ""
    """an extra that the advantage needs in addition"""

    defaults: ClassVar[Mapping[str, str]] = {"data": "prompts", "rollout": "hf", "reward": "length"}
    roles: ClassVar[Mapping[str, ModelOptions]] = {
        "actor": TrainedOptions(optim=AdamW(lr=1e-3)),
        "critic": TrainedOptions(optim=AdamW(lr=1e-2)),
    }

    def __call__(self, choices: ProviderChoices) -> tuple[Term, ...]:
        value: Any = Pinball()
        credit: Any = Novelty()
        if self.loss:
            value = type("Asking", (Pinball,), {"outputs": Pinball.outputs | {self.loss}})()
        if self.need:
            credit = type("Needing", (Novelty,), {"needs": Novelty.needs | {self.need}})()
        return Term("actor", "actor", PolicyLoss(), credit), Term("critic", "actor", value, credit)


class Plugin:
    @hookimpl
    def rlhf_output(self) -> Providers:
        return {"quantiles_NTK": Quantiles, "tsallis_NT": Tsallis, "shapeless": Quantiles}


def registry() -> Registry:
    made = Registry(autoload=False)
    made.register(Plugin(), "quantiles")
    return made


def distributional(output: Path, steps: int, **options: Any) -> Any:
    return tiny_run(output, Distributional(), registry(), steps=steps, sampling=TINY_SAMPLING, **options)


def curve(run: Any) -> list[tuple[float, float]]:
    import json

    rows = [json.loads(line) for line in (run.output / "metrics.jsonl").read_text().splitlines()]
    return [(row["loss/actor"], row["loss/critic"]) for row in rows]


# ----------------------------------------------------------------------------------------------------------------------


def test_rlhf_output_brings_outputs_that_are_trained_needed_saved_and_resumed(tmp_path: Path) -> None:
    straight = distributional(tmp_path / "straight", 4)
    straight.train()
    losses = curve(straight)
    assert losses[-1][1] < losses[0][1], "the quantiles learn"
    part = distributional(tmp_path / "part", 2, save_every=2)
    part.train()
    resumed = distributional(tmp_path / "part", 4, resume=True)
    resumed.train()
    assert curve(resumed) == losses, "to the bit"
    pieces = distributional(tmp_path / "pieces", 4, micro_tokens=1)
    pieces.train()
    for found, expected in zip(curve(pieces), losses, strict=True):
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_an_exported_head_is_loaded_again_and_a_model_without_it_is_refused(tmp_path: Path) -> None:
    plan = make_plan(make_config(Distributional(), registry(), model="tiny", steps=1))
    critic = LocalRole(plan, "critic")
    batch, names = tiny_rollouts(), frozenset({"quantiles_NTK", "features_NH"})
    before = critic.infer(batch, names)
    critic.export(str(tmp_path / "critic"))
    again = LocalRole(_with_model(plan, str(tmp_path / "critic")), "critic")
    for name, values in again.infer(batch, names).items():
        assert torch.equal(values, before[name])
    frozen = replace(plan.roles["critic"], options=ModelOptions(model=str(tmp_path / "actor")), terms=())
    LocalRole(plan, "actor").export(str(tmp_path / "actor"))
    with pytest.raises(UsageError, match="has no trained quantiles_NTK head"):
        LocalRole(replace(plan, roles={"critic": frozen}), "critic")


def _with_model(plan: Plan, model: str) -> Plan:
    critic = plan.roles["critic"]
    return replace(plan, roles={**plan.roles, "critic": replace(critic, options=replace(critic.options, model=model))})


def test_values_and_scores_are_linear_in_the_features() -> None:
    plan = make_plan(make_config(Distributional(), registry(), model="tiny", steps=1))
    critic = replace(plan.roles["critic"], outputs=FEATURES, providers={})
    role, batch = LocalRole(replace(plan, roles={"critic": critic}), "critic"), tiny_rollouts()
    found = role.infer(batch, FEATURES)
    value, score = (role.module.scalar_head(name).weight.detach()[0] for name in ("value", "score"))
    assert torch.allclose(found["values_NT"], found["features_NTH"] @ value, atol=1e-6)
    assert torch.allclose(found["scores_N"], found["features_NH"] @ score, atol=1e-6)
    ids = torch.cat([batch.prompt_NL[0, : batch.prompt_lengths_N[0]], batch.tokens_NT[0, : batch.lengths_N[0]]])
    with torch.no_grad():
        states_SH = role.module.model.base_model(input_ids=ids[None]).last_hidden_state[0]
    T = int(batch.lengths_N[0])
    assert torch.allclose(found["features_NH"][0], states_SH[-1], atol=1e-5)
    assert torch.allclose(found["features_NTH"][0, :T], states_SH[-T - 1 : -1], atol=1e-5)


@pytest.mark.parametrize(
    ("output", "name"), [(Quantiles(), "quantiles_NTK"), (Tsallis(), "tsallis_NT"), (MeanState(), "mean_NH")]
)
def test_the_authors_check_passes_for_outputs_that_keep_the_contract(output: Output, name: str) -> None:
    check_output(output, name)


@pytest.mark.parametrize(
    ("output", "name", "message"),
    [
        (AllLogits(), "largest_NT", "AllLogits makes a tensor of shape .*, the logits of all tokens"),
        (Leaky(), "leaky_N", "leaky_N of a row must not depend on other rows"),
        (
            WrongShape(),
            "wrong_NTK",
            r"the output 'wrong_NTK' \(WrongShape of .*\) has shape \(8, 14\), but its name requires \(N, T, K\)",
        ),
        (Quantiles(), "quantiles", "must end in its shape"),
    ],
)
def test_the_authors_check_names_what_is_wrong(output: Output, name: str, message: str) -> None:
    with pytest.raises((AssertionError, ContractError), match=message):
        check_output(output, name)


def test_a_function_of_the_distribution_has_the_value_and_the_gradient_of_the_plain_computation() -> None:
    values: dict[int, Tensor] = {}
    for chunk in (2, 0):
        from rlhf_core.testing import outputs as kit

        trainable, batch = kit._trainable(Tsallis(), "tsallis_NT"), tiny_rollouts()
        trainable.module.causal_lm.get_output_embeddings().chunk = chunk
        found_NT = trainable.forward(batch, frozenset({"tsallis_NT"}))["tsallis_NT"]
        found_NT.sum().backward()
        values[chunk] = torch.cat([p.grad.flatten() for p in trainable.module.parameters() if p.grad is not None])
        ids = torch.cat([batch.prompt_NL[0, : batch.prompt_lengths_N[0]], batch.tokens_NT[0, : batch.lengths_N[0]]])
        with torch.no_grad():
            hidden = trainable.module.model.base_model(input_ids=ids[None]).last_hidden_state[0]
            p = (hidden @ trainable.module.causal_lm.get_output_embeddings().weight.T).softmax(-1)
        T = int(batch.lengths_N[0])
        assert torch.allclose(found_NT[0, :T].detach(), 1 - p[-T - 1 : -1].square().sum(-1), atol=1e-5)
    assert torch.allclose(values[2], values[0], atol=1e-6)


@pytest.mark.parametrize(
    ("algorithm", "message"),
    [
        (
            Distributional(loss="quantile_NTK"),
            "Asking needs the output 'quantile_NTK', which no forward pass gives; the known outputs are logprobs_NT, ",
        ),
        (
            Distributional(need="critic.hidden_NTH"),
            "Needing needs 'critic.hidden_NTH', which nothing provides; the known names are ",
        ),
        (
            Distributional(need="critic.rank_N"),
            "Needing needs 'critic.rank_N', which nothing provides; the known names are ",
        ),
        (
            Distributional(loss="shapeless"),
            "the name of the output 'shapeless' must end in its shape: _N, _NT, or one more letter",
        ),
    ],
)
def test_an_unknown_output_is_refused_in_planning_with_the_name_of_the_asker(
    algorithm: Distributional, message: str
) -> None:
    with pytest.raises(UsageError) as caught:
        make_plan(make_config(algorithm, registry(), model="tiny"))
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
    assert "features_NH" in str(caught.value) or "shapeless" in message


def test_a_worker_plans_the_same_outputs_from_names() -> None:
    config = make_config(f"{__name__}:Distributional", registry(), model="tiny")
    plan = make_plan(from_names(to_names(config), registry()))
    assert plan.roles["critic"].providers == {"quantiles_NTK": Quantiles()}
    assert plan.roles["actor"].providers == {}
    assert plan.roles["critic"].outputs == {"quantiles_NTK", "features_NH"}
    assert not plan.roles["critic"].needs_language_head


# ----------------------------------------------------------------------------------------------------------------------
# names and shapes
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "letters", "token", "row"),
    [
        ("logprobs_NT", "NT", True, True),
        ("critic.quantiles_NTK", "NTK", True, True),
        ("features_NH", "NH", False, True),
        ("metric/score_N", "N", False, True),
        ("router_loss", "", False, False),
        ("T_final", "", False, False),
        ("prompt_L", "L", False, False),
    ],
)
def test_a_name_says_its_shape(name: str, letters: str, token: bool, row: bool) -> None:
    assert (requirements.letters(name), requirements.per_token(name), requirements.per_row(name)) == (
        letters,
        token,
        row,
    )


def test_rows_are_picked_joined_and_trimmed_with_extras_of_every_shape() -> None:
    batch = tiny_rollouts()
    N, T = batch.mask_NT.shape
    inside_NT = torch.arange(T)[None] < batch.lengths_N[:, None]
    numbers = torch.arange(N * T * K, dtype=torch.float32).view(N, T, K)
    batch = batch.with_extras(
        x_NTK=torch.where(inside_NT[..., None], numbers, 0.0), y_NH=torch.arange(N * 3).view(N, 3)
    )
    short = int(batch.lengths_N.argmin())
    few, rest = [short], [i for i in range(N) if i != short]
    one = batch.rows(few)
    assert one["x_NTK"].shape == (1, int(batch.lengths_N[short]), K)
    assert torch.equal(one["y_NH"], batch["y_NH"][few])
    back = Batch.cat([batch.rows(rest), one])
    assert torch.equal(back["x_NTK"], batch["x_NTK"][[*rest, short]])
    assert torch.equal(back["y_NH"], batch["y_NH"][[*rest, short]])


def test_a_rank_without_rows_and_a_cache_on_disk_keep_the_shapes_of_extras() -> None:
    batch = tiny_rollouts()
    N, T = batch.mask_NT.shape
    inside_NT1 = (torch.arange(T)[None] < batch.lengths_N[:, None])[..., None]
    values = {
        "x_NTK": torch.randn(N, T, K) * inside_NT1,
        "y_NH": torch.randn(N, 3),
        "z_NT": torch.randn(N, T) * inside_NT1[..., 0],
    }
    empty = micro_batch(batch.with_extras(**values).rows([]), [], 0, unit=2)
    assert {name: tuple(empty[name].shape) for name in values} == {"x_NTK": (2, 1, K), "y_NH": (2, 3), "z_NT": (2, 1)}
    for name, expected in values.items():
        stored = [reference_cache._bytes(expected[i], batch, i, name) for i in range(N)]
        assert torch.equal(reference_cache._tensor(stored, batch, name), expected)
