"""Runs that live on after a death: the numbers are those of a run that nobody disturbed, and every recovery is counted."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

ray = pytest.importorskip("ray", reason="needs ray: pip install 'rlhf-distributed-ray[ray]'")
pytest.importorskip("rlhf_algos", reason="runs algorithms of rlhf-algos")

from rlhf_core import Registry, Run, hookimpl  # noqa: E402  after the checks above
from rlhf_core.config.builder import parse  # noqa: E402
from rlhf_core.errors import RunStopped, WorkerLost  # noqa: E402

MEASURED = ("time/", "speed/", "memory/", "sync/", "padding", "recovered/")
JOB = (
    "grpo --model tiny --data prompts --reward length --sampling.n 2 --sampling.max-new-tokens 6 --batch-size 4".split()
)
JOB += ["--actor.optim.lr", "1e-3"]
RAY = ["--launcher", "ray", "--launcher.cpus", "0.1"]


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init("local", num_cpus=8, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


class Harm:
    """Sends a signal to a process of the run after a step: (step, role or `engine`, rank, signal)."""

    def __init__(self, *planned: tuple[int, str, int, int]) -> None:
        self.planned = list(planned)

    @hookimpl
    def rlhf_step_end(self, run: Run, step: int, metrics: Mapping[str, float]) -> None:
        for plan in [each for each in self.planned if each[0] == step]:
            self.planned.remove(plan)  # a step that comes again is not disturbed again
            _, who, rank, number = plan
            assert run.placed is not None
            group: Any = run.placed.rollout if who == "engine" else run.roles[who]
            os.kill(group.crew.where[rank][1], number)


def run(words: Sequence[str], output: Path, *observers: object) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    registry = Registry()
    for k, observer in enumerate(observers):
        registry.register(observer, name=f"observer{k}")
    Run(parse([*words, "--output", str(output)], registry), registry).train()
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def computed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Everything in the metrics that is not measured."""
    return [
        {name: pytest.approx(value, abs=1e-4, rel=1e-4) for name, value in row.items() if not name.startswith(MEASURED)}
        for row in rows
    ]


def total(rows: list[dict[str, Any]], name: str) -> float:
    return sum(row.get(name, 0.0) for row in rows)


def assert_same(expected: list[dict[str, Any]], found: list[dict[str, Any]]) -> None:
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    assert [
        {name: row[name] for name in each} for each, row in zip(computed(expected), found, strict=True)
    ] == computed(expected)


def test_a_dead_engine_is_replaced_and_samples_what_it_would_have_sampled(tmp_path: Path) -> None:
    """Two engines; one dies before any weights were sent, the other after two updates, the new one again."""
    expected = run([*JOB, "--steps", "5"], tmp_path / "undisturbed")
    harm = Harm((1, "engine", 0, signal.SIGKILL), (2, "engine", 1, signal.SIGKILL), (4, "engine", 1, signal.SIGKILL))
    flags = ["--launcher.engines", "2", "--launcher.retries", "3"]
    rows = run([*JOB, "--steps", "5", *RAY, *flags], tmp_path / "disturbed", harm)
    assert_same(expected, rows)
    assert [row["recovered/engine"] for row in rows] == [0, 1, 1, 0, 1]
    assert all((row["recovered/engine_seconds"] > 0) == (row["recovered/engine"] > 0) for row in rows)
    assert all(row["actor/mismatch"] < 1e-5 for row in rows), "the new engine has the weights that were trained"
    assert {row["sync/controller_calls"] for row in rows} == {1 + 2}, "one call on each worker and engine"


def test_the_run_ends_with_one_line_when_too_many_engines_have_died(tmp_path: Path) -> None:
    harm = Harm((1, "engine", 0, signal.SIGKILL), (2, "engine", 0, signal.SIGKILL))
    with pytest.raises(
        RunStopped, match=r"^rollout engine rank 0 on node .* died: .*; continue from the last checkpoint"
    ) as ended:
        run([*JOB, "--steps", "3", *RAY, "--launcher.retries", "1"], tmp_path / "run", harm)
    assert not isinstance(ended.value, WorkerLost), "no role starts again for an engine that stays dead"


@pytest.mark.slow
def test_a_stopped_engine_is_replaced_too(tmp_path: Path) -> None:
    expected = run([*JOB, "--steps", "3"], tmp_path / "undisturbed")
    harm = Harm((1, "engine", 0, signal.SIGSTOP))
    rows = run([*JOB, "--steps", "3", *RAY, "--launcher.patience", "10"], tmp_path / "disturbed", harm)
    assert_same(expected, rows)
    assert total(rows, "recovered/engine") == 1


@pytest.mark.parametrize(
    ("rank", "flags", "seen"),
    [
        pytest.param(1, ["--launcher.snapshot-every", "1"], 2, id="snapshot"),
        pytest.param(0, ["--save-every", "2"], 2, id="checkpoint", marks=pytest.mark.slow),
        pytest.param(0, [], 0, id="neither", marks=pytest.mark.slow),
    ],
)
def test_a_dead_trainer_comes_back_and_the_run_goes_on(
    rank: int, flags: list[str], seen: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """PPO: the critic of the same step is given up too, and every step is in metrics.jsonl once. The death of step 3 comes
    before its snapshot."""
    words = ["ppo", *JOB[1:], "--steps", "5"]
    expected = run(words, tmp_path / "undisturbed")
    harm = Harm((3, "actor", rank, signal.SIGKILL))
    rows = run([*words, *RAY, "--launcher.workers", "2", *flags], tmp_path / "disturbed", harm)
    assert_same(expected, rows)
    assert [row.get("recovered/roles", 0.0) for row in rows] == [float(step == seen + 1) for step in range(1, 6)]
    assert total(rows, "recovered/seconds") > 0
    told = capsys.readouterr().err
    assert f"role actor rank {rank} on node" in told and f"continuing after step {seen}" in told
    samples = [json.loads(line) for line in (tmp_path / "disturbed" / "samples.jsonl").read_text().splitlines()]
    steps = [sample["step"] for sample in samples]
    assert steps == sorted(steps) and len(steps) == len(
        (tmp_path / "undisturbed" / "samples.jsonl").read_text().splitlines()
    )


class Rows:
    """The numbers of the prompts that each step was trained on; of a step that comes again, the last time counts."""

    def __init__(self) -> None:
        self.uids: dict[int, list[int]] = {}

    @hookimpl
    def rlhf_step_end(self, run: Run, step: int) -> None:
        self.uids[step] = run.samples["actor"]["uids_N"].tolist()


@pytest.mark.slow
def test_a_run_that_samples_ahead_survives_the_death_of_an_engine_and_of_a_trainer(tmp_path: Path) -> None:
    """Check rows, ages and recoveries; numbers may differ, since timing decides which weights sample."""
    expected, found = Rows(), Rows()
    run([*JOB, "--steps", "6"], tmp_path / "undisturbed", expected)
    harm = Harm((2, "engine", 0, signal.SIGKILL), (4, "actor", 1, signal.SIGKILL))
    flags = ["--ahead", "1", "--launcher.workers", "2", "--launcher.snapshot-every", "1"]
    rows = run([*JOB, "--steps", "6", *RAY, *flags], tmp_path / "disturbed", found, harm)
    assert [row["step"] for row in rows] == [*range(1, 7)]
    assert found.uids == expected.uids, "no prompt is lost, and none is trained on twice"
    assert total(rows, "recovered/engine") == 1 and total(rows, "recovered/roles") == 1
    assert max(row["rollout/staleness_max"] for row in rows) <= 1
    assert all(row.get("actor/mismatch", 0.0) < 1e-5 for row in rows), "the versions of tokens are right"


@pytest.mark.slow
@pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed beside ray")
def test_a_dead_rank_of_a_deepspeed_role_comes_back_with_its_shards(tmp_path: Path) -> None:
    """Stage 2: each rank has its part of the optimizer's states, which its snapshot holds. The numbers are those of torch."""
    expected = run([*JOB, "--steps", "4"], tmp_path / "undisturbed")
    harm = Harm((3, "actor", 1, signal.SIGKILL))
    flags = "--strategy deepspeed --strategy.stage 2 --launcher.workers 2 --launcher.snapshot-every 1".split()
    rows = run([*JOB, "--steps", "4", *RAY, *flags], tmp_path / "disturbed", harm)
    assert_same(expected, rows)
    assert [row.get("recovered/roles", 0.0) for row in rows] == [0, 0, 1, 0], (
        "the death came before the snapshot of step 3"
    )
