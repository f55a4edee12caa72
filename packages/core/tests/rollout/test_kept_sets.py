"""Kept sets: what truncated sampling could have drawn, held in little memory, and the trainer's log-probabilities over it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_core.contract.batch import Rollouts
from rlhf_core.contract.kept_sets import KeptSets, Truncation, truncates
from rlhf_core.contract.options import Sampling
from rlhf_core.errors import ContractError
from rlhf_core.models.heads.kept_tokens import KeptTokens, arrange_kept, kept_logprobs
from rlhf_core.models.heads.warp import warp
from rlhf_core.rollout.fake import FakeRollout
from rlhf_core.rollout.kept_sets import KeptSetsRecorder, with_kept_sets
from rlhf_core.testing import tiny_run
from rlhf_core.testing.batches import make_batch

V = 1000


@dataclass(eq=False)
class Words:
    """A tokenizer that has these tokens."""

    ids: dict[str, int]

    def get_vocab(self) -> dict[str, int]:
        return self.ids


class MinPFirst(FakeRollout):
    """An engine of vLLM's order."""

    min_p_first = True


CUTS = [{"top_p": 0.8}, {"top_k": 20}, {"min_p": 0.3}, {"top_p": 0.9, "top_k": 7, "min_p": 0.01}]


def random_sets(rows: int, tokens: int) -> torch.Tensor:
    """Kept tokens (rows, tokens, V): a few, many, or all of them."""
    generator = torch.Generator().manual_seed(1)
    share = torch.tensor([0.003, 0.02, 0.5, 1.1])[torch.randint(4, (rows, tokens), generator=generator)]
    kept = torch.rand(rows, tokens, V, generator=generator) < share[..., None]
    kept[..., 5] = True
    return kept


def recorded(kept_BTV: torch.Tensor, lengths: list[int]) -> list[KeptSets]:
    """The sets as a sampler adds them: rows in another order each time, and only those that have not ended."""
    recorder = KeptSetsRecorder(len(lengths), kept_BTV.shape[1])
    for t in range(kept_BTV.shape[1]):
        live = torch.tensor([b for b in range(len(lengths)) if lengths[b] > t][:: -1 if t % 2 else 1], dtype=torch.long)
        recorder.add(live, t, kept_BTV[live, t])
    return recorder.completions(lengths)


def masks(sets: list[KeptSets], lengths: list[int], at_once: int) -> torch.Tensor:
    """The sets as masks (M, V), some tokens at a time."""
    tokens = arrange_kept(replace(make_batch(lengths), kept_sets=list(sets)))
    assert isinstance(tokens, KeptTokens)
    M = sum(lengths)
    cuts = [slice(i, min(i + at_once, M)) for i in range(0, M, at_once)]
    return torch.cat([tokens.mask(cut, torch.zeros(cut.stop - cut.start, V)) for cut in cuts])


@pytest.mark.parametrize("at_once", [1, 4, 100])
def test_sets_of_any_size_are_found_again_token_by_token(at_once: int) -> None:
    lengths = [6, 1, 4, 5]
    kept = random_sets(4, 6)
    expected = torch.cat([kept[b, :n] for b, n in enumerate(lengths)])
    sets = recorded(kept, lengths)
    assert torch.equal(masks(sets, lengths, at_once), expected)
    assert {int(code) for each in sets for code in each.counts_T.clamp(max=1)} == {-1, 0, 1}, "all three forms occur"
    joined = KeptSets.join([each.cut(1) for each in sets] + [KeptSets.whole(2)])
    first = torch.cat([kept[:, 0], torch.ones(2, V, dtype=torch.bool)])
    assert torch.equal(masks([joined], [6], at_once), first)


def test_sets_of_some_tokens_are_theirs() -> None:
    """Tokens that do not follow one another, as ranks that share rows hold them."""
    kept = random_sets(4, 6)
    whole = arrange_kept(replace(make_batch([6] * 4), kept_sets=recorded(kept, [6] * 4)))
    assert isinstance(whole, KeptTokens)
    some = torch.tensor([0, 1, 5, 6, 7, 13, 22, 23])
    found = whole.part(some)
    assert torch.equal(found.mask(slice(0, 8), torch.zeros(8, V)), kept.flatten(0, 1)[some])
    assert torch.equal(found.mask(slice(3, 6), torch.zeros(3, V)), kept.flatten(0, 1)[some[3:6]])
    assert len(found.ids_K) < len(whole.ids_K)


def test_no_set_takes_more_than_a_bit_per_token_of_the_vocabulary() -> None:
    kept = random_sets(3, 50)
    for each in recorded(kept, [50] * 3):
        bytes_ = sum(t.untyped_storage().nbytes() for t in (each.ids_K, each.bits_WB))
        assert bytes_ <= 50 * V / 8 and each.ids_K.dtype == torch.int32 and each.bits_WB.dtype == torch.uint8


def test_log_probabilities_over_a_kept_set_are_those_of_the_distribution_that_was_sampled() -> None:
    """Against the sampler's own in float64, and by rules where the sets are not known; a target at the edge stays finite."""
    logits = torch.randn(6, V, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 3
    for cut in CUTS:
        sampling: Any = cut
        warped = warp(logits, **sampling)
        targets = warped.logprobs_NV.argmax(-1)
        for sets in ([Truncation(**sampling)], recorded(warped.kept_NV[None], [6])):
            found = over_kept(logits, targets, sets, [6])
            torch.testing.assert_close(found.float(), warped.logprobs_NV.amax(-1), atol=1e-6, rtol=0)
    outside = logits.argmin(-1)
    assert over_kept(logits, outside, [Truncation(top_k=2)], [6]).isfinite().all()


def test_what_is_cut_and_who_says_how() -> None:
    assert [truncates(Sampling(**each)) for each in ({}, *CUTS)] == [False, *[True] * len(CUTS)]  # type: ignore[arg-type]
    assert not truncates(Sampling(temperature=0.0, top_p=0.5))
    batch: Rollouts = make_batch([2, 1])
    own: Any = [KeptSets.whole(2), KeptSets.whole(1)]
    given = replace(batch, kept_sets=own)
    for sampling in (Sampling(), Sampling(top_k=3, replay="off")):
        for each in (batch, given):
            assert completed(each, sampling).kept_sets == [], "no replay, whatever the engine gave"
    assert (
        completed(batch, Sampling(top_k=3), tokenizer=Words({"a": 0, "c": 2, "e": 4})).kept_sets
        == [Truncation(top_k=3, tokens=5, holes=(1, 3))] * 2
    )
    (first, _) = completed(batch, Sampling(top_p=0.5), engine=MinPFirst()).kept_sets
    assert isinstance(first, Truncation) and first.min_p_first
    assert completed(given, Sampling(top_k=3)).kept_sets == own


@pytest.mark.parametrize("lengths", [[2], [2, 1, 1], [1, 2], [2, 2]])
def test_an_engine_whose_sets_do_not_fit_its_completions_is_named(lengths: list[int]) -> None:
    sets: Any = [KeptSets.whole(length) for length in lengths]
    with pytest.raises(ContractError, match=r"^rollout FakeRollout returned kept sets of \d tokens in \d comp"):
        completed(replace(make_batch([2, 1]), kept_sets=sets), Sampling(top_k=3))


def completed(batch: Rollouts, sampling: Sampling, engine: Any = None, tokenizer: Any = None) -> Rollouts:
    """The completions with kept sets or rules, of a model with three tokens."""
    return with_kept_sets(batch, sampling, engine or FakeRollout(), tokenizer or Words({"a": 0, "b": 1, "c": 2}))


def test_rows_of_several_engines_are_each_cut_as_they_were_sampled() -> None:
    """Sets, rules in two orders, and none: each row of one batch has what it has alone, in every chunk and after joining."""
    logits = torch.randn(7, V, generator=torch.Generator().manual_seed(4), dtype=torch.float64) * 2
    targets = logits.argmax(-1)
    shares: Any = {"top_p": 0.7, "min_p": 0.02}
    lengths, at = [2, 1, 3, 1], [slice(0, 2), slice(2, 3), slice(3, 6), slice(6, 7)]
    kept = warp(logits[:2], top_k=9).kept_NV
    hole = int(logits[3].topk(2).indices[1])  # it would be in the set
    parts: list[Any] = [
        recorded(kept[None], [2])[0],
        Truncation(**shares),
        Truncation(**shares, min_p_first=True, tokens=V - 10, holes=(hole,)),
        KeptSets.whole(1),
    ]
    alone = [
        over_kept(logits[where], targets[where], [part], [length])
        for where, part, length in zip(at, parts, lengths, strict=True)
    ]
    expected = [warp(logits[:2], top_k=9), warp(logits[2:3], **shares), None, warp(logits[6:7])]
    for found, warped in zip(alone, expected, strict=True):
        if warped is not None:
            torch.testing.assert_close(found.float(), warped.logprobs_NV.amax(-1), atol=1e-6, rtol=0)
    known = logits[3:6].clone()
    known[:, [hole, *range(V - 10, V)]] = -torch.inf
    mask = warp(known, **shares, min_p_first=True).kept_NV.scatter(1, targets[3:6, None], True)
    by_hand = logits[3:6].masked_fill(~mask, -torch.inf).log_softmax(-1).gather(1, targets[3:6, None])[:, 0]
    torch.testing.assert_close(alone[2], by_hand)
    torch.testing.assert_close(over_kept(logits, targets, parts, lengths), torch.cat(alone))
    torch.testing.assert_close(over_kept(logits, targets, parts, lengths, 2), torch.cat(alone))


def over_kept(
    logits: torch.Tensor, targets: torch.Tensor, parts: list[Any], lengths: list[int], at_once: int = 100
) -> torch.Tensor:
    """Log-probabilities of targets over the kept sets of a batch, some tokens at a time."""
    kept = arrange_kept(replace(make_batch(lengths), kept_sets=parts))
    assert kept is not None
    M = sum(lengths)
    cuts = [slice(i, min(i + at_once, M)) for i in range(0, M, at_once)]
    return torch.cat([kept_logprobs(logits[cut], targets[cut], kept, cut) for cut in cuts])


def test_rows_that_were_cut_and_rows_that_were_not_are_joined_in_either_order() -> None:
    own: Any = [Truncation(top_k=3), KeptSets.from_lists([[4]])]
    cut, whole = replace(make_batch([2, 1]), kept_sets=own), make_batch([3])
    for batches, place in (([cut, whole], 2), ([whole, cut], 0)):
        sets: Any = Rollouts.cat(batches).kept_sets
        assert len(sets) == 3 and sets[place].counts_T.tolist() == [0, 0, 0]
        assert [*sets[:place], *sets[place + 1 :]] == own
    assert Rollouts.cat([whole, whole]).kept_sets == []


def test_sets_stay_with_their_rows_and_only_the_role_that_sampled_reads_them() -> None:
    own: Any = [KeptSets.whole(2), KeptSets.whole(1)]
    batch = replace(make_batch([2, 1]), kept_sets=own)
    assert batch.rows([1]).kept_sets == [own[1]]
    assert type(batch).cat([batch.rows([1]), batch]).kept_sets == [own[1], *own]
    assert batch.read_by("actor", "actor") is batch
    assert batch.read_by("reference", "actor").kept_sets == [] and batch.kept_sets == own


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("chunk", [1024, 7, 0])
def test_the_trainer_takes_log_probabilities_and_gradients_over_what_the_sampler_kept(
    cut: dict[str, float], chunk: int, tmp_path: Path
) -> None:
    """Against plain transformers: its logits, all but the kept tokens masked out, and autograd."""
    sampling: Any = Sampling(n=3, max_new_tokens=5, temperature=0.7, **cut)  # type: ignore[arg-type]
    run = tiny_run(tmp_path, model="tiny:hidden=16,layers=1", sampling=sampling, chunk=chunk)
    with run.place():
        role: Any = run.roles["actor"]
        prompts = run.encoder.prompts(run.heldout(2), [0, 1])
        batch = run.rollouts("actor", prompts, sampling, trained=True)
        found = role.infer(batch, frozenset({"logprobs_NT", "full_logprobs_NT"}))
        kept = (found["logprobs_NT"] - batch["sampler_logprobs_NT"])[batch.mask_NT]
        assert float(kept.abs().max()) < 1e-5
        mass = (found["full_logprobs_NT"] - found["logprobs_NT"] - batch["sampler_log_mass_NT"])[batch.mask_NT]
        assert float(mass.abs().max()) < 1e-5
        weights_NT = torch.randn(batch.mask_NT.shape, generator=torch.Generator().manual_seed(3)) * batch.mask_NT
        outputs = role.trainable.forward(batch, frozenset({"logprobs_NT", "full_logprobs_NT"}))
        ours = gradient(role, (outputs["logprobs_NT"] * weights_NT).sum() + outputs["full_logprobs_NT"].sum())
        theirs = gradient(role, by_hand(role.causal_lm, batch, weights_NT, sampling))
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)
        assert run.rollouts("actor", prompts, sampling).kept_sets == [], "evaluations compare whole distributions"


def gradient(role: Any, loss: torch.Tensor) -> torch.Tensor:
    """The gradient of all parameters as one vector."""
    parameters = [p for p in role.causal_lm.parameters() if p.requires_grad]
    return torch.cat([each.flatten() for each in torch.autograd.grad(loss, parameters)])


def by_hand(model: Any, batch: Rollouts, weights_NT: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """The weighted log-probabilities over kept sets, and the plain ones over the whole vocabulary; row by row."""
    total = torch.zeros(())
    for row in range(len(batch)):
        P, T = int(batch.prompt_lengths_N[row]), int(batch.lengths_N[row])
        ids = torch.cat([batch.prompt_NL[row, :P], batch.tokens_NT[row, :T]])[None]
        logits = model(input_ids=ids).logits[0, P - 1 : -1].float() / sampling.temperature
        kept = warp(logits.detach(), 1.0, sampling.top_p, sampling.top_k, sampling.min_p).kept_NV
        targets = batch.tokens_NT[row, :T, None]
        over_kept = logits.masked_fill(~kept, -torch.inf).log_softmax(-1).gather(1, targets)[:, 0]
        total = total + (over_kept * weights_NT[row, :T]).sum() + logits.log_softmax(-1).gather(1, targets).sum()
    return total
