"""Model cards: what a model was made from, with what, and how well it does; how to load it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from rlhf_core.models.export.loading_code import loading_code
from rlhf_core.models.loading.names import SHIPPED

__all__ = ["Card", "read_card"]


@dataclass(frozen=True)
class Card:
    """A model's origin and results."""

    base: str
    """the model it was trained from"""
    algorithm: str
    """algorithm that trained it"""
    steps: int = 0
    data: str = ""
    """description of its training data"""
    evaluation: Mapping[str, float] = field(default_factory=dict)
    """the last evaluation's metrics"""
    note: str = ""
    """description of the weights, if they are not simply the trained ones"""
    home: str = "."
    """location of the model in the loading code: this folder, or its name on the hub"""

    def text(self, model_class: str, adapter: bool = False, classifier: bool = False) -> str:
        """Return the card as Markdown with the metadata that hubs read."""
        local = Path(self.base).exists()
        name = Path(self.base).name if local else self.base  # a folder's place on this machine is private
        head = ["---", f"library_name: {'peft' if adapter else 'transformers'}"]
        head += [f"base_model: {self.base}"] if "/" in self.base and not local and self.base not in SHIPPED else []
        head += [f"tags: [rlhf, {self.algorithm}]", "---", ""]
        what = f"An adapter for `{name}` (`{model_class}`)" if adapter else f"A `{model_class}` trained from `{name}`"
        done = f" in {self.steps} steps" if self.steps else ""
        body = [
            f"# {name}, trained with {self.algorithm}",
            "",
            f"{what}, made with `{self.algorithm}`{done} by rlhf-core.",
        ]
        body += [self.note] if self.note else []
        body += ["", "## Data", "", self.data] if self.data else []
        body += ["", "## Evaluation", "", *(_table(self.evaluation) or ["This run had no evaluator."])]
        code = loading_code(self.base, self.home, model_class, adapter=adapter, classifier=classifier)
        body += ["", "## Loading", "", "```python", *code, "```", "", "## TODO: intended use and limits", ""]
        return "\n".join([*head, *body])


def read_card(folder: Path) -> Card | None:
    """Return the content of a run's model card in a folder; None if there is no card, or it is another program's."""
    path = folder / "README.md"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    made = re.search(r"(?:for|from) `(.+?)`.* made with `(.+?)`(?: in (\d+) steps)? by rlhf-core\.", text)
    if made is None:
        return None
    parts = dict(re.findall(r"^## (.+?)\n\n(.*?)(?=\n\n## |\Z)", text, re.MULTILINE | re.DOTALL))
    rows = re.findall(r"^\| (\S+) \| (\S+) \|$", parts.get("Evaluation", ""), re.MULTILINE)
    evaluation = {name: float(value) for name, value in rows if name != "metric"}
    card = Card(base=made[1], algorithm=made[2], steps=int(made[3] or 0), data=parts.get("Data", ""))
    return replace(card, evaluation=evaluation)


def _table(metrics: Mapping[str, float]) -> list[str]:
    if not metrics:
        return []
    rows = [f"| {name.removeprefix('eval/')} | {value:.4g} |" for name, value in metrics.items()]
    return ["| metric | value |", "|---|---|", *rows]
