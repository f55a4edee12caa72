"""Slices of completions on the engine `hf`: whatever their length is, tokens and log-probabilities of whole completions."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rlhf_core import Example, Prompts, Rollouts, Sampling
from rlhf_core.contract.kept_sets import KeptSets
from rlhf_core.contract.options import turn_uid
from rlhf_core.rollout.hf import HuggingFaceRollout
from rlhf_core.rollout.slices import PartialCompletion, PartialGroup, add_slice, join_groups, next_slice
from rlhf_core.testing import tiny_run
from rlhf_core.testing.batches import make_batch
from rlhf_core.training.local_role import LocalRole

TEXTS, MOST, N = ["Hello", "The sky is", "1 + 1 ="], 11, 2


@pytest.fixture(scope="module")
def role(tmp_path_factory: pytest.TempPathFactory) -> LocalRole:
    plan = tiny_run(tmp_path_factory.mktemp("run"), model="tiny:hidden=16,layers=1").plan
    return LocalRole(plan, "actor")


def prompts_of(role: LocalRole) -> Prompts:
    ids = [role.tokenizer(text)["input_ids"] for text in TEXTS]
    return Prompts(list(TEXTS), ids, [Example(text, row=i) for i, text in enumerate(TEXTS)], [7, 8, 9])


def in_slices(role: LocalRole, length: int, sampling: Sampling, move: bool = False) -> Rollouts:
    """Completions in slices of `length` tokens; with `move` the role takes an update after each."""
    prompts = prompts_of(role)
    groups = [PartialGroup(prompts.rows([i]), [PartialCompletion(k) for k in range(N)]) for i in range(len(TEXTS))]
    sampled = None
    while not all(group.is_complete for group in groups):
        asked, going = next_slice(groups, MOST, length)
        sampled = HuggingFaceRollout()(role, asked, replace(sampling, n=1, max_new_tokens=max(asked.limits)))
        add_slice(going, asked.limits, sampled, MOST)
        role.version += move
    assert sampled is not None
    return join_groups(groups, role.tokenizer, sampled)


@pytest.mark.parametrize("length", [1, 4, MOST, 50])
def test_greedy_slices_are_whole_completions(role: LocalRole, length: int) -> None:
    greedy = Sampling(n=N, max_new_tokens=MOST, temperature=0.0)
    whole = HuggingFaceRollout()(role, prompts_of(role), greedy)
    found = in_slices(role, length, greedy)
    for name in ("tokens_NT", "lengths_N", "mask_NT", "prompt_NL", "group_N"):
        assert torch.equal(getattr(found, name), getattr(whole, name)), name
    assert (found.texts, found.finish, found.prompts) == (whole.texts, whole.finish, whole.prompts)
    assert torch.equal(found["uids_N"], whole["uids_N"])
    torch.testing.assert_close(found["sampler_logprobs_NT"], whole["sampler_logprobs_NT"], atol=1e-5, rtol=0)
    assert found.extras.keys() == whole.extras.keys()


def test_sampled_slices_report_the_log_probabilities_of_the_whole_context(role: LocalRole) -> None:
    found = in_slices(role, 3, Sampling(n=N, max_new_tokens=MOST, seed=5))
    expected = role.infer(found, frozenset({"logprobs_NT"}))["logprobs_NT"]
    torch.testing.assert_close(found["sampler_logprobs_NT"], expected * found.mask_NT, atol=1e-5, rtol=0)
    rows = {tuple(row.tolist()) for row in found.tokens_NT}
    assert len(rows) == len(TEXTS) * N, "completions of a prompt have seeds of their own"


def test_truncated_slices_keep_their_kept_sets_and_the_mean_kept_mass(role: LocalRole) -> None:
    found = in_slices(role, 4, Sampling(n=N, max_new_tokens=MOST, top_k=5))
    assert [len(kept) for kept in found.kept_sets if isinstance(kept, KeptSets)] == found.lengths_N.tolist()
    mass = found["sampler_log_mass_NT"][found.mask_NT].exp().mean()
    assert found.scalars["kept_mass"] == pytest.approx(float(mass), rel=1e-5)


def test_versions_change_between_slices_and_not_inside_of_them(role: LocalRole) -> None:
    before = role.version
    found = in_slices(role, 4, Sampling(n=N, max_new_tokens=MOST, seed=1), move=True)
    for i, length in enumerate(found.lengths_N.tolist()):
        assert found["versions_NT"][i, :length].tolist() == [before + t // 4 for t in range(length)]


def test_each_slice_of_a_completion_draws_as_another_turn_of_its_own(role: LocalRole) -> None:
    """Equal numbers would repeat the draws of the first slice at every slice."""
    group = PartialGroup(prompts_of(role).rows([1]), [PartialCompletion(k) for k in range(N)])
    asked = []
    for _ in range(3):
        prompts, going = next_slice([group], MOST, 2)
        asked.append(prompts.uids)
        sampled = HuggingFaceRollout()(role, prompts, Sampling(n=1, max_new_tokens=2, temperature=0.0))
        add_slice(going, prompts.limits, sampled, MOST)
    assert asked == [[turn_uid(8, k, number) for k in range(N)] for number in range(3)]
    assert len({uid for uids in asked for uid in uids}) == 3 * N


@pytest.mark.parametrize(("limit", "finish", "length"), [(3, "stop", 3), (2, None, 2)])
def test_an_end_beyond_the_limit_of_a_slice_ends_no_completion(limit: int, finish: str | None, length: int) -> None:
    """An engine may ignore limits; what it sampled beyond one is dropped, its end with it."""
    sampled = make_batch([3]).with_extras(versions_NT=torch.zeros(1, 3, dtype=torch.int64))
    sampled.finish = ["stop"]
    completion = PartialCompletion(0)
    add_slice([completion], [limit], sampled, MOST)
    assert (completion.finish, len(completion.tokens), completion.slices) == (finish, length, 1)
