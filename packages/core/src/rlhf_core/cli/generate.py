"""`rlhf-run generate`: completions of a model on the prompts of a data provider, as JSON lines. Nothing is trained.

A line: `uid` (row of the data), `k` (which of its completions), `prompt` as the data has it, `text` as the model read it,
`completion`, `tokens` (their number), `finish`, and the row's `label` and `datasource` where it has them. Seeds depend on
the run's seed, uid and k alone: neither shards nor batches nor a kill in the middle change a completion.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from rlhf_core.cli.resumable import append_lines, continue_output, read_lines
from rlhf_core.contract.batch import Example
from rlhf_core.contract.commands import Command
from rlhf_core.contract.options import ModelOptions, Sampling
from rlhf_core.contract.ranges import at_least
from rlhf_core.errors import UsageError
from rlhf_core.util.atomic_files import write_text
from rlhf_core.util.places import read_path
from rlhf_core.util.random_states import read_apart

if TYPE_CHECKING:
    from rlhf_core.contract.batch import Rollouts
    from rlhf_core.contract.commands import CommandContext
    from rlhf_core.contract.run_view import RunView

__all__ = ["Generate"]


@dataclass(frozen=True)
class Generate(Command):
    """Write a model's completions on the data's prompts to a JSONL file; started again, it goes on where it stopped."""

    model: str = ""
    """hub name, folder (OUTPUT/model of a run, or a checkpoint), GGUF file, or `tiny`"""
    output: str = "completions.jsonl"
    """file to write; each shard has its own"""
    split: str = "train"
    """rows to answer: train or heldout"""
    shard: str = "0/1"
    """i/n answers the rows whose number modulo n is i"""
    prompts: int = 0
    """at most this many rows of the split, over all shards; 0 answers all"""
    batch_size: int = 16
    """prompts sampled, and then written, together; changes speed, never results"""
    max_prompt_tokens: int = 1024
    """longer prompts are left out and counted"""
    seed: int = 0
    """the same seed gives the same completions"""
    sampling: Sampling = Sampling(n=1)
    """how completions are drawn"""

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
            raise UsageError(f"--shard must be i/n with i from 0 to n - 1, as 0/4, not {self.shard!r}")

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
        left_out = 0
        with context.open_run() as run:
            rows = self._rows(run, done)
            while batch := list(islice(rows, self.batch_size)):
                fitting = [(uid, example) for uid, example in batch if run.encoder.fits_prompt(example)]
                left_out += len(batch) - len(fitting)
                if fitting:
                    append_lines(path, self._lines(run, fitting))
        note = f"; {left_out} prompts were longer than --max-prompt-tokens" if left_out else ""
        print(f"{len(read_lines(path))} completions in {path}{note}")
        return 0

    def _finished_rows(self, path: Path) -> set[int]:
        """Rows that an earlier run finished; what it wrote of an unfinished one is taken away."""
        lines = read_lines(path)
        i, n = _shard(self.shard)
        try:
            written = Counter(int(line["uid"]) for line in lines)
        except (KeyError, TypeError, ValueError):
            raise UsageError(f"{path} is not a file of this command; name another --output") from None
        if any(count > self.sampling.n or uid % n != i for uid, count in written.items()):
            raise UsageError(f"{path} was written with another --shard or --sampling.n; name another --output")
        done = {uid for uid, count in written.items() if count == self.sampling.n}
        if len(done) < len(written):
            kept = [json.dumps(line, ensure_ascii=False) + "\n" for line in lines if line["uid"] in done]
            write_text(path, "".join(kept))
        return done

    def _rows(self, run: RunView, done: set[int]) -> Iterator[tuple[int, Example]]:
        """The rows to answer, with their numbers."""
        i, n = _shard(self.shard)
        for uid, example in enumerate(islice(read_apart(run.rows(self.split), self.seed), self.prompts or None)):
            if uid % n == i and uid not in done:
                yield uid, example

    def _lines(self, run: RunView, rows: list[tuple[int, Example]]) -> list[dict[str, Any]]:
        """Sample, and describe each completion."""
        prompts = run.encoder.prompts([example for _, example in rows], [uid for uid, _ in rows])
        rollouts = run.rollouts("actor", prompts, replace(self.sampling, seed=self.seed))
        return [_line(rollouts, j, self.sampling.n) for j in range(len(rollouts))]


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
