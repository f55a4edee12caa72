"""Agreement of vLLM's samples with the trained model in transformers, and with the contract."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from types import BuiltinFunctionType
from typing import Any

import numpy as np
import pytest
import torch

from rlhf_core.contract.batch import Prompts, Rollouts
from rlhf_core.contract.options import Sampling
from rlhf_core.contract.providers import Rollout
from rlhf_core.errors import UsageError
from rlhf_core.models.heads.warp import warp
from rlhf_core.rollout.hf import HuggingFaceRollout
from rlhf_core.rollout.kept_sets import with_kept_sets
from rlhf_core.testing import check_rollout
from rlhf_core.training.local_role import LocalRole
from rlhf_rollout_vllm.engine import VLLM, VLLMEngines

pytestmark = pytest.mark.vllm

GREEDY = Sampling(n=1, max_new_tokens=24, temperature=0.0)
TEMPERATURE = 0.7  # conftest's
SAMPLED = Sampling(n=3, max_new_tokens=12, temperature=TEMPERATURE, seed=5)
LOGPROBS = frozenset({"logprobs_NT"})


def logits_of(role: LocalRole, rollouts: Rollouts, i: int) -> torch.Tensor:
    """(T, V) logits of completion `i` from transformers' own forward pass."""
    prompt = rollouts.prompt_NL[i, : int(rollouts.prompt_lengths_N[i])].tolist()
    tokens = rollouts.tokens_NT[i, : int(rollouts.lengths_N[i])].tolist()
    with torch.no_grad():
        states = role.causal_lm.base_model(torch.tensor([prompt + tokens]))[0][0, len(prompt) - 1 : -1]
        return torch.nn.functional.linear(states, role.causal_lm.get_input_embeddings().weight)  # tiny is tied


def ended(rollouts: Rollouts) -> list[list[int]]:
    """Tokens of each completion."""
    return [row[:n].tolist() for row, n in zip(rollouts.tokens_NT, rollouts.lengths_N.tolist(), strict=True)]


def test_it_keeps_the_contract_of_a_rollout() -> None:
    check_rollout(VLLM(kv_cache_gib=0.25, max_num_seqs=16))


def test_a_temperature_that_vllm_would_replace_is_refused(
    engine: VLLMEngines, role: LocalRole, prompts: Prompts
) -> None:
    """It samples at 0.01 instead, and says so in a log that is off."""
    with pytest.raises(UsageError, match=r"cannot sample at temperature 0.005; give sampling.temperature = 0 or at"):
        engine(role, prompts, replace(SAMPLED, temperature=0.005))


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_greedy_tokens_equal_those_of_hf_whatever_the_weights(
    engine: VLLMEngines, role: LocalRole, prompts: Prompts, seed: int, randomize: Callable[..., Any]
) -> None:
    randomize(role, seed=100 + seed)
    engine.sync(role)
    ours, theirs = engine(role, prompts, GREEDY), HuggingFaceRollout()(role, prompts, GREEDY)
    assert ended(ours) == ended(theirs)
    assert ours.finish == theirs.finish
    assert ours.texts == theirs.texts
    torch.testing.assert_close(
        ours["sampler_logprobs_NT"], theirs["sampler_logprobs_NT"], rtol=0, atol=1e-4
    )  # float32 in another order


def test_log_probabilities_are_the_roles_own_at_its_temperature(
    engine: VLLMEngines, role: LocalRole, prompts: Prompts
) -> None:
    rollouts = engine(role, prompts, SAMPLED)
    torch.testing.assert_close(
        rollouts["sampler_logprobs_NT"], role.infer(rollouts, LOGPROBS)["logprobs_NT"], rtol=0, atol=1e-3
    )
    assert rollouts.version == role.version


@pytest.mark.parametrize("cut", [{"top_k": 5}, {"top_p": 0.6}, {"min_p": 0.2}])
def test_truncated_log_probabilities_are_those_of_the_kept_set(
    engine: VLLMEngines, role: LocalRole, prompts: Prompts, cut: dict[str, float]
) -> None:
    rollouts = engine(role, prompts, replace(SAMPLED, n=1, **cut))  # four completions: all are measured
    masses: list[float] = []
    for i, tokens in enumerate(ended(rollouts)):
        kept = warp(logits_of(role, rollouts, i), TEMPERATURE, **cut)
        expected = kept.logprobs_NV[range(len(tokens)), tokens]
        masses = [*masses, *kept.log_mass_N.exp().tolist()]
        torch.testing.assert_close(rollouts["sampler_logprobs_NT"][i, : len(tokens)], expected, rtol=0, atol=1e-3)
    assert rollouts.scalars["kept_mass"] == pytest.approx(sum(masses) / len(masses), abs=1e-3)


@pytest.mark.parametrize("cut", [{"top_k": 5}, {"top_k": 12, "top_p": 0.6}, {"top_k": 12, "min_p": 0.2}])
def test_under_top_k_the_kept_sets_are_those_that_were_sampled_from(
    engine: VLLMEngines, role: LocalRole, prompts: Prompts, cut: dict[str, float]
) -> None:
    """They are those of the rules on transformers' logits, and the role's log-probabilities over them are the engine's."""
    rollouts = engine(role, prompts, replace(SAMPLED, **cut))  # type: ignore[arg-type]
    sizes = set()
    for i in range(len(rollouts)):
        kept_NV = warp(logits_of(role, rollouts, i), TEMPERATURE, **cut).kept_NV
        assert kept_NV is not None
        sets: Any = rollouts.kept_sets[i]
        assert sets.counts_T.tolist() == kept_NV.sum(1).tolist()
        assert sets.ids_K.tolist() == kept_NV.nonzero()[:, 1].tolist()
        sizes |= set(sets.counts_T.tolist())
    assert len(sizes) > 1 or len(cut) == 1
    replayed_NT = role.infer(rollouts, LOGPROBS)["logprobs_NT"]
    torch.testing.assert_close(rollouts["sampler_logprobs_NT"], replayed_NT, rtol=0, atol=1e-4)
    assert 0 < rollouts.scalars["kept_mass"] < 1


@pytest.mark.parametrize("cut", [{}, {"top_k": 12}, {"top_k": 200}])
def test_min_p_is_taken_before_top_p_and_the_trainer_replays_that_order(
    engine: VLLMEngines, role: LocalRole, prompts: Prompts, cut: dict[str, int]
) -> None:
    """By vLLM's own sets under a small top-k, and by the rules without them; in core's order the sets are others."""
    sampling = replace(SAMPLED, top_p=0.6, min_p=0.2, **cut)
    rollouts = engine(role, prompts, sampling)
    assert bool(rollouts.kept_sets) == (cut == {"top_k": 12})

    def largest_error(provider: Rollout) -> float:
        replayed = with_kept_sets(replace(rollouts, kept_sets=[]), sampling, provider, role.tokenizer)
        found_NT = role.infer(replayed, LOGPROBS)["logprobs_NT"]
        return float((found_NT - rollouts["sampler_logprobs_NT"])[rollouts.mask_NT].abs().max())

    assert largest_error(VLLM()) < 1e-4
    assert largest_error(HuggingFaceRollout()) > 0.05
    if rollouts.kept_sets:
        replayed_NT = role.infer(rollouts, LOGPROBS)["logprobs_NT"]
        torch.testing.assert_close(rollouts["sampler_logprobs_NT"], replayed_NT, rtol=0, atol=1e-4)


@pytest.mark.parametrize("cut", [{"top_p": 0.6}, {"top_k": 200}, {"top_k": 5, "replay": "off"}])
def test_sets_that_are_too_large_or_not_wanted_are_not_asked_for(
    engine: VLLMEngines, role: LocalRole, prompts: Prompts, cut: dict[str, Any]
) -> None:
    rollouts = engine(role, prompts, replace(SAMPLED, **cut))
    assert rollouts.kept_sets == []
    assert rollouts["sampler_logprobs_NT"].shape == rollouts.tokens_NT.shape


def test_first_tokens_are_drawn_with_the_models_probabilities(
    engine: VLLMEngines, role: LocalRole, prompts: Prompts
) -> None:
    one, draws = prompts.rows([0]), 4000
    rollouts = engine(role, one, Sampling(n=draws, max_new_tokens=1, temperature=TEMPERATURE, seed=3))
    probabilities = (logits_of(role, rollouts, 0)[0].double() / TEMPERATURE).softmax(-1)
    expected = probabilities * draws
    counts = torch.bincount(rollouts.tokens_NT[:, 0], minlength=len(expected)).double()
    rare = expected < 5  # pooled, as Pearson's test wants
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
    chi2, freedom = float(((counts - expected) ** 2 / expected).sum()), len(expected) - 1
    assert chi2 < freedom + 5 * (2 * freedom) ** 0.5, "five standard deviations"


def test_a_seed_belongs_to_a_completion_not_to_a_batch(engine: VLLMEngines, role: LocalRole, prompts: Prompts) -> None:
    together = ended(engine(role, prompts, SAMPLED))
    alone = [tokens for i in (2, 0, 3, 1) for tokens in ended(engine(role, prompts.rows([i]), SAMPLED))]
    assert [together[n * i + k] for n in [SAMPLED.n] for i in (2, 0, 3, 1) for k in range(n)] == alone
    fewer = ended(engine(role, prompts, replace(SAMPLED, n=2)))
    assert fewer == [together[SAMPLED.n * i + k] for i in range(len(prompts)) for k in range(2)]
    assert len({tuple(tokens) for tokens in together[: SAMPLED.n]}) == SAMPLED.n, "completions of a prompt differ"


def test_a_completion_ends_with_eos_and_keeps_it(engine: VLLMEngines, role: LocalRole, prompts: Prompts) -> None:
    eos = role.tokenizer.eos_token_id
    with torch.no_grad():
        role.causal_lm.get_input_embeddings().weight[eos] *= 3  # tied: often the likeliest, or the unlikeliest
    role.version += 1
    rollouts = engine(role, prompts, Sampling(n=16, max_new_tokens=32, temperature=1.0))
    assert {"stop", "length"} == set(rollouts.finish), "the weights of this test must give both"
    for tokens, finish in zip(ended(rollouts), rollouts.finish, strict=True):
        assert eos not in tokens[:-1]
        assert (tokens[-1] == eos) == (finish == "stop")
        assert finish == "stop" or len(tokens) == 32


def test_a_stop_string_ends_a_completion_and_is_kept(engine: VLLMEngines, role: LocalRole, prompts: Prompts) -> None:
    with torch.no_grad():
        role.causal_lm.get_input_embeddings().weight[128:] = 0  # tied: bytes below 128 are likelier, and are text
    role.version += 1
    free = engine(role, prompts, GREEDY)
    for i, text in enumerate(free.texts):
        sampling = replace(GREEDY, stop=("no such text", text[2:5]))
        stopped, hf = engine(role, prompts.rows([i]), sampling), HuggingFaceRollout()(role, prompts.rows([i]), sampling)
        assert stopped.finish == ["stop"]
        assert stopped.texts[0].endswith(text[2:5])
        assert stopped.texts[0].index(text[2:5]) == len(stopped.texts[0]) - 3
        assert ended(stopped) == [ended(free)[i][: int(stopped.lengths_N[0])]] == ended(hf)


def test_more_completions_than_the_engine_runs_at_a_time_keep_their_order(
    engine: VLLMEngines, role: LocalRole, make_prompts: Callable[..., Any]
) -> None:
    texts = [f"{i} " * (1 + i % 7) for i in range(40)]
    prompts = make_prompts(role, texts)
    rollouts = engine(role, prompts, replace(SAMPLED, n=4, max_new_tokens=3))
    assert len(rollouts) == 160
    assert rollouts.prompts == [text for text in texts for _ in range(4)]
    last = engine(role, prompts.rows([39]), replace(SAMPLED, n=4, max_new_tokens=3))
    assert ended(last) == ended(rollouts)[-4:]


def test_prompts_that_do_not_fit_into_one_forward_pass_are_sampled_by_their_seeds_too(
    engine: VLLMEngines, role: LocalRole, make_prompts: Callable[..., Any]
) -> None:
    prompts = make_prompts(role, [f"{i}" + "long " * 600 for i in range(4)])
    sampling = replace(SAMPLED, n=1, max_new_tokens=4)
    together = engine(role, prompts, sampling)
    assert ended(together) == [tokens for i in range(4) for tokens in ended(engine(role, prompts.rows([i]), sampling))]


def test_a_prompt_is_read_once_for_all_its_completions(
    engine: VLLMEngines, role: LocalRole, make_prompts: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM tells how much of each prompt it found in its cache, in blocks of 128 tokens on the CPU."""
    prompts = make_prompts(role, [f"{i} " + "once upon a time " * 24 for i in range(3)])
    engine(role, prompts.rows([0]), GREEDY)  # opens it
    role.version += 1  # and so empties the cache before the next call
    llm, cached = engine.engines["actor"].host.llm, []
    generate = llm.generate
    monkeypatch.setattr(llm, "generate", lambda *a, **k: cached.extend(generate(*a, **k)) or cached)
    engine(role, prompts, replace(SAMPLED, n=4))
    found = [answer.num_cached_tokens for answer in cached]
    assert found == [0, 384, 384, 384] * 3, "three blocks of 410 tokens, all but the first time"


def test_a_prompt_that_is_too_long_is_a_users_mistake(
    engine: VLLMEngines, role: LocalRole, make_prompts: Callable[..., Any]
) -> None:
    prompts = make_prompts(role, ["x" * 4090])
    with pytest.raises(UsageError, match=r"4090 tokens and 7 new ones exceed the 4096 positions"):
        engine(role, prompts, replace(SAMPLED, max_new_tokens=7))


def test_sampling_leaves_the_processs_random_state_and_threads_alone(
    engine: VLLMEngines, role: LocalRole, prompts: Prompts
) -> None:
    set_threads = torch.set_num_threads
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy(), torch.get_num_threads()
    engine(role, prompts, SAMPLED)
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1], torch.get_num_threads()
    assert torch.equal(before[0], after[0])
    assert before[1] == after[1]
    assert (before[2] == after[2]).all()
    assert before[3] == after[3]
    assert torch.set_num_threads is set_threads
    assert isinstance(set_threads, BuiltinFunctionType), "not vLLM's, which does nothing"
