"""One test per hook: what a plugin from outside gives through it is found by name, and does its work in a real run."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
import torch

from rlhf_core import (
    Example,
    Filter,
    LossTerms,
    Outputs,
    Providers,
    Reduction,
    RewardOutput,
    Rollouts,
    Run,
    RunStopped,
    Sampler,
    Term,
    hookimpl,
)
from rlhf_core.contract.batch import Batch, Prompts
from rlhf_core.contract.options import Sampling, TrainedOptions
from rlhf_core.contract.plan import Plan
from rlhf_core.contract.providers import (
    Advantage,
    Algorithm,
    Data,
    Evaluator,
    Launcher,
    Loss,
    Observer,
    Reward,
    Rollout,
)
from rlhf_core.contract.roles import Placement, Role
from rlhf_core.contract.terms import ProviderChoices
from rlhf_core.launcher.local import Local
from rlhf_core.plugins.registry import Registry
from rlhf_core.rollout.hf import HuggingFaceRollout
from rlhf_core.strategy.torch import TorchStrategy, TorchTrainable
from rlhf_core.testing.tiny import tiny_run
from rlhf_core.testing.tiny_algorithm import TinyAdvantage, TinyLoss
from rlhf_core.testing.tiny_environment import TinyEnvironment

if TYPE_CHECKING:
    from rlhf_core.contract.optimizers import OptimizerProvider

CALLED: list[str] = []
"""Who was called in the test that runs."""


@pytest.fixture(autouse=True)
def _nobody_called_yet() -> None:
    CALLED.clear()


def plugin(**hooks: Callable[..., Any]) -> Any:
    """A plugin with these hooks."""
    return SimpleNamespace(**{name: hookimpl(hook) for name, hook in hooks.items()})


def outside(kind: str, cls: type) -> Registry:
    """Core's registry with a stranger's plugin that provides `cls` as `mine`."""

    def provide() -> Providers:
        return {"mine": cls}

    registry = Registry(autoload=False)
    registry.register(plugin(**{f"rlhf_{kind}": provide}), "stranger", "rlhf-stranger", "1.0")
    return registry


def run_with(tmp_path: Path, registry: Registry, **options: Any) -> list[dict[str, Any]]:
    """The metrics of a run of two steps."""
    made = tiny_run(tmp_path, registry=registry, **options)
    made.train()
    return [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]


# ----------------------------------------------------------------------------------------------------------------------
# providers
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Greetings(Data):
    """Greets."""

    def __call__(self, split: str) -> Iterable[Example]:
        CALLED.append(split)
        return [Example(f"Hello {i}!", meta={"i": i}) for i in range(5)]


def test_rlhf_data_brings_rows_that_are_sampled_from(tmp_path: Path) -> None:
    run_with(tmp_path, outside("data", Greetings), data="mine")
    prompts = {json.loads(line)["prompt"] for line in (tmp_path / "samples.jsonl").read_text().splitlines()}
    assert CALLED[0] == "train"
    assert all("Hello" in prompt for prompt in prompts)


@dataclass(frozen=True)
class Backwards(Sampler):
    """Every row once, the last one first."""

    reacts: ClassVar[bool] = False
    epochs: ClassVar[bool] = True

    def __call__(self, rows: int, seed: int) -> Iterator[int]:
        while True:
            yield from range(rows - 1, -1, -1)


def test_rlhf_sampler_brings_the_order_of_rows(tmp_path: Path) -> None:
    """Five rows, two a step, and two completions of each."""
    run_with(tmp_path, outside("sampler", Backwards), sampler="mine", data=Greetings(), steps=3)
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [sample["row"] for sample in samples][::2] == [4, 3, 2, 1, 0, 4]


@dataclass(frozen=True)
class Echo(Rollout):
    """Answers every prompt with the same token, as often as it is told."""

    times: int = 3
    """tokens per completion"""

    def __call__(self, role: Role, prompts: Prompts, sampling: Sampling) -> Rollouts:
        CALLED.append("sample")
        rollouts = HuggingFaceRollout()(role, prompts, sampling)
        rollouts.texts = rollouts.raw_texts = ["echo"] * len(rollouts)
        return rollouts

    def sync(self, role: Role) -> Mapping[str, float]:
        CALLED.append("sync")
        return {"echo/synced": float(role.version)}

    def close(self) -> None:
        CALLED.append("close")


def test_rlhf_rollout_brings_an_engine_that_samples_follows_the_weights_and_is_closed(tmp_path: Path) -> None:
    rows = run_with(tmp_path, outside("rollout", Echo), rollout="mine")
    assert CALLED.count("sample") == 2
    assert CALLED[-1] == "close"
    assert [row["echo/synced"] for row in rows] == [1.0, 2.0]
    samples = [json.loads(line)["completion"] for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert set(samples) == {"echo"}


def test_rlhf_environment_brings_what_answers_between_turns(tmp_path: Path) -> None:
    """Without an environment chosen there is none; with one, its rewards are those that are trained on."""
    rows = run_with(tmp_path / "none", outside("environment", TinyEnvironment))
    assert "completion/turns" not in rows[-1]
    rows = run_with(tmp_path / "mine", outside("environment", TinyEnvironment), environment="mine")
    assert rows[-1]["completion/turns"] >= 1
    assert rows[-1]["reward/even"] == rows[-1]["reward/mean"]


@dataclass(frozen=True)
class Constant(Reward):
    """Rewards everything alike."""

    value: float = 0.25
    """the reward"""

    def __call__(self, rollouts: Rollouts) -> list[float]:
        return [self.value] * len(rollouts)


def test_rlhf_reward_brings_what_is_maximized(tmp_path: Path) -> None:
    rows = run_with(tmp_path, outside("reward", Constant), reward={"use": "mine", "value": 0.75})
    assert [row["reward/mean"] for row in rows] == [0.75, 0.75]


@dataclass(frozen=True)
class Every(Filter):
    """Accepts the first `accepted` groups of each round."""

    accepted: int = 1
    """groups"""

    def __call__(self, rollouts: Rollouts, rewards: RewardOutput) -> torch.Tensor:
        return torch.arange(len(rollouts.group_N.unique())) < self.accepted


def test_rlhf_filter_brings_the_choice_of_groups_that_are_trained_on(tmp_path: Path) -> None:
    """One prompt of two is accepted, so that a step takes two rounds of two prompts; without a filter none are replaced."""
    rows = run_with(tmp_path / "mine", outside("filter", Every), filter="mine")
    assert [(row["dynamic/rounds"], row["dynamic/prompts"], row["dynamic/kept"]) for row in rows] == [(2, 4, 0.5)] * 2
    assert "dynamic/rounds" not in run_with(tmp_path / "none", outside("filter", Every))[-1]


@dataclass(frozen=True)
class Nothing(Advantage):
    """Gives no credit to anybody."""

    needs: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, rewards: RewardOutput, rollouts: Rollouts, extras: Mapping[str, Any]) -> torch.Tensor:
        return torch.zeros(rollouts.mask_NT.shape)


def test_rlhf_advantage_brings_credit_and_no_credit_means_no_gradient(tmp_path: Path) -> None:
    rows = run_with(tmp_path, outside("advantage", Nothing), advantage="mine")
    assert [row["grad_norm/actor"] for row in rows] == [0.0, 0.0]


@dataclass(frozen=True)
class One(Loss):
    """A loss of one per token, wherever the policy is."""

    outputs: ClassVar[frozenset[str]] = frozenset({"logprobs_NT"})
    needs: ClassVar[frozenset[str]] = frozenset()
    rows_per_unit: ClassVar[int] = 1

    def __call__(self, outputs: Outputs, batch: Batch) -> LossTerms:
        return LossTerms(1.0 + 0.0 * outputs["logprobs_NT"], Reduction("token"))


def test_rlhf_loss_brings_values_that_core_averages(tmp_path: Path) -> None:
    rows = run_with(tmp_path, outside("loss", One), loss="mine")
    assert [row["loss/actor"] for row in rows] == pytest.approx([1.0, 1.0], abs=1e-6)


@dataclass(frozen=True)
class Twins(Algorithm):
    """Trains the actor and a second model, the twin, on what the actor samples."""

    defaults: ClassVar[Mapping[str, str]] = {"data": "prompts", "rollout": "hf", "reward": "length"}
    roles: ClassVar[Mapping[str, Any]] = {"actor": TrainedOptions(), "twin": TrainedOptions()}

    def __call__(self, choices: ProviderChoices) -> tuple[Term, ...]:
        return (
            Term("actor", "actor", TinyLoss(), TinyAdvantage()),
            Term("twin", "actor", TinyLoss(), TinyAdvantage(), weight=2.0),
        )


def test_rlhf_algorithm_brings_terms_and_the_roles_they_train(tmp_path: Path) -> None:
    rows = run_with(tmp_path, outside("algorithm", Twins), algorithm="mine", sampling={"n": 2, "max_new_tokens": 4})
    assert rows[0]["loss/twin"] == pytest.approx(2 * rows[0]["loss/actor"], rel=1e-5)


@dataclass(frozen=True)
class Counting(TorchStrategy):
    """Counts the models it is given."""

    def __call__(self, build: Callable[[], Any], optim: OptimizerProvider | None, total_steps: int) -> TorchTrainable:
        CALLED.append(f"{'trained' if optim else 'frozen'} {total_steps}")
        return super().__call__(build, optim, total_steps)


def test_rlhf_strategy_brings_what_trains_each_role(tmp_path: Path) -> None:
    run_with(tmp_path, outside("strategy", Counting), strategy="mine")
    assert CALLED == ["trained 2"]


@dataclass(frozen=True)
class Elsewhere(Launcher):
    """Places everything here, and says so."""

    def __call__(self, plan: Plan) -> Placement:
        CALLED.extend(sorted(plan.roles))
        return Local()(plan)


def test_rlhf_launcher_brings_the_roles_of_the_plan_to_their_place(tmp_path: Path) -> None:
    run_with(tmp_path, outside("launcher", Elsewhere), launcher="mine")
    assert CALLED == ["actor"]


@dataclass(frozen=True)
class Stopwatch(Evaluator):
    """Measures how far the run is."""

    def __call__(self, run: Run) -> Mapping[str, float]:
        return {"steps_done": float(run.step)}


def test_rlhf_evaluator_brings_measurements_at_the_start_and_at_the_end(tmp_path: Path) -> None:
    registry = outside("evaluator", Stopwatch)
    run = tiny_run(tmp_path, registry=registry, evaluator="mine")
    run.train()
    assert run.evaluations == [(0, {"eval/steps_done": 0.0}), (2, {"eval/steps_done": 2.0})]


@dataclass(frozen=True)
class Diary(Observer):
    """Writes down what it sees."""

    word: str = "saw"
    """what its lines begin with"""
    stops_at: int = 0
    """the step after which it stops the run; 0 for never"""

    def __call__(self, run: Run) -> Any:
        return Writer(self)


class Writer:
    """Watches for a diary."""

    def __init__(self, diary: Diary) -> None:
        self.diary = diary

    @hookimpl
    def rlhf_run_start(self, run: Run) -> None:
        CALLED.append(f"{self.diary.word} start")

    @hookimpl
    def rlhf_step_end(self, step: int) -> str | None:
        CALLED.append(f"{self.diary.word} {step}")
        return "the diary is full" if step == self.diary.stops_at else None

    @hookimpl
    def rlhf_run_end(self, error: BaseException | None) -> None:
        CALLED.append(f"{self.diary.word} end: {error}")


def test_rlhf_observer_brings_company_that_is_asked_for_by_name_and_has_options(tmp_path: Path) -> None:
    registry = outside("observer", Diary)
    run_with(tmp_path / "alone", registry)
    assert CALLED == []
    run_with(tmp_path / "observed", registry, observer={"use": "mine", "word": "noted"})
    assert CALLED == ["noted start", "noted 1", "noted 2", "noted end: None"]


def test_an_observer_stops_a_run_with_a_reason_and_the_step_is_saved(tmp_path: Path) -> None:
    with pytest.raises(RunStopped) as caught:
        run_with(tmp_path, outside("observer", Diary), observer={"use": "mine", "stops_at": 1})
    assert str(caught.value) == "stopped after step 1 of 2, which is saved: the diary is full"
    assert caught.value.exit_code == 1
    assert (tmp_path / "checkpoints" / "step-1" / "manifest.json").exists()
    assert not (tmp_path / "model").exists()
    CALLED.clear()
    run_with(tmp_path, outside("observer", Diary), resume=True)
    assert CALLED == [], "watchers of one run do not watch the next"


def test_rlhf_metrics_documents_what_a_stranger_logs() -> None:
    def metrics() -> Mapping[str, str]:
        return {"reward/marks": "marks: exclamation marks of a completion, mean"}

    registry = Registry(autoload=False)
    registry.register(plugin(rlhf_metrics=metrics), "stranger", "rlhf-stranger", "1.0")
    told = [(str(who), name, said) for who, name, said in registry.metrics()]
    assert ("rlhf-stranger 1.0", "reward/marks", "marks: exclamation marks of a completion, mean") in told
    assert any(name == "[<source>/]reward/mean" for _, name, _ in told)
