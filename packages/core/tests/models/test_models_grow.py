"""New tokens: in the tokenizer, in every role's model, and in what a run leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from model_rows import spec
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from rlhf_core.contract.options import Lora, ModelOptions
from rlhf_core.errors import UsageError
from rlhf_core.models.build import build_module
from rlhf_core.models.loading.byte_tokenizer import TOKENS, byte_tokenizer
from rlhf_core.models.loading.load import load_model, load_scorer
from rlhf_core.models.loading.tokenizer import load_tokenizer
from rlhf_core.testing import tiny_run


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "tokens.txt"
    path.write_text("<think>\n</think>\n\n<think>\n")
    return str(path)


def saved(folder: Path, vocab: int = TOKENS, tied: bool = False, **more: Any) -> str:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(
        **sizes, vocab_size=vocab, tie_word_embeddings=tied, bos_token_id=None, pad_token_id=None, **more
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    byte_tokenizer(TOKENS).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("tied", [True, False])
def test_new_rows_begin_at_the_mean_of_the_old_ones_which_stay(tied: bool, file: str, tmp_path: Path) -> None:
    base = saved(tmp_path / "base", tied=tied)
    plain, grown = (load_model(base, ModelOptions(add_tokens=each)) for each in ("", file))
    for get in ("get_input_embeddings", "get_output_embeddings"):
        old, new = (getattr(model, get)().weight.detach() for model in (plain, grown))
        assert torch.equal(new[:TOKENS], old)
        assert new.shape[0] == TOKENS + 2
        torch.testing.assert_close(new[TOKENS:], old.mean(0).expand(2, -1), rtol=1e-5, atol=1e-7)
    assert (grown.lm_head.weight is grown.model.embed_tokens.weight) == tied
    ids = load_tokenizer(base, ModelOptions(add_tokens=file))("a<think>b")["input_ids"]
    assert ids == [ord("a"), TOKENS, ord("b")]
    scorer, _ = load_scorer(base, ModelOptions(add_tokens=file))
    assert scorer.get_input_embeddings().weight.shape[0] == TOKENS + 2, "a critic reads them too"


def test_a_tokenizer_with_more_tokens_than_its_model_makes_it_grow(tmp_path: Path, capsys: Any) -> None:
    base = saved(tmp_path, vocab=250)
    assert load_model(base, ModelOptions()).config.vocab_size == TOKENS
    assert f"has {TOKENS - 250} new tokens, whose embeddings start at the mean" in capsys.readouterr().err
    larger = saved(tmp_path / "larger", vocab=300)
    assert load_model(larger, ModelOptions()).config.vocab_size == 300, "a padded embedding stays as it is"


@pytest.mark.parametrize("room", [1, 10])
def test_new_tokens_in_the_padding_of_a_head_begin_at_the_mean_of_the_known_ones(
    room: int, file: str, tmp_path: Path, capsys: Any
) -> None:
    """Some heads are padded to round sizes; rows there were never trained. With one such row for two tokens it grows, too."""
    base = saved(tmp_path / "base", vocab=TOKENS + room)
    plain, grown = (load_model(base, ModelOptions(add_tokens=each)) for each in ("", file))
    assert "has 2 new tokens, whose embeddings start at the mean" in capsys.readouterr().err
    for get in ("get_input_embeddings", "get_output_embeddings"):
        old, new = (getattr(model, get)().weight.detach() for model in (plain, grown))
        assert new.shape[0] == TOKENS + max(room, 2)
        assert torch.equal(new[:TOKENS], old[:TOKENS]) and torch.equal(new[TOKENS + 2 :], old[TOKENS + 2 :])
        mean = old[:TOKENS].double().mean(0).float()
        torch.testing.assert_close(new[TOKENS : TOKENS + 2], mean.expand(2, -1), rtol=1e-5, atol=1e-7)
    with pytest.raises(UsageError, match="adapters cannot learn the 2 new tokens of"):
        build_module(spec("logprobs_NT", model=base, lora=Lora(rank=2), add_tokens=file))
    grown.save_pretrained(tmp_path / "trained")
    load_tokenizer(base, ModelOptions(add_tokens=file)).save_pretrained(tmp_path / "trained")
    with torch.no_grad():
        grown.lm_head.weight[TOKENS] += 1
    grown.save_pretrained(tmp_path / "trained")
    again = load_model(str(tmp_path / "trained"), ModelOptions(add_tokens=file))
    assert torch.equal(again.lm_head.weight, grown.lm_head.weight), "what was trained stays"


def test_a_run_leaves_a_model_and_a_tokenizer_with_the_new_tokens(file: str, tmp_path: Path) -> None:
    run = tiny_run(tmp_path / "run", add_tokens=file, model="tiny:hidden=16,layers=1,heads=1")
    run.train()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    assert model.config.vocab_size == len(tokenizer) == TOKENS + 2
    assert tokenizer.convert_tokens_to_ids("</think>") == TOKENS + 1
    again = load_model(str(tmp_path / "run" / "model"), ModelOptions(add_tokens=file))
    assert again.config.vocab_size == TOKENS + 2, "they are there already"


def test_adapters_cannot_learn_new_tokens(file: str) -> None:
    pytest.importorskip("peft")
    with pytest.raises(UsageError, match="adapters cannot learn the 2 new tokens of tiny"):
        build_module(spec("logprobs_NT", lora=Lora(rank=2), add_tokens=file))


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "No such file"), (b"", "has no tokens"), (b"\xff\xfe", "it is not UTF-8 text")],
)
def test_a_file_of_tokens_that_cannot_be_read_is_told(content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=message):
        load_tokenizer("tiny", ModelOptions(add_tokens=str(path)))
