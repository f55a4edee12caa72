"""Model cards: what a model was made from, with what, and how well it does; how to load it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["Card"]


@dataclass(frozen=True)
class Card:
    """What is known about a model."""

    base: str
    """the model it was trained from"""
    algorithm: str
    """what it was trained with"""
    steps: int = 0
    data: str = ""
    """what it was trained on, in words"""
    evaluation: Mapping[str, float] = field(default_factory=dict)
    """the last evaluation's metrics"""
    note: str = ""
    """which weights these are, if not simply the trained ones"""

    def text(self, model_class: str, adapter: bool = False, classifier: bool = False) -> str:
        """The card as Markdown with the metadata that hubs read."""
        local = Path(self.base).exists()
        name = Path(self.base).name if local else self.base  # a folder's place on this machine is nobody's business
        head = ["---", f"library_name: {'peft' if adapter else 'transformers'}"]
        head += [f"base_model: {self.base}"] if "/" in self.base and not local else []
        head += [f"tags: [rlhf, {self.algorithm}]", "---", ""]
        what = f"An adapter for `{name}` (`{model_class}`)" if adapter else f"A `{model_class}` trained from `{name}`"
        done = f" in {self.steps} steps" if self.steps else ""
        body = [
            f"# {name}, trained with {self.algorithm}",
            "",
            f"{what}, made with `{self.algorithm}`{done} by rlhf-core.",
        ]
        body += [f"{self.note}"] if self.note else []
        body += ["", "## Data", "", self.data or "To be written by whoever publishes this model."]
        body += ["", "## Evaluation", "", *(_table(self.evaluation) or ["This run had no evaluator."])]
        body += ["", "## Loading", "", "```python", *_loading(name, adapter, classifier), "```"]
        body += ["", "Intended use and limits: to be written by whoever publishes this model.", ""]
        return "\n".join([*head, *body])


def _table(metrics: Mapping[str, float]) -> list[str]:
    if not metrics:
        return []
    rows = [f"| {name.removeprefix('eval/')} | {value:.4g} |" for name, value in metrics.items()]
    return ["| metric | value |", "|---|---|", *rows]


def _loading(name: str, adapter: bool, classifier: bool) -> list[str]:
    auto = "AutoModelForSequenceClassification" if classifier else "AutoModelForCausalLM"
    if not adapter:
        return [f"from transformers import {auto}, AutoTokenizer", "", f'model = {auto}.from_pretrained("this folder")']
    labels = ", num_labels=1" if classifier else ""
    return [
        "from peft import PeftModel",
        f"from transformers import {auto}",
        "",
        f'base = {auto}.from_pretrained("{name}"{labels})',
        'model = PeftModel.from_pretrained(base, "this folder")',
    ]
