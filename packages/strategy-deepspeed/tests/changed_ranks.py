"""Ranks of the tests of models that change while they are loaded: short runs with new tokens, adapters, and four bits."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from deepspeed_ranks import ONLINE, Plain

from rlhf_core.contract.providers import Strategy
from rlhf_core.testing import tiny_run


def cases(folder: Path, adapted: bool) -> dict[str, dict[str, Any]]:
    """Options of each run, whose models and tokens lie in `folder`."""
    tokens = str(folder / "tokens.txt")
    found: dict[str, dict[str, Any]] = {
        "tokens, tied": {"model": "tiny", "add_tokens": tokens},
        "tokens, untied": {"model": str(folder / "untied"), "add_tokens": tokens},
    }
    if adapted:
        adapter = str(folder / "adapter")
        found |= {"adapter": {"model": adapter}, "both": {"model": adapter, "add_tokens": tokens}}
        found["lora on adapter"] = {"model": adapter, "actor": {"lora": {"rank": 4}}}
    if adapted and find_spec("bitsandbytes"):
        quantized = {"lora": {"rank": 4}, "quantize": "nf4"}
        found["quantized"] = {"model": str(folder / "untied"), "actor": quantized}
    return found


def train(folder: Path, adapted: bool, name: str, strategy: Strategy) -> None:
    """Train each model for two steps. Every run writes its model, and metrics next to it."""
    for case, options in cases(folder, adapted).items():
        output = folder / name / case
        result = tiny_run(output, Plain(), strategy=strategy, **ONLINE, **options).train()
        torch.save(dict(result.metrics), output / "metrics.pt")


def shard(folder: str, adapted: bool) -> None:
    """Train under stage 3, on all ranks."""
    from rlhf_strategy_deepspeed.strategy import DeepSpeed

    torch.set_num_threads(1)
    train(Path(folder), adapted, "sharded", DeepSpeed(stage=3, persist=8))
