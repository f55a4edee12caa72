"""Features of responses for the studies of one-pass reward models: one forward pass per text, written to a safetensors file.

A row of DATA holds `chosen` and `rejected`, HH dialogues, or a list `texts` of them. A language model renders a dialogue with
its chat template and gives the state of the last token after the final norm, what the head of a reward model reads. A folder
with `modules.json` is a sentence encoder: it gives the mean of the last layer's states. Only the last `--tokens` tokens are
read. Texts are read in batches of like length; a text that occurs twice is read once.

    python benchmarks/one_pass_features.py pairs.jsonl features.safetensors --model smollm2-135m
    python benchmarks/one_pass_features.py pairs.jsonl features.safetensors --model FOLDER --tokens 256

The file has `features_RH`, and `index_NK` with the rows of the K texts of each of N lines, chosen first.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from rlhf_core.contract.options import ModelOptions
from rlhf_core.data.chats import parse_dialogue
from rlhf_core.models.loading.load import load_model
from rlhf_core.models.loading.tokenizer import load_tokenizer, render_chat

Read = Callable[[Tensor, Tensor], Tensor]
"""Features (B, H) of token ids and attention mask (B, L), padded on the right."""


def main() -> None:
    """Read the texts, run each through the model once, write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=512, help="read at most the last N tokens of a text")
    parser.add_argument("--budget", type=int, default=2048, help="tokens per forward pass, padding included")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    options = parser.parse_args()
    rows = [texts_of(json.loads(line)) for line in options.data.read_text(encoding="utf-8").splitlines()]
    unique = {text: number for number, text in enumerate(dict.fromkeys(text for row in rows for text in row))}
    reader = sentence_encoder if is_encoder(options.model) else language_model
    encode, read = reader(options.model, options.dtype)
    started = time.perf_counter()
    features_RH = read_all([encode(text, options.tokens) for text in unique], read, options.budget)
    index_NK = torch.tensor([[unique[text] for text in row] for row in rows])
    save_file({"features_RH": features_RH, "index_NK": index_NK}, options.output)
    print(f"{len(unique)} texts, {features_RH.shape[1]} features, {time.perf_counter() - started:.0f} s")


def texts_of(row: dict[str, object]) -> list[str]:
    """The texts of a line, chosen first."""
    texts = row["texts"] if "texts" in row else [row["chosen"], row["rejected"]]
    return [str(text) for text in texts]  # type: ignore[union-attr]


def is_encoder(model: str) -> bool:
    """Return True for a folder of a sentence encoder."""
    return (Path(model) / "modules.json").is_file()


def language_model(name: str, dtype: str) -> tuple[Callable[[str, int], list[int]], Read]:
    """The last token's state of a causal language model."""
    tokenizer, model_options = load_tokenizer(name, ModelOptions()), ModelOptions(dtype=dtype)  # type: ignore[arg-type]
    body = load_model(name, model_options).base_model.eval()

    def encode(text: str, tokens: int) -> list[int]:
        rendered = render_chat(tokenizer, parse_dialogue(text), generation=False).rstrip("\n")
        return list(tokenizer(rendered, add_special_tokens=False)["input_ids"][-tokens:])

    def read(ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
        states_BLH = body(input_ids=ids_BL, attention_mask=mask_BL, use_cache=False).last_hidden_state
        return states_BLH[torch.arange(len(ids_BL)), mask_BL.sum(1) - 1]

    return encode, read


def sentence_encoder(folder: str, dtype: str) -> tuple[Callable[[str, int], list[int]], Read]:
    """The mean state of an encoder."""
    tokenizer, body = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder, dtype=dtype).eval()
    start, end = tokenizer.cls_token_id, tokenizer.sep_token_id

    def encode(text: str, tokens: int) -> list[int]:
        inner = tokenizer(text, add_special_tokens=False)["input_ids"]
        return [start, *inner[-(tokens - 2) :], end]

    def read(ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
        states_BLH = body(input_ids=ids_BL, attention_mask=mask_BL).last_hidden_state
        return (states_BLH * mask_BL[..., None]).sum(1) / mask_BL.sum(1, keepdim=True)

    return encode, read


@torch.inference_mode()
def read_all(rows: Sequence[list[int]], read: Read, budget: int) -> Tensor:
    """Features of all rows (R, H), batches made of rows of like length."""
    order = sorted(range(len(rows)), key=lambda row: len(rows[row]), reverse=True)
    found: dict[int, Tensor] = {}
    while order:
        count = max(1, budget // len(rows[order[0]]))
        batch, order = order[:count], order[count:]
        ids = [torch.tensor(rows[row]) for row in batch]
        ids_BL = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
        mask_BL = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
        found.update(zip(batch, read(ids_BL, mask_BL).float()))
        if len(order) % 100 < count:
            print(f"{len(order)} texts left", flush=True)
    return torch.stack([found[row] for row in range(len(rows))]).contiguous()


if __name__ == "__main__":
    main()
