"""The files of an evaluation: answers with their raw rewards, settings, and prompts to train on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_core import OptionError
from rlhf_core.analysis.tables import write_parquet
from rlhf_core.util.atomic_files import write_text
from rlhf_eval_gcg.evaluation.questions import prompt_of

if TYPE_CHECKING:
    from rlhf_eval_gcg.attack import Attack, AttackResult
    from rlhf_eval_gcg.evaluation.store import Unit

__all__ = ["ANSWERS", "SETTINGS", "remove_answers", "write_answers", "write_prompts", "write_settings"]

ANSWERS = "answers.jsonl"
SETTINGS = "settings.json"


def write_answers(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write answers as JSON lines, and as Parquet where pyarrow is installed."""
    write_text(folder / ANSWERS, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    try:
        import pyarrow  # noqa: F401  # an extra of rlhf-core
    except ImportError:
        return
    write_parquet((folder / ANSWERS).with_suffix(".parquet"), {name: [row[name] for row in rows] for name in rows[0]})


def remove_answers(folder: Path) -> None:
    """Remove the answers of an earlier evaluation."""
    for ending in (".jsonl", ".parquet"):
        (folder / ANSWERS).with_suffix(ending).unlink(missing_ok=True)


def write_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Write what the answers follow from."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / SETTINGS, json.dumps(settings, indent=1, ensure_ascii=False) + "\n")


def write_prompts(path: Path, attacks: Sequence[tuple[Unit, Sequence[AttackResult]]], options: Attack) -> None:
    """Write attacked prompts as rows that `--data json` reads: a chat, and where it comes from.

    Raises:
        OptionError: the file cannot be written.
    """
    rows = []
    for unit, results in attacks:
        for result in results:
            prompt = prompt_of(result.message, options)
            shown = prompt if isinstance(prompt, str) else list(prompt)
            origin = {"goal": result.goal.goal, "target": result.goal.target, "suffix": result.text}
            rows.append(
                {"prompt": shown, "datasource": "gcg", **origin, "attack_seed": unit.seed, "attack_loss": result.loss}
            )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    except OSError as error:
        raise OptionError("export", f"{path}: {error.strerror}") from None
