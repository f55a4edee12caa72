"""Runs of reward models on a frozen tiny body, and plain transformers' reading of what they leave."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rlhf_core import Run, make_config

WORDS = [
    "alpha",
    "be",
    "gamma ray",
    "d",
    "epsilon",
    "zeta zeta",
    "eta",
    "theta th",
    "iota",
    "kappa k",
    "la",
    "mu mu mu",
]
ROWS = [{"prompt": f"{w}?", "chosen": w.upper(), "rejected": w[::-1] * (1 + i % 3)} for i, w in enumerate(WORDS)]


def options(output: Path, optim: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Return the options of a run of three steps of four pairs."""
    role = {"optim": optim, "freeze": ["body"], **more.pop("reward", {})}
    usual: dict[str, Any] = {
        "model": "tiny:hidden=16,layers=1",
        "data": {"use": "json", "path": str(write_rows(output)), "encoding": {"template": "raw"}},
        "batch_size": 4,
        "output": str(output),
    }
    return {"algorithm": "reward", "reward": role, **usual, **more}


def write_rows(output: Path, rows: list[dict[str, Any]] | None = None) -> Path:
    """Write the pairs beside the folder of a run; return the file."""
    import json

    path = output.with_suffix(".jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows or ROWS))
    return path


def train(output: Path, optim: dict[str, Any], **more: Any) -> Run:
    """Train, and return the finished run."""
    run = Run(make_config(**options(output, optim, **more)))
    run.train()
    return run


def head_of(output: Path) -> Tensor:
    """Return the head (D,) of the model that a run left, as plain transformers loads it."""
    model = AutoModelForSequenceClassification.from_pretrained(output / "model", num_labels=1)
    return model.score.weight.detach()[0]


def plain_pairs(output: Path) -> Tensor:
    """Return feature differences (rows, D) of all pairs, computed by plain transformers, in the order of the file."""
    model = AutoModelForSequenceClassification.from_pretrained(output / "model", num_labels=1).eval()
    tokenizer = AutoTokenizer.from_pretrained(output / "model")

    def features(text: str) -> Tensor:
        ids = [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        with torch.no_grad():
            return model.base_model(torch.tensor([ids]))[0][0, -1].double()

    found = [features(r["prompt"] + r["chosen"]) - features(r["prompt"] + r["rejected"]) for r in ROWS]
    return torch.stack(found)
