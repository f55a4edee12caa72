"""Runs of ranks that share rows under Ulysses, with models whose layers attend within windows or chunks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import deepspeed_ranks as ranks
import torch
import transformers

from rlhf_core.contract.options import TrainedOptions
from rlhf_core.launcher.local import join_world
from rlhf_core.models.loading.tokenizer import load_tokenizer

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
}
MIXED = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
CHUNKS = {"head_dim": 8, "intermediate_size_mlp": 32, "num_local_experts": 2, "attention_chunk_size": 4}
WINDOWS: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral": ("MistralConfig", {**SIZES, "sliding_window": 4}),
    "gemma3": ("Gemma3TextConfig", {**SIZES, **MIXED, "head_dim": 8}),
}
"""A window in every layer, and in one of two; rows and stretches of a rank are longer."""
MODELS = {**WINDOWS, "llama4": ("Llama4TextConfig", {**SIZES, **CHUNKS})}


def write_models(folder: Path) -> None:
    """Write `MODELS` to folders of their names, each with large random weights. For the process that starts the ranks."""
    tokenizer = load_tokenizer("tiny", TrainedOptions())
    special = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    for name, (kind, sizes) in MODELS.items():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            config = getattr(transformers, kind)(**sizes, vocab_size=len(tokenizer), **special)
            model = transformers.AutoModelForCausalLM.from_config(config)
            for parameter in model.parameters():
                torch.nn.init.normal_(parameter, 0.0, 0.2)
            model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def run(folder: str, model: str, strategy: Any, name: str) -> dict[str, Any]:
    """Train for two steps on a model of `MODELS`."""
    options = {"model": str(Path(folder, model)), "steps": 2, "batch_size": 2, "save_every": 0}
    return ranks.run(Path(folder), "plain", strategy, name, **options)


def main(folder: str) -> None:
    """Leave FOLDER/MODEL.pt of each model with windows, and FOLDER/message of the one with chunks."""
    torch.set_num_threads(1)
    world = join_world()
    for model in WINDOWS:
        result = run(folder, model, ranks.sharded("1s"), f"{model}-run")
        if torch.distributed.get_rank() == 0:
            torch.save(result, Path(folder, f"{model}.pt"))
    message = ranks.mistake(lambda: run(folder, "llama4", ranks.sharded("1s"), "llama4-run"))
    Path(folder, f"message-{torch.distributed.get_rank()}").write_text(message, encoding="utf-8")
    world.barrier()
