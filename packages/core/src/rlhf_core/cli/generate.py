"""`rlhf-run generate`: completions of a model on the prompts of a data provider, as JSON lines. Nothing is trained.

A line: `uid` (row of the data), `k` (which of its completions), `prompt` as the data has it, `text` as the model read it,
`completion`, `tokens` (their number), `finish`, and the row's `label` and `datasource` where it has them. Seeds depend on
the run's seed, uid and k alone: neither shards nor batches nor a kill in the middle change a completion.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from rlhf_core.cli.resumable import append_lines, continue_output, whole_lines, write_lines
from rlhf_core.contract.batch import Example
from rlhf_core.contract.commands import Command
from rlhf_core.contract.options import ModelOptions, Sampling
from rlhf_core.contract.ranges import at_least
from rlhf_core.data.shuffling import can_read_ahead
from rlhf_core.errors import UsageError
from rlhf_core.util.places import read_path
from rlhf_core.util.random_states import read_apart

if TYPE_CHECKING:
    from rlhf_core.contract.batch import Prompts, Rollouts
    from rlhf_core.contract.commands import CommandContext
    from rlhf_core.contract.run_view import RunView

__all__ = ["FinishedRows", "Generate"]

BEGINNING = re.compile(rb'\{"uid": (\d+), "k": \d+, .*\}\n\Z', re.DOTALL)
"""A line of this command."""
MOST = 2**31
"""Row numbers are below this."""


@dataclass(frozen=True)
class Generate(Command):
    """Write a model's completions on the data's prompts to a JSONL file; a restart continues where it stopped."""

    model: str = ""
    """hub name, folder (OUTPUT/model of a run, or a checkpoint), GGUF file, or `tiny`"""
    output: str = "completions.jsonl"
    """file to write; each shard has its own"""
    split: str = "train"
    """rows to answer: train or heldout"""
    shard: str = "0/1"
    """shard i/n: answers the rows whose number modulo n is i"""
    prompts: int = 0
    """maximum number of rows of the split to answer, over all shards; 0 answers all"""
    batch_size: int = 16
    """number of prompts sampled and written together; changes speed, never results"""
    max_prompt_tokens: int = 1024
    """longest prompt in tokens; longer prompts are left out and counted"""
    seed: int = 0
    """seed of the random draws; the same seed gives the same completions"""
    sampling: Sampling = Sampling(n=1)
    """sampling options"""

    defaults: ClassVar[Mapping[str, str | None]] = {
        "data": "prompts",
        "rollout": "hf",
        "strategy": "torch",
        "launcher": "local",
    }
    roles: ClassVar[Mapping[str, Any]] = {"actor": ModelOptions()}

    def __post_init__(self) -> None:
        at_least(1, self, "batch_size", "max_prompt_tokens")
        at_least(0, self, "seed", "prompts")
        i, n = _shard(self.shard)
        if not 0 <= i < n:
            raise UsageError(f"--shard must be i/n with i from 0 to n - 1, such as 0/4, not {self.shard!r}")

    def __call__(self, context: CommandContext) -> int:
        path, config = read_path("--output", self.output), context.config
        chosen = {kind: config.providers[kind] for kind in ("data", "rollout")}
        continue_output(
            path,
            model=self.model,
            actor=config.roles["actor"],
            seed=self.seed,
            split=self.split,
            max_prompt_tokens=self.max_prompt_tokens,
            sampling=self.sampling,
            **chosen,
        )
        done = self._finished_rows(path)
        total, left_out = done.lines, 0
        with context.open_run() as run:
            rows = self._rows(run, done)
            while batch := list(islice(rows, self.batch_size)):
                prompts = run.encoder.fitting_prompts([example for _, example in batch], [uid for uid, _ in batch])
                left_out += len(batch) - len(prompts)
                if len(prompts):
                    lines = self._lines(run, prompts)
                    append_lines(path, lines)
                    total += len(lines)
        note = f"; {left_out} prompts were longer than --max-prompt-tokens" if left_out else ""
        print(f"{total} completions in {path}{note}")
        return 0

    def _finished_rows(self, path: Path) -> FinishedRows:
        """Rows that an earlier run finished; what it wrote of an unfinished one is taken away."""
        i, n = _shard(self.shard)
        done = FinishedRows(self.sampling.n)
        for uid in _uids(path):
            if uid % n != i or not done.add(uid // n):
                raise UsageError(f"{path} was written with another --shard or --sampling.n; name another --output")
        if done.unfinished_lines:
            kept = (line for line, uid in zip(whole_lines(path), _uids(path)) if uid // n in done)
            write_lines(path, kept)
            done.drop_unfinished()
        return done

    def _rows(self, run: RunView, done: FinishedRows) -> Iterator[tuple[int, Example]]:
        """The rows to answer, with their numbers; where rows are read by number, no others are read."""
        i, n = _shard(self.shard)
        rows = run.rows(self.split)
        if isinstance(rows, Sequence) and can_read_ahead(run.config.providers["data"], rows):
            for uid in range(i, min(len(rows), self.prompts or len(rows)), n):
                if uid // n not in done:
                    yield uid, rows[uid]
            return
        for uid, example in enumerate(islice(read_apart(rows, self.seed), self.prompts or None)):
            if uid % n == i and uid // n not in done:
                yield uid, example

    def _lines(self, run: RunView, prompts: Prompts) -> list[dict[str, Any]]:
        """Sample, and describe each completion."""
        rollouts = run.rollouts("actor", prompts, replace(self.sampling, seed=self.seed))
        return [_line(rollouts, j, self.sampling.n) for j in range(len(rollouts))]


class FinishedRows:
    """The rows of a shard that have all their completions; a row takes 4 bytes.

    Args:
        n: completions of each row.
    """

    def __init__(self, n: int) -> None:
        self.lines = 0
        """lines of these and of unfinished rows"""
        self._n = n
        self._counts = array("I")

    def add(self, row: int) -> bool:
        """Count a completion; return False if the row has all of them already."""
        if row >= len(self._counts):
            self._counts.frombytes(bytes(self._counts.itemsize * (row + 1 - len(self._counts))))
        if self._counts[row] == self._n:
            return False
        self._counts[row] += 1
        self.lines += 1
        return True

    def __contains__(self, row: int) -> bool:
        return row < len(self._counts) and self._counts[row] == self._n

    @property
    def unfinished_lines(self) -> int:
        """Lines of rows that lack a completion."""
        return sum(count for count in self._counts if count != self._n)

    def drop_unfinished(self) -> None:
        """Forget rows that lack a completion."""
        self.lines -= self.unfinished_lines
        self._counts = array("I", (count if count == self._n else 0 for count in self._counts))


def _uids(path: Path) -> Iterator[int]:
    """The row number of each line.

    Raises:
        UsageError: a line has none.
    """
    for line in whole_lines(path):
        begins = BEGINNING.match(line)  # parsing takes several times as long
        try:
            uid = int(begins[1]) if begins else int(json.loads(line)["uid"])
        except (KeyError, TypeError, ValueError, RecursionError):
            raise UsageError(f"{path} is not a file of this command; name another --output") from None
        if not 0 <= uid < MOST:
            raise UsageError(f"{path} is not a file of this command; name another --output")
        yield uid


def _line(rollouts: Rollouts, j: int, n: int) -> dict[str, Any]:
    line = {
        "uid": int(rollouts["uids_N"][j]),
        "k": j % n,
        "prompt": rollouts.meta[j]["prompt"],
        "text": rollouts.prompts[j],
        "completion": rollouts.texts[j],
        "tokens": int(rollouts.lengths_N[j]),
        "finish": rollouts.finish[j],
    }
    given = {"label": rollouts.labels[j], "datasource": rollouts.meta[j].get("datasource")}
    return line | {name: value for name, value in given.items() if value is not None}


def _shard(text: str) -> tuple[int, int]:
    """`i/n` as numbers; (0, 0) where it is not of that form."""
    i, _, n = text.partition("/")
    return (int(i), int(n)) if i.isdigit() and n.isdigit() else (0, 0)
