"""`rlhf-run chat`: what the model says to a prompt, a conversation, or each line by itself."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf_core.cli import main


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """`say("chat", "tiny")`: the standard output of a command that succeeds."""
    monkeypatch.setenv("RLHF_DISABLE_PLUGIN_AUTOLOAD", "1")

    def run(*words: str) -> str:
        assert main(list(words)) == 0
        return capsys.readouterr().out

    return run


def greedy(text: str, tokens: int) -> str:
    """Return the greedy answer of the model `tiny`, token by token without a cache."""
    import torch

    from rlhf_core.contract.options import ModelOptions
    from rlhf_core.models.loading.load import load_model
    from rlhf_core.models.loading.tokenizer import load_tokenizer

    tokenizer, model = load_tokenizer("tiny", ModelOptions()), load_model("tiny", ModelOptions()).eval()
    ids = tokenizer(text, return_tensors="pt").input_ids
    start = ids.shape[1]
    for _ in range(tokens):
        ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
    return str(tokenizer.decode(ids[0, start:], skip_special_tokens=True))


@pytest.fixture
def template(monkeypatch: pytest.MonkeyPatch) -> Callable[[str | None], None]:
    """Give the model `tiny` another chat template, or none."""
    from rlhf_core.models.loading import tokenizer as loading

    plain = loading.load_tokenizer

    def use(text: str | None) -> None:
        def tokenizer(name: str, options: Any) -> Any:
            made = plain(name, options)
            made.chat_template = text
            return made

        monkeypatch.setattr(loading, "load_tokenizer", tokenizer)

    return use


SHORT = ("--max-new-tokens", "3", "--temperature", "0")


def test_chat_answers_one_prompt(say: Callable[..., str], template: Callable[[str | None], None]) -> None:
    template("{% for m in messages %}[{{ m.content }}{% endfor %}")
    assert say("chat", "tiny", "--prompt", "hello", *SHORT) == greedy("[hello", 3) + "\n"


def test_chat_remembers_the_conversation_where_the_model_has_a_template(
    say: Callable[..., str], template: Callable[[str | None], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    template("{% for m in messages %}[{{ m.content }}{% endfor %}")
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n\nworld\n"))
    first = greedy("[hello", 3)
    assert say("chat", "tiny", *SHORT) == f"{first}\n{greedy(f'[hello[{first}[world', 3)}\n"


def test_chat_continues_each_line_by_itself_where_there_is_no_template(
    say: Callable[..., str], template: Callable[[str | None], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    template(None)
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\nworld\n"))
    assert say("chat", "tiny", *SHORT) == f"{greedy('hello', 3)}\n{greedy('world', 3)}\n"


def test_chat_says_the_same_for_the_same_seed(say: Callable[..., str]) -> None:
    answers = [say("chat", "tiny", "--prompt", "hello", "--max-new-tokens", "8", "--seed", seed) for seed in "112"]
    assert answers[0] == answers[1] != answers[2]


def test_a_chat_beyond_the_models_positions_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", "tiny:context=64", "--prompt", "x" * 20, "--max-new-tokens", "60"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "exceed the 64 positions of the model; lower --max-new-tokens" in line


def test_ids_that_the_tokenizer_lacks_are_never_said(tmp_path: Path, say: Callable[..., str]) -> None:
    """The head is padded with a row that is always the likeliest: greedily, the model would say nothing but that."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from rlhf_core.models.loading.byte_tokenizer import EOS, TOKENS, byte_tokenizer

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=TOKENS + 5, bos_token_id=None, eos_token_id=EOS))
    with torch.no_grad():
        model.lm_head.weight.zero_()
        ids = torch.tensor([[1]])
        model.lm_head.weight[TOKENS + 2] = 10 * model.model(ids)[0][0, -1]
        model.lm_head.weight[ord("a")] = model.model(ids)[0][0, -1]
    model.save_pretrained(tmp_path)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "\x01"
    tokenizer.save_pretrained(tmp_path)
    assert int(model(ids).logits[0, -1].argmax()) == TOKENS + 2
    said = say("chat", str(tmp_path), "--prompt", "x", "--max-new-tokens", "1", "--temperature", "0")
    assert said.splitlines()[-1] == "a"  # DeepSpeed, where it is installed, wrote a line while the model was saved
