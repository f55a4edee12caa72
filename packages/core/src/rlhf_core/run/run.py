"""A run: the state around the loop. It opens what a plan needs, gives the loop its verbs, and leaves nothing behind.

from rlhf_core import Run, make_config

run = Run(make_config("grpo", model="tiny", reward="length", steps=20, output="runs/first"))
run.train()
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_core import loop
from rlhf_core.checkpoint import Checkpoints, check_metric, prepare_output
from rlhf_core.contract.batch import Batch, Example, Prompts, Rollouts
from rlhf_core.contract.options import RunConfig, Sampling
from rlhf_core.contract.plan import DATA
from rlhf_core.contract.results import RewardOutput
from rlhf_core.contract.roles import Placement, Role
from rlhf_core.errors import NotFiniteReward, UsageError
from rlhf_core.lazy import torch
from rlhf_core.models.loading.vocabulary import check_vocabularies
from rlhf_core.reward.output import to_reward_output, without_nan
from rlhf_core.run.data import RunData
from rlhf_core.run.failures import translate_failures
from rlhf_core.run.publishing import check_hub, publish
from rlhf_core.run.rollout_metrics import log_completions, log_rewards, measure_step
from rlhf_core.run.signals import StopSignals, exit_on_preemption
from rlhf_core.run.state import RunState
from rlhf_core.run.step_metrics import Meter
from rlhf_core.run.stopping import Stop
from rlhf_core.training.credit import check_rows, prepare_rows
from rlhf_core.training.dynamic_sampling import keep_sampling
from rlhf_core.training.kl import KLController
from rlhf_core.training.nonfinite import SKIP, keep_samples
from rlhf_core.training.planner import make_plan
from rlhf_core.training.reduction import Means
from rlhf_core.training.reference_cache import cache_frozen_roles
from rlhf_core.training.reward_shaping import RewardShaping
from rlhf_core.training.running_moments import Moments

if TYPE_CHECKING:
    from rlhf_core.contract.plan import Plan
    from rlhf_core.data.encoder import Encoder
    from rlhf_core.data.prefetch import Prefetcher
    from rlhf_core.data.stream import DrawnRows
    from rlhf_core.plugins.registry import Registry

__all__ = ["Run"]


class Run(Meter):
    """One training run, from its configuration to the files it leaves in `config.output`.

    Args:
        config: everything resolved; see `make_config` and `rlhf-run --help`.
        registry: where observers are found; all installed plugins if absent.

    Raises:
        UsageError: the configuration cannot work; nothing has been started or written.
    """

    def __init__(self, config: RunConfig, registry: Registry | None = None) -> None:
        from rlhf_core.plugins.registry import Registry

        self.config = config
        self.plan = make_plan(config)
        self.registry = registry or Registry()
        self.output = Path(config.output)
        self.state = RunState(KLController(self.plan.kl) if self.plan.kl is not None else None)
        self.data = RunData(self.plan)
        self.checkpoints = Checkpoints(config)
        self.samples: dict[str, Batch] = {}
        """the credited batches of the last step"""
        self.observers: list[Any] = []
        """what the chosen observers watch with, while the run is open, in the first process"""
        self.placed: Placement | None = None
        self._scored: dict[str, RewardOutput] = {}
        self._unscored = False
        """whether this rank has completions of this step without a finite reward"""
        super().__init__()
        self.signals = StopSignals()
        self.stop = Stop()

    # ------------------------------------------------------------------------------------------------------------------
    # the life of a run

    def train(self) -> dict[str, float]:
        """Train to the last step, evaluate, save and export; returns the last step's metrics."""
        with translate_failures(self), exit_on_preemption(), self.opened():
            if self.step == 0:
                self.evaluate()
            with self.signals:
                loop.train(self)
                self.save()  # before evaluating: what was trained is safe, however that ends
                self._add_background(self.checkpoints.background.wait)
            self.stop.check(self.signals, self.world, f"step {self.step} of {self.config.steps}", self.output)
            if not self.evaluations or self.evaluations[-1][0] != self.step:
                self.evaluate()
                if self.leader:
                    self.checkpoints.rotate(self.evaluations)  # the last one may turn out to be the best
            self.export()
        return self.last_metrics

    @contextmanager
    def opened(self) -> Iterator[Run]:
        """Roles placed, checkpoint restored, observers told; everything closed at the end, whatever happens."""
        self.check()
        check_rows(self.plan, self.data.rows)  # reads the data's beginning: said before anything is written
        prepare_output(self.config)
        torch.manual_seed(self.config.seed)
        self.placed = self.config.providers["launcher"](self.plan)
        cache_frozen_roles(self.placed, self.plan)
        error: BaseException | None = None
        watched = ExitStack()
        try:
            if self.config.resume:
                self.restore()
            if self.leader:
                chosen = self.config.providers.get("observer", ())
                self.observers = [observer(self) for observer in chosen]
                watched.enter_context(self.registry.with_observers(self.observers, chosen))
                self.registry.hook.rlhf_run_start(run=self)
            yield self
        except BaseException as caught:
            error = caught
            raise
        finally:
            self._end_saving(error)
            with watched:
                if self.leader:
                    self.registry.hook.rlhf_run_end(run=self, error=error)
            reward = self.config.providers.get("reward")
            if reward is not None and hasattr(reward, "close"):
                reward.close()
            if "stream" in self.__dict__:
                self.stream.close()
            self.placed.close()

    def _end_saving(self, error: BaseException | None) -> None:
        """Let a checkpoint that is being written beside the loop be finished, but where a second signal stops at once."""
        if error is not None and not isinstance(error, Exception):
            return
        try:
            self.checkpoints.background.wait()
        except Exception as failed:
            if error is None:
                raise
            print(f"rlhf-run: the checkpoint that was being written failed too: {failed}", file=sys.stderr)

    def check(self) -> None:
        """Let every provider say what it misses, before anything heavy starts."""
        for chosen in self.config.providers.values():
            for provider in chosen if isinstance(chosen, tuple) else (chosen,):
                if hasattr(provider, "check"):
                    provider.check()
        check_vocabularies(self.plan)
        check_hub(self.config)

    def steps(self) -> Iterator[int]:
        """The numbers of the remaining steps, from 1; ends early when an observer asked for it."""
        while self.step < self.config.steps and not self.stop:
            self._started = time.perf_counter()
            yield self.step + 1

    def finish(self, step: int, credited: Mapping[str, Batch]) -> None:
        """Close a step: count it, measure, tell observers, and save if it is time."""
        self.state.step, self.state.stream = step, self.stream.state_dict()
        self.samples = dict(credited)
        self._add_background(self.checkpoints.background.poll)
        tokens = sum(float((b.prompt_lengths_N + b.lengths_N).sum()) for b in credited.values())
        self.log(measure_step(self.world_sum(tokens), time.perf_counter() - self._started) | self.stream.metrics())
        metrics = self._metrics.reduce(None)
        self._metrics = Means()  # of the next step: time/checkpoint there is that of the save below
        if self.config.eval_every and step % self.config.eval_every == 0:
            metrics |= self.evaluate()
        self.state.last_metrics = {"step": step, **metrics}
        evaluated = self.evaluations[-1][1] if self.evaluations else ()
        check_metric(self.config.keep_best, self.plan.trained_roles, metrics, evaluated)
        said = self.registry.hook.rlhf_step_end(run=self, step=step, metrics=self.last_metrics) if self.leader else []
        self.stop.agree(said, self.signals, self.world)
        if self.config.save_every and step % self.config.save_every == 0:
            self.save()

    # ------------------------------------------------------------------------------------------------------------------
    # the loop's verbs

    def next_rows(self) -> DrawnRows:
        """This step's rows of data, made ready while the step before was at work."""
        with self.phase("data"):
            return next(self.stream)

    def read(self, rows: DrawnRows) -> Batch:
        """Rows of data as a batch."""
        with self.phase("data"):
            batch = replace(self.encoder.batch(*rows), world=self.world, scalars=self._scalars())
            return prepare_rows(self.plan, batch)

    def sample(self, source: str, rows: DrawnRows) -> Rollouts:
        """Completions of `source` on the prompts of `rows`, or of fresh ones where `DynamicSampling` replaces some."""
        dynamic = getattr(self.config.algorithm, "dynamic", None)
        if dynamic is None or dynamic.keep == "all":
            return self.sample_once(source, rows)
        rollouts, self._scored[source] = keep_sampling(self, source, rows, dynamic)
        return rollouts

    def sample_once(self, source: str, rows: DrawnRows) -> Rollouts:
        """Completions of `source` on the prompts of `rows`."""
        with self.phase("rollout"):
            prompts = self.encoder.prompts(*rows)
            seed = Sampling(seed=self.config.seed).seed_for(self.step, self.plan.sources.index(source))
            rollouts = self.rollouts(source, prompts, replace(self.config.sampling, seed=seed))
        exact = getattr(self.config.providers["rollout"], "exact", False) and self.config.sampling.temperature > 0
        narrow = self.plan.roles[source].options.dtype != "float32"  # rounds token by token otherwise than in one pass
        if exact and not narrow and "kept_mass" not in rollouts.scalars:
            rollouts.extras["old_logprobs_NT"] = rollouts["sampler_logprobs_NT"]
        self._metrics.add_sum("samples", self.world_sum(len(rollouts)))
        log_completions(self, source, rollouts)
        return replace(rollouts, world=self.world, scalars=rollouts.scalars | self._scalars())

    def rollouts(self, source: str, prompts: Prompts, sampling: Sampling) -> Rollouts:
        """Completions of the role `source`; also for evaluators."""
        assert self.placed is not None and self.placed.rollout is not None, "only online runs sample"
        return self.placed.rollout(self.roles[source], prompts, sampling)

    def score(self, source: str, rollouts: Batch) -> RewardOutput:
        """Rewards of completions, checked and shaped; logged for the policy."""
        with self.phase("reward"):
            rewards = self._scored.pop(source, None) or self.judge(rollouts)
        if self.config.on_nonfinite == "skip" and self.world_sum(float(self._unscored)):
            self._unscored = False
            rollouts.scalars[SKIP] = 1.0  # by every rank
            return rewards
        prefix = "reward" if source == self.plan.sources[0] else f"{source}/reward"
        shaping = getattr(self.config.algorithm, "shaping", None)
        if shaping not in (None, RewardShaping()):
            self.log_batch(f"{prefix}/unshaped", rewards.total_N)
            rewards = shaping(
                rewards, rollouts, self.config.sampling.max_new_tokens, self.state.moments.setdefault(source, Moments())
            )
        log_rewards(self, prefix, rewards, rollouts)
        rollouts.extras["rewards_N"] = rewards.rewards_N
        return rewards

    def judge(self, rollouts: Batch) -> RewardOutput:
        """The reward of completions that will be trained on: of those that have none, it can be noted and the step skipped."""
        raw = self._reward(rollouts)
        try:
            return to_reward_output(raw, rollouts, self._reward)
        except NotFiniteReward as error:
            if self.config.on_nonfinite == "stop":
                raise
            path = keep_samples(self.output, self.step + 1, error)
            print(
                f"rlhf-run: step {self.step + 1} is skipped: {error}; all such samples are in {path}", file=sys.stderr
            )
            self._unscored = True
            return to_reward_output(without_nan(raw), rollouts, self._reward)

    def reward_of(self, rollouts: Batch) -> RewardOutput:
        """The reward provider's answer, checked against its contract."""
        return to_reward_output(self._reward(rollouts), rollouts, self._reward)

    @property
    def _reward(self) -> Any:
        """The reward provider."""
        reward = self.config.providers.get("reward")
        if reward is None:
            raise UsageError("an evaluator asks for rewards, but none was chosen; pass --reward NAME")
        return reward

    def watch_kl(self, batches: Mapping[str, Batch]) -> None:
        """Log the KL to the reference and let an adaptive coefficient follow it."""
        if self.state.kl is not None:
            for batch in batches.values():
                self.log(self.state.kl.watch(batch, self.world.total))

    def sync(self) -> None:
        """Let the rollout engine take the new weights."""
        assert self.placed is not None
        if self.placed.rollout is not None:
            for name in self.plan.sources:
                if name != DATA and self.plan.roles[name].trained:
                    self.log(self.placed.rollout.sync(self.roles[name]) or {})

    def evaluate(self) -> dict[str, float]:
        """Every chosen evaluator's metrics, as `eval/<name>`."""
        metrics: dict[str, float] = {}
        for evaluator in self.config.providers.get("evaluator", ()):
            metrics |= {f"eval/{name}": value for name, value in evaluator(self).items()}
        if metrics:
            self.state.evaluations.append((self.step, metrics))
        return metrics

    def save(self) -> None:
        """Write a checkpoint of this step, if there is none yet."""
        trained = {name: self.roles[name] for name in self.plan.trained_roles}
        self.state.versions = {name: role.version for name, role in trained.items()}
        self.state.stream = self.state.stream or self.stream.state_dict()
        self._add_background(lambda: self.checkpoints.save(self.state.state_dict(), trained, self.world))

    def restore(self) -> None:
        """Continue from the newest valid checkpoint; from the start if none was written.

        Raises:
            UsageError: there are checkpoints, but each is damaged, or another strategy wrote them.
        """
        trained = {name: self.roles[name] for name in self.plan.trained_roles}
        state = self.checkpoints.restore(trained, self.world)
        if state is None:
            return
        self.state.load_state_dict(state)
        for name, role in trained.items():
            role.version = self.state.versions[name]
        self.stream.load_state_dict(self.state.stream)
        self.sync()

    def _add_background(self, finished: Callable[[], float]) -> None:
        """Count the seconds of a background save that is over. Raises what it raised."""
        with self.phase("checkpoint"):
            seconds = finished()
        if seconds:
            self.add_seconds("checkpoint_background", seconds)

    def export(self) -> None:
        """Write the trained policy as a Hugging Face folder, OUTPUT/model."""
        self.roles[self.plan.trained_roles[0]].export(str(self.output / "model"))
        if self.leader:
            publish(self)

    def _scalars(self) -> dict[str, float]:
        return {"progress": self.step / max(1, self.config.steps), "kl_coef": self.kl_coef, "step": self.step + 1}

    # ------------------------------------------------------------------------------------------------------------------
    # what the run holds

    @property
    def active_plan(self) -> Plan:
        """The part of the plan that the step at hand is about."""
        return self.plan.for_step(self.step + 1)

    @property
    def step(self) -> int:
        """The number of finished steps."""
        return self.state.step

    @property
    def evaluations(self) -> list[tuple[int, dict[str, float]]]:
        """(step, metrics) of every evaluation."""
        return self.state.evaluations

    @property
    def last_metrics(self) -> dict[str, float]:
        """The metrics of the last finished step."""
        return self.state.last_metrics

    @property
    def roles(self) -> Mapping[str, Role]:
        """The placed roles by name."""
        assert self.placed is not None, "roles exist while the run is open"
        return self.placed.roles

    @property
    def world(self) -> Any:
        """The ranks that run this same loop."""
        assert self.placed is not None
        return self.placed.world

    @property
    def leader(self) -> bool:
        """Whether this process is the one that tells observers and writes files."""
        return bool(self.world.rank == 0)

    @property
    def kl_coef(self) -> float:
        """The KL coefficient in force; 0 without a penalty."""
        return self.state.kl_coef

    @property
    def encoder(self) -> Encoder:
        """The encoder of the role that reads the data."""
        return self.data.encoder

    @cached_property
    def stream(self) -> Prefetcher:
        """This rank's rows, shuffled by the seed, at the position of the run."""
        return self.data.stream(self.world)

    def heldout(self, most: int | None = None) -> Sequence[Example]:
        """Return the held-out rows of the data, the first `most` of them; at least one for each rank."""
        return self.data.heldout(most, self.world)
