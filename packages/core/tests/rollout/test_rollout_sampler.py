"""The sampler on small random models, against `generate`, against full forward passes in float64, and against itself in
other company."""

from __future__ import annotations

import copy
import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from rlhf_core.contract.options import Sampling
from rlhf_core.errors import OptionError, RunStopped, UsageError
from rlhf_core.rollout.hf import HuggingFaceRollout
from rlhf_core.rollout.sampler import Piece, SampledCompletion, plan_waves, sample, uniforms

RAGGED = [[5, 6, 7], [9], [3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13], [2, 2], [30, 1, 30, 1, 30]]
SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 40,
}
NO_ENDS: dict[str, Any] = {"eos_token_id": None, "bos_token_id": None, "pad_token_id": None}


def llama(**options: Any) -> Any:
    """Two layers with grouped queries; weights so large that its distributions are far from flat."""
    torch.manual_seed(0)
    config = LlamaConfig(**(SMALL | NO_ENDS | {"num_key_value_heads": 2, "initializer_range": 0.3} | options))
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def model() -> Any:
    return llama()


def run(model: Any, prompts: list[list[int]], sampling: Sampling, uids: list[int] | None = None, **options: Any) -> Any:
    uids = list(range(len(prompts))) if uids is None else uids
    seeds = [[sampling.seed_for(uid, k) for k in range(sampling.n)] for uid in uids]
    return sample(model, prompts, sampling, seeds, **{"eos_ids": (), "pad_id": 0, **options})


def tokens(completions: list[SampledCompletion]) -> list[list[int]]:
    return [completion.tokens.tolist() for completion in completions]


def full_logits(model: Any, prompt: list[int], completion: list[int]) -> Any:
    """(T, V): what a float64 copy of the model says about each token, in one unpadded pass without a cache."""
    with torch.no_grad():
        exact = copy.deepcopy(model).double()
        return exact(torch.tensor([prompt + completion]), use_cache=False).logits[0, len(prompt) - 1 : -1]


# ----------------------------------------------------------------------------------------------------------------------
# what is sampled
# ----------------------------------------------------------------------------------------------------------------------


def sliding() -> Any:
    torch.manual_seed(0)
    options = SMALL | NO_ENDS | {"num_key_value_heads": 2, "sliding_window": 6, "initializer_range": 0.3}
    return MistralForCausalLM(MistralConfig(**options)).eval()


def learned_positions() -> Any:
    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=40, n_positions=64, initializer_range=0.3, **NO_ENDS)
    return GPT2LMHeadModel(config).eval()


def plain_attention() -> Any:
    return llama(attn_implementation="eager")


@pytest.mark.parametrize("make", [llama, sliding, learned_positions, plain_attention])
@pytest.mark.parametrize("prompts", [RAGGED, [[1, 2, 3], [4, 5, 6]], [[7]]], ids=["ragged", "even", "one token"])
def test_greedy_is_generate_token_by_token(make: Any, prompts: list[list[int]]) -> None:
    model = make()
    greedy = Sampling(n=1, max_new_tokens=20, temperature=0)
    expected = [
        model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), do_sample=False, max_new_tokens=20
        )
        for prompt in prompts
    ]
    ours = run(model, prompts, greedy)
    assert tokens(ours) == [row[0, len(p) :].tolist() for row, p in zip(expected, prompts, strict=True)]
    for prompt, completion in zip(prompts, ours, strict=True):
        logits_TV = full_logits(model, prompt, completion.tokens.tolist())
        plain_T = logits_TV.log_softmax(-1).gather(1, completion.tokens[:, None])[:, 0]
        assert completion.logprobs.tolist() == pytest.approx(plain_T.tolist(), abs=1e-5)


def test_frequencies_are_the_exact_probabilities() -> None:
    """Every sequence of two tokens over seven: Pearson's statistic within five standard deviations of its mean."""
    tiny, draws = llama(vocab_size=7, initializer_range=0.2), 6000
    prompt = [1, 2, 3]
    found = tokens(run(tiny, [prompt], Sampling(n=draws, max_new_tokens=2, temperature=1.3)))
    statistic = cells = 0.0
    for first, second in itertools.product(range(7), range(7)):
        logprobs_TV = (full_logits(tiny, prompt, [first, second]) / 1.3).log_softmax(-1)
        expected = draws * float((logprobs_TV[0, first] + logprobs_TV[1, second]).exp())
        statistic += (found.count([first, second]) - expected) ** 2 / expected
        cells += 1
    freedom = cells - 1
    assert abs(statistic - freedom) < 5 * (2 * freedom) ** 0.5


@pytest.mark.parametrize(
    "rules",
    [
        {"temperature": 1.0},
        {"temperature": 0.6},
        {"temperature": 1.5, "top_k": 5},
        {"temperature": 1.0, "top_p": 0.7},
        {"temperature": 0.9, "min_p": 0.1},
        {"temperature": 1.2, "top_k": 12, "top_p": 0.8, "min_p": 0.05},
    ],
    ids=str,
)
def test_log_probabilities_are_those_of_a_full_forward_pass(model: Any, rules: dict[str, Any]) -> None:
    """After transformers' own temperature and truncation in float64, to 1e-5; and truncated tokens never come up."""
    warpers = [
        TemperatureLogitsWarper(rules["temperature"]),
        *([TopKLogitsWarper(rules["top_k"])] if "top_k" in rules else []),
        *([TopPLogitsWarper(rules["top_p"])] if "top_p" in rules else []),
        *([MinPLogitsWarper(rules["min_p"])] if "min_p" in rules else []),
    ]
    sampling = Sampling(n=3, max_new_tokens=12, **rules)
    completions = run(model, RAGGED, sampling)
    prompts = [prompt for prompt in RAGGED for _ in range(3)]
    for prompt, completion in zip(prompts, completions, strict=True):
        logits_TV = full_logits(model, prompt, completion.tokens.tolist())
        warped_TV = logits_TV
        for warper in warpers:
            warped_TV = warper(torch.zeros(len(logits_TV), 0, dtype=torch.long), warped_TV)
        exact_TV = warped_TV.log_softmax(-1)
        exact_T = exact_TV.gather(1, completion.tokens[:, None])[:, 0]
        assert completion.logprobs.tolist() == pytest.approx(exact_T.tolist(), abs=1e-5)
        untruncated_TV = (logits_TV / rules["temperature"]).softmax(-1)
        kept_T = (untruncated_TV * (exact_TV > -torch.inf)).sum(-1)
        assert completion.log_mass.tolist() == pytest.approx(kept_T.log().tolist(), abs=1e-5)


# ----------------------------------------------------------------------------------------------------------------------
# seeds
# ----------------------------------------------------------------------------------------------------------------------


def test_a_seed_gives_the_same_tokens_in_any_company(model: Any) -> None:
    """Order, other prompts, waves, how many completions, when ended rows leave: nothing of it changes a completion."""
    sampling = Sampling(n=4, max_new_tokens=12, seed=3)
    together = run(model, RAGGED, sampling, eos_ids={7, 20})
    assert len({tuple(row) for row in tokens(together)}) > 15
    for prompt in range(len(RAGGED)):
        alone = run(model, [RAGGED[prompt]], sampling, uids=[prompt], eos_ids={7, 20})
        assert tokens(alone) == tokens(together[4 * prompt : 4 * prompt + 4])
    backwards = run(model, RAGGED[::-1], sampling, uids=[4, 3, 2, 1, 0], eos_ids={7, 20})
    assert tokens(backwards) == [row for p in range(5) for row in tokens(together[4 * (4 - p) : 4 * (4 - p) + 4])]
    for options in ({"wave_tokens": 1}, {"wave_tokens": 60}, {"compact": 0.0}, {"compact": 1.0}):
        assert tokens(run(model, RAGGED, sampling, eos_ids={7, 20}, **options)) == tokens(together)
    fewer = run(model, RAGGED, Sampling(n=2, max_new_tokens=12, seed=3), eos_ids={7, 20})
    assert tokens(fewer) == [row for p in range(5) for row in tokens(together[4 * p : 4 * p + 2])]


def test_a_shorter_limit_gives_the_beginning_of_the_same_completions(model: Any) -> None:
    long, short = (run(model, RAGGED, Sampling(n=2, max_new_tokens=T)) for T in (12, 5))
    assert tokens(short) == [row[:5] for row in tokens(long)]


def test_another_base_seed_gives_other_completions(model: Any) -> None:
    one, other = (run(model, RAGGED, Sampling(n=2, max_new_tokens=12, seed=seed)) for seed in (0, 1))
    assert all(a != b for a, b in zip(tokens(one), tokens(other), strict=True))


def test_streams_are_uniform_independent_of_each_other_and_strictly_inside_the_unit_interval() -> None:
    draws = uniforms([Sampling().seed_for(uid, k) for uid in range(40) for k in range(5)], 500)
    assert draws.dtype == torch.float64
    assert draws.min() > 0
    assert draws.max() < 1
    n = draws.numel()
    assert abs(draws.mean() - 1 / 2) < 5 * (1 / 12 / n) ** 0.5
    assert abs(draws.var() - 1 / 12) < 5 * (1 / 180 / n) ** 0.5
    correlations = torch.corrcoef(draws)[~torch.eye(200, dtype=torch.bool)]
    assert correlations.abs().max() < 6 / 500**0.5
    assert torch.equal(uniforms([7], 100), uniforms([7], 500)[:, :100])


# ----------------------------------------------------------------------------------------------------------------------
# where completions end
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compact", [0.0, 0.25, 1.0])
def test_eos_ends_a_completion_and_counts(model: Any, compact: float) -> None:
    """Against the same seeds without any end: cut after the first end token."""
    sampling, ends = Sampling(n=6, max_new_tokens=16), {7, 20, 33}
    free = run(model, RAGGED, sampling)
    cut = run(model, RAGGED, sampling, eos_ids=ends, compact=compact)
    assert {completion.finish for completion in cut} == {"stop", "length"}
    for whole, part in zip(free, cut, strict=True):
        end = next((t + 1 for t, token in enumerate(whole.tokens.tolist()) if token in ends), None)
        assert torch.equal(part.tokens, whole.tokens[:end])
        assert part.finish == ("length" if end is None else "stop")
        assert part.logprobs.tolist() == pytest.approx(whole.logprobs[:end].tolist(), abs=1e-5)
        assert len(part.log_mass) == len(part.tokens)


class Parrot(nn.Module):
    """Says fixed bytes after any prompt of one token, whatever it reads."""

    def __init__(self, said: bytes) -> None:
        super().__init__()
        self.said = said
        self.config = LlamaConfig(**SMALL)
        self.device = torch.device("cpu")

    def forward(self, input_ids: Any, position_ids: Any, **_: Any) -> Any:
        following = torch.tensor([self.said[i] for i in position_ids[:, -1].tolist()])
        return SimpleNamespace(logits=50.0 * nn.functional.one_hot(following, 256)[:, None].float())


@pytest.mark.parametrize(
    ("stop", "kept"),
    [
        (("END",), "a café, crème; EN E END"),
        (("é, c",), "a café, c"),
        (("zzz", "; EN E", "ème"), "a café, crème"),
        ((" ",), "a "),
        (("a",), "a"),
        (("nothing of the kind",), "a café, crème; EN E END END"),
    ],
)
def test_a_stop_string_ends_a_completion_with_the_token_that_completes_it(stop: tuple[str, ...], kept: str) -> None:
    """Also across tokens, with letters of two bytes, and whichever of several comes first."""
    said = "a café, crème; EN E END END".encode()
    model, sampling = Parrot(said), Sampling(n=2, max_new_tokens=len(said), stop=stop)

    def decode(rows: list[list[int]]) -> list[str]:
        return [bytes(row).decode(errors="replace") for row in rows]

    for completion in run(model, [[1], [2]], sampling, decode=decode):
        assert bytes(completion.tokens.tolist()).decode() == kept
        assert completion.finish == ("stop" if kept != said.decode() else "length")


def test_decoding_for_stop_strings_does_not_grow_with_the_completion() -> None:
    decoded: list[int] = []

    def decode(rows: list[list[int]]) -> list[str]:
        decoded.extend(map(len, rows))
        return ["" for _ in rows]

    run(Parrot(b"x" * 300), [[1]], Sampling(n=1, max_new_tokens=300, stop=("never",)), decode=decode)
    assert max(decoded) < 20


# ----------------------------------------------------------------------------------------------------------------------
# waves, state, mistakes
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [1, 40, 100, 500, 10_000])
def test_waves_hold_every_completion_once_and_stay_within_the_budget(budget: int) -> None:
    lengths, sampling = [3, 50, 7, 7, 20, 1, 50], Sampling(n=5, max_new_tokens=10)
    waves = plan_waves(lengths, sampling, budget)
    rows = [(piece.prompt, k) for wave in waves for piece in wave for k in range(piece.first, piece.stop)]
    assert sorted(rows) == [(p, k) for p in range(7) for k in range(5)]
    for wave in waves:
        count, width = sum(p.stop - p.first for p in wave), max(lengths[p.prompt] for p in wave) + 10
        assert count * width <= budget or count == 1


def test_a_prompt_is_read_once_and_short_prompts_are_not_padded_to_a_very_long_one() -> None:
    waves = plan_waves([4, 500, 6, 480], Sampling(n=4, max_new_tokens=8), 100_000)
    assert waves == [[Piece(1, 0, 4), Piece(3, 0, 4)], [Piece(2, 0, 4), Piece(0, 0, 4)]]


def test_the_model_is_left_as_it_was() -> None:
    model = llama(attention_dropout=0.5).train()
    for _ in range(2):
        run(model, RAGGED, Sampling(n=2, max_new_tokens=4))
        assert model.training
        assert model.config._attn_implementation == "sdpa"
    loss = model(torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss
    loss.backward()  # nothing that was made without gradients is left inside
    assert model.model.embed_tokens.weight.grad is not None


def test_a_model_without_a_cache_of_this_kind_is_refused() -> None:
    recurrent = MambaForCausalLM(MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=40, state_size=4))
    with pytest.raises(UsageError, match="purely recurrent"):
        run(recurrent, RAGGED, Sampling(max_new_tokens=2))


def test_a_policy_that_is_no_longer_finite_stops_the_run() -> None:
    model = llama()
    model.lm_head.weight.data.fill_(torch.nan)
    with pytest.raises(RunStopped, match="log-probabilities are not finite"):
        run(model, RAGGED, Sampling(n=2, max_new_tokens=4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"wave_tokens": -5}, "wave_tokens must be at least 0, not -5"),
        ({"compact": 3.0}, "compact must be at most 1, not 3.0"),
        ({"compact": float("nan")}, "compact must be at least 0, not nan"),
        ({"compile": True, "graphs": "off"}, "compile is for decoding with graphs; leave out .*graphs"),
    ],
)
def test_options_that_mean_nothing_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        HuggingFaceRollout(**options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("compiles", [True, False])
def test_compiling_where_there_is_no_gpu_is_said_to_change_nothing(
    compiles: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    context: Any = None  # nothing of it is used
    HuggingFaceRollout(compile=compiles).open(context)
    assert ("compile of rollout 'hf' changes nothing" in capsys.readouterr().err) is compiles
