"""Many samples on held-out prompts, kept with their numbers: what is rare is counted later, at any threshold.

One row per completion, in the order of passes, prompts and completions, for any number of ranks: ranks share the prompts,
and their rows are gathered before the first one writes. Nothing of the algorithm's shaping or transformation is in the rewards.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from rlhf_core.analysis.tables import check_parquet, write_parquet
from rlhf_core.contract.options import Sampling
from rlhf_core.contract.providers import Evaluator
from rlhf_core.errors import UsageError, run_option
from rlhf_core.evaluator.heldout_samples import policy

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_core.contract.batch import Example, Rollouts
    from rlhf_core.contract.run_view import RunView

__all__ = ["HeldoutTable"]

LOGPROBS = frozenset({"logprobs_NT"})


@dataclass(frozen=True)
class HeldoutTable(Evaluator):
    """Sample held-out prompts many times and keep every reward and return: OUTPUT/heldout.parquet, for `rlhf-run frontier`.

    Zhao et al. 2025, section 4.3. Columns: pass, uid, k, prompt, completion, tokens, finish, reward, kl, return, logprob.
    The KL and the log-probability are at --sampling.temperature, before any truncation.
    """

    prompts: int = 0
    """maximum number of held-out prompts, taken from the first; 0 takes all"""
    n: int = 5
    """completions per prompt and pass"""
    passes: int = 1
    """number of passes over all prompts"""
    batch: int = 32
    """prompts sampled together; changes memory and speed, never results"""
    kl_coef: float = 0.0
    """coefficient of log p - log reference, which the return subtracts from the reward; 0 needs no reference"""
    always: bool = False
    """write the file at every evaluation, not only at the end of the run; the latest evaluation replaces the earlier
    ones"""
    name: str = "heldout.parquet"
    """name of the file in the run's folder"""

    @property
    def needs(self) -> frozenset[str]:
        """A reference only where it counts."""
        return frozenset({"ref_logprobs_NT"}) if self.kl_coef else frozenset()

    @property
    def writes(self) -> tuple[str, ...]:
        return (self.name,)

    def check(self) -> None:
        """Parquet can be written."""
        check_parquet()

    def __call__(self, run: RunView) -> dict[str, float]:
        """`heldout_table/reward`, `…/return` and `…/worst`, and how many `…/samples`; nothing before the end."""
        early = bool(run.plan.trained_roles) and run.step < run.config.steps and not self.always
        if early and run.step:
            return {}
        rows = run.heldout(self.prompts or None)
        fitting = [i for i in range(len(rows)) if run.encoder.fits_prompt(rows[i])]
        if not fitting:
            raise UsageError(f"every held-out prompt is too long; raise {run_option('max_prompt_tokens')}")
        if early:  # the rows were read at the run's start, so that their faults do not end it at its end
            return {}
        columns: dict[str, list[Any]] = {}
        for number in range(self.passes):
            for asked in self._shares(fitting, run.world.rank, run.world.size):
                found = self._columns(run, self._sample(run, rows, asked or fitting[:1], number), number)
                for name, values in found.items() if asked else ():
                    columns.setdefault(name, []).extend(values)
        gathered = run.world.gather(columns)
        merged = {name: [value for part in gathered for value in part.get(name, ())] for name in gathered[0]}
        order = sorted(range(len(merged["uid"])), key=lambda i: (merged["pass"][i], merged["uid"][i], merged["k"][i]))
        merged = {name: [values[i] for i in order] for name, values in merged.items()}
        if run.leader:
            write_parquet(run.output / self.name, merged)
        rewards, returns = ([value for value in merged[name] if value is not None] for name in ("reward", "return"))
        samples = {"heldout_table/samples": float(len(order))}
        if not rewards:  # the reward abstained from all
            return samples
        return {
            "heldout_table/reward": sum(rewards) / len(rewards),
            "heldout_table/return": sum(returns) / len(returns),
            "heldout_table/worst": min(rewards),
            **samples,
        }

    def _shares(self, fitting: list[int], rank: int, size: int) -> Iterator[list[int]]:
        """The prompts of a rank, batch by batch, as often on every rank since they infer together; the last may be none."""
        mine, most = fitting[rank::size], len(fitting[::size])
        for start in range(0, most, self.batch):
            yield mine[start : start + self.batch]

    def _sample(self, run: RunView, rows: Sequence[Example], asked: list[int], number: int) -> Rollouts:
        """Completions of the prompts `asked`; their seeds depend on the run's seed, the pass and the prompt alone."""
        seed = Sampling(seed=run.config.seed).seed_for(number, -1)
        sampling = replace(run.config.sampling, n=self.n, seed=seed)
        prompts = run.encoder.prompts([rows[i] for i in asked], asked)
        return run.rollouts(policy(run, "heldout_table"), prompts, sampling)

    def _columns(self, run: RunView, rollouts: Rollouts, number: int) -> dict[str, list[Any]]:
        """Return the columns that describe each completion."""
        rewards = run.reward_of(rollouts)
        rewards_N, answered = rewards.total_N, rewards.answered_N.tolist()
        now_NT = run.roles[policy(run, "heldout_table")].infer(rollouts, LOGPROBS)["logprobs_NT"].double()
        kl_N = rewards_N.new_zeros(len(rollouts))
        if self.kl_coef:
            kl_N = (now_NT - run.roles["reference"].infer(rollouts, LOGPROBS)["logprobs_NT"].double()).sum(1)
        return {
            "pass": [number] * len(rollouts),
            "uid": rollouts["uids_N"].tolist(),
            "k": [i % self.n for i in range(len(rollouts))],
            "prompt": list(rollouts.prompts),
            "completion": list(rollouts.texts),
            "tokens": rollouts.lengths_N.tolist(),
            "finish": list(rollouts.finish),
            "reward": _null_unless(answered, rewards_N),
            "kl": kl_N.tolist(),
            "return": _null_unless(answered, rewards_N - self.kl_coef * kl_N),
            "logprob": now_NT.sum(1).tolist(),
        }


def _null_unless(answered: Sequence[bool], values_N: Tensor) -> list[float | None]:
    """Return the values, None where the reward abstained."""
    return [value if known else None for value, known in zip(values_N.tolist(), answered, strict=True)]
