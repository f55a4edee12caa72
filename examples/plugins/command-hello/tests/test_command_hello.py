"""The commands keep the contract, answer mistakes in one line, and give the numbers of transformers alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rlhf_command_hello.commands import Hello, Likelihood
from rlhf_core.testing import check_command, check_light, tiny_run


def rlhf_run(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "rlhf_core", "-p", "rlhf_command_hello.plugin", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_hello_keeps_the_contract(capsys: pytest.CaptureFixture[str]) -> None:
    assert check_command(Hello("Ada", times=2)) == 0
    assert capsys.readouterr().out == "Hello, Ada!\nHello, Ada!\n"


def test_commands_do_not_slow_down_help() -> None:
    check_light("rlhf_command_hello.plugin", "rlhf_command_hello.commands")


def test_rlhf_run_lists_and_documents_the_commands() -> None:
    assert "  hello                           Greet somebody\n" in rlhf_run("--help").stdout
    text = rlhf_run("hello", "--help").stdout
    assert text.startswith("usage: rlhf-run hello NAME [flags]\n\nGreet somebody.")
    assert "--times INT                     number of greetings (default: 1)" in text
    assert "--actor.dtype" in rlhf_run("likelihood", "--help").stdout


def test_a_mistake_is_one_line_and_exit_code_2() -> None:
    done = rlhf_run("hello", "Ada", "--times", "0")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "rlhf-run: --times must be at least 1, not 0\n"


def test_likelihood_is_that_of_the_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The independent source: one forward pass of the exported model by transformers, and log_softmax in float64."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tiny_run(tmp_path, steps=1).train()
    folder = str(tmp_path / "model")
    capsys.readouterr()
    assert check_command(Likelihood("The sky is", " blue", model=folder)) == 0
    printed = json.loads(capsys.readouterr().out)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "The sky is"}], tokenize=False, add_generation_prompt=True
    )
    prompt, completion = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (chat, " blue"))
    ids = torch.tensor([[*prompt, *completion, tokenizer.eos_token_id]])
    logprobs = model(ids).logits.double().log_softmax(-1)[0, len(prompt) - 1 : -1]
    expected = logprobs.detach()[range(len(completion) + 1), ids[0, len(prompt) :]].mean()
    assert printed["tokens"] == len(completion) + 1, "the token that ends the completion counts"
    assert printed["mean_logprob"] == pytest.approx(float(expected), abs=1e-5)
