"""Template of `new-plugin --kind ingredient`: an ingredient and its test."""

from __future__ import annotations

__all__ = ["MODULE", "RUN", "TEST"]

RUN = "rlhf-run plugins --kind ingredient"

MODULE = '''\
from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from rlhf_core import Artifact, ArtifactKind, Ingredient, IngredientContext, hookimpl


@dataclass(frozen=True)
class $cls(Ingredient):
    """Drop the rows whose prompt is too long."""

    at_most: int = 2000
    """longest prompt, in characters"""

    inputs: ClassVar[Mapping[str, ArtifactKind]] = {"rows": "dataset"}
    outputs: ClassVar[Mapping[str, ArtifactKind]] = {"rows": "dataset", "counts": "metrics"}

    def __call__(self, context: IngredientContext) -> Mapping[str, Artifact]:
        lines = context.inputs["rows"].path.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if len(str(json.loads(line)["prompt"])) <= self.at_most]
        rows, counts = context.folder / "rows.jsonl", context.folder / "counts.json"
        rows.write_text("".join(f"{line}\\n" for line in kept), encoding="utf-8")
        counts.write_text(json.dumps({"read": len(lines), "kept": len(kept)}), encoding="utf-8")
        return {"rows": Artifact("dataset", rows), "counts": Artifact("metrics", counts)}


@hookimpl
def rlhf_ingredient() -> dict[str, type]:
    return {"$name": $cls}
'''

TEST = """\
from pathlib import Path

from rlhf_core import Artifact
from rlhf_core.testing import check_ingredient

from $module import $cls


def test_it_keeps_the_contract(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "short"}\\n{"prompt": "much too long"}\\n')
    check_ingredient($cls(at_most=5), {"rows": Artifact("dataset", rows)})
"""
