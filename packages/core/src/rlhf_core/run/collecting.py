"""The iterations of a run: each collected in turn, or by a thread that samples ahead of training (`--ahead`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from rlhf_core.asynchronous.gate import EngineGate, NotDue
from rlhf_core.asynchronous.queue import IterationQueue
from rlhf_core.asynchronous.schedule import FILE, describe_batches, read_schedule
from rlhf_core.asynchronous.supply import AheadSupply, InTurn
from rlhf_core.contract.staleness import check_staleness, largest_age, usable_ahead
from rlhf_core.data.shuffling import SHUFFLED
from rlhf_core.errors import OptionError, UsageError, run_option
from rlhf_core.run.iteration import Iteration
from rlhf_core.run.partial_sampling import PartialSampling
from rlhf_core.training.dynamic_sampling import choose_filter
from rlhf_core.training.joining import join_sources
from rlhf_core.training.old_logprobs import oldest_age
from rlhf_core.util.clock import current_time
from rlhf_core.util.jsonl import append_line, cut_lines
from rlhf_core.util.messages import log

if TYPE_CHECKING:
    from rlhf_core.contract.options import RunConfig
    from rlhf_core.contract.plan import Plan
    from rlhf_core.run.run import Run

__all__ = ["Collecting", "check_ahead"]

REPLAY_SECONDS = 3600.0
"""Deadline for a replayed call to become due."""
CLOSE_SECONDS = 60.0
"""Deadline for the call in progress when a run ends early."""
COLLECTING = ("environment", "filter", "reward", "rollout", "sampler")
"""Engines that collecting changes; a checkpoint holds their states as of the last iteration that was trained on."""


def check_ahead(plan: Plan) -> None:
    """Check that this run can sample ahead, if it is asked to.

    Raises:
        UsageError: it samples nothing, its engine samples from the trained weights themselves, or options do not fit.
    """
    config = plan.config
    check_staleness(config)
    if not config.ahead:
        return
    if not plan.online:
        raise OptionError("/ahead", "applies to sampling, but this algorithm does not sample; leave it out")
    launcher, engine = config.providers["launcher"], config.providers["rollout"]
    if not (launcher.engines_apart or engine.has_own_weights):
        raise OptionError(
            "/ahead",
            f"is not possible: the rollout engine {config.names.get('rollout', '')!r} samples from the weights that are "
            f"trained; leave out {run_option('ahead')}, or pass {run_option('launcher', 'ray')}, which gives the engine a "
            "separate copy",
        )
    if config.partial.midway:
        _check_midway(config)
    if config.stale.policy == "drop" and choose_filter(config) is not None:
        raise OptionError(
            "/stale.policy",
            "drop samples the same prompts again, but a filter replaces prompts; choose wait or mask, or leave out "
            "the filter",
        )
    if config.partial.tokens:
        _check_rows(plan)
    read_schedule(config.replay)


def _check_midway(config: RunConfig) -> None:
    """Check that weights can reach an engine in the middle of a call, and that it takes them there."""
    launcher, engine = config.providers["launcher"], config.providers["rollout"]
    reached = launcher.brings_weights_midway or not launcher.engines_apart
    if reached and engine.takes_weights_midway:
        return
    where = f"under {run_option('launcher', config.names.get('launcher', ''))}"
    who = f"of kind {config.names.get('rollout', '')!r} with these options" if reached else where
    raise OptionError(
        "/partial.midway",
        f"is not supported by rollout engines {who}, which take weights between two calls; leave it out",
    )


def _check_rows(plan: Plan) -> None:
    """Check that the rows of a step may be trained on in another one, as partial rollouts need it."""
    config = plan.config
    reacts = config.providers.get("sampler", SHUFFLED).reacts
    reasons = {
        f"cannot follow the prompts that a filter replaces; leave out {run_option('filter')}": choose_filter(config)
        is not None,
        f"supports only one sampled role, but this algorithm samples {', '.join(plan.sources)}; leave it out": len(
            plan.sources
        )
        > 1,
        f"changes the order of scores; leave out {run_option('sampler')}": reacts,
    }
    for reason, holds in reasons.items():
        if holds:
            raise OptionError("/partial.tokens", reason)


class Collecting:
    """Collect a run's iterations, and guard its rollout engines.

    Args:
        run: the open run.
        collect: gives each source of an iteration its batch; the loop's.
    """

    def __init__(self, run: Run, collect: Callable[[Iteration], None]) -> None:
        self.run, self.ahead = run, usable_ahead(run.config)
        self._fill = collect
        self._moments = run.state.moments
        """running moments of rewards after the last iteration that was collected"""
        self._current: Iteration | None = None
        self.gate = EngineGate(run.step)
        self.schedule = read_schedule(run.config.replay)
        self.schedule.begin_after(run.step)
        self.collected: dict[str, Any] = {}
        """states of the engines of `COLLECTING`, as of the last finished step"""
        self.partial: PartialSampling | None = None
        """groups in progress, where completions can continue in a later iteration"""
        self.last_call = run.step
        """steps that had been trained at the last call of the rollout engines for an iteration"""
        if not self.ahead:
            self.supply: InTurn[Iteration] | AheadSupply[Iteration] = InTurn(self._collect, run.step)
            return
        if run.world.size > 1:
            raise UsageError(
                f"{run_option('ahead')} needs a training loop in one process, but there are {run.world.size}; pass "
                f"{run_option('launcher', 'ray')}"
            )
        if run.leader:
            cut_lines(run.output / FILE, lambda step: step <= run.step)
            _announce(run)
        queue = IterationQueue(self.ahead, run.config.steps, run.step)
        if run.config.partial.tokens:
            self.partial = PartialSampling(run, self)
        self.supply = AheadSupply(
            self._collect,
            queue,
            self.gate.changed,
            lambda step: self.schedule.may_begin(step, self.gate.trained),
            take_seconds=REPLAY_SECONDS if run.config.replay else float("inf"),
            close_seconds=run.config.stop_within or CLOSE_SECONDS,
        )

    def take(self) -> Iteration:
        """Return the next iteration, collected. An error in `collect` is raised here, at the iteration that had it."""
        try:
            iteration = self.supply.take()
        except NotDue:
            raise self._cannot_follow() from None
        except BaseException:
            if self._current is not None:
                self.run.meter.doing = self._current.meter.doing  # the phase that failed
            raise
        if isinstance(self.supply, AheadSupply):
            self.run.meter.add_seconds("wait", self.supply.waited_seconds)
            if self.run.config.stale.policy == "drop":
                iteration = self._without_stale(iteration)
            iteration.trained_versions = {name: role.version for name, role in self.run.roles.items()}
        return iteration

    def pause(self) -> AbstractContextManager[None]:
        """While it is open, nothing is collected: neither rewards nor engines are called by two threads."""
        return self.supply.pause()

    @contextmanager
    def sampling(self, trained: bool) -> Iterator[None]:
        """Hold the rollout engines for a call; `trained` if its completions are for an iteration."""
        current = self._current
        if not (trained and self.ahead and current is not None):
            with self.gate.sampling():
                yield
            return
        try:
            with self.gate.sampling(partial(self._may_call, current), REPLAY_SECONDS) as after:
                if not current.sampled_again:
                    self.schedule.add_call(current.step)
                    current.sampled_after.append(after)
                self.last_call = after
                yield
        except NotDue:
            raise self._cannot_follow() from None

    @contextmanager
    def bringing_weights(self, step: int) -> Iterator[None]:
        """Hold the rollout engines while they take the weights after `step`.

        The call in progress ends before, unless weights may arrive midway.
        """
        began, midway = current_time(), self.run.config.partial.midway
        try:
            with self.gate.weights(step, lambda: self.schedule.may_bring(step), REPLAY_SECONDS, midway):
                if self.ahead:
                    self.run.meter.add_seconds("wait", current_time() - began)
                yield
        except NotDue:
            raise self._cannot_follow() from None

    def finish(self, iteration: Iteration) -> None:
        """Take over what belongs to the checkpoint of a step that was trained on, and record which weights sampled it."""
        self.collected = iteration.engine_states
        if self.ahead and self.run.leader:
            row = {"step": iteration.step, "after": iteration.sampled_after}
            append_line(self.run.output / FILE, row | describe_batches(iteration.batches, iteration.trained_versions))

    def close(self) -> None:
        """Collect no more."""
        self.supply.close()

    def _may_call(self, iteration: Iteration) -> bool:
        """Return True if a call of `iteration` is due."""
        return iteration.sampled_again or self.schedule.may_call(self.gate.trained)

    def _cannot_follow(self) -> UsageError:
        """Return the error of a replay whose weights do not come."""
        step = self.run.step + 1 if self._current is None else max(self.run.step + 1, self._current.step)
        return UsageError(
            f"{run_option('replay', self.run.config.replay)} cannot be followed: step {step} waits for weights that "
            "never arrive; use the options of the run that wrote the file"
        )

    def _collect(self, step: int) -> Iteration:
        """Return the iteration of `step`, collected."""
        run = self.run
        moments = self._moments if self.ahead else run.state.moments
        iteration = self._current = Iteration(run, step, run.kl_coef, moments)
        if isinstance(self.supply, AheadSupply):
            iteration.meter.add_seconds("sampler_wait", self.supply.idle_seconds)
        iteration.partial = self.partial
        run.recorder.begin(iteration)
        iteration.begin()
        self._fill(iteration)
        iteration.batches |= join_sources(iteration.plan, iteration.batches)
        run.recorder.note(iteration)
        if self.ahead:
            self._moments = iteration.moments
            iteration.position = run.stream.with_ahead(iteration.position)
            iteration.engine_states = {
                place: state
                for root in COLLECTING
                if run.engines.stateful(root)
                for place, state in run.engines.state_dict(root, clone=True).items()
            }
        return iteration

    def _without_stale(self, iteration: Iteration) -> Iteration:
        """Return the iteration, collected again on the same rows if one of its tokens is too old to be trained on."""
        run, most = self.run, largest_age(self.run.config)
        ages = [
            oldest_age(batch, run.roles[name].version) for name, batch in iteration.batches.items() if name in run.roles
        ]
        too_old = max(ages, default=0.0) > most
        if too_old:
            with self.supply.pause():
                again = self._current = iteration.again()
                self._fill(again)
                again.batches |= join_sources(again.plan, again.batches)
            iteration = again
        run.log({"rollout/dropped": float(too_old)})
        return iteration


def _announce(run: Run) -> None:
    """Log once what sampling ahead means for the numbers of this run."""
    config, steps = run.config, usable_ahead(run.config)
    told = f"sampling runs up to {steps} steps ahead of training; tokens are at most {largest_age(config)} updates old"
    if run.plan.proximal:
        how = "; truncated importance weights correct for this, and {} switches them off"
        told += how.format(run_option("stale.correct", "off"))
    else:
        told += "; without importance weights, since ratios use the weights that sampled"
    log.info(config.option_names.render(told))
