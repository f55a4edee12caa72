"""Architectures, tokenizer families and algorithms together: what a run trains on, what it saves, and that it can stop.

The right ids of a row are worked out here from the rendered text alone, and their log-likelihood by plain transformers, row by
row in eager attention. By default each architecture, family and algorithm occurs; `nox -s slow` runs the whole product.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from families import family, user
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BloomConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GenerationConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen3Config,
    SmolLM3Config,
)

from rlhf_core.run.run import Run
from rlhf_core.testing.tiny import tiny_run

SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
WIDE: dict[str, Any] = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2}
EXPERTS: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
WINDOW: dict[str, Any] = {"sliding_window": 8}

ARCHITECTURES: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, WIDE),
    "mistral": (MistralConfig, {**WIDE, **WINDOW}),
    "mixtral": (MixtralConfig, {**WIDE, **EXPERTS}),
    "olmo2": (Olmo2Config, WIDE),
    "qwen3": (Qwen3Config, {**WIDE, "head_dim": 8, "tie_word_embeddings": True}),
    "gemma2": (Gemma2Config, {**WIDE, **WINDOW, "head_dim": 8}),
    "gemma3": (Gemma3TextConfig, {**WIDE, **WINDOW, "head_dim": 8}),
    "gpt2": (GPT2Config, {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}),
    "gpt_neox": (GPTNeoXConfig, {**SIZES, "intermediate_size": 48}),
    "phi3": (Phi3Config, WIDE),
    "bloom": (BloomConfig, {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "gpt_oss": (GptOssConfig, {**WIDE, **EXPERTS, **WINDOW, "head_dim": 8}),
    "opt": (OPTConfig, {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 256}),
    "smollm3": (SmolLM3Config, WIDE),
}
ENDS = {
    "qwen": "<|im_end|>",
    "llama-3": "<|eot_id|>",
    "llama-2": "</s>",
    "zephyr": "</s>",
    "gemma": "<end_of_turn>",
    "phi-3": "<|end|>",
}
"""The families, and what ends an assistant's turn in each; in four of them it is not, or not alone, the tokenizer's EOS."""

ALGORITHMS = ("sft", "dpo", "reward", "grpo")
PROMPTS = ("What is the capital of France?", "Is it so?")
CHOSEN, REJECTED = ("Paris.", "Yes. It is so."), ("No.", "Answer: 12")
BETA = 0.1


@dataclass(frozen=True)
class Case:
    """A base model, its tokenizer, and another model of the same kind as the reference."""

    architecture: str
    family: str
    base: str
    other: str

    @property
    def tokenizer(self) -> Any:
        return family(self.family)

    @property
    def end(self) -> int:
        """The token that ends a turn."""
        number: int = self.tokenizer.convert_tokens_to_ids(ENDS[self.family])
        return number

    def prompt_ids(self, prompt: str) -> list[int]:
        """The ids of the rendered prompt."""
        text = self.tokenizer.apply_chat_template(user(prompt), add_generation_prompt=True, tokenize=False)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def row_ids(self, prompt: str, completion: str) -> tuple[list[int], list[int]]:
        """The ids of a prompt, and those that the whole rendered chat has after them, to the token that ends the turn."""
        chat = [*user(prompt), {"role": "assistant", "content": completion}]
        text = self.tokenizer.apply_chat_template(chat, tokenize=False)
        whole = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        first = self.prompt_ids(prompt)
        assert whole[: len(first)] == first, "a row whose pieces are not those of the whole proves nothing here"
        rest = whole[len(first) :]
        return first, rest[: rest.index(self.end) + 1]


def make(folder: Path, architecture: str, tokenizer: Any, auto: Any, seed: int) -> str:
    """Write a random model of an architecture; weights are large enough to tell right ids from wrong ones."""
    cls, sizes = ARCHITECTURES[architecture]
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    labels = {"num_labels": 1} if auto is AutoModelForSequenceClassification else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = cls(**sizes, **ids, **labels, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
        model = auto.from_config(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, 0.0, 0.1)
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def make_case(folder: Path, architecture: str, name: str, algorithm: str) -> Case:
    auto = AutoModelForSequenceClassification if algorithm == "reward" else AutoModelForCausalLM
    base, other = (
        make(folder / label, architecture, family(name), auto, seed) for seed, label in enumerate(["base", "other"])
    )
    return Case(architecture, name, base, other)


def logprobs(model: Any, first: list[int], rest: list[int]) -> Tensor:
    """The log-probabilities of `rest` after `first`, of one row by itself."""
    ids_1S = torch.tensor([[*first, *rest]])
    logits_SV = model(input_ids=ids_1S, use_cache=False).logits[0, :-1].double()
    return logits_SV.log_softmax(-1).gather(1, ids_1S[0, 1:, None])[len(first) - 1 :, 0]


def plain(folder: str, auto: Any = AutoModelForCausalLM) -> Any:
    return auto.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


@torch.no_grad()
def expected_loss(case: Case, algorithm: str) -> float:
    """The loss of the first step as the papers have it."""
    chosen = [case.row_ids(*row) for row in zip(PROMPTS, CHOSEN, strict=True)]
    rejected = [case.row_ids(*row) for row in zip(PROMPTS, REJECTED, strict=True)]
    if algorithm == "sft":
        model = plain(case.base)
        return -float(torch.cat([logprobs(model, *row) for row in chosen]).mean())
    if algorithm == "dpo":
        policy, reference = plain(case.base), plain(case.other)
        margins = [
            sum(sign * (logprobs(policy, *row).sum() - logprobs(reference, *row).sum()) for sign, row in signed)
            for signed in (((1, good), (-1, bad)) for good, bad in zip(chosen, rejected, strict=True))
        ]
        return -float(logsigmoid(BETA * torch.stack(margins)).mean())  # type: ignore[arg-type]
    model = plain(case.base, AutoModelForSequenceClassification)

    def score(row: tuple[list[int], list[int]]) -> Tensor:
        body = model.base_model(input_ids=torch.tensor([[*row[0], *row[1]]]), use_cache=False)[0]
        value: Tensor = model.score(body[0, -1])
        return value

    return -float(torch.cat([logsigmoid(score(a) - score(b)) for a, b in zip(chosen, rejected, strict=True)]).mean())


def train(case: Case, algorithm: str, output: Path) -> Run:
    """One step."""
    rows = [
        {"prompt": prompt, "completion": good, "chosen": good, "rejected": bad}
        for prompt, good, bad in zip(PROMPTS, CHOSEN, REJECTED, strict=True)
    ]
    keys = {"sft": ["completion"], "grpo": []}.get(algorithm, ["chosen", "rejected"])
    path = output / "rows.jsonl"
    path.write_text("".join(json.dumps({key: row[key] for key in ("prompt", *keys)}) + "\n" for row in rows))
    options: dict[str, Any] = {"data": {"use": "json", "path": str(path)}, "steps": 1, "model": case.base}
    if algorithm == "dpo":
        options["reference"] = {"model": case.other}
    if algorithm == "grpo":
        options |= {"reward": "length", "sampling": {"n": 2, "max_new_tokens": 6}}
    run = tiny_run(output / "run", algorithm, **options)
    run.train()
    return run


@torch.no_grad()
def check_sampled(case: Case, run: Run) -> None:
    """Samples are of the right prompts, end at the end tokens alone, and have the plain model's log-probabilities."""
    (batch,) = run.samples.values()
    model = plain(case.base)
    known = [case.prompt_ids(prompt) for prompt in PROMPTS]
    for n in range(len(batch)):
        first = batch.prompt_NL[n, : batch.prompt_lengths_N[n]].tolist()
        rest = batch.tokens_NT[n, : batch.lengths_N[n]].tolist()
        assert first in known
        assert case.end not in rest[:-1], "a completion is over where its turn ends"
        found_T = batch["sampler_logprobs_NT"][n, : len(rest)].double()
        torch.testing.assert_close(found_T, logprobs(model, first, rest), rtol=0, atol=1e-4)


@torch.no_grad()
def check_saved(case: Case, folder: Path, algorithm: str) -> None:
    """Plain transformers loads all of the folder, and stops where a turn ends; a reward model scores a padded batch."""
    auto = AutoModelForSequenceClassification if algorithm == "reward" else AutoModelForCausalLM
    model, info = auto.from_pretrained(folder, output_loading_info=True, attn_implementation="eager")
    assert not info["missing_keys"] and not info["unexpected_keys"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [tokenizer.apply_chat_template(user(each), add_generation_prompt=True, tokenize=False) for each in PROMPTS]
    given = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert given == [case.prompt_ids(prompt) for prompt in PROMPTS]
    if algorithm == "reward":
        together = model(**tokenizer.pad({"input_ids": given}, return_tensors="pt"), use_cache=False).logits
        apart = torch.cat([model(torch.tensor([ids]), use_cache=False).logits for ids in given])
        torch.testing.assert_close(together, apart, rtol=0, atol=1e-4)
        return
    ends = GenerationConfig.from_pretrained(folder).eos_token_id
    assert case.end in (ends if isinstance(ends, list) else [ends])
    ids = torch.tensor([given[0]])
    options = {"do_sample": False, "max_new_tokens": 8, "attention_mask": torch.ones_like(ids)}
    out = model.generate(ids, prefix_allowed_tokens_fn=lambda *_: [case.end], **options)
    assert out[0, len(given[0]) :].tolist() == [case.end], "the first token that ends a turn is the last one"


def check(folder: Path, architecture: str, name: str, algorithm: str) -> None:
    case = make_case(folder, architecture, name, algorithm)
    run = train(case, algorithm, folder)
    if algorithm == "grpo":
        check_sampled(case, run)
    else:
        role = "reward" if algorithm == "reward" else "actor"
        assert run.last_metrics[f"loss/{role}"] == pytest.approx(expected_loss(case, algorithm), rel=1e-4)
    check_saved(case, folder / "run" / "model", algorithm)


COVERING = list(zip(ARCHITECTURES, cycle(ENDS), cycle(ALGORITHMS), strict=False))
"""Every architecture once, and with them every family and algorithm."""


@pytest.mark.parametrize(("architecture", "name", "algorithm"), COVERING)
def test_the_first_step_and_the_saved_folder_are_those_of_plain_transformers(
    architecture: str, name: str, algorithm: str, tmp_path: Path
) -> None:
    check(tmp_path, architecture, name, algorithm)


@pytest.mark.slow
@pytest.mark.parametrize("name", ENDS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_so_they_are_in_every_combination(architecture: str, name: str, tmp_path: Path) -> None:
    for algorithm in ALGORITHMS:
        (tmp_path / algorithm).mkdir()
        check(tmp_path / algorithm, architecture, name, algorithm)
