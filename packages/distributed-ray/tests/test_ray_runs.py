"""Runs under Ray and in one process: equal numbers, and a one-line error when something dies or is missing.

One local cluster serves the whole file; every run starts its own actors. Sampling is seeded per completion, so samples are
the same wherever they are drawn, and differences are those of summing in another order.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import pytest

ray = pytest.importorskip("ray", reason="needs ray: pip install 'rlhf-distributed-ray[ray]'")
pytest.importorskip("rlhf_algos", reason="runs algorithms of rlhf-algos")

from rlhf_core import Registry, Run, hookimpl  # noqa: E402  after the checks above
from rlhf_core.config.builder import parse  # noqa: E402
from rlhf_core.errors import RunStopped, UsageError  # noqa: E402

TOLERANCE = 1e-4
WORKERS = ["--launcher", "ray", "--launcher.cpus", "0.1"]
VLLM = ["--rollout", "vllm", "--rollout.kv-cache-gib", "0.25"]
WITH_VLLM = pytest.mark.skipif(find_spec("vllm") is None, reason="needs vllm beside ray")
WITH_DEEPSPEED = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed beside ray")


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """A cluster on this machine with more CPUs than it has: roles work in turn."""
    for attempt in range(5):
        try:
            ray.init("local", num_cpus=8, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
            break
        except Exception as error:  # Ray gives a node 30 s to start, which is little beside much other work
            if attempt == 4 or "timed out during startup" not in str(error):
                raise
            ray.shutdown()
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def preferences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    rows = [{"prompt": f"{n}?", "chosen": "yes" * (n % 5 + 1), "rejected": "no" * (n % 3 + 1)} for n in range(32)]
    rows = [row | {"datasource": "abc"[n % 3]} for n, row in enumerate(rows)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


ONLINE = ["--data", "prompts", "--reward", "length", "--sampling.n", "2", "--sampling.max-new-tokens", "6"]


def words_of(algorithm: str, preferences: Path, output: Path, steps: int = 4) -> list[str]:
    """A small run of `algorithm`."""
    source = {
        "sft": ["--data", "json", "--data.path", str(preferences), "--data.completion-key", "chosen"],
        "dpo": ["--data", "json", "--data.path", str(preferences)],
    }.get(algorithm, ONLINE)
    tail = ["--model", "tiny", "--batch-size", "4", "--actor.optim.lr", "1e-3", "--output", str(output)]
    return [algorithm, *source, *tail, "--steps", str(steps)]


def run(words: list[str], *observers: object) -> list[dict[str, Any]]:
    """The metrics of a run, a mapping per step; `drawn` beside them are the tokens it was trained on."""
    sampled: list[Any] = []

    class Look:
        @hookimpl
        def rlhf_step_end(self, run: Run, step: int, metrics: Mapping[str, float]) -> None:
            sampled.append({key: batch.tokens_NT.tolist() for key, batch in run.samples.items()})

    registry = Registry()
    for k, observer in enumerate([Look(), *observers]):
        registry.register(observer, name=f"observer{k}")
    finished = Run(parse(words, registry), registry)
    finished.train()
    rows = [json.loads(line) for line in (finished.output / "metrics.jsonl").read_text().splitlines()]
    for row, tokens in zip(rows[-len(sampled) :], sampled, strict=True):
        row["drawn"] = tokens
    return rows


def weights(output: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(output / "model" / "model.safetensors")


def assert_equal_runs(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> None:
    """Assert equal tokens and metrics, step by step, except times, rates of padding and counts of transfers.

    In dpo's first step every margin is rounding, and so is the share of those above zero.
    """
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        apart = ("time/", "speed/", "memory/", "sync/", "padding", "drawn", "actor/accuracy")
        names = [n for n in a if not n.startswith(apart)]
        assert {n: b[n] for n in names} == {n: pytest.approx(a[n], abs=TOLERANCE, rel=TOLERANCE) for n in names}
        if "drawn" in a and "drawn" in b:  # of a resumed run only the last steps' are at hand
            assert a["drawn"] == b["drawn"]


@pytest.fixture(scope="module")
def same_as_in_one_process(preferences: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., None]:
    """`same_as_in_one_process(algorithm, steps, flags)`: the run under Ray with `flags` has the numbers and the weights."""

    @cache
    def local(algorithm: str, steps: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        folder = tmp_path_factory.mktemp("local")
        return run(words_of(algorithm, preferences, folder / "run", steps)), weights(folder / "run")

    def check(algorithm: str, steps: int, flags: list[str]) -> None:
        output = tmp_path_factory.mktemp("ray") / "run"
        placed = run([*words_of(algorithm, preferences, output, steps), *WORKERS, *flags])
        metrics, ours = local(algorithm, steps)
        assert len(placed) == steps
        assert_equal_runs(metrics, placed)
        theirs = weights(output)
        assert ours.keys() == theirs.keys()
        assert max(float((ours[name] - theirs[name]).abs().max()) for name in ours) < TOLERANCE

    return check


@pytest.mark.parametrize(
    ("algorithm", "flags"),
    [
        ("grpo", ["--launcher.workers", "2", "--launcher.engines", "2"]),
        ("ppo", ["--launcher.place", "actor@1,critic+reference@1x2"]),
        ("dpo", ["--launcher.workers", "2", "--launcher.place", "separate"]),
        ("sft", ["--launcher.workers", "1"]),
    ],
)
def test_a_run_under_ray_has_the_numbers_and_the_weights_of_one_process(
    algorithm: str, flags: list[str], same_as_in_one_process: Callable[..., None]
) -> None:
    same_as_in_one_process(algorithm, 4, flags)


@pytest.mark.parametrize("game", ["rlhf_core.testing.tiny_environment:TinyEnvironment", "harness"])
def test_episodes_under_ray_are_those_of_one_process(game: str, preferences: Path, tmp_path: Path) -> None:
    """Turns are dealt to two engines; a completion that goes on may get its next turn from the other one."""
    flags = ["--environment", game, "--reward", "environment", "--sampling.max-new-tokens", "30"]
    flags += ["--episode.turn-tokens", "3"]
    if game == "harness":
        agent = Path(__file__).with_name("ray_agent.py")
        flags += ["--environment.agent", f"{agent}:play"]
    local = run([*words_of("grpo", preferences, tmp_path / "local", 2), *flags])
    engines = ["--launcher.workers", "2", "--launcher.engines", "2"]
    placed = run([*words_of("grpo", preferences, tmp_path / "ray", 2), *flags, *WORKERS, *engines])
    assert_equal_runs(local, placed)
    assert local[0]["completion/turns"] > 1


@pytest.mark.slow
def test_kept_sets_reach_the_workers_with_their_rows(preferences: Path, tmp_path: Path) -> None:
    """Replay under Ray: rows are cut, sent and put together, and the trainer's log-probabilities are the sampler's."""
    cut = ["--sampling.top-p", "0.8", "--minibatches", "2", "--algorithm.kl.coef", "0.1"]
    local = run([*words_of("grpo", preferences, tmp_path / "local", 2), *cut])
    flags = ["--launcher.workers", "2", "--launcher.engines", "2", "--launcher.place", "separate"]
    placed = run([*words_of("grpo", preferences, tmp_path / "ray", 2), *cut, *WORKERS, *flags])
    assert_equal_runs(local, placed)
    assert all(row["actor/mismatch_max"] < 1e-5 and row["rollout/kept_mass"] < 1 for row in placed)


@pytest.mark.slow
def test_samples_without_a_reward_are_left_out_as_in_one_process(preferences: Path, tmp_path: Path) -> None:
    """In step 1 one sample of each group is left, in step 2 a single sample, and a worker has none; in step 3 none at all."""
    reward = (
        "calls = []\n"
        "def reward_func(completions):\n"
        "    calls.append(0)\n"
        "    left = {1: range(0, 99, 2), 2: [3], 3: []}[len(calls)]\n"
        "    return [len(text) if number in left else None for number, text in enumerate(completions)]\n"
    )
    shares = []
    for name, flags in (("here", []), ("ray", [*WORKERS, "--launcher.workers", "2"])):
        copy = tmp_path / f"{name}.py"  # each run counts its own calls
        copy.write_text(reward)
        words = words_of("reinforce", preferences, tmp_path / name, 3)
        shares.append(run([*words, "--reward", "func", "--reward.path", str(copy), *flags]))
    assert [row["reward/abstained"] for row in shares[0]] == [0.5, 7 / 8, 1.0]
    assert [row.get("skipped/actor", 0) for row in shares[0]] == [0, 0, 1]
    assert_equal_runs(*shares)


@pytest.mark.slow
def test_roles_that_track_or_judge_have_the_numbers_of_one_process(
    preferences: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reference that follows the actor, and a reward's own reward model: weights go from workers to workers; also resumed."""
    here = str(Path(__file__).parent)
    monkeypatch.syspath_prepend(here)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH")))))
    tracking = ["--reference.track.of", "actor", "--reference.track.every", "2", "--algorithm.kl.coef", "0.1"]
    flags = [*tracking, "--reward", "ray_judge:Judged", "--save-every", "3"]

    def words(output: str, steps: int) -> list[str]:
        return [*words_of("grpo", preferences, tmp_path / output, steps), *flags]

    expected = run(words("one", 4))
    assert [row["staleness/reference"] for row in expected] == [1, 0, 1, 0]
    placed = [*WORKERS, "--launcher.workers", "2"]
    assert_equal_runs(expected, run([*words("ray", 4), *placed]))
    run([*words("resumed", 3), *placed])
    assert_equal_runs(expected, run([*words("resumed", 4), *placed, "--resume"]))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("algorithm", "workers", "placement"), [*product(("sft", "dpo", "ppo", "grpo"), "12", ("together", "separate"))]
)
def test_twenty_steps_of_every_algorithm_wherever_roles_are_placed(
    algorithm: str, workers: str, placement: str, same_as_in_one_process: Callable[..., None]
) -> None:
    same_as_in_one_process(algorithm, 20, ["--launcher.workers", workers, "--launcher.place", placement])


@WITH_DEEPSPEED
@pytest.mark.parametrize(
    ("algorithm", "stage", "steps"),
    [
        *(pytest.param(*each, 4, marks=pytest.mark.engines) for each in (("ppo", 2), ("grpo", 3))),
        *(
            pytest.param(*each, 20, marks=pytest.mark.slow)
            for each in (("sft", 0), ("dpo", 1), ("ppo", 2), ("grpo", 3))
        ),
    ],
)
def test_deepspeed_inside_ray_changes_no_number_either(
    algorithm: str, stage: int, steps: int, same_as_in_one_process: Callable[..., None]
) -> None:
    flags = ["--launcher.workers", "2", "--strategy", "deepspeed", "--strategy.stage", str(stage)]
    same_as_in_one_process(algorithm, steps, flags)


@pytest.mark.engines
@WITH_VLLM
@pytest.mark.parametrize(
    "strategy",
    [
        pytest.param([], id="torch"),
        pytest.param(["--strategy", "deepspeed", "--strategy.stage", "3"], id="deepspeed", marks=WITH_DEEPSPEED),
    ],
)
def test_vllm_inside_ray_samples_the_weights_that_were_trained_elsewhere(
    strategy: list[str], preferences: Path, tmp_path: Path
) -> None:
    """Completions, rewards and log-probabilities of the run in one process, also with vLLM; shards are gathered for it."""
    flags = ["--launcher.workers", "2", "--launcher.engines", "2", "--launcher.place", "separate"]
    local = run([*words_of("grpo", preferences, tmp_path / "local"), *VLLM])
    placed = run([*words_of("grpo", preferences, tmp_path / "ray"), *VLLM, *WORKERS, *flags, *strategy])
    assert_equal_runs(local, placed)
    assert placed[0]["sync/logprob_diff_max"] < 1e-3


def test_fewer_held_out_rows_than_workers_are_evaluated_all_the_same(preferences: Path, tmp_path: Path) -> None:
    asked = ["--evaluator", "policy_stats", "--evaluator.prompts", "1", "--steps", "1"]
    words = [*words_of("grpo", preferences, tmp_path / "run"), *asked]
    local = run([*words, "--output", str(tmp_path / "local")])
    assert_equal_runs(local, run([*words, *WORKERS, "--launcher.workers", "2", "--launcher.engines", "2"]))


@pytest.fixture
def edges(monkeypatch: pytest.MonkeyPatch) -> None:
    """`ray_edges` can be imported, here and in workers."""
    here = str(Path(__file__).parent)
    monkeypatch.syspath_prepend(here)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([here, os.environ.get("PYTHONPATH", "")]))


def test_a_step_of_few_rows_or_none_goes_on_as_in_one_process(edges: None, preferences: Path, tmp_path: Path) -> None:
    """One group for two workers, and in the second step none."""
    words = [*words_of("grpo", preferences, tmp_path / "run", 3), "--advantage", "ray_edges:Few"]
    local = run([*words, "--output", str(tmp_path / "local")])
    assert_equal_runs(local, run([*words, *WORKERS, "--launcher.workers", "2"]))


@pytest.mark.parametrize(
    ("engine", "rounding"),
    [pytest.param([], 1e-5, id="hf"), pytest.param(VLLM, 1e-3, id="vllm", marks=[WITH_VLLM, pytest.mark.engines])],
)
def test_a_weight_that_does_not_arrive_is_caught_in_the_first_step_that_samples_with_it(
    engine: list[str], rounding: float, edges: None, preferences: Path, tmp_path: Path
) -> None:
    """Engines build the model themselves; what they are sent after step 1 lacks every `down_proj`.

    vLLM compares what it has with what it was sent, which agree; only the trainer's own log-probabilities differ.
    """
    words = [*words_of("grpo", preferences, tmp_path / "run", 3), *WORKERS, *engine, "--on-mismatch", "stop"]
    sound = run(words)
    assert all(row["actor/mismatch"] < rounding for row in sound)
    with pytest.raises(RunStopped, match="log-probabilities of the rollout engine differ from those of role 'actor'"):
        run([*words, "--strategy", "ray_edges:Zeroed", "--output", str(tmp_path / "planted")])
    planted = (tmp_path / "planted" / "metrics.jsonl").read_text().splitlines()
    assert len(planted) == 1, "step 2 is not trained"
    if engine:
        assert json.loads(planted[0])["sync/logprob_diff_max"] < rounding, "and the engine itself saw nothing"


def test_a_loss_that_is_not_finite_is_told_as_in_one_process(edges: None, preferences: Path, tmp_path: Path) -> None:
    """One line, and samples with their texts, which workers do not have; or a step that is left out."""
    words = [*words_of("grpo", preferences, tmp_path / "run", 3), "--loss", "ray_edges:Broken", *WORKERS]
    with pytest.raises(RunStopped, match=r"the loss of role 'actor' is nan in the term Broken on actor"):
        run([*words, "--launcher.workers", "2"])
    rows = [json.loads(line) for line in (tmp_path / "run" / "failed" / "step-2.jsonl").read_text().splitlines()]
    assert len(rows) == 8, "of both ranks"
    assert all(row["prompt"] and row["completion"] for row in rows) and len({row["prompt"] for row in rows}) == 4


def test_a_skipped_step_leaves_its_samples_with_the_run(
    edges: None, preferences: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--output` is relative to where the run was started, not to where the cluster was."""
    monkeypatch.chdir(tmp_path)
    words = [*words_of("grpo", preferences, Path("run"), 3), "--loss", "ray_edges:Broken", "--on-nonfinite", "skip"]
    rows = run([*words, *WORKERS, "--save-every", "1"])
    assert [row["skipped/actor"] for row in rows] == [0, 1, 0]
    samples = [json.loads(line) for line in (tmp_path / "run" / "failed" / "step-2.jsonl").read_text().splitlines()]
    assert samples and all(sample["prompt"] and sample["completion"] for sample in samples)
    assert sum("failed/step-2.jsonl" in line for line in capsys.readouterr().err.splitlines()) == 1
    assert (tmp_path / "run" / "checkpoints" / "step-3" / "roles" / "actor").is_dir()


FAKE = ["--rollout", "fake", "--strategy", "fake"]


@pytest.mark.parametrize(("rank", "workers", "engines"), [(0, "1", []), (1, "2", FAKE)])
def test_a_killed_worker_ends_the_run_with_one_line_and_a_folder_that_resumes(
    rank: int, workers: str, engines: list[str], preferences: Path, tmp_path: Path
) -> None:
    """Whichever rank it is: the others wait for it, or fail because of it, and are not what is told."""

    class Assassin:
        """Kills a worker of the actor after step 2, whose checkpoint is then the newest."""

        victim: tuple[str, int]

        @hookimpl
        def rlhf_step_end(self, run: Run, step: int, metrics: Mapping[str, float]) -> None:
            self.victim = run.roles["actor"].crew.where[rank]  # type: ignore[attr-defined]
            if step == 3:
                os.kill(self.victim[1], signal.SIGKILL)

    straight = run([*words_of("grpo", preferences, tmp_path / "straight"), *engines])
    words = [*words_of("grpo", preferences, tmp_path / "run"), *engines, "--save-every", "1", *WORKERS]
    words += ["--launcher.workers", workers, "--launcher.retries", "0"]
    assassin = Assassin()
    with pytest.raises(RunStopped) as stopped:
        run(words, assassin)
    message = str(stopped.value)
    node, process = assassin.victim
    assert message.startswith(f"role actor rank {rank} on node {node} (process {process}) died: ")
    assert message.endswith("continue from the last checkpoint with --resume") and "\n" not in message
    assert_equal_runs(straight, run([*words, "--resume"]))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--launcher.cpus", "9"],
            r"^launcher ray needs 27 CPU for 1 x actor, 1 x reference, 1 x engine, but the cluster has 8;",
        ),
        (["--launcher.gpus", "on"], r"^launcher ray needs 1 GPU for .*, but the cluster has 0; request less with "),
        (
            ["--launcher.workers", "two"],
            r"^--launcher.workers 'two': give a number of workers, or NODESxDEVICES such as 2x4$",
        ),
        (
            ["--launcher.role-workers", "judge=2"],
            r"^--launcher.role-workers 'judge=2': this run has no role 'judge'; it has ",
        ),
        (["--launcher.engines", "-1"], r"^--launcher.engines -1: must be at least 1, or 0 for one engine per worker "),
        (["--launcher.workers", "1x4", "--launcher.cpus", "3"], r"^launcher ray needs 36 CPU for 4 x actor, "),
        (
            ["--launcher.role-workers", "actor=2:SPREAD"],
            r"^--launcher.role-workers 'actor=2:SPREAD': roles that share a place must have the same layout; use ",
        ),
    ],
)
def test_what_cannot_be_placed_is_said_in_one_line(
    flags: list[str], message: str, preferences: Path, tmp_path: Path
) -> None:
    words = [*words_of("grpo", preferences, tmp_path / "run"), "--launcher", "ray", *flags]
    with pytest.raises(UsageError, match=message):
        run(words)
