"""A sweep: one configuration, varied by named variants and a grid, with every combination run for every seed.

    config = "toy.toml"                 # the base, as `rlhf-run --config` reads it; paths are relative to the sweep's file
    output = "sweeps/toy"               # OUTPUT/<run>/ is a run's folder, relative to the working folder
    seeds = [0, 1, 2]
    discard = ["checkpoints", "model"]  # what is removed of a finished run; nothing where absent
    processes = 4                       # ranks of each run, one per GPU, under torchrun; one process by default

    [grid]                              # every combination; keys are paths as in flags, without the dashes
    "algorithm.alpha" = [0.01, 0.1]

    [variants.reinforce]                # tables of settings over the base; a table with another `use` replaces it
    algorithm = { use = "rloo", kl.coef = 0.0 }

    [slurm]                             # lines `#SBATCH --key=value` of the script that --slurm writes
    time = "04:00:00"

    [ray]                               # flags `--key=value` of `ray job submit` in the script that --ray writes
    entrypoint-num-gpus = 1

A method is a variant with one combination of the grid; a run is a method with a seed. A method's own `grid` table takes the
place of the common one, and `skip = true` in it leaves a variant out. The state of a run is read from its folder alone.
"""

from __future__ import annotations

import itertools
import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rlhf_core.errors import UsageError
from rlhf_core.util.atomic_files import inside, write_text
from rlhf_core.util.messages import log
from rlhf_core.util.text_files import read_text

__all__ = ["Member", "SweepFile", "read_sweep"]

KINDS: Mapping[str, type] = {
    "config": str,
    "output": str,
    "discard": list,
    "grid": dict,
    "variants": dict,
    "slurm": dict,
    "ray": dict,
}
"""Types of a sweep's keys, except those with their own check."""
WORDS: Mapping[type, str] = {str: "path", list: "list of names", dict: "table"}

State = Literal["waiting", "begun", "failed", "finished"]
KEYS = ("config", "output", "seeds", "discard", "processes", "grid", "variants", "slurm", "ray")


@dataclass(frozen=True)
class Member:
    """One run of a sweep."""

    name: str
    """`<method>-seed<k>`, its folder in the sweep's output"""
    method: str
    seed: int
    settings: Mapping[str, Any] = field(repr=False)
    """the whole tree of its configuration"""
    folder: Path = Path()

    @property
    def state(self) -> State:
        """`begun` runs were killed or are at work; `failed` ones ended with an error and can be tried again."""
        status = self.status
        if "exit" in status:
            return "finished" if status["exit"] == 0 else "failed"
        return "begun" if self.is_started else "waiting"

    @property
    def is_started(self) -> bool:
        """Return True if there is something to resume."""
        return any((self.folder / name).exists() for name in ("metrics.jsonl", "checkpoints"))

    @property
    def status(self) -> dict[str, Any]:
        """Read `exit` and `seconds` of the last attempt; empty if there was none, or if it was killed."""
        try:
            found: Any = json.loads(self.status_file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}

    @property
    def status_file(self) -> Path:
        """Beside the run's own files."""
        return self.folder / "sweep-status.json"

    def metrics(self, name: str = "metrics.jsonl") -> Iterator[dict[str, Any]]:
        """The lines of a file of metrics; a half-written last one is left out, and damaged ones are named and left out."""
        path = self.folder / name
        lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line.decode())
            except (ValueError, RecursionError):
                row = None
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                yield row
            else:
                log.warning(f"{path}:{number} is damaged and skipped")


@dataclass(frozen=True)
class SweepFile:
    """Contents of a sweep file."""

    path: Path
    output: Path
    members: tuple[Member, ...]
    discard: tuple[str, ...] = ()
    processes: int = 1
    slurm: Mapping[str, str] = field(default_factory=dict)
    ray: Mapping[str, str] = field(default_factory=dict)


def read_sweep(path: str | Path) -> SweepFile:
    """The sweep that a file describes.

    Raises:
        UsageError: no such file, not TOML, an unknown key, or two runs of one name.
    """
    path = Path(path)
    tree = _toml(path)
    for key in tree:
        if key not in KEYS:
            raise UsageError(f"{path}: unknown key {key!r}; a sweep has {', '.join(KEYS)}")
    for key, kind in KINDS.items():
        if not isinstance(tree.get(key, kind()), kind):
            raise UsageError(f"{path}: {key} must be a {WORDS[kind]}, not {tree[key]!r}")
    if "\0" in tree.get("output", ""):
        raise UsageError(f"{path}: output {tree['output']!r} contains a NUL character; name a folder")
    base = _toml(path.parent / tree["config"]) if "config" in tree else {}
    output = Path(tree.get("output", path.with_suffix("")))
    seeds = tree.get("seeds", [0])
    if not isinstance(seeds, list) or not seeds or not all(isinstance(seed, int) for seed in seeds):
        raise UsageError(f"{path}: seeds must be a list of numbers, such as [0, 1, 2]")
    members = []
    methods = list(_methods(tree, base, path))
    for seed, (method, settings) in itertools.product(seeds, methods):  # all methods once, before the next seed
        name = f"{method}-seed{seed}"
        folder = inside(output, name)
        members.append(Member(name, method, seed, {**settings, "seed": seed, "output": str(folder)}, folder))
    if len({member.name for member in members}) < len(members):
        raise UsageError(f"{path}: two runs have the same name; rename a variant, or change a grid value")
    discard = tuple(map(str, tree.get("discard", ())))
    for name in discard:
        inside(output / "run", name)
    processes = tree.get("processes", 1)
    if not isinstance(processes, int) or processes < 1:
        raise UsageError(f"{path}: processes must be a whole number of at least 1, not {processes!r}")
    slurm, ray = ({key: str(value) for key, value in tree.get(table, {}).items()} for table in ("slurm", "ray"))
    return SweepFile(path, output, tuple(members), discard, processes, slurm, ray)


def write_configuration(member: Member) -> Path:
    """The file that `rlhf-run --config` reads for a member."""
    import tomli_w

    member.folder.mkdir(parents=True, exist_ok=True)
    path = member.folder / "sweep-config.toml"
    write_text(path, tomli_w.dumps(dict(member.settings)))
    return path


def _toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(read_text(path))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not valid TOML: {error}") from None


def _methods(tree: Mapping[str, Any], base: Mapping[str, Any], path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every method's name and settings."""
    variants: Mapping[str, Any] = tree.get("variants") or {"": {}}
    for variant, own in variants.items():
        if not isinstance(own, Mapping):
            raise UsageError(f"{path}: variants.{variant} must be a table of settings, not {own!r}")
        if own.get("skip", False):
            continue
        grid: Mapping[str, Any] = own.get("grid", tree.get("grid", {}))
        if not isinstance(grid, Mapping):
            raise UsageError(f"{path}: variants.{variant}.grid must be a table, not {grid!r}")
        for key, values in grid.items():
            if not isinstance(values, list) or not values:
                raise UsageError(f"{path}: grid {key!r} must be a list of values, not {values!r}")
        changes = {key: value for key, value in own.items() if key not in ("grid", "skip")}
        for combination in itertools.product(*grid.values()):
            settings = _merge(base, changes)
            for key, value in zip(grid, combination, strict=True):
                settings = _merge(settings, _nest(key, value))
            words = [f"{key.rpartition('.')[2]}={value}" for key, value in zip(grid, combination, strict=True)]
            yield re.sub(r"[^\w.=+-]+", "_", "-".join(filter(None, (variant, *words)))) or "run", settings


def _nest(path: str, value: Any) -> dict[str, Any]:
    """`{"a": {"b": value}}` for `a.b`."""
    for part in reversed(path.replace("-", "_").split(".")):
        value = {part: value}
    tree: dict[str, Any] = value
    return tree


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `over` on it, table by table; a table or a name that uses another provider replaces the whole table."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        if (
            isinstance(old, Mapping)
            and isinstance(value, Mapping)
            and value.get("use", old.get("use")) == old.get("use")
        ):
            merged[key] = _merge(old, value)
        else:
            merged[key] = value
    return merged
