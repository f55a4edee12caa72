"""Measure the policy's log-probabilities of known bad outputs, which `--reward keep_bad` kept."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from rlhf_core.contract.batch import Batch
from rlhf_core.contract.providers import Evaluator
from rlhf_core.contract.requirements import TRAINED
from rlhf_core.errors import DataError, OptionError
from rlhf_core.lazy import torch
from rlhf_core.util.padding import pad_rows

if TYPE_CHECKING:
    from rlhf_core.contract.run_view import RunView

__all__ = ["BadSamples"]


@dataclass(frozen=True)
class BadSamples(Evaluator):
    """Log-probability of saved bad samples, one by one and together for each prompt (RePULSe's negative data).

    At the run's --sampling.temperature, like everything that a role computes; `bad_probability` is at 1.
    """

    path: str = "bad_samples.jsonl"
    """JSONL file with prompt_ids and ids, as `--reward keep_bad` writes it"""

    samples: ClassVar[bool] = False
    """nothing is sampled"""
    needs: ClassVar[frozenset[str]] = frozenset({f"{TRAINED}.logprobs_NT"})

    def __call__(self, run: RunView) -> dict[str, float]:
        """`bad_samples/logprob`, the mean over samples, and `bad_samples/log_mass`, the mean over prompts of the log of the
        probability that any of their samples is given; natural logarithms."""
        rows = self._rows()
        prompts = sorted({str(row["prompt_ids"]) for row in rows})
        mine = set(prompts[run.world.rank :: run.world.size])
        own = [row for row in rows if str(row["prompt_ids"]) in mine] or rows[:1]  # ranks infer together
        name = run.plan.trained_roles[0] if run.plan.trained_roles else next(iter(run.plan.roles))
        logprobs_NT = run.roles[name].infer(samples_as_batch(own), frozenset({"logprobs_NT"}))["logprobs_NT"]
        logprobs_N = logprobs_NT.double().sum(1).tolist()
        by_prompt: dict[str, list[float]] = {}
        for row, logprob in zip(own, logprobs_N, strict=True):
            if str(row["prompt_ids"]) in mine:
                by_prompt.setdefault(str(row["prompt_ids"]), []).append(logprob)
        every = [values for part in run.world.gather(by_prompt) for values in part.values()]
        masses = [float(torch.tensor(values, dtype=torch.float64).logsumexp(0)) for values in every]
        return {
            "bad_samples/logprob": sum(map(sum, every)) / sum(map(len, every)),
            "bad_samples/log_mass": sum(masses) / len(masses),
        }

    def _rows(self) -> list[dict[str, Any]]:
        """The file's samples."""
        try:
            lines = Path(self.path).read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise OptionError("path", f"{self.path}: {error.strerror}") from None
        rows = []
        for number, line in enumerate(lines, start=1):
            try:
                rows.append({name: json.loads(line)[name] for name in ("prompt_ids", "ids")})
            except (ValueError, KeyError, TypeError):
                raise DataError(f"{self.path}:{number}: expected an object with prompt_ids and ids") from None
        if not rows:
            raise OptionError("path", f"{self.path} contains no samples; name a file that reward keep_bad wrote")
        return rows


def samples_as_batch(rows: list[dict[str, Any]]) -> Batch:
    """Samples by token ids, for a role to read."""
    prompt_NL, prompt_lengths_N = pad_rows([row["prompt_ids"] for row in rows])
    tokens_NT, lengths_N = pad_rows([row["ids"] for row in rows])
    return Batch(
        prompts=[""] * len(rows),
        texts=[""] * len(rows),
        prompt_NL=prompt_NL,
        prompt_lengths_N=prompt_lengths_N,
        tokens_NT=tokens_NT,
        lengths_N=lengths_N,
        mask_NT=torch.arange(tokens_NT.shape[1]) < lengths_N[:, None],
        group_N=torch.arange(len(rows)),
        labels=[None] * len(rows),
        meta=[{}] * len(rows),
    )
