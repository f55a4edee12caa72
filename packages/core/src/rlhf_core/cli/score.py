"""`rlhf-run score FILE --reward NAME`: any reward over a JSONL file of completions, such as `rlhf-run generate` writes.

A line needs `prompt` (text or messages) and `completion`; `text`, `label`, `finish`, `tokens` and `datasource` are used
where they are. It gets `reward`, `score` where the reward has one, and `uncertainty` where the reward reports this metric.
Token ids are not in the file: a reward that reads them sees as many bytes of the text as there were tokens.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from rlhf_core.cli.resumable import append_lines, continue_output, parse_line, whole_lines, write_lines
from rlhf_core.contract.batch import Rollouts
from rlhf_core.contract.commands import Command
from rlhf_core.contract.engines import open_provider
from rlhf_core.contract.ranges import at_least
from rlhf_core.contract.results import UNCERTAINTY
from rlhf_core.errors import DataError, UsageError, options_under
from rlhf_core.lazy import torch
from rlhf_core.util.padding import pad_rows
from rlhf_core.util.places import read_path
from rlhf_core.util.random_states import seed_libraries
from rlhf_core.util.text_files import read_text

if TYPE_CHECKING:
    from rlhf_core.contract.commands import CommandContext
    from rlhf_core.contract.providers import Reward
    from rlhf_core.contract.results import RewardOutput

__all__ = ["Score", "make_rollouts"]


@dataclass(frozen=True)
class Score(Command):
    """Add `reward` to each line of a JSONL file of completions, null if the reward abstains; a restart continues
    where it stopped."""

    file: str
    """JSONL file whose lines have `prompt` and `completion`"""
    output: str = ""
    """file to write; empty takes FILE with the ending `.scored.jsonl`"""
    batch_size: int = 64
    """number of completions scored and written together"""
    seed: int = 0
    """seed of the random draws; the same seed and batch size give the same rewards, also for rewards that draw random
    numbers"""

    defaults: ClassVar[Mapping[str, str | None]] = {"reward": ""}
    roles: ClassVar[Mapping[str, Any]] = {}

    def __post_init__(self) -> None:
        at_least(1, self, "batch_size")
        at_least(0, self, "seed")

    def __call__(self, context: CommandContext) -> int:
        reward = context.config.providers["reward"]
        if reward.needs:
            raise UsageError(
                f"the reward {type(reward).__qualname__} reads roles ({', '.join(sorted(reward.needs))}), which "
                "exist only in a run; choose another reward"
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
            raise UsageError(f"--output {path} is the input file; name another")
        lines = self._lines()
        first = next(lines, None)  # a file that cannot be read is refused before anything is written
        continue_output(path, reward=reward, seed=self.seed)
        total, rest = self._finished_lines(path, lines if first is None else chain([first], lines))
        rows = (self._parse(*line) for line in rest)
        while batch := list(islice(rows, self.batch_size)):
            seed_libraries(self.seed + total)
            rollouts = make_rollouts(batch)
            output = to_reward_output(engine(rollouts), rollouts, reward)
            append_lines(path, [row | one for row, one in zip(batch, _columns(output), strict=True)])
            total += len(batch)
        print(f"{total} rewards in {path}")
        return 0

    def _finished_lines(self, path: Path, lines: Iterator[tuple[int, str]]) -> tuple[int, Iterator[tuple[int, str]]]:
        """Return how many lines have a reward, and the lines that have none.

        Lines of a batch that was cut short are taken away.

        Raises:
            UsageError: a line is not one of the file with a reward.
        """
        total = 0
        batch: list[tuple[int, str]] = []
        for old in whole_lines(path):
            total += 1
            line = next(lines, None)
            if line is None or not self._continues(path, old, line):
                raise UsageError(f"{path}:{total} does not belong to {self.file}:{total}; name another --output")
            if len(batch) == self.batch_size:
                batch = []
            batch.append(line)
        following = next(lines, None)
        if following is None:
            return total, iter(())
        if len(batch) == self.batch_size:
            batch = []
        if batch:
            write_lines(path, islice(whole_lines(path), total - len(batch)))
        return total - len(batch), chain(batch, [following], lines)

    def _continues(self, path: Path, old: bytes, line: tuple[int, str]) -> bool:
        """Return True if `old`, a line of the output, is a line of the file with something added."""
        if old.startswith(line[1].rstrip()[:-1].encode() + b', "reward": '):  # a parse takes many times as long
            return True
        scored = parse_line(path, old)
        return {**scored, **self._parse(*line)} == scored

    def _lines(self) -> Iterator[tuple[int, str]]:
        """(number from 1, line) of each line of the file that is not blank."""
        file = read_path("score", self.file)
        try:
            if file.is_file():
                with file.open(encoding="utf-8-sig") as lines:
                    yield from ((number, line) for number, line in enumerate(lines, start=1) if line.strip())
            else:  # a pipe is read once, and a device is refused
                content = read_text(file)
                yield from ((n, line) for n, line in enumerate(content.split("\n"), start=1) if line.strip())
        except OSError as error:
            raise UsageError(f"cannot read {self.file}: {error.strerror}") from None
        except UnicodeDecodeError:
            raise DataError(f"{self.file}: expected UTF-8 text") from None

    def _parse(self, number: int, line: str) -> dict[str, Any]:
        """The row of a line.

        Raises:
            DataError: it is no object with a prompt and a completion.
        """
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise DataError(f"{self.file}:{number}: not a JSON object") from None
        if not isinstance(row, dict) or "prompt" not in row or not isinstance(row.get("completion"), str):
            raise DataError(f"{self.file}:{number}: expected an object with `prompt` and `completion`")
        return row


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


def _columns(output: RewardOutput) -> list[dict[str, float | None]]:
    """Return what the line of each completion gets: None where the reward abstains or does not know."""
    columns = {"reward": (output.total_N.float(), output.answered_N)}
    if output.scores_N is not None:
        columns["score"] = (output.scores_N, output.answered_N)
    if UNCERTAINTY in output.metrics:
        known_N = output.known.get(UNCERTAINTY, output.answered_N) & output.answered_N
        columns[UNCERTAINTY] = (output.metrics[UNCERTAINTY], known_N)
    return [
        {name: float(values_N[i]) if known_N[i] else None for name, (values_N, known_N) in columns.items()}
        for i in range(len(output.rewards_N))
    ]


def _meta(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"datasource": row["datasource"]} if "datasource" in row else {}
