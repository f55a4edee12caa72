"""The chat template that rows were read with is the saved model's, however it is saved: plain transformers renders the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from rlhf_core import Run
from rlhf_core.cli import main
from rlhf_core.models.loading.byte_tokenizer import byte_tokenizer
from rlhf_core.testing import tiny_run

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% if m.role == 'assistant' %}<|fim|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
"""Ends turns with a token that ends none in the model's own template."""
CHAT = [{"role": "user", "content": "Is it so?"}]
SMALL = "tiny:hidden=16,layers=1"


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "t.jinja"
    path.write_text(TEMPLATE)
    return str(path)


@pytest.fixture
def base(tmp_path: Path) -> str:
    """A model whose tokenizer has another template, and the token that ends turns in this one."""
    folder = tmp_path / "base"
    tiny_run(tmp_path / "first", model=SMALL, steps=0).train()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "first" / "model")
    tokenizer: Any = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|fim|>"]})
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def trained(tmp_path: Path, base: str, encoding: dict[str, str], **options: Any) -> Run:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": CHAT}) + "\n" for _ in range(4)))
    data = {"use": "json", "path": str(rows), "encoding": encoding}
    run = tiny_run(tmp_path / "run", model=base, data=data, steps=1, save_every=1, **options)
    run.train()
    return run


def check(folder: Path, run: Run) -> None:
    """The folder has the template alone, writes what the run read, and stops where turns end."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == TEMPLATE
    (batch, *_) = run.samples.values()
    rendered = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=False)
    assert {*batch.prompts} == {rendered} == {"[user] Is it so?[assistant] "}
    ids = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True)["input_ids"]
    assert batch.prompt_NL[0, : batch.prompt_lengths_N[0]].tolist() == ids
    ends = GenerationConfig.from_pretrained(folder).eos_token_id
    assert tokenizer.convert_tokens_to_ids("<|fim|>") in (ends if isinstance(ends, list) else [ends])


def test_a_template_from_a_file_is_saved_with_the_model_and_with_an_exported_checkpoint(
    tmp_path: Path, base: str, file: str
) -> None:
    run = trained(tmp_path, base, {"template_file": file})
    check(tmp_path / "run" / "model", run)
    checkpoint = tmp_path / "run" / "checkpoints" / "step-1"
    assert main(["export", str(checkpoint), "--output", str(tmp_path / "exported")]) == 0
    check(tmp_path / "exported", run)
    folders = tmp_path / "run" / "model", tmp_path / "exported"
    one, other = (AutoModelForCausalLM.from_pretrained(each).state_dict() for each in folders)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_template_from_a_file_is_saved_with_adapters_and_what_they_are_merged_into(
    tmp_path: Path, base: str, file: str
) -> None:
    pytest.importorskip("peft")
    run = trained(tmp_path, base, {"template_file": file}, actor={"lora": {"rank": 2}})
    check(tmp_path / "run" / "model", run)
    assert main(["merge-lora", str(tmp_path / "run" / "model"), "--output", str(tmp_path / "merged")]) == 0
    check(tmp_path / "merged", run)


@pytest.mark.parametrize("template", ["auto", "raw"])
def test_without_a_template_in_force_from_a_file_the_tokenizers_own_is_saved(
    tmp_path: Path, base: str, file: str, template: str
) -> None:
    encoding = {"template": template} if template == "auto" else {"template": template, "template_file": file}
    trained(tmp_path, base, encoding)
    own = AutoTokenizer.from_pretrained(base).chat_template
    assert own != TEMPLATE and AutoTokenizer.from_pretrained(tmp_path / "run" / "model").chat_template == own
