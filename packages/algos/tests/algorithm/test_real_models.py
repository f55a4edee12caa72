"""Models with tokenizers, templates and configurations as real ones have them, from the data to plain transformers."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from families import family, user
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

from rlhf_core.testing.tiny import tiny_run


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose generation config knows `<|endoftext|>` alone, beside a ChatML template."""
    folder, tokenizer = tmp_path_factory.mktemp("base"), family("qwen")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=64,
        vocab_size=len(tokenizer),
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def train(base: Path, output: Path, algorithm: str, **options: Any) -> None:
    """A short run."""
    tiny_run(output, algorithm, model=str(base), **options).train()


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows = [{"prompt": f"Is it {word}?", "completion": "Yes."} for word in ("so", "a", "Paris", "Fine")]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_a_model_that_learns_to_end_its_turns_ends_them_in_plain_transformers(
    base: Path, answers: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "rlhf")
    train(
        base,
        tmp_path / "sft",
        "sft",
        data={"use": "json", "path": str(answers)},
        steps=40,
        actor={"optim": {"lr": 1e-2}},
    )
    told = [record.getMessage() for record in caplog.records if "completions end with" in record.getMessage()]
    assert len(told) == 1
    assert told[0].startswith("the chat template ends a turn with '<|im_end|>', but EOS is '<|endoftext|>':")
    folder = tmp_path / "sft" / "model"
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    ends = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert GenerationConfig.from_pretrained(folder).eos_token_id == ends
    prompt = tokenizer.apply_chat_template(user("Is it so?"), add_generation_prompt=True, return_tensors="pt")
    ids = model.generate(**prompt, do_sample=False, max_new_tokens=12)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(ids) == "Yes.<|im_end|>"
