"""The record of a finished step: what it was made of, so that it is known when it must run again, and why.

    OUTPUT/steps/NAME/step.json
        made_of   checksums of the resolved options, of the inputs, and of the provider's version and seed, each by name
        outputs   kind, path and checksum of every output
        seconds   how long it took

Options are kept as checksums only, so that no secret is written. A step is up to date if `made_of` is what it would be now.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from rlhf_core.config.option_fields import option_fields
from rlhf_core.contract.ingredients import FOLDERS, Artifact, Ingredient
from rlhf_core.errors import UsageError
from rlhf_core.util.atomic_files import write_text

__all__ = ["RECORD", "Record", "checksum", "differences", "option_checksums", "read_record"]

RECORD = "step.json"
HUB_KINDS = frozenset({"model"})
"""The kinds of artifacts that may be a name of the hub, or of a model that core makes, such as `tiny`."""
UNHASHED = frozenset({"README.md"})
"""Files of a model that depend on the time it was made, not on its content."""


@dataclass(frozen=True)
class Record:
    """Contents of OUTPUT/steps/NAME/step.json."""

    made_of: Mapping[str, str]
    outputs: Mapping[str, Mapping[str, str]]
    seconds: float

    def write(self, folder: Path) -> None:
        """Write the record into the folder of the step, which is then complete."""
        content = {"made_of": dict(self.made_of), "outputs": dict(self.outputs), "seconds": round(self.seconds, 1)}
        write_text(folder / RECORD, json.dumps(content, indent=1, sort_keys=True) + "\n")

    def artifact(self, output: str, folder: Path) -> Artifact:
        """Return an output of the step in `folder`."""
        found: Any = self.outputs[output]
        return Artifact(found["kind"], folder / found["path"])


def read_record(folder: Path) -> Record | None:
    """Return the record of a step; None if it is not finished, or its record or an output is damaged or gone."""
    try:
        content = json.loads((folder / RECORD).read_bytes())
        record = Record(dict(content["made_of"]), dict(content["outputs"]), float(content["seconds"]))
        whole = all(
            (folder / each["path"]).exists() and each["kind"] and each["xxh3"] for each in record.outputs.values()
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return record if whole else None


def option_checksums(provider: Ingredient) -> dict[str, str]:
    """Return the checksum of every option of an ingredient, those inside tables under dotted names."""
    plain = {each.name: getattr(provider, each.name) for each in option_fields(type(provider))}
    return {f"option {name}": _text_checksum(value) for name, value in _leaves(plain)}


def checksum(artifact: Artifact) -> str:
    """Return the checksum of an artifact's content; of the name of a model that is no folder, such as one of the hub.

    Raises:
        UsageError: there is no such file.
    """
    path = artifact.path
    if not path.exists():
        if artifact.kind in HUB_KINDS:
            return _text_checksum(str(path))
        raise UsageError(f"{path}: there is no such {artifact.kind}")
    files = [path]
    if artifact.kind in FOLDERS and path.is_dir():
        files = sorted(each for each in path.rglob("*") if each.is_file() and each.name not in UNHASHED)
    digest = xxhash.xxh3_128()
    for file in files:
        digest.update(f"{file.relative_to(path)}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as content:
            while block := content.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def differences(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Return the names of what a step is made of that changed, came or went."""
    return [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]


def _leaves(value: Any, above: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of a tree of tables by dotted name; an empty table is a value."""
    if not isinstance(value, Mapping) or not value:
        yield above, value
        return
    for key, each in value.items():
        yield from _leaves(each, f"{above}.{key}" if above else str(key))


def _text_checksum(value: Any) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(value, sort_keys=True, default=repr).encode())
