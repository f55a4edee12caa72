"""A run: the state around the loop. It opens what a plan needs, gives the loop its verbs, and leaves nothing behind.

from rlhf_core import Run, make_config

run = Run(make_config("grpo", model="tiny", reward="length", steps=20, output="runs/first"))
run.train()
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rlhf_core import loop
from rlhf_core.checkpoint import Checkpoints, OutputFolder, check_metric
from rlhf_core.contract.batch import Batch, Example, Prompts, Rollouts
from rlhf_core.contract.engines import Engines
from rlhf_core.contract.options import RunConfig, Sampling
from rlhf_core.contract.results import Metric, RewardOutput
from rlhf_core.contract.roles import Placement, Role
from rlhf_core.errors import UsageError, options_under, run_option, spell_options
from rlhf_core.reward.output import to_reward_output
from rlhf_core.rollout.episodes import complete
from rlhf_core.run import lifetime
from rlhf_core.run.batch_watch import check_ages, watch_batches
from rlhf_core.run.collecting import Collecting
from rlhf_core.run.data import RunData
from rlhf_core.run.failures import translate_failures
from rlhf_core.run.lives import Lives
from rlhf_core.run.observing import Observers
from rlhf_core.run.polite_stop import Rest, end_in_time, give_up_in_time
from rlhf_core.run.publishing import BEST, export_best, publish
from rlhf_core.run.recording import Recorder
from rlhf_core.run.result import RunResult
from rlhf_core.run.reward_inputs import reward_precision, with_reward_needs
from rlhf_core.run.rollout_metrics import add_measured, measure_step, trained_tokens
from rlhf_core.run.signals import StopSignals
from rlhf_core.run.state import RunState
from rlhf_core.run.stopping import Stop
from rlhf_core.training.dynamic_sampling import choose_filter
from rlhf_core.training.kl import KLController
from rlhf_core.training.planner import make_plan
from rlhf_core.training.step_metrics import Meter
from rlhf_core.training.tracking import follow_roles, steps_behind
from rlhf_core.util.clock import current_time
from rlhf_core.util.messages import install_console, progress

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from rlhf_core.contract.distributed import World
    from rlhf_core.contract.plan import Plan
    from rlhf_core.data.encoder import Encoder
    from rlhf_core.data.prefetch import Prefetcher
    from rlhf_core.plugins.registry import Registry
    from rlhf_core.run.iteration import Iteration

__all__ = ["Run"]

T = TypeVar("T")


class Run:
    """One training run, from its configuration to the files it leaves in `config.output`.

    Args:
        config: everything resolved; see `make_config` and `rlhf-run --help`.
        registry: the plugins that are searched for observers; all installed ones if absent.

    Raises:
        UsageError: the configuration cannot work; nothing has been started or written.
    """

    def __init__(self, config: RunConfig, registry: Registry | None = None) -> None:
        from rlhf_core.plugins.registry import Registry

        install_console()
        self.registry = registry or Registry()
        self.output = Path(config.output)
        self.signals = StopSignals(config.stop_within)
        self.placed: Placement | None = None
        self.lives = Lives(self)
        self.begin_again(config)

    def begin_again(self, config: RunConfig) -> None:
        """Be a run of `config` that is not open."""
        self.configure(config)
        self.observers = Observers(self.registry)
        self.stop = Stop()
        self.recorder = Recorder(self)
        self.meter = Meter()
        """the metrics of the step at hand, from credit on; what was collected for it is in its iteration"""
        self.samples: dict[str, Batch] = {}
        """the credited batches of the last step"""
        self.collecting: Collecting | None = None
        """source of iterations, once the loop asks for them"""
        self._last_end = 0.0
        self.__dict__.pop("stream", None)

    def configure(self, config: RunConfig) -> None:
        """Work out the plan of `config`, and hold what follows from it; the run is not open."""
        self.config = config
        with spell_options(config.option_names):
            self.plan = make_plan(config)
        self.state = RunState(KLController(self.plan.kl) if self.plan.kl is not None else None)
        self.engines = Engines(config.seed, self.output, self.plan)
        """engines that the providers have opened, while the run is open"""
        self.data = RunData(self.plan, self.engines)
        self.folder = OutputFolder(config, ["model", *self.plan.exports, *([BEST] if config.keep_best else [])])
        """`output`, locked while the run is open"""
        self.checkpoints = Checkpoints(config)

    # ------------------------------------------------------------------------------------------------------------------
    # the life of a run

    def train(self) -> RunResult:
        """Train to the last step, evaluate, save and export; return the numbers and files that are left."""
        with spell_options(self.config.option_names), translate_failures(self), end_in_time(self):
            return self.lives.live(self._train)

    def _train(self) -> RunResult:
        with self.open():
            if self.step == 0:
                self.evaluate()
            with give_up_in_time(self):
                loop.train(self)
                self.signals.watch.restart()
                self.save()  # before evaluating: what was trained is safe, however that ends
                self._add_background(self.checkpoints.background.wait)
            self.stop.check(self.signals, self.world, self.step, self.config)
            if not self.evaluations or self.evaluations[-1][0] != self.step:
                self.evaluate()
                if self.leader:
                    self.checkpoints.rotate(self.evaluations)  # the last one may turn out to be the best
            self.export()
        return RunResult(self.last_metrics, tuple(self.evaluations), self.output, self.plan.exports)

    def check(self) -> None:
        """Let every provider report what it misses, before anything heavy starts."""
        lifetime.check(self.plan)

    def open(self) -> AbstractContextManager[Run]:
        """Place roles, restore a checkpoint and call observers; close everything at the end, whatever happens."""
        return lifetime.open_run(self)

    def place(self) -> AbstractContextManager[Run]:
        """Open providers and place roles, and free them at the end; for a run that is not trained, so no file is written."""
        return lifetime.open_untrained(self)

    # ------------------------------------------------------------------------------------------------------------------
    # the loop's verbs

    def iterations(self, collect: Callable[[Iteration], None]) -> Iterator[Iteration]:
        """Yield the remaining iterations, each collected; end early when a signal came or an observer asks for it.

        An error in `collect` is raised here, at the iteration that had it.
        """
        self.collecting = Collecting(self, collect)
        while self.step < self.config.steps and not self.stop:
            self.rest = Rest.take(self)
            iteration = self.collecting.take()
            for source, rewards in iteration.rewards.items():
                self.notify("rlhf_rollouts_ready", source=source, rollouts=iteration.batches[source], rewards=rewards)
            yield iteration

    def watch(self, batches: Mapping[str, Batch]) -> None:
        """Log the age of sampled batches and the KL to the reference, which an adaptive coefficient follows after the step."""
        watch_batches(self, batches)

    def sync(self) -> None:
        """Let tracking roles follow those that were trained, then let the rollout engine take the new weights."""
        moved = follow_roles(self.plan, self.roles)
        self.log({f"staleness/{name}": float(steps) for name, steps in steps_behind(self.plan, self.roles).items()})
        with self.collecting.bringing_weights(self.step + 1) if self.collecting is not None else nullcontext():
            self.sync_engine({*self.plan.trained_roles, *moved})

    def sync_engine(self, changed: Collection[str]) -> None:
        """Let the rollout engine take the weights of those roles that it samples."""
        if "rollout" in self.engines:
            for name in self.plan.sources:
                if name in changed:
                    with options_under("/rollout"):
                        self.log(self.engines["rollout"].sync(self.roles[name]) or {})

    def finish(self, iteration: Iteration, credited: Mapping[str, Batch]) -> None:
        """Close a step: take over the state of its iteration, measure, call observers, and save if it is time."""
        step = iteration.step
        if self.leader:
            self.folder.lock.check()
        self.state.step, self.state.stream, self.state.moments = step, dict(iteration.position), iteration.moments
        if self.collecting is not None:
            self.collecting.finish(iteration)
        self.samples = {**credited, **{f"{name}/abstained": rows for name, rows in iteration.left_out.items()}}
        self._add_background(self.checkpoints.background.poll)
        self.meter.merge(iteration.meter)
        self.meter.log_total("tokens", trained_tokens(credited))
        begun = max(iteration.started, self._last_end) if self.config.ahead else iteration.started
        self._last_end = current_time()
        self.log(measure_step(self._last_end - begun))
        self.log({**self.stream.metrics(iteration.position), **self.lives.recoveries()})
        self.log(self.placed.metrics() if self.placed else {})
        metrics = self.meter.take()  # what comes now is the next step's, such as the time of the save below
        metrics["speed/tokens"] = metrics["tokens"] / max(metrics["time/step"], 1e-9)
        metrics = self.state.kl.settle(metrics) if self.state.kl is not None else metrics
        check_ages(self, metrics)
        self.recorder.finish(step, credited, metrics)
        if self.config.eval_every and step % self.config.eval_every == 0:
            metrics |= self.evaluate()
        self.state.last_metrics = {"step": step, **metrics}
        latest = self.evaluations[-1][1] if self.evaluations else ()
        check_metric(self.config.keep_best, self.plan.trained_roles, metrics, latest)
        answers = self.notify("rlhf_step_end", step=step, metrics=self.last_metrics)
        self.stop.agree(answers, self.signals, self.world)
        if self.config.save_every and step % self.config.save_every == 0:
            self.save()
        self.lives.keep()

    def evaluate(self) -> dict[str, float]:
        """Return every chosen evaluator's metrics, as `eval/<name>`, and call observers with them."""
        if (names := self.config.names_of("evaluator")) and self.leader:
            progress.info(
                f"evaluating {', '.join(names)} {f'after step {self.step}' if self.step else 'before step 1'}"
            )
        metrics = self.measure()
        if metrics:
            self.state.evaluations.append((self.step, metrics))
            self.notify("rlhf_evaluated", step=self.step, metrics=metrics)
        return metrics

    def measure(self) -> dict[str, float]:
        """Return every chosen evaluator's metrics, as `eval/<name>`."""
        metrics: dict[str, float] = {}
        with self.collecting.pause() if self.collecting is not None else nullcontext():
            for (path, _), name in zip(self.config.provider_paths("evaluator"), self.config.names_of("evaluator")):
                with options_under(path):
                    measured = self.engines[f"evaluator.{name}"](self)
                add_measured(metrics, measured, name)
        return metrics

    def save(self) -> None:
        """Write a checkpoint of this step, if there is none yet."""
        state, roles = self.capture_state(), self.changing_roles
        self._add_background(lambda: self.checkpoints.save(state, roles, self.engine_states, self.world))

    def capture_state(self) -> dict[str, Any]:
        """Return the state between two steps as plain data, with the versions of roles and the position of the data."""
        self.state.versions = {name: role.version for name, role in self.changing_roles.items()}
        if not (self.config.ahead and self.state.stream):  # then it has what was drawn ahead of its own step
            self.state.stream = self.stream.with_ahead(self.state.stream or self.stream.state_dict())
        return self.state.state_dict()

    def engine_states(self) -> dict[str, Any]:
        """Return this rank's states of engines by place: readers' as of the rows that were trained on, others' as they are."""
        collected = self.collecting.collected if self.collecting is not None else {}
        return self.engines.state_dict(clone=True) | collected | dict(self.state.readers)

    def _add_background(self, finished: Callable[[], float]) -> None:
        """Count the seconds of a background save that is over. Raises what it raised."""
        with self.phase("checkpoint"):
            seconds = finished()
        if seconds:
            self.meter.add_seconds("checkpoint_background", seconds)

    def export(self) -> None:
        """Write the trained policy as a Hugging Face folder, OUTPUT/model, and other roles that are exported with it."""
        if self.leader:
            self.folder.claim_exports()
        self.world.barrier()
        self.roles[self.plan.policy].export(str(self.output / "model"))
        for name in self.plan.exports:
            self.roles[name].export(str(self.output / name))
        export_best(self.checkpoints.best(self.world), self.roles[self.plan.policy], self.output)
        if self.leader:
            publish(self)

    def notify(self, hook: str, **arguments: Any) -> list[Any]:
        """Call an observer hook with this run and `arguments`; return the answers that are not None."""
        return self.observers.notify(hook, self, **arguments)

    # ------------------------------------------------------------------------------------------------------------------
    # what evaluators and observers see: `RunView` documents each of these

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
    def kl_coef(self) -> float:
        """The KL coefficient in force; 0 without a penalty."""
        return self.state.kl_coef

    @property
    def roles(self) -> Mapping[str, Role]:
        """The placed roles by name."""
        assert self.placed is not None, "roles exist while the run is open"
        return self.placed.roles

    @property
    def changing_roles(self) -> dict[str, Role]:
        """The roles whose weights change, by name: those that a checkpoint holds."""
        return {name: self.roles[name] for name in self.plan.changing_roles}

    @property
    def world(self) -> World:
        """The ranks that run this same loop."""
        assert self.placed is not None
        return self.placed.world

    def together(self, calls: Mapping[str, Callable[[], T]]) -> dict[str, T]:
        """Make independent calls to roles, by role; at once where the launcher can."""
        assert self.placed is not None
        return self.placed.together(calls)

    @property
    def leader(self) -> bool:
        """True in the process that writes files and calls observers."""
        return self.world.leads

    @property
    def encoder(self) -> Encoder:
        """The encoder of the role that reads the data."""
        return self.data.encoder

    @cached_property
    def stream(self) -> Prefetcher:
        """This rank's rows, shuffled by the seed, at the position of the run."""
        return self.data.stream(self.world)

    @property
    def advantages(self) -> Mapping[str, Any]:
        """The engines of advantages by credit key."""
        return {key: self.engines[f"advantage.{key}"] for key, spec in self.plan.credits.items() if spec.advantage}

    @property
    def group_filter(self) -> Any:
        """The engine of the filter, or the one that the algorithm's options are short for; None without one."""
        return self.engines.get("filter") or choose_filter(self.config)

    @property
    def reward(self) -> Any:
        """The engine of the reward."""
        if "reward" not in self.engines:
            raise UsageError(f"an evaluator needs rewards, but the run has none; pass {run_option('reward', 'NAME')}")
        return self.engines["reward"]

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Add the time inside to `time/<name>` of the step at hand."""
        return self.meter.phase(name)

    def log(self, metrics: Mapping[str, float | Metric]) -> None:
        """Add metrics to the step at hand."""
        self.meter.log(metrics)

    def rows(self, split: str) -> Iterable[Example]:
        """Return the rows of a split of the data."""
        return self.data.read(split)

    def heldout(self, most: int | None = None) -> Sequence[Example]:
        """Return the held-out rows of the data, the first `most` of them; at least one for each rank."""
        return self.data.heldout(most)

    def rollouts(self, source: str, prompts: Prompts, sampling: Sampling, trained: bool = False) -> Rollouts:
        """Return completions of the role `source`, or episodes; with kept sets if they are to be `trained` on."""
        sampling = sampling if trained else replace(sampling, replay="off")
        environment = self.engines.get("environment")
        holding = self.collecting.sampling(trained) if self.collecting is not None else nullcontext()
        with options_under("/rollout"), holding:
            engine, role = self.engines["rollout"], self.roles[source]
            return complete(engine, environment, role, prompts, sampling, self.config.episode, self.encoder)

    def reward_of(self, rollouts: Batch) -> RewardOutput:
        """Return what the reward provider gives to completions, checked against its contract."""
        with options_under("/reward"):
            engine = self.reward  # not chosen: an error
            raw = engine(read) if len(read := self.reward_inputs(rollouts)) else []  # no rows on this rank
            return to_reward_output(raw, rollouts, self.config.providers["reward"], reward_precision(self.plan))

    def reward_inputs(self, rollouts: Batch) -> Batch:
        """Return completions as the reward is called with them: with the outputs of roles that it needs."""
        return with_reward_needs(self, rollouts)
