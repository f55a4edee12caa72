"""The result of a training run, as `Run.train()` returns it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_core.checkpoint.manifest import list_checkpoints
from rlhf_core.contract.options import ModelOptions

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["RunResult"]


@dataclass(frozen=True)
class RunResult:
    """Numbers and files that a finished run leaves. Several ranks have the same numbers, and the first one wrote the files."""

    metrics: Mapping[str, float]
    """metrics of the last step, by the names of docs/metrics.md"""
    evaluations: tuple[tuple[int, Mapping[str, float]], ...]
    """(step, metrics) of every evaluation"""
    output: Path
    """folder of the run"""
    exported: tuple[str, ...] = ()
    """further roles whose models were written"""

    @property
    def model(self) -> Path:
        """The trained policy: a Hugging Face folder."""
        return self.output / "model"

    @property
    def exports(self) -> dict[str, Path]:
        """Model folders of further roles, by role."""
        return {role: self.output / role for role in self.exported}

    @property
    def checkpoints(self) -> tuple[Path, ...]:
        """Folders of the checkpoints that are kept, oldest first."""
        return tuple(list_checkpoints(self.output))

    @property
    def history(self) -> list[dict[str, Any]]:
        """Metrics of every step, in order, as metrics.jsonl has them."""
        return [json.loads(line) for line in (self.output / "metrics.jsonl").read_bytes().splitlines()]

    def load_model(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Return the trained policy and its tokenizer; adapters are merged into their base, and a reward model has its head."""
        from rlhf_core.models.loading.load import load_model, load_scorer
        from rlhf_core.models.loading.tokenizer import load_tokenizer

        name, options = str(self.model), ModelOptions()
        tokenizer = load_tokenizer(name, options)
        if _is_scorer(self.model):
            return load_scorer(name, options)[0], tokenizer
        return load_model(name, options), tokenizer


def _is_scorer(folder: Path) -> bool:
    """Return True if a model folder, or an adapter's, has the score head of a reward model."""
    from rlhf_core.models.loading.adapters import has_score

    if (folder / "adapter_config.json").is_file():
        return has_score(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return any(name.endswith("ForSequenceClassification") for name in config.get("architectures") or ())
