"""`rlhf-run score FILE --reward NAME`: any reward over a JSONL file of completions, such as `rlhf-run generate` writes.

A line needs `prompt` (text or messages) and `completion`; `text`, `label`, `finish`, `tokens` and `datasource` are used
where they are. Token ids are not in the file: a reward that reads them sees as many bytes of the text as there were tokens.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from rlhf_core.cli.resumable import append_lines, continue_output, read_lines
from rlhf_core.contract.batch import Rollouts
from rlhf_core.contract.commands import Command
from rlhf_core.contract.engines import open_provider
from rlhf_core.contract.ranges import at_least
from rlhf_core.errors import DataError, UsageError, options_under
from rlhf_core.lazy import torch
from rlhf_core.util.atomic_files import write_text
from rlhf_core.util.padding import pad_rows
from rlhf_core.util.places import read_path
from rlhf_core.util.random_states import seed_libraries
from rlhf_core.util.text_files import read_text

if TYPE_CHECKING:
    from rlhf_core.contract.commands import CommandContext
    from rlhf_core.contract.providers import Reward

__all__ = ["Score", "make_rollouts"]


@dataclass(frozen=True)
class Score(Command):
    """Add `reward` to each line of a JSONL file of completions, null if the reward abstains; started again, it goes on
    where it stopped."""

    file: str
    """JSONL file whose lines have `prompt` and `completion`"""
    output: str = ""
    """file to write; FILE with `.scored.jsonl` for its ending where empty"""
    batch_size: int = 64
    """completions scored, and then written, together"""
    seed: int = 0
    """the same seed and batch size give the same rewards, also of one that draws from `random`, numpy or torch"""

    defaults: ClassVar[Mapping[str, str | None]] = {"reward": ""}
    roles: ClassVar[Mapping[str, Any]] = {}

    def __post_init__(self) -> None:
        at_least(1, self, "batch_size")
        at_least(0, self, "seed")

    def __call__(self, context: CommandContext) -> int:
        reward = context.config.providers["reward"]
        if reward.needs:
            raise UsageError(
                f"the reward {type(reward).__qualname__} reads roles ({', '.join(sorted(reward.needs))}), which only a run "
                "places; score with another one"
            )
        with options_under("/reward"):
            reward.check()
            with open_provider(reward, "reward", self.seed) as engine:
                return self._score(reward, engine)

    def _score(self, reward: Reward, engine: Any) -> int:
        """Score the lines that have no reward yet, by the open reward."""
        from rlhf_core.reward.output import to_reward_output

        read = read_path("score", self.file)
        path = read_path("--output", self.output) if self.output else read.with_suffix(".scored.jsonl")
        if os.path.realpath(path) == os.path.realpath(read):  # which takes links in a circle
            raise UsageError(f"--output {path} is the file that is read; name another")
        rows = list(self._rows())
        continue_output(path, reward=reward, seed=self.seed)
        total = self._finished_lines(path, rows)
        while batch := rows[total : total + self.batch_size]:
            seed_libraries(self.seed + total)
            rollouts = make_rollouts(batch)
            output = to_reward_output(engine(rollouts), rollouts, reward)
            columns = {"reward": output.total_N.float()}
            if output.scores_N is not None:
                columns["score"] = output.scores_N
            added = [
                {name: float(values_N[i]) if answered else None for name, values_N in columns.items()}
                for i, answered in enumerate(output.answered_N.tolist())
            ]
            append_lines(path, [row | one for row, one in zip(batch, added, strict=True)])
            total += len(batch)
        print(f"{total} rewards in {path}")
        return 0

    def _finished_lines(self, path: Path, rows: Sequence[Mapping[str, Any]]) -> int:
        """Return how many lines have a reward; of a batch that was cut short, the lines are taken away.

        Raises:
            UsageError: a line is not one of the file with a reward.
        """
        lines = read_lines(path)
        for number, old in enumerate(lines, start=1):
            if number > len(rows) or {**old, **rows[number - 1]} != old:
                raise UsageError(f"{path}:{number} is not {self.file}:{number} with a reward; name another --output")
        rest = len(lines) % self.batch_size
        if not rest or len(lines) == len(rows):
            return len(lines)
        kept = lines[: len(lines) - rest]
        write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept))
        return len(kept)

    def _rows(self) -> Iterator[dict[str, Any]]:
        """The lines of the file."""
        try:
            content = read_text(read_path("score", self.file))
        except OSError as error:
            raise UsageError(f"{self.file}: {error.strerror}") from None
        except UnicodeDecodeError:
            raise DataError(f"{self.file}: expected UTF-8 text") from None
        for number, line in enumerate(content.split("\n"), start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                raise DataError(f"{self.file}:{number}: not a JSON object") from None
            if not isinstance(row, dict) or "prompt" not in row or not isinstance(row.get("completion"), str):
                raise DataError(f"{self.file}:{number}: expected an object with `prompt` and `completion`")
            yield row


def make_rollouts(rows: list[dict[str, Any]]) -> Rollouts:
    """Lines as the batch that a reward is called with; adjacent lines with one prompt are a group."""
    from rlhf_core.data.chats import to_chat

    prompts = [to_chat(row["prompt"]) if isinstance(row["prompt"], list) else str(row["prompt"]) for row in rows]
    group = [0]
    for before, now in pairwise(prompts):
        group.append(group[-1] + (before != now))
    texts = [str(row.get("text", row["prompt"])) for row in rows]
    ids = [list(row["completion"].encode()) for row in rows]
    ids = [(each + [0] * n)[:n] for each, n in zip(ids, (int(r.get("tokens", len(e))) for r, e in zip(rows, ids)))]
    prompt_NL, prompt_lengths_N = pad_rows([list(text.encode()) for text in texts], width=1)
    tokens_NT, lengths_N = pad_rows(ids, width=1)
    return Rollouts(
        prompts=texts,
        texts=[row["completion"] for row in rows],
        prompt_NL=prompt_NL,
        prompt_lengths_N=prompt_lengths_N,
        tokens_NT=tokens_NT,
        lengths_N=lengths_N,
        mask_NT=torch.arange(tokens_NT.shape[1])[None] < lengths_N[:, None],
        group_N=torch.tensor(group),
        labels=[row.get("label") for row in rows],
        meta=[{"prompt": prompt, **_meta(row)} for prompt, row in zip(prompts, rows, strict=True)],
        finish=[row.get("finish", "stop") for row in rows],
    )


def _meta(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"datasource": row["datasource"]} if "datasource" in row else {}
