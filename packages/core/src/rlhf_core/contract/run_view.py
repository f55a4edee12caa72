"""The part of a run that its callees may use: evaluators, observers, and ingredients of recipes.

A `Run` has every member below. All others are private to core and may change. Nothing here changes a run, except
`samples` and the metrics that `log` adds to the step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from pathlib import Path

    from rlhf_core.contract.batch import Batch, Example, Prompts, Rollouts
    from rlhf_core.contract.distributed import World
    from rlhf_core.contract.episode import Feedback
    from rlhf_core.contract.options import RunConfig, Sampling
    from rlhf_core.contract.plan import Plan
    from rlhf_core.contract.results import Metric, RewardOutput
    from rlhf_core.contract.roles import Role

__all__ = ["RenderedPrompt", "RowEncoder", "RunView"]


class RenderedPrompt(Protocol):
    """A prompt as the policy reads it."""

    @property
    def text(self) -> str:
        """The text, rendered by the chat template where there is one."""
        ...

    @property
    def ids(self) -> list[int]:
        """Its token ids."""
        ...


class RowEncoder(Protocol):
    """The encoder of a run: from rows of data to token ids, with the tokenizer of the role that reads them."""

    tokenizer: Any
    """the Hugging Face tokenizer"""
    max_prompt_tokens: int
    """tokens of the longest prompt"""
    positions: int | None
    """tokens of prompt and completion that every role has positions for; None knows no limit"""

    def prompt_row(self, example: Example) -> RenderedPrompt:
        """Return the prompt of `example`, tokenized at full length."""
        ...

    def fits_prompt(self, example: Example) -> bool:
        """Return True if the row's prompt is within `--max-prompt-tokens`."""
        ...

    def fitting_prompts(self, examples: Sequence[Example], uids: Sequence[int]) -> Prompts:
        """Return the prompts that are within `--max-prompt-tokens`, maybe none; each is tokenized once."""
        ...

    def prompts(self, examples: Sequence[Example], uids: Sequence[int]) -> Prompts:
        """Return P prompts for a rollout engine. `uids` number the rows; seeds are derived from them."""
        ...

    def batch(self, examples: Sequence[Example], uids: Sequence[int]) -> Batch:
        """Return N rows with their completions for a role to read."""
        ...

    def feedback(self, example: Example, feedback: Feedback, turn_ids: Sequence[int]) -> list[int]:
        """Return the tokens of an environment's feedback to a turn of `example`'s episode, sampled as `turn_ids`."""
        ...


class RunView(Protocol):
    """The run that evaluators and observers see. Every member is for reading; on several ranks, each rank has its own view."""

    @property
    def config(self) -> RunConfig:
        """The resolved options and the chosen providers."""
        ...

    @property
    def plan(self) -> Plan:
        """The terms, sources, credits and roles that the configuration means."""
        ...

    @property
    def active_plan(self) -> Plan:
        """The part of `plan` that takes part in the step at hand; terms with a cadence rest in other steps."""
        ...

    @property
    def output(self) -> Path:
        """The folder of the run; only the leader writes into it."""
        ...

    @property
    def step(self) -> int:
        """The number of finished steps; 0 before the first one."""
        ...

    @property
    def world(self) -> World:
        """The ranks that run this same loop."""
        ...

    @property
    def leader(self) -> bool:
        """True in the one process that writes files and calls observers."""
        ...

    @property
    def roles(self) -> Mapping[str, Role]:
        """The placed roles by name: `run.roles["actor"].infer(batch, outputs)`. Every rank asks in the same order."""
        ...

    @property
    def encoder(self) -> RowEncoder:
        """The encoder of the role that reads the data."""
        ...

    @property
    def kl_coef(self) -> float:
        """The KL coefficient in force; 0 without a penalty."""
        ...

    @property
    def samples(self) -> Mapping[str, Batch]:
        """The credited batches of the last step by credit key (`Plan.credits`), this rank's rows."""
        ...

    @property
    def evaluations(self) -> Sequence[tuple[int, Mapping[str, float]]]:
        """(step, metrics) of every evaluation so far, those before a resume included."""
        ...

    @property
    def last_metrics(self) -> Mapping[str, float]:
        """The metrics of the last finished step; empty before the first one."""
        ...

    def rows(self, split: str) -> Iterable[Example]:
        """Return the rows of a split of the data (`train`, or `heldout`). Raises `DataError` naming file and row."""
        ...

    def measure(self) -> Mapping[str, float]:
        """Return the metrics of every evaluator that the configuration chose, as `eval/<name>`; collective over ranks."""
        ...

    def heldout(self, most: int | None = None) -> Sequence[Example]:
        """Return the held-out rows of the data, the first `most` of them. They may be fewer than ranks.

        Raises:
            UsageError: there are none.
        """
        ...

    def rollouts(self, source: str, prompts: Prompts, sampling: Sampling) -> Rollouts:
        """Return `sampling.n` completions of the role `source` per prompt; collective over ranks, some without prompts."""
        ...

    def reward_of(self, rollouts: Batch) -> RewardOutput:
        """Return what the run's reward gives to completions, checked against its contract.

        Raises:
            UsageError: the run has no reward.
            NotFiniteReward: a reward is not finite.
        """
        ...

    def log(self, metrics: Mapping[str, float | Metric]) -> None:
        """Add metrics to the step at hand.

        Numbers must be those of all ranks: sum with `world.total` first. A `Metric` is this rank's part of a mean. The ranks
        add up all of these in one reduction at the end of the step, so every rank logs them in the same order.
        """
        ...
