"""From ragged lists to the contract, and the providers `hf` and `fake` as the loop calls them."""

from __future__ import annotations

import pickle
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rlhf_core.contract.batch import Example, Prompts
from rlhf_core.contract.engines import open_provider
from rlhf_core.contract.options import Sampling
from rlhf_core.errors import ContractError, UsageError
from rlhf_core.rollout.assemble import assemble
from rlhf_core.rollout.fake import FakeEngine, FakeRollout
from rlhf_core.rollout.hf import HuggingFaceRollout
from rlhf_core.strategy.fake import FakeStrategy
from rlhf_core.testing.engines import check_rollout
from rlhf_core.testing.providers import check_light, check_provider
from rlhf_core.testing.tiny import tiny_run
from rlhf_core.training.local_role import LocalRole

WORDS = ["<pad>", "<end>", *" ab.,cde", "the", " cat", "sat ", " , ", "fgh", "i"]
PAD, END = 0, 1


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Every token is a piece of text, joined as they are."""
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<pad>")


def ask(*token_ids: list[int], **columns: Any) -> Prompts:
    """Prompts of these tokens; `columns` are numbers per prompt."""
    examples = [
        Example(f"p{i}", label=f"label {i}", meta={"row": i}, fields={name: each[i] for name, each in columns.items()})
        for i in range(len(token_ids))
    ]
    return Prompts(
        [f"<p{i}>" for i in range(len(token_ids))], list(token_ids), examples, [100 + i for i in range(len(token_ids))]
    )


@pytest.fixture(scope="module")
def role(tokenizer: PreTrainedTokenizerFast) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        vocab_size=len(WORDS),
        max_position_embeddings=64,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=PAD,
    )
    return SimpleNamespace(
        causal_lm=LlamaForCausalLM(config).eval(),
        module=SimpleNamespace(compute_dtype=torch.float32, vision=None),
        gathered=nullcontext,
        tokenizer=tokenizer,
        version=5,
        refresh=lambda *_: 5,
        spec=SimpleNamespace(ends=(END,)),
    )


# ----------------------------------------------------------------------------------------------------------------------
# assemble
# ----------------------------------------------------------------------------------------------------------------------


def test_every_field_is_what_its_documentation_says(tokenizer: PreTrainedTokenizerFast) -> None:
    prompts = ask([3, 4, 5], [6], gold=[0.25, 4.0])
    tokens = [[10, 11, END], [END], [12, 13, 3, 4], [7, 8]]
    logprobs = [[-0.5, -1.0, -2.0], [-0.25], [-1.0, -1.0, -3.0, -4.0], [-6.0, -7.0]]
    batch = assemble(
        prompts,
        tokens,
        ["stop", "stop", "length", "stop"],
        tokenizer,
        version=3,
        per_token={"sampler_logprobs_NT": logprobs},
        scalars={"kept_mass": 0.5},
    )
    assert batch.prompts == ["<p0>", "<p0>", "<p1>", "<p1>"]
    assert batch.texts == ["the cat", "", "sat  , ab", "cd"]
    assert batch.prompt_NL.tolist() == [[3, 4, 5], [3, 4, 5], [6, PAD, PAD], [6, PAD, PAD]]
    assert batch.prompt_lengths_N.tolist() == [3, 3, 1, 1]
    assert batch.tokens_NT.tolist() == [[10, 11, END, PAD], [END, PAD, PAD, PAD], [12, 13, 3, 4], [7, 8, PAD, PAD]]
    assert batch.lengths_N.tolist() == [3, 1, 4, 2]
    assert batch.mask_NT.int().tolist() == [[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch.group_N.tolist() == [0, 0, 1, 1]
    assert batch.labels == ["label 0", "label 0", "label 1", "label 1"]
    assert batch.meta == [{"row": 0}, {"row": 0}, {"row": 1}, {"row": 1}]
    assert batch["sampler_logprobs_NT"].tolist() == [
        [-0.5, -1.0, -2.0, 0.0],
        [-0.25, 0.0, 0.0, 0.0],
        [-1.0, -1.0, -3.0, -4.0],
        [-6.0, -7.0, 0.0, 0.0],
    ]
    assert batch["gold_N"].tolist() == [0.25, 0.25, 4.0, 4.0]
    assert batch["uids_N"].tolist() == [100, 100, 101, 101]
    assert (batch.finish, batch.version) == (["stop", "stop", "length", "stop"], 3)
    assert batch.scalars == {"kept_mass": 0.5}
    integers = (batch.prompt_NL, batch.prompt_lengths_N, batch.tokens_NT, batch.lengths_N, batch.group_N)
    assert {tensor.dtype for tensor in integers} == {torch.int64}
    assert (batch.mask_NT.dtype, batch["sampler_logprobs_NT"].dtype) == (torch.bool, torch.float32)


def test_raw_texts_have_the_added_tokens_that_do_not_end_a_completion(tokenizer: PreTrainedTokenizerFast) -> None:
    """Each is what decoding its tokens with special ones says, but for a last one that stopped it."""
    tokens = [[10, END, 11, END], [END], [12, 13], [12, END], [PAD, 7, PAD]]
    finish: list[Any] = ["stop", "stop", "length", "length", "stop"]
    rows = [torch.tensor(row) for row in tokens]
    logprobs = [torch.zeros(len(row)) for row in tokens]
    batch = assemble(ask(*[[3]] * 5), rows, finish, tokenizer, per_token={"sampler_logprobs_NT": logprobs})
    bare = [[10, END, 11], [], [12, 13], [12, END], [PAD, 7]]
    assert batch.raw_texts == [tokenizer.decode(row, skip_special_tokens=False) for row in bare]
    assert batch.texts == [tokenizer.decode(row, skip_special_tokens=True) for row in tokens]
    mask = [[True, False, True, True], [False], [True, False], [False, True], [True, True, False]]
    masked = assemble(
        ask(*[[3]] * 5), rows, finish, tokenizer, per_token={}, mask=mask, texts=["a", "b", "c", "d", "e"]
    )
    bare = [[10, 11], [], [12], [END], [PAD, 7]]
    assert masked.raw_texts == [tokenizer.decode(row, skip_special_tokens=False) for row in bare]
    assert masked.texts == ["a", "b", "c", "d", "e"]


def test_rows_of_the_batch_keep_what_belongs_together(tokenizer: PreTrainedTokenizerFast) -> None:
    batch = assemble(
        ask([3, 4, 5], [6]),
        [[10, END], [7]],
        ["stop", "length"],
        tokenizer,
        per_token={"sampler_logprobs_NT": [[-1, -2], [-3]]},
    )
    last = batch.rows([1])
    assert (last.texts, last.finish, last.prompt_NL.tolist()) == (["c"], ["length"], [[6]])
    assert last["sampler_logprobs_NT"].tolist() == [[-3.0]]


# ----------------------------------------------------------------------------------------------------------------------
# hf
# ----------------------------------------------------------------------------------------------------------------------

PROMPTS = ask([3, 4, 5, 6, 7, 8, 9], [10], [11, 12])


def test_hf_returns_what_the_model_says_of_the_sampled_tokens(role: Any) -> None:
    """Each completion with its prompt in one unpadded float64 pass: tokens, log-probabilities and ends fit."""
    batch = HuggingFaceRollout()(role, PROMPTS, Sampling(n=4, max_new_tokens=10))
    exact = LlamaForCausalLM(role.causal_lm.config).double().eval()
    exact.load_state_dict(role.causal_lm.state_dict())
    assert set(batch.finish) == {"stop", "length"}
    assert batch.version == 5
    for i in range(len(batch)):
        length, prompt = int(batch.lengths_N[i]), PROMPTS.token_ids[i // 4]
        tokens = batch.tokens_NT[i, :length].tolist()
        with torch.no_grad():
            logits_TV = exact(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        exact_T = logits_TV.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]
        torch.testing.assert_close(batch["sampler_logprobs_NT"][i, :length].double(), exact_T, atol=1e-5, rtol=0)
        assert END not in tokens[:-1]
        assert batch.finish[i] == ("stop" if tokens[-1] == END else "length")
        assert batch.texts[i] == "".join(WORDS[token] for token in tokens if token not in (PAD, END))


def test_hf_keeps_the_contract_on_the_model_tiny() -> None:
    check_rollout(HuggingFaceRollout(), atol=1e-5)


def test_hf_computes_in_the_dtype_that_training_computes_in(tmp_path: Path) -> None:
    """Weights in float32, autocast to bfloat16: the role's own log-probabilities within its resolution, and training goes on
    in float32 afterwards."""
    options: dict[str, Any] = {"actor.dtype": "bfloat16"}
    run = tiny_run(tmp_path, **options)
    role: Any = LocalRole(run.plan, "actor")
    prompts = ask([72, 101, 108], [33])
    batch = HuggingFaceRollout()(role, prompts, Sampling(n=2, max_new_tokens=8))
    expected_NT = role.infer(batch, frozenset({"logprobs_NT"}))["logprobs_NT"]
    difference_NT = (batch["sampler_logprobs_NT"] - expected_NT).abs()
    assert 0 < difference_NT.max() < 0.05
    assert role.causal_lm.dtype == torch.float32
    role.trainable.forward(batch, frozenset({"logprobs_NT"}))["logprobs_NT"].sum().backward()
    assert role.causal_lm.get_input_embeddings().weight.grad.dtype == torch.float32


def test_hf_seeds_completions_by_prompt_number_so_that_company_does_not_matter(role: Any) -> None:
    sampling = Sampling(n=3, max_new_tokens=10, seed=1)
    whole = HuggingFaceRollout()(role, PROMPTS, sampling)
    for options in (HuggingFaceRollout(wave_tokens=20), HuggingFaceRollout(compact=1.0)):
        assert options(role, PROMPTS, sampling).texts == whole.texts
    swapped = HuggingFaceRollout()(role, PROMPTS.rows([2, 0]), sampling)
    assert swapped.texts == whole.texts[6:] + whole.texts[:3]


def test_hf_stops_at_a_string_of_the_decoded_text(role: Any) -> None:
    """Against the same completions without it, cut where their joined pieces first contain a stop string."""
    stops = ("ce", ". ", "catsat")
    free = HuggingFaceRollout()(role, PROMPTS, Sampling(n=16, max_new_tokens=12))
    cut = HuggingFaceRollout()(role, PROMPTS, Sampling(n=16, max_new_tokens=12, stop=stops))
    shortened = 0
    for i in range(len(free)):
        tokens = free.tokens_NT[i, : int(free.lengths_N[i])].tolist()
        said = ["".join(WORDS[token] for token in tokens[:t] if token > END) for t in range(1, len(tokens) + 1)]
        end = next((t for t, text in enumerate(said, 1) if any(stop in text for stop in stops)), None)
        assert cut.tokens_NT[i, : int(cut.lengths_N[i])].tolist() == tokens[:end]
        assert cut.finish[i] == (free.finish[i] if end is None else "stop")
        shortened += end is not None and end < len(tokens)
    assert shortened > 5, "otherwise this test shows nothing"


def test_hf_says_how_much_probability_truncation_kept(role: Any) -> None:
    plain = HuggingFaceRollout()(role, PROMPTS, Sampling(n=2, max_new_tokens=8))
    assert "kept_mass" not in plain.scalars
    assert "sampler_log_mass_NT" not in plain
    greedy = HuggingFaceRollout()(role, PROMPTS, Sampling(n=1, max_new_tokens=8, temperature=0, top_k=2))
    assert "sampler_log_mass_NT" not in greedy, "the most likely token is not truncated"
    cut = HuggingFaceRollout()(role, PROMPTS, Sampling(n=2, max_new_tokens=8, top_p=0.8))
    kept_NT = cut["sampler_log_mass_NT"].exp()[cut.mask_NT]
    assert kept_NT.min() >= 0.8 - 1e-6
    assert cut.scalars["kept_mass"] == pytest.approx(kept_NT.mean().item(), abs=1e-6)


def test_every_end_token_of_the_run_ends_a_completion(role: Any) -> None:
    several = SimpleNamespace(**{**vars(role), "spec": SimpleNamespace(ends=(END, 5, 7))})
    sampled = HuggingFaceRollout()(several, PROMPTS, Sampling(n=16, max_new_tokens=12))
    for row, length, finish in zip(sampled.tokens_NT.tolist(), sampled.lengths_N.tolist(), sampled.finish, strict=True):
        assert not {*row[: length - 1]} & {END, 5, 7}
        assert (row[length - 1] in (END, 5, 7)) == (finish == "stop")
    assert {row[length - 1] for row, length in zip(sampled.tokens_NT.tolist(), sampled.lengths_N.tolist())} > {5, 7}


def test_hf_refuses_prompts_that_do_not_fit_the_model(role: Any) -> None:
    with pytest.raises(UsageError, match=r"7 tokens and 58 new ones exceed the 64 positions"):
        HuggingFaceRollout()(role, PROMPTS, Sampling(max_new_tokens=58))


def test_listing_the_engines_imports_nothing_heavy() -> None:
    check_light("rlhf_core.rollout.hf", "rlhf_core.rollout.fake")
    for provider in (HuggingFaceRollout(), FakeRollout(token_seconds=0.5)):
        check_provider(provider)


# ----------------------------------------------------------------------------------------------------------------------
# fake
# ----------------------------------------------------------------------------------------------------------------------


def fake_role(version: int = 0, w: float = 0.0) -> Any:
    trainable = FakeStrategy()(lambda: torch.nn.Identity(), None, 1)
    with torch.no_grad():
        trainable.w.fill_(w)
    return SimpleNamespace(version=version, weights=trainable.weights, trainable=trainable)


def test_fake_completions_follow_from_their_seeds() -> None:
    sampling = Sampling(n=3, max_new_tokens=9, seed=2)
    batch = FakeEngine(FakeRollout())(fake_role(), PROMPTS, sampling)
    for i in range(9):
        seed = sampling.seed_for(100 + i // 3, i % 3)
        length = 1 + seed % 9
        alphabet = "abcdefghijklmnopqrstuvwxyz" * 2
        said = alphabet[seed % 26 : seed % 26 + length]
        assert batch.lengths_N[i] == length
        assert batch.texts[i] == (said if length == 9 else said[:-1])
        assert batch.finish[i] == ("length" if length == 9 else "stop")


def test_fake_log_probabilities_are_those_of_the_fake_strategy_when_it_was_last_synced() -> None:
    """So a stale engine shows: by the version it stamps and by the difference of the number it took."""
    engine, sampling = FakeEngine(FakeRollout()), Sampling(n=2, max_new_tokens=9)
    role = fake_role(version=4, w=-0.25)
    fresh = engine(role, PROMPTS, sampling)
    exact_NT = role.trainable.forward(fresh, frozenset({"logprobs_NT"}))["logprobs_NT"].detach()
    torch.testing.assert_close(fresh["sampler_logprobs_NT"], exact_NT)
    newer = fake_role(version=6, w=-1.25)
    stale = engine(newer, PROMPTS, sampling)
    assert stale.version == 4
    exact_NT = newer.trainable.forward(stale, frozenset({"logprobs_NT"}))["logprobs_NT"].detach()
    assert (stale["sampler_logprobs_NT"] - exact_NT)[stale.mask_NT].tolist() == pytest.approx(
        [1.0] * int(stale.mask_NT.sum())
    )
    engine.sync(newer)
    assert engine(newer, PROMPTS, sampling).version == 6


def test_fake_takes_the_time_it_is_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """Longest completion times the step, prompt tokens by the thousand, and each of the other calls."""
    engine, sampling = FakeEngine(FakeRollout(0.005, 2.0, 0.03, 0.02)), Sampling(n=4, max_new_tokens=8)
    role = fake_role()
    longest = max(1 + sampling.seed_for(uid, k) % 8 for uid in PROMPTS.uids for k in range(4))
    expected = {"sync": 0.03, "call": 0.005 * longest + 2.0 * 10 / 1000, "sleep": 0.02, "wake": 0.02}
    calls = {"sync": lambda: engine.sync(role), "call": lambda: engine(role, PROMPTS, sampling)}
    for name, call in {**calls, "sleep": engine.sleep, "wake": engine.wake}.items():
        slept: list[float] = []
        monkeypatch.setattr(time, "sleep", slept.append)
        call()
        assert sum(slept) == pytest.approx(expected[name]), name


def test_fake_refuses_to_sample_while_asleep() -> None:
    engine = FakeEngine(FakeRollout())
    engine.sleep()
    with pytest.raises(ContractError, match="asleep"):
        engine(fake_role(), PROMPTS, Sampling())
    engine.wake()
    assert len(engine(fake_role(), PROMPTS, Sampling(n=2))) == 6


def test_fake_wakes_by_parts_and_drops_its_weights_at_level_2() -> None:
    engine = FakeEngine(FakeRollout(weights_gib=2.0, cache_gib=0.5))
    engine.sync(fake_role(version=1, w=0.5))
    assert (engine.sleep(), engine.sleep()) == (5 * 2**29, 0)
    assert engine.w == 0.5
    with pytest.raises(ContractError, match=r"wake\('weights'\)"):
        engine.sync(fake_role())
    assert (engine.wake("weights"), engine.wake("weights")) == (2**31, 0)
    engine.sync(fake_role(version=2, w=0.75))
    with pytest.raises(ContractError, match="asleep"):
        engine(fake_role(), PROMPTS, Sampling())
    assert engine.wake("all") == 2**29
    assert (engine.sleep(2), engine.w) == (5 * 2**29, None)
    engine.wake()
    engine(fake_role(version=3, w=0.25), PROMPTS, Sampling())
    assert (engine.w, engine.version) == (0.25, 3), "it takes the weights itself"


def test_what_a_fake_engine_holds_is_not_in_its_provider() -> None:
    provider = FakeRollout(sync_seconds=0.05)
    with open_provider(provider) as engine, open_provider(provider) as other:
        engine.sync(fake_role(version=4, w=-0.25))
        engine.sleep()
        assert (engine.w, engine.version, engine.asleep) == (-0.25, 4, {"weights", "cache"})
        assert (other.w, other.version, other.asleep) == (None, 0, frozenset())
    assert pickle.loads(pickle.dumps(provider)) == FakeRollout(sync_seconds=0.05)
