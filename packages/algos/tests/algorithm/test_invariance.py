"""Classes of command lines that must give one curve: how a batch is cut, ordered or interrupted changes no number.

Each runs through the real command line on a 4-layer model for 50 steps. Tolerances are for float32 rounding in another
order, amplified by 50 optimizer steps: a maximum for single steps, and a tighter one for the mean residual, which a
systematic difference (a wrong denominator, a lost row) would exceed at once.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf_core.cli import main

STEPS = 50
MODEL = "tiny:layers=4"
MAXIMUM = 2e-3  # of a loss near 5
MEAN_RESIDUAL = 2e-4


@pytest.fixture(scope="module")
def demonstrations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 demonstrations of very different lengths."""
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = [
        {"prompt": f"Count to {n % 9}:", "response": " ".join(map(str, range(n % 9))) + "!" * (n % 3)}
        for n in range(64)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def curve(output: Path, data: Path, *flags: str, name: str = "loss/actor") -> list[float]:
    """The losses of a run with these flags."""
    words = ["sft", "--model", MODEL, "--data", "json", "--data.path", str(data), "--output", str(output)]
    words += ["--steps", str(STEPS), "--batch-size", "8", "--actor.optim.lr", "1e-3", *flags]
    assert main(words) == 0
    return [json.loads(line)[name] for line in (output / "metrics.jsonl").read_text().splitlines()]


def assert_one_curve(first: list[float], second: list[float]) -> None:
    assert len(first) == len(second) == STEPS
    residuals = [abs(a - b) for a, b in zip(first, second, strict=True)]
    assert max(residuals) < MAXIMUM
    assert abs(sum(a - b for a, b in zip(first, second, strict=True))) / STEPS < MEAN_RESIDUAL


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, demonstrations: Path) -> list[float]:
    losses = curve(tmp_path_factory.mktemp("straight") / "run", demonstrations)
    assert losses[-1] < losses[0] - 1  # it learns, or equality would say little
    return losses


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(["--micro-tokens", "1"], id="one row at a time"),
        pytest.param(["--micro-tokens", "100"], id="a small token budget"),
        pytest.param(["--actor.packing", "False"], id="padded rows of like length"),
        pytest.param(["--chunk", "7"], id="seven rows of logits at a time"),
        pytest.param(["--chunk", "0"], id="plain logits"),
        pytest.param(["--actor.gradient-checkpointing", "True"], id="recomputed activations"),
    ],
)
def test_how_a_batch_is_cut_changes_no_number(
    flags: list[str], straight: list[float], demonstrations: Path, tmp_path: Path
) -> None:
    assert_one_curve(straight, curve(tmp_path / "run", demonstrations, *flags))


def test_the_order_of_the_samples_changes_no_number(tmp_path: Path, demonstrations: Path) -> None:
    """Eight rows are one whole batch every step, in whatever order they stand in the file and are cut."""
    rows = demonstrations.read_text().splitlines(keepends=True)[:8]
    for name, order in (("forward", rows), ("backward", rows[::-1])):
        (tmp_path / f"{name}.jsonl").write_text("".join(order))
    flags = ["--micro-tokens", "100"]
    forward, backward = (curve(tmp_path / name, tmp_path / f"{name}.jsonl", *flags) for name in ("forward", "backward"))
    assert_one_curve(forward, backward)
    assert forward != backward, "the order was another one"
    assert forward[-1] < forward[0] - 1


def test_a_run_stopped_and_resumed_gives_the_same_numbers_bit_for_bit(
    straight: list[float], demonstrations: Path, tmp_path: Path
) -> None:
    """The schedule is laid over all steps, so the first part is the same run with an observer that ends it."""
    from rlhf_core import Registry, Run, hookimpl
    from rlhf_core.config.builder import parse

    class Stop:
        @hookimpl
        def rlhf_step_end(self, step: int) -> bool:
            return step == 20

    words = ["sft", "--model", MODEL, "--data", "json", "--data.path", str(demonstrations)]
    words += ["--steps", str(STEPS), "--batch-size", "8", "--actor.optim.lr", "1e-3", "--output", str(tmp_path / "run")]
    registry = Registry()
    registry.register(Stop(), name="stop")
    Run(parse(words, registry), registry).train()
    assert main([*words, "--resume"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["loss/actor"] for line in lines] == straight


def test_the_same_command_gives_the_same_numbers(straight: list[float], demonstrations: Path, tmp_path: Path) -> None:
    assert curve(tmp_path / "run", demonstrations) == straight


def test_the_resolved_configuration_repeats_the_run(
    straight: list[float], demonstrations: Path, tmp_path: Path
) -> None:
    curve(tmp_path / "run", demonstrations)
    assert main(["--config", str(tmp_path / "run" / "config.toml"), "--output", str(tmp_path / "again")]) == 0
    lines = (tmp_path / "again" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["loss/actor"] for line in lines] == straight


# ----------------------------------------------------------------------------------------------------------------------
# the other kinds of runs
# ----------------------------------------------------------------------------------------------------------------------

SMALL = "tiny:hidden=32,layers=2"
ONLINE = ["--reward", "length", "--sampling.n", "4", "--sampling.max-new-tokens", "9"]
TRAINED = {  # the roles of each algorithm that have optimizers
    "grpo": ["actor"],
    "ppo": ["actor", "critic"],
    "repulse": ["actor", "proposal"],
    "dpo": ["actor"],
    "kto": ["actor"],
    "reward": ["reward"],
}
CUTS = [
    ["--micro-tokens", "1", "--chunk", "7"],
    ["--micro-tokens", "90", "--chunk", "0", "--{role}.packing", "False"],
]
NOT_NUMBERS = ("time/", "speed/", "memory/", "padding")


def _rows(algorithm: str) -> list[dict[str, object]]:
    """Eight rows of data of very different lengths."""
    texts = [" ".join(map(str, range(n))) + "!" for n in (1, 8, 3, 2, 9, 5, 4, 7)]
    if algorithm == "kto":
        return [{"prompt": f"Count to {n}:", "response": text, "label": n % 2 == 0} for n, text in enumerate(texts)]
    pairs = zip(texts, reversed(texts), strict=True)
    return [{"prompt": f"Count to {n}:", "chosen": a, "rejected": b} for n, (a, b) in enumerate(pairs)]


@pytest.mark.parametrize("algorithm", TRAINED)
def test_how_the_batches_of_every_kind_of_run_are_cut_changes_no_metric(algorithm: str, tmp_path: Path) -> None:
    """Every metric of three steps, but times and the share of padding; 1e-4 is rounding in another order, at a rate of 1e-3."""
    words = [algorithm, "--model", SMALL, "--steps", "3", "--batch-size", "4"]
    if algorithm in ("grpo", "ppo", "repulse"):
        words += ONLINE
    else:
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in _rows(algorithm)))
        words += ["--data", "json", "--data.path", str(tmp_path / "rows.jsonl")]
    roles = TRAINED[algorithm]
    words += [word for role in roles for word in (f"--{role}.optim.lr", "1e-3")]
    curves = []
    for number, cut in enumerate([[], *CUTS]):
        own = [flag.format(role=role) for role in roles for flag in cut]
        output = tmp_path / str(number)
        assert main([*words, *own, "--output", str(output)]) == 0
        curves.append([json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()])
    whole = curves[0]
    assert all(step[f"grad_norm/{role}"] > 1e-3 for step in whole for role in roles), "it moves, or this says little"
    for cut in curves[1:]:
        for one, other in zip(whole, cut, strict=True):
            names = [name for name in one if not name.startswith(NOT_NUMBERS)]
            expected = {name: pytest.approx(one[name], rel=1e-4, abs=1e-4) for name in names}
            assert {name: other[name] for name in names} == expected
