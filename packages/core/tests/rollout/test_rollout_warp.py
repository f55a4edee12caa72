"""Temperature, truncation and drawing, against plain Python in float64 and against the definition of an inverse."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_core.contract.options import Sampling
from rlhf_core.models.heads.warp import draw, warp
from rlhf_core.rollout.sampler import pick

LOGITS = st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=12)
RULES = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.5, 1.0, 1.7]),
        "top_p": st.floats(0.01, 1),
        "top_k": st.integers(0, 14),
        "min_p": st.sampled_from([0.0, 0.05, 0.3, 1.0]),
        "min_p_first": st.booleans(),
    }
)

STEADY = settings(deadline=None, derandomize=True)
"""The same examples in every run: a border case in the last digit should not fail somebody else's change."""


def probabilities(logits: list[float], temperature: float) -> list[float]:
    """Softmax in float64, one number at a time."""
    highest = max(logits)
    weights = [math.exp((x - highest) / temperature) for x in logits]
    return [w / math.fsum(weights) for w in weights]


def reference(
    logits: list[float], temperature: float, top_p: float, top_k: int, min_p: float, min_p_first: bool = False
) -> list[float]:
    """Truncated probabilities, each rule in the words of its definition, one after the other."""
    probs = probabilities(logits, temperature)
    if min_p_first:
        probs = renormalized([p if p >= min_p * max(probs) else 0.0 for p in probs])
    if 0 < top_k < len(probs):
        kth = sorted(probs, reverse=True)[top_k - 1]
        probs = renormalized([p if p >= kth else 0.0 for p in probs])
    if top_p < 1:
        mass, least = 0.0, 0.0
        for p in sorted(probs, reverse=True):
            mass, least = mass + p, p
            if mass >= top_p:
                break
        probs = renormalized([p if p >= least else 0.0 for p in probs])
    return renormalized([p if p >= min_p * max(probs) else 0.0 for p in probs])


def renormalized(probs: list[float]) -> list[float]:
    return [p / math.fsum(probs) for p in probs]


def separated(logits: list[float]) -> bool:
    """No two logits so near that float32 and float64 may order them or their sums differently."""
    ordered = sorted(logits)
    return all(b - a > 1e-3 for a, b in itertools.pairwise(ordered))


@given(LOGITS.filter(separated), RULES)
@STEADY
def test_truncated_probabilities_are_those_of_the_definitions(logits: list[float], rules: dict[str, float]) -> None:
    probs = reference(logits, **rules)  # type: ignore[arg-type]
    warped = warp(torch.tensor([logits]), **rules)  # type: ignore[arg-type]
    ours = warped.logprobs_NV[0].double().exp().tolist()
    if [p > 0 for p in ours] != [
        p > 0 for p in probs
    ]:  # only a share that falls on a border to the last digit may differ
        near = {**rules, "top_p": rules["top_p"] * (1 - 1e-5), "min_p": rules["min_p"] * (1 + 1e-5)}
        far = {**rules, "top_p": min(rules["top_p"] * (1 + 1e-5), 1.0), "min_p": rules["min_p"] * (1 - 1e-5)}
        borders = (reference(logits, **near), reference(logits, **far))  # type: ignore[arg-type]
        probs = next(each for each in borders if [p > 0 for p in each] == [p > 0 for p in ours])
    assert ours == pytest.approx(probs, abs=1e-6)
    kept = math.fsum(p for p, q in zip(probabilities(logits, rules["temperature"]), probs, strict=True) if q > 0)
    assert warped.log_mass_N.exp().item() == pytest.approx(kept, abs=1e-5)


@given(LOGITS, RULES)
@STEADY
def test_the_most_likely_token_is_kept_and_everything_as_likely_as_a_kept_one(
    logits: list[float], rules: dict[str, float]
) -> None:
    kept_V = warp(torch.tensor([logits]), **rules).kept_NV[0]  # type: ignore[arg-type]
    assert kept_V[torch.tensor(logits).argmax()]
    logprobs_V = warp(torch.tensor([logits]), rules["temperature"]).logprobs_NV[0]
    assert torch.equal(kept_V, logprobs_V >= logprobs_V[kept_V].min())


@given(LOGITS, RULES, st.randoms())
@STEADY
def test_the_order_of_the_vocabulary_does_not_matter(
    logits: list[float], rules: dict[str, float], random: object
) -> None:
    order = list(range(len(logits)))
    random.shuffle(order)  # type: ignore[attr-defined]
    rules |= {"top_p": round(rules["top_p"], 2) + 0.00314}  # off the border that another order of addition could cross
    rules["top_p"] = min(rules["top_p"], 1.0)
    one = warp(torch.tensor([logits]), **rules).logprobs_NV[0][order]  # type: ignore[arg-type]
    other = warp(torch.tensor([[logits[i] for i in order]]), **rules).logprobs_NV[0]  # type: ignore[arg-type]
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_nothing_is_cut_by_default() -> None:
    logits_NV = torch.randn(3, 50)
    warped = warp(logits_NV)
    torch.testing.assert_close(warped.logprobs_NV, logits_NV.double().log_softmax(-1).float())
    assert warped.log_mass_N.tolist() == [0.0, 0.0, 0.0]
    assert warped.kept_NV.all()


@pytest.mark.parametrize("V", [100, 1000, 5000])
def test_top_p_keeps_the_smallest_set_in_a_large_flat_vocabulary(V: int) -> None:
    """Check that more tokens are examined if the first guess does not hold the share."""
    logits_NV = torch.randn(2, V, generator=torch.Generator().manual_seed(V)) * 0.1
    kept_NV = warp(logits_NV, top_p=0.9).kept_NV
    probs_NV = logits_NV.double().softmax(-1)
    for probs_V, kept_V in zip(probs_NV, kept_NV, strict=True):
        assert probs_V[kept_V].sum() >= 0.9 - 1e-6
        assert probs_V[kept_V].sum() - probs_V[kept_V].min() < 0.9 + 1e-6
        assert probs_V[kept_V].min() >= probs_V[~kept_V].max()


def test_the_order_of_min_p_and_top_p_matters() -> None:
    """Cut 0.5, 0.3, 0.2: min-p 0.5 leaves 0.625 and 0.375, so top-p 0.6 keeps one token after min-p, and two before."""
    logits_NV = torch.tensor([[0.5, 0.3, 0.2]]).log()
    for top_p, first, expected in ((0.75, False, 2), (0.75, True, 2), (0.6, False, 2), (0.6, True, 1)):
        assert int(warp(logits_NV, top_p=top_p, min_p=0.5, min_p_first=first).kept_NV.sum()) == expected


def test_log_mass_gives_the_untruncated_log_probability_back() -> None:
    logits_NV = torch.randn(4, 30, generator=torch.Generator().manual_seed(0)) * 3
    warped, plain = warp(logits_NV, 0.8, 0.7, 10, 0.02), warp(logits_NV, 0.8)
    restored_NV = warped.logprobs_NV + warped.log_mass_N[:, None]
    torch.testing.assert_close(restored_NV[warped.kept_NV], plain.logprobs_NV[warped.kept_NV])


def test_the_gradient_is_that_of_the_distribution_over_the_kept_set() -> None:
    """d log p(v) / d logit(u) = [u = v] - p(u) over the kept set, divided by the temperature; nothing outside."""
    logits_NV = torch.tensor([[2.0, 1.0, 0.5, -1.0, -4.0]], requires_grad=True)
    warped = warp(logits_NV, temperature=0.5, top_k=3)
    (gradient_NV,) = torch.autograd.grad(warped.logprobs_NV[0, 1], logits_NV)
    probs = renormalized([math.exp(x / 0.5) for x in (2.0, 1.0, 0.5)])
    expected = [-probs[0] / 0.5, (1 - probs[1]) / 0.5, -probs[2] / 0.5, 0.0, 0.0]
    assert gradient_NV[0].tolist() == pytest.approx(expected, abs=1e-6)


@given(st.lists(st.floats(-30, 5, width=32), min_size=1, max_size=700), st.floats(0, 1 - 2**-51))
@STEADY
def test_a_draw_is_the_inverse_of_the_cumulative_distribution(logits: list[float], uniform: float) -> None:
    logprobs_NV = torch.tensor([logits]).log_softmax(-1)
    token = int(draw(logprobs_NV, torch.tensor([uniform], dtype=torch.float64)))
    probs = logprobs_NV[0].double().exp()
    below, through = probs[:token].sum() / probs.sum(), probs[: token + 1].sum() / probs.sum()
    assert probs[token] > 0
    assert below - 1e-6 <= uniform <= through + 1e-6


@pytest.mark.parametrize("V", [3, 256, 257, 1000])
def test_tokens_of_probability_zero_are_never_drawn_whatever_the_number(V: int) -> None:
    logits_V = torch.full((V,), -torch.inf)
    allowed = {1, V // 2, V - 2}
    logits_V[list(allowed)] = torch.tensor([0.0, -3.0, -80.0])[: len(allowed)]
    edges = torch.tensor([0.0, 2.0**-51, 0.5, 0.95257, 1 - 2.0**-51], dtype=torch.float64)
    many = torch.cat([edges, torch.rand(2000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))])
    tokens_N = draw(logits_V.log_softmax(-1).expand(len(many), V), many)
    assert set(tokens_N.tolist()) <= allowed


def test_an_even_grid_of_numbers_draws_each_token_in_proportion() -> None:
    """A grid of M numbers gives each token between M p - 1 and M p + 1 of them: no bias at block borders."""
    V, M = 700, 100_000
    logprobs_V = (torch.randn(V, generator=torch.Generator().manual_seed(1)) * 2).log_softmax(-1)
    grid = (torch.arange(M, dtype=torch.float64) + 0.5) / M
    counts_V = torch.bincount(torch.cat([draw(logprobs_V.expand(len(u), V), u) for u in grid.split(5000)]), minlength=V)
    assert (counts_V - M * logprobs_V.double().exp()).abs().max() < 1.1


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0, 2.0])
def test_ids_that_a_tokenizer_lacks_are_never_drawn_and_the_others_keep_their_whole_probability(
    temperature: float,
) -> None:
    """A padded head: the trainer's log-softmax is over all of it, at the temperature of sampling (1 where that is 0)."""
    logits_RV = torch.randn(64, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits_RV[:, 2] += 2  # the likeliest id, which has no token
    uniforms_R = torch.rand(64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    tokens_R, logprobs_R, _ = pick(logits_RV, uniforms_R, Sampling(temperature=temperature), torch.tensor([2, 5]))
    assert not torch.isin(tokens_R, torch.tensor([2, 5])).any()
    expected_RV = (logits_RV / (temperature or 1.0)).log_softmax(1)
    torch.testing.assert_close(
        logprobs_R.double(), expected_RV.gather(1, tokens_R[:, None])[:, 0], atol=1e-5, rtol=1e-5
    )
