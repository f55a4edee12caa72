"""Partial rollouts: a run's groups in progress over several iterations (`--partial.tokens`, `--partial.surplus`).

An iteration samples slice by slice until it has --batch-size complete groups. The others continue in the next iteration. A
checkpoint holds the position of the data before the oldest group that is not trained on, and the uids after it that are: a
resumed run draws the same rows again, leaves these out, and begins the others anew.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rlhf_core.asynchronous.pool import GroupPool
from rlhf_core.contract.staleness import largest_age, updates_per_iteration
from rlhf_core.rollout.slices import PartialCompletion, PartialGroup, add_slice, join_groups, next_slice
from rlhf_core.util.clock import current_time

if TYPE_CHECKING:
    from rlhf_core.contract.batch import Prompts, Rollouts
    from rlhf_core.contract.options import Sampling
    from rlhf_core.data.stream import DrawnRows
    from rlhf_core.run.collecting import Collecting
    from rlhf_core.run.iteration import Iteration
    from rlhf_core.run.run import Run

__all__ = ["DONE", "PartialSampling"]

DONE = "trained_uids"
"""Key in a position of the data: uids after it that have been trained on."""


class PartialSampling:
    """The groups in progress of an open run.

    Args:
        run: the run.
        collecting: identifies the weights that sample.
    """

    def __init__(self, run: Run, collecting: Collecting) -> None:
        config = run.config
        self.run, self.collecting, self.options = run, collecting, config.partial
        self.pool: GroupPool[PartialGroup] = GroupPool(
            config.batch_size, config.partial.surplus, largest_age(config) // updates_per_iteration(config)
        )
        self._reserve: deque[PartialGroup] = deque()
        """groups that are drawn and not begun"""
        self._skip = set(run.state.stream.get(DONE, ()))
        """uids that a resumed run draws again and has trained on"""
        self._batches: deque[tuple[Mapping[str, Any], set[int]]] = deque()
        """(position of the data before it, its uids) of each batch that was drawn and is not wholly trained on"""
        self._trained: set[int] = set(self._skip)
        self._position: Mapping[str, Any] = run.stream.state_dict()
        self._like: Rollouts | None = None
        """last result of the engine"""

    def sample(self, iteration: Iteration, source: str, sampling: Sampling) -> Rollouts:
        """Return the complete groups that `iteration` trains on; it draws rows where others are wanted."""
        self._fill(iteration)
        began = current_time()
        while not self.pool.enough(iteration.step, few=self._is_late(began)):
            self._like = self._sample_slice(source, sampling)
            iteration.meter.add_sum("rollout/slices", 1.0)
        taken = self.pool.take(iteration.step)
        iteration.meter.log({"rollout/carried": float(sum(group.begun is not None for group in self.pool.groups))})
        self._trained |= {group.uid for group in taken}
        iteration.position = self._saved_position()
        assert self._like is not None, "complete groups were sampled"
        return join_groups(taken, self.run.roles[source].tokenizer, self._like)

    def _is_late(self, began: float) -> bool:
        """Return True if the iteration has had its time."""
        return bool(self.options.seconds) and current_time() - began >= self.options.seconds

    def _sample_slice(self, source: str, sampling: Sampling) -> Rollouts:
        """Continue every completion in progress for a slice."""
        groups = self.pool.groups
        prompts, going = next_slice(groups, sampling.max_new_tokens, self.options.tokens)
        asked = replace(sampling, n=1, max_new_tokens=max(prompts.limits))
        sampled = self.run.rollouts(source, prompts, asked, trained=True)
        for group in groups:
            if group.begun is None:
                group.begun = self.collecting.last_call
        add_slice(going, prompts.limits, sampled, sampling.max_new_tokens)
        return sampled

    def _fill(self, iteration: Iteration) -> None:
        """Put groups in progress until there are enough, and draw rows for them."""
        while self.pool.lacking:
            while not self._reserve:
                self._add(iteration.draw(), iteration.position)
            self.pool.groups.append(self._reserve.popleft())

    def _add(self, rows: DrawnRows, after: Mapping[str, Any]) -> None:
        """Keep the groups of drawn rows, but for those that were trained on before a resume."""
        prompts = self.run.encoder.prompts(*rows)
        self._batches.append((self._position, set(prompts.uids)))
        self._position = after
        for i, uid in enumerate(prompts.uids):
            if uid in self._skip:
                self._skip.discard(uid)
            else:
                self._reserve.append(_new_group(prompts.rows([i]), self.run.config.sampling.n))

    def _saved_position(self) -> Mapping[str, Any]:
        """Return the position before the oldest batch that is not wholly trained on, with the uids after it that are."""
        while self._batches and self._batches[0][1] <= self._trained:
            self._trained -= self._batches.popleft()[1]
        before = self._batches[0][0] if self._batches else self._position
        drawn = set[int]().union(*(uids for _, uids in self._batches))
        return {**before, DONE: sorted(self._trained & drawn | self._skip)}


def _new_group(prompt: Prompts, completions: int) -> PartialGroup:
    return PartialGroup(prompt, [PartialCompletion(k) for k in range(completions)])
