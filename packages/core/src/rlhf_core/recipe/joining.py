"""All versions of an artifact as one: data sets one after the other, metrics as a table with a row for each version."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path

from rlhf_core.contract.ingredients import Artifact, ArtifactKind
from rlhf_core.util.atomic_files import write_bytes, write_text

__all__ = ["join"]


def join(artifacts: Sequence[Artifact], kind: ArtifactKind, path: Path) -> Artifact:
    """Return the artifacts as one of `kind`, written to `path` with the ending of its kind.

    A table has the column `version`, which counts from 0, and one for each name in any of the metrics.
    """
    if kind == "dataset":
        target = path.with_suffix(".jsonl")
        parts = [artifact.path.read_bytes() for artifact in artifacts]
        write_bytes(target, b"".join(part if part.endswith(b"\n") or not part else part + b"\n" for part in parts))
        return Artifact("dataset", target)
    rows = [json.loads(artifact.path.read_text(encoding="utf-8")) for artifact in artifacts]
    names = dict.fromkeys(name for row in rows for name in row)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["version", *names])
    writer.writerows([number, *(row.get(name, "") for name in names)] for number, row in enumerate(rows))
    target = path.with_suffix(".csv")
    write_text(target, text.getvalue())
    return Artifact("table", target)
