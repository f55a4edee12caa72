"""A run whose processes die: it goes on in another life, to the numbers and weights of a run that nobody disturbed."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from remembering import Novelty

from rlhf_core.contract.plan import Plan
from rlhf_core.contract.providers import Launcher
from rlhf_core.contract.roles import Placement
from rlhf_core.errors import RunStopped, WorkerLost
from rlhf_core.launcher.local import Local
from rlhf_core.testing import tiny_run

STEPS = 5
CALLS: list[str] = []
"""of the placement, in the test at hand"""


@pytest.fixture(autouse=True)
def no_calls() -> None:
    CALLS.clear()


@dataclass(frozen=True)
class Mortal(Launcher):
    """Places roles here; updates fail as if a process had died, at these calls of `train`."""

    deaths: tuple[int, ...] = ()
    retries: int = 8
    snapshot_every: int = 0
    memory: str = ""
    """folder of snapshots"""
    forgets: bool = False
    """snapshots are lost with the process"""
    replaced: tuple[int, ...] = ()
    """an engine is replaced before these calls of `train`"""

    def check_plan(self, plan: Plan) -> None:
        CALLS.append("check")

    def __call__(self, plan: Plan) -> Placement:
        return MortalPlacement(self, plan)


class MortalPlacement(Placement):
    def __init__(self, launcher: Mortal, plan: Plan) -> None:
        placed = Local()(plan)
        super().__init__(placed.roles, placed.rollout, placed.world, launcher.retries, launcher.snapshot_every)
        self.launcher, self.plan = launcher, plan
        self.trained = self.replaced = 0
        self._haunt()

    def _haunt(self) -> None:
        role: Any = self.roles["actor"]
        train = role.train

        def fail_or_train(work: Any) -> Any:
            metrics = train(work)  # what it changed is given up
            self.trained += 1
            self.replaced += self.trained in self.launcher.replaced
            if self.trained in self.launcher.deaths:
                raise WorkerLost("role actor rank 0", "role actor rank 0 on node here (process 7) died: for the test")
            return metrics

        role.train = fail_or_train

    def keep(self, step: int, roles: Sequence[str]) -> bool:
        CALLS.append(f"keep {step}")
        for name in roles:
            folder = Path(self.launcher.memory) / str(step) / name
            folder.mkdir(parents=True)
            self.roles[name].save(str(folder))
        return True

    def give_back(self, step: int, roles: Sequence[str]) -> None:
        CALLS.append(f"give back {step}")
        if not (Path(self.launcher.memory) / str(step)).exists():
            raise WorkerLost("snapshot", "the snapshot is lost")
        for name in roles:
            self.roles[name].load(str(Path(self.launcher.memory) / str(step) / name))

    def revive(self, roles: Collection[str]) -> None:
        CALLS.append(f"revive {' '.join(roles)}")
        if self.launcher.forgets:
            shutil.rmtree(self.launcher.memory, ignore_errors=True)
        self.roles |= {name: role for name, role in Local()(self.plan).roles.items() if name in roles}
        self._haunt()

    def recoveries(self) -> dict[str, float]:
        replaced, self.replaced = self.replaced, 0
        return {"recovered/engine": float(replaced)}

    def close(self) -> None:
        CALLS.append("close")


def lines(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    measured = ("time/", "speed/", "memory/", "recovered/")
    rows = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith(measured)} for row in rows]


def run(folder: Path, launcher: Launcher, **options: Any) -> list[dict[str, Any]]:
    """A run with a reward that counts what it has seen, which must not count what is given up."""
    tiny_run(folder, steps=STEPS, launcher=launcher, reward=Novelty(), **options).train()
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    run(folder, Local())
    return folder


def assert_same(first: Path, second: Path) -> None:
    assert lines(first) == lines(second)
    assert lines(first, "samples.jsonl") == lines(second, "samples.jsonl")
    weights = Path("model") / "model.safetensors"
    assert (first / weights).read_bytes() == (second / weights).read_bytes()


@pytest.mark.parametrize(
    ("options", "snapshot_every", "seen"),
    [
        ({}, 0, 0),
        ({"save_every": 2}, 0, 2),
        ({}, 1, 3),
        ({}, 2, 2),
        ({"save_every": 3}, 2, 3),
        ({"save_every": 2}, 2, 2),
    ],
)
def test_a_death_costs_steps_and_changes_no_number(
    options: dict[str, Any], snapshot_every: int, seen: int, undisturbed: Path, tmp_path: Path
) -> None:
    """The actor dies in step 4; the run goes on after step `seen`: of a snapshot, a checkpoint, or at the start."""
    launcher = Mortal((4,), snapshot_every=snapshot_every, memory=str(tmp_path / "memory"))
    rows = run(tmp_path / "run", launcher, **options)
    assert_same(undisturbed, tmp_path / "run")
    assert [row.get("recovered/roles", 0.0) for row in rows] == [
        float(step == seen + 1) for step in range(1, STEPS + 1)
    ]
    assert CALLS.count("close") == 1 and CALLS[-1] == "close"
    assert CALLS.count("revive actor") == CALLS.count("check") == 1, "the plan of a later life is not checked again"
    from_memory = (snapshot_every and "save_every" not in options) or (options == {"save_every": 2} and snapshot_every)
    assert (f"give back {seen}" in CALLS) == bool(from_memory)


def test_several_deaths_are_counted_where_the_run_went_on(undisturbed: Path, tmp_path: Path) -> None:
    """Calls 2 and 3 of `train` are both step 2; call 6 is step 4."""
    launcher = Mortal((2, 3, 6), snapshot_every=1, memory=str(tmp_path / "memory"))
    rows = run(tmp_path / "run", launcher)
    assert_same(undisturbed, tmp_path / "run")
    assert [row.get("recovered/roles", 0.0) for row in rows] == [0, 2, 0, 1, 0]


@pytest.mark.parametrize(
    ("deaths", "replaced", "save_every", "roles", "engines"),
    [
        pytest.param((4,), (3,), 2, [0, 0, 1, 0, 0], [0, 0, 1, 0, 0], id="the line of step 3 is cut"),
        pytest.param((4,), (4,), 2, [0, 0, 1, 0, 0], [0, 0, 1, 0, 0], id="step 4 is given up"),
        pytest.param((2, 5), (1,), 0, [2, 0, 0, 0, 0], [1, 0, 0, 0, 0], id="everything is cut, twice"),
        # calls 1 to 3, then 3 to 4 again, of which the second dies, then 3 to 5
        pytest.param((3, 5), (3, 4, 5, 8), 2, [0, 0, 2, 0, 0], [0, 0, 3, 0, 1], id="some are cut and some stay"),
    ],
)
def test_what_is_counted_outlives_the_line_that_is_cut(
    deaths: tuple[int, ...],
    replaced: tuple[int, ...],
    save_every: int,
    roles: list[int],
    engines: list[int],
    tmp_path: Path,
) -> None:
    """Every recovery is in one line, which is in the file at the end."""
    rows = run(tmp_path / "run", Mortal(deaths, replaced=replaced), save_every=save_every)
    assert [row["recovered/engine"] for row in rows] == engines
    assert [row.get("recovered/roles", 0) for row in rows] == roles


def test_a_snapshot_that_is_lost_too_leaves_the_checkpoint(undisturbed: Path, tmp_path: Path) -> None:
    launcher = Mortal((4,), snapshot_every=1, memory=str(tmp_path / "memory"), forgets=True)
    rows = run(tmp_path / "run", launcher, save_every=2)
    assert_same(undisturbed, tmp_path / "run")
    assert [row.get("recovered/roles", 0.0) for row in rows] == [0, 0, 1, 0, 0]
    assert CALLS.count("give back 3") == 1


@pytest.mark.parametrize(("retries", "deaths"), [(0, (2,)), (1, (2, 4))])
def test_a_run_without_a_life_left_ends_with_the_line_of_the_death_and_resumes(
    retries: int, deaths: tuple[int, ...], undisturbed: Path, tmp_path: Path
) -> None:
    launcher = Mortal(deaths, retries=retries)
    with pytest.raises(WorkerLost, match=r"died: for the test; continue from the last checkpoint with resume=True$"):
        run(tmp_path / "run", launcher, save_every=1)
    assert CALLS[-1] == "close"
    run(tmp_path / "run", Local(), resume=True)
    assert_same(undisturbed, tmp_path / "run")


def test_a_run_that_was_asked_to_stop_does_not_live_on(tmp_path: Path) -> None:
    launcher = Mortal((2,))
    stopped = tiny_run(tmp_path / "run", steps=STEPS, launcher=launcher)
    stopped.signals.received = signal.SIGINT
    with pytest.raises(RunStopped):
        stopped.train()
    assert "revive actor" not in CALLS
