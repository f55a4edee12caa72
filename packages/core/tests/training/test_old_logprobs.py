"""The one rule of old log-probabilities, on batches whose versions are set by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rlhf_core.contract.batch import Rollouts
from rlhf_core.contract.distributed import World
from rlhf_core.contract.options import ModelOptions, RunConfig
from rlhf_core.contract.plan import RoleSpec
from rlhf_core.errors import ContractError, RunStopped
from rlhf_core.testing.batches import make_batch
from rlhf_core.training.mismatch import Mismatch
from rlhf_core.training.old_logprobs import ages_of, is_live, keep_exact, late_tokens, replace_late, with_live


def sampled(versions: list[list[int]], sampler: float = -2.0) -> Rollouts:
    """Rows of two and one tokens, sampled at these versions, each with the same log-probability of the engine."""
    batch = make_batch([2, 1])
    mask_NT = batch.mask_NT.float()
    return batch.with_extras(versions_NT=torch.tensor(versions), sampler_logprobs_NT=sampler * mask_NT)


def test_the_version_of_a_batch_is_its_oldest_token_s() -> None:
    assert sampled([[7, 5], [6, 0]]).version == 5  # the 0 is padding


def test_age_is_counted_over_sampled_tokens_against_the_weights_in_training() -> None:
    batch = sampled([[7, 5], [6, 0]])
    assert ages_of(batch, 8) == (3.0, 1.0 + 3.0 + 2.0, 3.0)
    assert [late_tokens(batch, version, World()) for version in (7, 6, 5, 8)] == [2.0, 2.0, 3.0, 3.0], (
        "a token after a late one is late"
    )


def test_late_tokens_keep_the_engine_s_log_probability_and_others_the_computed_one() -> None:
    computed_NT = torch.tensor([[-1.0, -1.5], [-1.25, 0.0]])
    assert replace_late(sampled([[7, 5], [6, 0]]), computed_NT, 7).tolist() == [[-1.0, -2.0], [-2.0, 0.0]]
    assert replace_late(sampled([[7, 7], [7, 0]]), computed_NT, 7) is computed_NT
    midway = replace_late(sampled([[5, 7], [7, 0]]), computed_NT, 7)
    assert midway.tolist() == [[-2.0, -2.0], [-1.25, 0.0]], (
        "the second token was sampled over the first one's old cache"
    )


def test_late_tokens_over_the_whole_vocabulary_have_the_log_of_the_kept_mass_added() -> None:
    """log p(token) = log p(token | kept) + log p(kept): -2 and -0.5."""
    computed_NT = torch.tensor([[-1.0, -1.5], [-1.25, 0.0]])
    batch = sampled([[7, 5], [6, 0]])
    mass = batch.with_extras(sampler_log_mass_NT=-0.5 * batch.mask_NT)
    assert replace_late(mass, computed_NT, 7, full=True).tolist() == [[-1.0, -2.5], [-2.5, 0.0]]
    assert replace_late(mass, computed_NT, 7).tolist() == [[-1.0, -2.0], [-2.0, 0.0]]
    assert replace_late(batch, computed_NT, 7, full=True) is computed_NT, "the engine does not report the mass"


@pytest.mark.parametrize(
    ("single", "proximal", "late", "where", "read", "expected"),
    [
        (True, False, 0.0, "loss", False, True),
        (True, False, 3.0, "loss", False, False),  # older weights sampled some tokens
        (True, True, 3.0, "loss", False, True),  # the policy that begins to train is the old one
        (False, False, 0.0, "loss", False, False),  # a second optimizer step has other weights
        (True, False, 0.0, "reward", False, False),  # the penalty reads them before the training pass
        (True, False, 0.0, "loss", True, False),  # and so does an advantage
    ],
)
def test_the_training_pass_serves_where_its_weights_sampled_and_nothing_reads_before(
    single: bool, proximal: bool, late: float, where: str, read: bool, expected: bool
) -> None:
    plan: Any = SimpleNamespace(single_update=single, proximal=proximal, kl=SimpleNamespace(where=where))
    credit: Any = SimpleNamespace(advantage=SimpleNamespace(needs={"old_logprobs_NT"} if read else set()))
    assert is_live(plan, credit, "old_logprobs_NT", late) is expected
    assert not is_live(plan, credit, "ref_logprobs_NT", late)


def test_a_late_batch_without_the_engine_s_log_probabilities_is_refused() -> None:
    batch = make_batch([1]).with_extras(versions_NT=torch.tensor([[3]]))
    with pytest.raises(ContractError, match="late completions need sampler_logprobs_NT"):
        replace_late(batch, torch.zeros(1, 1), 4)


def test_the_training_pass_gives_old_log_probabilities_of_its_own_version_only() -> None:
    live_NT = torch.tensor([[-1.0, -1.5], [-1.25, 0.0]], requires_grad=True)
    fresh = with_live(sampled([[7, 7], [7, 0]]), live_NT, 7)["old_logprobs_NT"]
    assert fresh.tolist() == live_NT.tolist() and not fresh.requires_grad
    mixed = sampled([[7, 5], [6, 0]])
    mixed = mixed.with_extras(old_logprobs_NT=mixed["sampler_logprobs_NT"])
    assert with_live(mixed, live_NT, 7)["old_logprobs_NT"].tolist() == [[-1.0, -2.0], [-2.0, 0.0]]


@pytest.mark.parametrize(
    ("exact", "temperature", "dtype", "scalars", "kept"),
    [
        (True, 1.0, "float32", {}, True),
        (False, 1.0, "float32", {}, False),
        (True, 0.0, "float32", {}, False),
        (True, 1.0, "bfloat16", {}, False),
        (True, 1.0, "float32", {"kept_mass": 0.9}, False),
    ],
)
def test_an_engine_s_log_probabilities_serve_where_they_are_the_trainer_s(
    exact: bool, temperature: float, dtype: str, scalars: dict[str, float], kept: bool
) -> None:
    batch = sampled([[1, 1], [1, 0]])
    batch.scalars.update(scalars)
    engine: Any = SimpleNamespace(exact=exact)
    assert ("old_logprobs_NT" in keep_exact(batch, engine, temperature, dtype)) == kept


# ----------------------------------------------------------------------------------------------------------------------
# agreement of sampler and trainer
# ----------------------------------------------------------------------------------------------------------------------


def mismatch(**options: Any) -> Mismatch:
    spec = RoleSpec("actor", ModelOptions(), frozenset())
    return Mismatch(RunConfig(SimpleNamespace(), {}, {}, {}, **options), spec, version=7)  # type: ignore[arg-type]


def test_differences_are_those_of_comparable_tokens_in_closed_form() -> None:
    """d is 0.5 and -0.25 on the two tokens of version 7; the late one of -100 does not count."""
    seen = mismatch(max_mismatch=10.0)
    seen.add(sampled([[7, 7], [6, 0]]), torch.tensor([[-1.5, -2.25], [-102.0, 0.0]]))
    k3 = sum(torch.tensor(d, dtype=torch.float64).exp().item() - 1 - d for d in (0.5, -0.25))
    assert seen.means.reduce() == {
        "actor/mismatch": pytest.approx(0.375),
        "actor/mismatch_max": pytest.approx(0.5),
        "actor/mismatch_kl": pytest.approx(k3 / 2),
    }


def test_truncated_sampling_is_compared_with_the_kept_mass_or_not_at_all() -> None:
    seen = mismatch(max_mismatch=1e-3)
    log_mass_NT = torch.tensor([[-0.5, -0.25], [0.0, 0.0]])
    seen.add(
        sampled([[7, 7], [7, 0]]).with_extras(sampler_log_mass_NT=log_mass_NT),
        torch.tensor([[-2.5, -2.25], [-2.0, 0.0]]),
    )
    assert seen.means.reduce()["actor/mismatch"] == 0.0
    blind, batch = mismatch(), sampled([[7, 7], [7, 0]])
    batch.scalars["kept_mass"] = 0.9
    blind.add(batch, torch.zeros(2, 2))
    assert blind.means.reduce() == {}


@pytest.mark.parametrize("trainer", [-2.002, float("nan")])
def test_a_difference_beyond_the_bound_warns_or_stops(trainer: float, caplog: pytest.LogCaptureFixture) -> None:
    logprobs_NT = torch.full((2, 2), trainer)
    warned = mismatch()
    warned.add(sampled([[7, 7], [7, 0]]), logprobs_NT)
    with caplog.at_level("WARNING", "rlhf"):
        warned.check(World())
    assert "rollout engine differ from those of role 'actor'" in caplog.text
    stopped = mismatch(on_mismatch="stop")
    stopped.add(sampled([[7, 7], [7, 0]]), logprobs_NT)
    with pytest.raises(RunStopped, match="above 0.001: the engine has other weights"):
        stopped.check(World())
