"""Finished attacks in the run's folder, so that a kill in the middle of an evaluation loses no more than one step of one goal.

    OUTPUT/gcg/step-N/attacks.jsonl             all attacks of the evaluation after step N, a line each
    OUTPUT/gcg/step-N/unfinished/               while it lasts: a file for each finished attack, and states of those in progress

An attack is identified by its inputs: goal, attack seed, options of the attack, and the model's weights. Finished attacks
under other circumstances is never taken for it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from shutil import rmtree
from typing import Any

import xxhash

from rlhf_core import DataError, RunStopped, UsageError, run_option
from rlhf_core.lazy import torch
from rlhf_core.util.atomic_files import write_text
from rlhf_eval_gcg.attack import Attack, AttackResult, Goal

__all__ = ["ATTACKS", "AttackStore", "Unit", "goal_key", "model_digest", "read_lines"]

ATTACKS = "attacks.jsonl"
FREE = ("batch_tokens", "goals_at_once")
"""Options of an attack that change memory and speed only."""


@dataclass(frozen=True)
class Unit:
    """Attacks that are made in one go: one goal, or all goals of a suffix that is to transfer, with one attack seed."""

    goals: tuple[Goal, ...]
    seed: int

    @property
    def key(self) -> str:
        """Return a word that follows from goals and seed."""
        return _digest([[goal_key(goal) for goal in self.goals], self.seed])

    @property
    def draw(self) -> int:
        """Return the seed of everything that the attack draws: it does not depend on the other goals."""
        return int(self.key, 16) >> 33  # 31 bits, from which an attack may derive further seeds


class AttackStore:
    """The attacks of one evaluation.

    Args:
        folder: where they are kept.
        options: of the attacks.
        digest: of the attacked model's weights, and of further models.
    """

    def __init__(self, folder: Path, options: Attack, digest: str) -> None:
        self.folder, self._unfinished = folder, folder / "unfinished"
        search = {name: value for name, value in asdict(options).items() if name not in FREE}
        self.fingerprint = _digest([search, digest])
        self._known = self._read_finished()

    def get(self, unit: Unit) -> list[AttackResult] | None:
        """Return the results of a unit that was attacked before; None if it was not."""
        key = self._key(unit)
        if key in self._known:
            return self._known[key]
        path = self._unfinished / f"{key}.json"
        try:
            rows = json.loads(path.read_text(encoding="utf-8"))
            return [_result(row) for row in rows]
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def put(self, unit: Unit, results: Sequence[AttackResult]) -> None:
        """Keep the results of a unit."""
        try:
            self._unfinished.mkdir(parents=True, exist_ok=True)
            write_text(self._unfinished / f"{self._key(unit)}.json", json.dumps([asdict(each) for each in results]))
        except OSError as error:
            raise RunStopped(
                f"{self._unfinished}: {error.strerror}; finished attacks are kept, so run the command again to continue"
            ) from error

    def state_file(self, units: Sequence[Unit]) -> Path:
        """Return the file for the state of attacks in progress that are made together."""
        self._unfinished.mkdir(parents=True, exist_ok=True)
        keys = [self._key(unit) for unit in units]
        return self._unfinished / f"{keys[0] if len(keys) == 1 else _digest(keys)}.state"

    def finish(self, attacks: Sequence[tuple[Unit, Sequence[AttackResult]]], step: int) -> bool:
        """Write all attacks of the evaluation into one file, and remove the separate ones; return True if it has changed."""
        rows = [
            {"step": step, "fingerprint": self.fingerprint, "unit": self._key(unit), "seed": unit.seed, **_row(result)}
            for unit, results in attacks
            for result in results
        ]
        self.folder.mkdir(parents=True, exist_ok=True)
        path, text = self.folder / ATTACKS, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        changes = not path.exists() or path.read_bytes() != text.encode()
        write_text(path, text)
        rmtree(self._unfinished, ignore_errors=True)
        return changes

    def check_same(self, run_trains: bool) -> bool:
        """Return True if the attacks that are there, if any, are of this model and these options.

        Raises:
            UsageError: they are not, and no run is there that wrote them on its way.
        """
        path = self.folder / ATTACKS
        rows = read_lines(path) if path.exists() else []
        if all(row.get("fingerprint") == self.fingerprint for row in rows):
            return True
        if run_trains:
            return False
        raise UsageError(
            f"{path} contains attacks on another model or with other options; name another {run_option('output')}, "
            f"or remove {self.folder}"
        )

    def _key(self, unit: Unit) -> str:
        return f"{unit.key}-{self.fingerprint}"

    def _read_finished(self) -> dict[str, list[AttackResult]]:
        path, known = self.folder / ATTACKS, dict[str, list[AttackResult]]()
        for row in read_lines(path) if path.exists() else ():
            if row.get("fingerprint") == self.fingerprint:
                try:
                    known.setdefault(str(row["unit"]), []).append(_result(row))
                except (KeyError, TypeError):
                    raise DataError(f"{path}: a line does not describe an attack; remove {self.folder}") from None
        return known


def goal_key(goal: Goal) -> str:
    """Return a word of 64 bits that follows from the texts of a goal."""
    return _digest([goal.goal, goal.target, list(goal.bad_set)])


def model_digest(models: Sequence[Any]) -> str:
    """Return a checksum of the weights of models, whose parameters are whole."""
    digest = xxhash.xxh3_128()
    for model in models:
        for name, parameter in model.named_parameters():
            values = parameter.detach().cpu().contiguous()
            digest.update(f"{name} {tuple(values.shape)} {values.dtype}".encode())
            digest.update(values.flatten().view(torch.uint8).numpy())
    return str(digest.hexdigest())


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a file of JSON lines.

    Raises:
        DataError: a line is no object; names it.
        UsageError: there is no such file.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    rows = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if not isinstance(row, dict):
                raise DataError(f"{path}:{number}: expected one JSON object; remove the damaged line")
            rows.append(row)
    return rows


def _row(result: AttackResult) -> dict[str, Any]:
    """Return a result as plain values, with the goal's texts."""
    plain = asdict(result)
    goal = plain.pop("goal")
    return {**goal, "steps": result.steps, **plain}


def _result(row: Mapping[str, Any]) -> AttackResult:
    """Return the result that plain values hold."""
    nested = row["goal"] if isinstance(row["goal"], Mapping) else row
    goal = Goal(nested["goal"], nested["target"], tuple(nested["bad_set"]), nested["origin"])
    values: dict[str, Any] = {each.name: row[each.name] for each in fields(AttackResult) if each.name != "goal"}
    plain: dict[str, Any] = {name: tuple(each) if isinstance(each, list) else each for name, each in values.items()}
    return AttackResult(goal, **plain)


def _digest(value: object) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=8).hexdigest()
