"""Features of responses for the studies of one-pass reward models: one forward pass per text, written to a safetensors file.

A row of DATA holds `chosen` and `rejected`, HH dialogues, or a list `texts` of them. A language model renders a dialogue with
its chat template and gives the state of the last token after the final norm, what the head of a reward model reads. A folder
with `modules.json` is a sentence encoder: it gives the mean of the last layer's states. Only the last `--tokens` tokens are
read. Texts are read in batches of like length; a text that occurs twice is read once.

    python benchmarks/one_pass_features.py pairs.jsonl features.safetensors --model smollm2-135m
    python benchmarks/one_pass_features.py pairs.jsonl features.safetensors --model FOLDER --tokens 256

The file has `features_RH`, and `index_NK` with the rows of the K texts of each of N lines, chosen first. Every batch is kept in
the folder OUTPUT.parts until the file is written. The same command after a kill continues with the batch that was interrupted.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree

import torch
import xxhash
from safetensors.torch import load_file, save
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from rlhf_core.contract.options import ModelOptions
from rlhf_core.data.chats import parse_dialogue
from rlhf_core.models.loading.load import load_model
from rlhf_core.models.loading.tokenizer import load_tokenizer, render_chat
from rlhf_core.util.atomic_files import write_bytes, write_text

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
    ids = [encode(text, options.tokens) for text in unique]
    parts = Parts(Path(f"{options.output}.parts"))
    parts.open(
        {"model": options.model, "dtype": options.dtype, "ids": xxhash.xxh3_128_hexdigest(json.dumps(ids).encode())}
    )
    features_RH = read_all(ids, read, options.budget, parts)
    index_NK = torch.tensor([[unique[text] for text in row] for row in rows])
    write_bytes(options.output, save({"features_RH": features_RH, "index_NK": index_NK}))
    rmtree(parts.folder)
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


@dataclass(frozen=True)
class Parts:
    """The features of finished batches, one file per batch, named after its first row."""

    folder: Path

    def open(self, made_of: dict[str, str]) -> None:
        """Keep the batches of an interrupted run on the same rows and model, and remove those of any other."""
        mark, text = self.folder / "made-of.json", json.dumps(made_of)
        if mark.exists() and mark.read_text(encoding="utf-8") == text:
            return
        if self.folder.exists() and not mark.exists():
            raise SystemExit(f"{self.folder} was not made by this script; move it away")
        rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        write_text(mark, text)

    def load(self, batch: Sequence[int]) -> Tensor | None:
        """Return the features (B, H) of a batch; None if it is not finished, or has other rows."""
        path = self._path(batch)
        found = load_file(path) if path.exists() else None
        return found["features_BH"] if found is not None and found["rows_B"].tolist() == list(batch) else None

    def save(self, batch: Sequence[int], features_BH: Tensor) -> None:
        """Write the features of a batch."""
        write_bytes(self._path(batch), save({"rows_B": torch.tensor(batch), "features_BH": features_BH}))

    def _path(self, batch: Sequence[int]) -> Path:
        return self.folder / f"batch-{batch[0]}.safetensors"


@torch.inference_mode()
def read_all(rows: Sequence[list[int]], read: Read, budget: int, parts: Parts) -> Tensor:
    """Features of all rows (R, H), batches made of rows of like length."""
    order = sorted(range(len(rows)), key=lambda row: len(rows[row]), reverse=True)
    found: dict[int, Tensor] = {}
    while order:
        count = max(1, budget // len(rows[order[0]]))
        batch, order = order[:count], order[count:]
        ids = [torch.tensor(rows[row]) for row in batch]
        ids_BL = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
        mask_BL = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
        features_BH = parts.load(batch)
        if features_BH is None:
            features_BH = read(ids_BL, mask_BL).float()
            parts.save(batch, features_BH)
        found.update(zip(batch, features_BH))
        if len(order) % 100 < count:
            print(f"{len(order)} texts left", flush=True)
    return torch.stack([found[row] for row in range(len(rows))]).contiguous()


if __name__ == "__main__":
    main()
