"""The contract between the host and its plugins.

A plugin is a module (or object) with functions named like these and marked `@hookimpl`, advertised under the entry-point
group `rlhf`. Two families:

* provider hooks run once at start-up and return `{name: provider}`. A provider is a frozen dataclass (its fields are its
  options, calling it does the work), or the string `"module:Class"` if its import should wait until it is chosen.
  `rlhf_core.contract.providers` has the base class of each kind: its call, and everything that core reads of it.
* observer hooks are called during a run, a few times per step. All implementations are called. Only the return value of
  `rlhf_step_end` can change the run: it may end it after the step. They are called in the first process only; an observer
  that declares `all_ranks = True`, or a plugin that does, is called in every process.

No hook is called per token or per sequence. This module imports nothing heavy: it is read by every `rlhf-run --help`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, get_args

import pluggy

if TYPE_CHECKING:
    from rlhf_core.contract.batch import Batch
    from rlhf_core.contract.results import RewardOutput
    from rlhf_core.contract.run_view import RunView

__all__ = [
    "CHOSEN",
    "GROUP",
    "KINDS",
    "METRICS",
    "OBSERVERS",
    "OF_ROLES",
    "OPTIONAL",
    "OUTSIDE_RUNS",
    "SEVERAL",
    "KindName",
    "Providers",
    "hookimpl",
    "hookspec",
]

GROUP = "rlhf"
"""The entry-point group in which plugins advertise themselves."""

KindName = Literal[
    "data",
    "sampler",
    "rollout",
    "environment",
    "reward",
    "filter",
    "advantage",
    "loss",
    "algorithm",
    "strategy",
    "launcher",
    "evaluator",
    "observer",
    "command",
    "ingredient",
    "optimizer",
    "output",
]
"""One word per kind: hook `rlhf_<kind>`."""

KINDS: tuple[str, ...] = get_args(KindName)
"""Every kind."""

OF_ROLES = ("optimizer", "output")
"""Kinds without one choice per run: an optimizer is chosen per role, and outputs are requested by name."""

OUTSIDE_RUNS = ("command", "ingredient")
"""Kinds that are not part of a run."""

CHOSEN = tuple(kind for kind in KINDS if kind not in (*OF_ROLES, *OUTSIDE_RUNS))
"""Kinds with a flag `--<kind>` and a TOML table `[<kind>]`."""

SEVERAL = ("evaluator", "observer")
"""Kinds of which a run has any number: none, one, or names with commas between them."""

OPTIONAL = ("environment", "filter")
"""Kinds of which a run has one or none."""

OBSERVERS = (
    "rlhf_watch",
    "rlhf_run_start",
    "rlhf_rollouts_ready",
    "rlhf_before_update",
    "rlhf_evaluated",
    "rlhf_step_end",
    "rlhf_run_end",
)
"""The hooks of observers, in the order of their first call."""

METRICS = "rlhf_metrics"
"""The hook that provides nothing, and documents what providers log."""

Providers = Mapping[str, type | str]
"""`{name: class}` or `{name: "module:Class"}`."""

hookspec = pluggy.HookspecMarker("rlhf")
hookimpl = pluggy.HookimplMarker("rlhf")


# ----------------------------------------------------------------------------------------------------------------------
# providers: called once at start-up, every implementation's table is merged
# ----------------------------------------------------------------------------------------------------------------------


@hookspec
def rlhf_data() -> Providers:
    """Readers of prompts, demonstrations and preferences: `(split) -> Iterable[Example]`."""
    raise AssertionError("a specification is never called")


@hookspec
def rlhf_sampler() -> Providers:
    """Orders of rows: `(rows, seed) -> Iterator[int]`, endless; one that reacts receives the rows' scores."""
    raise AssertionError("a specification is never called")


@hookspec
def rlhf_rollout() -> Providers:
    """Sampling engines: `(role, prompts, sampling) -> Rollouts`, with `sync`, `sleep`, `wake` and `close`."""
    raise AssertionError("a specification is never called")


@hookspec
def rlhf_environment() -> Providers:
    """Environments that answer a policy between its turns: `(example, seed) -> Session`."""
    raise AssertionError("a specification is never called")


@hookspec
def rlhf_reward() -> Providers:
    """Scores of completions: `(rollouts) -> RewardOutput`, a tensor of N rewards, or a list of N floats or Nones."""
    raise AssertionError("a specification is never called")


@hookspec
def rlhf_filter() -> Providers:
    """Choices of the groups that are trained on: `(rollouts, rewards) -> bool_P`; fresh prompts replace the others."""
    raise AssertionError("a specification is never called")


@hookspec
def rlhf_advantage() -> Providers:
    """Credit assignment: `(rewards, rollouts, extras) -> Credit`, or the tensor advantages_NT alone."""
    raise AssertionError("a specification is never called")


@hookspec
def rlhf_loss() -> Providers:
    """Objectives: `(outputs, batch) -> LossTerms`, values and the reduction they ask for; core reduces."""
    raise AssertionError("a specification is never called")


@hookspec
def rlhf_algorithm() -> Providers:
    """Compositions: `(choices) -> tuple[Term, ...]`, which roles are trained, on what, by which credit and loss."""
    raise AssertionError("a specification is never called")


@hookspec
def rlhf_strategy() -> Providers:
    """Strategies that train a role's model inside a process: `(build, optim, total_steps) -> Trainable`."""
    raise AssertionError("a specification is never called")


@hookspec
def rlhf_launcher() -> Providers:
    """Launchers that place processes and roles: `(plan) -> Placement`."""
    raise AssertionError("a specification is never called")


@hookspec
def rlhf_evaluator() -> Providers:
    """Measurements on a policy: `(run) -> {metric name: float}`."""
    raise AssertionError("a specification is never called")


@hookspec
def rlhf_observer() -> Providers:
    """Observers selected by name, such as trackers and alarms: `(run) -> object with observer hooks`."""
    raise AssertionError("a specification is never called")


@hookspec
def rlhf_optimizer() -> Providers:
    """Optimizers of roles (`--<role>.optim.use NAME`): `(named_parameters, total_steps) -> torch.optim.Optimizer`."""
    raise AssertionError("a specification is never called")


@hookspec
def rlhf_output() -> Providers:
    """Outputs of a role's forward pass, named with their shape (`quantiles_NTK`): `(states, head) -> Tensor`."""
    raise AssertionError("a specification is never called")


@hookspec
def rlhf_command() -> Providers:
    """Commands of `rlhf-run`: `(context) -> exit code`."""
    raise AssertionError("a specification is never called")


@hookspec
def rlhf_ingredient() -> Providers:
    """Steps of a recipe: `(context) -> {artifact name: Artifact}`, with typed inputs and outputs."""
    raise AssertionError("a specification is never called")


@hookspec
def rlhf_metrics() -> Mapping[str, str]:
    """Document the metrics of the plugin: `{name: "unit: meaning"}`, as in `rlhf_core.plugins.metric_catalogue`."""
    raise AssertionError("a specification is never called")


# ----------------------------------------------------------------------------------------------------------------------
# observers: called during a run, a few times per step or more rarely; every implementation is called
# ----------------------------------------------------------------------------------------------------------------------


@hookspec
def rlhf_watch(run: RunView) -> object | None:
    """Called once per run when roles are placed and a checkpoint is restored, before `rlhf_run_start`.

    It suits a plugin that watches every run and keeps data of each.

    Args:
        run: the run.

    Returns:
        an object with observer hooks (methods marked `@hookimpl`), which are called until the run ends; None watches nothing.
    """


@hookspec
def rlhf_run_start(run: RunView) -> None:
    """Called once after roles are placed and a checkpoint is restored, before the first step.

    Args:
        run: the run, with its resolved `config`, `plan`, `output` folder and `step`.
    """


@hookspec
def rlhf_rollouts_ready(run: RunView, source: str, rollouts: Batch, rewards: RewardOutput) -> None:
    """Called for each sampled source of a step when its completions are scored and shaped, before credit and updates.

    Args:
        run: the run; `run.step` counts the steps before this one.
        source: the role that was sampled.
        rollouts: N completions, this rank's; `rollouts["rewards_N"]` are what credit reads.
        rewards: what they earned, after shaping.
    """


@hookspec
def rlhf_before_update(run: RunView, role: str) -> None:
    """Called before each trained role takes the optimizer steps of a step.

    Roles whose updates do not depend on each other are named one after the other, before the first of their updates.

    Args:
        run: the run.
        role: name of the role; `run.roles[role]` has the weights before the update.
    """


@hookspec
def rlhf_evaluated(run: RunView, step: int, metrics: Mapping[str, float]) -> None:
    """Called after each evaluation: before the first step, every `--eval-every` steps, and at the end.

    Within a step it comes before `rlhf_step_end`, whose metrics include these.

    Args:
        run: the run; `run.evaluations` holds this evaluation too.
        step: number of finished steps, from 0.
        metrics: every metric of the evaluators by its full name, `eval/<name>`.
    """


@hookspec
def rlhf_step_end(run: RunView, step: int, metrics: Mapping[str, Any]) -> bool | str | None:
    """Called at the end of each step, after all its optimizer updates and before its checkpoint.

    Args:
        run: the run; `run.samples` holds the batches that were trained on.
        step: number of finished steps, from 1.
        metrics: every metric of the step by its full name; floats.

    Returns:
        True to end the run after this step; a text to stop it there, saved but not finished, with that text and exit code 1.
    """


@hookspec
def rlhf_run_end(run: RunView, error: BaseException | None) -> None:
    """Called once when the run ends, also by an error or a signal.

    Args:
        run: the run.
        error: what ended it early, or None.
    """
