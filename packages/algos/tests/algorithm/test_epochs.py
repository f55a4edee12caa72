"""`--epochs`: passes over the data as steps, for offline and online algorithms, on one rank and on two, stopped and resumed."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from rlhf_core import Run, UsageError, make_config
from rlhf_core.cli import main
from rlhf_core.config.builder import parse, to_toml
from rlhf_core.plugins.registry import Registry

TINY = {"model": "tiny", "batch_size": 4}


@pytest.fixture
def rows(tmp_path: Path) -> str:
    """Ten rows, of which two are longer than 60 tokens."""
    path = tmp_path / "rows.jsonl"
    lines = [{"prompt": f"say {n}", "completion": "x" * (200 if n in (3, 7) else 4)} for n in range(10)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def sft(rows: str, output: Path, **options: Any) -> Run:
    """A run of SFT on these rows, long ones dropped."""
    data = {"use": "json", "path": rows, "encoding": {"max_tokens": 60}}
    return Run(make_config("sft", data=data, output=str(output), **{**TINY, **options}))


def drawn(run: Run) -> list[int]:
    """Train; return the row numbers that were trained on, in order."""
    seen: list[int] = []
    finish = run.finish

    def watch(iteration: Any, credited: Any) -> None:
        seen.extend(credited["data"]["row_N"].tolist())
        finish(iteration, credited)

    run.finish = watch  # type: ignore[method-assign]
    run.train()
    return seen


def test_epochs_count_the_rows_that_fit(rows: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        run = sft(rows, tmp_path / "run", epochs=2)
        seen = drawn(run)
    assert run.config.steps == 4 and set(Counter(seen).values()) == {2} and len(set(seen)) == 8
    assert "2 epochs of 8 rows (2 more are too long) are 4 steps of 4" in caplog.text
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["data/epoch"] > 1.7 and lines[-1]["data/dropped"] >= 2


@pytest.mark.parametrize(("epochs", "batch", "steps"), [(1, 4, 2), (0.5, 4, 1), (3, 8, 3), (1, 3, 3), (2, 16, 1)])
def test_steps_are_passes_times_rows_by_rows_of_a_batch_rounded_up(
    rows: str, tmp_path: Path, epochs: float, batch: int, steps: int
) -> None:
    from rlhf_core.run.epochs import count_steps

    assert count_steps(sft(rows, tmp_path, epochs=epochs, batch_size=batch).plan) == steps


def test_prompts_of_an_online_algorithm_are_passed_over_too(rows: str, tmp_path: Path) -> None:
    from rlhf_core.run.epochs import count_steps

    config = make_config(
        "grpo", data={"use": "json", "path": rows}, reward="length", epochs=2, output=str(tmp_path), **TINY
    )
    assert count_steps(Run(config).plan) == 5  # ten prompts: all are short


def test_a_schedule_is_laid_over_the_epochs(rows: str, tmp_path: Path) -> None:
    optim = {"lr": 1.0, "schedule": "linear"}
    run = sft(rows, tmp_path / "run", epochs=2, actor={"optim": optim})
    run.train()
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["lr/actor"] for line in lines] == pytest.approx([1.0, 0.75, 0.5, 0.25])


def test_a_run_of_epochs_resumes_from_its_file(rows: str, tmp_path: Path) -> None:
    constant = {"actor": {"optim": {"schedule": "constant"}}}
    whole = drawn(sft(rows, tmp_path / "whole", epochs=2, **constant))
    first = sft(rows, tmp_path / "parts", epochs=1, **constant)  # half of it, as if it had been stopped there
    seen = drawn(first)
    written = tomllib.loads((tmp_path / "parts/config.toml").read_text())
    assert written["epochs"] == 1.0 and "steps" not in written
    argv = ["--config", str(tmp_path / "parts/config.toml"), "--epochs", "2", "--resume"]
    second = Run(parse(argv, Registry()))
    assert seen + drawn(second) == whole


def test_another_length_under_a_schedule_is_refused_on_resume(rows: str, tmp_path: Path) -> None:
    sft(rows, tmp_path / "run", epochs=1).train()
    file = str(tmp_path / "run/config.toml")
    for words, named in (
        (["--epochs", "2"], "--epochs 1.0 -> 2.0"),
        (["--steps", "9"], "epochs in .* 1.0 -> --steps 9"),
    ):
        with pytest.raises(UsageError, match=named):
            Run(parse(["--config", file, *words, "--resume"], Registry())).train()


def test_two_ranks_agree_on_the_steps_of_the_epochs(rows: str, tmp_path: Path) -> None:
    argv = ["sft", "--model", "tiny", "--data", "json", "--data.path", rows, "--data.encoding.max-tokens", "60"]
    argv += ["--batch-size", "4", "--epochs", "2", "--output", str(tmp_path / "two"), "--data.heldout-path", rows]
    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "rlhf_core"]
    subprocess.run([sys.executable, *ranks, *argv], check=True, capture_output=True, timeout=240)
    argv[-3] = str(tmp_path / "one")
    Run(parse(argv, Registry())).train()
    for name in ("one", "two"):
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["data/epoch"] for line in lines][-1] > 1.7 and len(lines) == 4
    one, two = (
        [json.loads(line) for line in (tmp_path / name / "evaluation-metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    )
    for alone, shared in zip(one, two, strict=True):  # held-out loss, which ranks share
        assert alone.keys() == shared.keys() and "eval/heldout/loss" in alone
        assert alone == pytest.approx(shared, rel=1e-5)


def test_one_length_is_given(rows: str, tmp_path: Path) -> None:
    flags = ["sft", "--model", "tiny", "--data", "json", "--data.path", rows]
    with pytest.raises(
        UsageError, match="^--steps and --epochs both set the length of the run; give only one of them$"
    ):
        parse([*flags, "--steps", "3", "--epochs", "2"], Registry())
    with pytest.raises(UsageError, match="both set the length"):
        make_config("sft", data={"use": "json", "path": rows}, steps=3, epochs=2, **TINY)
    file = tmp_path / "run.toml"
    file.write_text(to_toml(parse([*flags, "--steps", "3"], Registry())))
    assert parse(["--config", str(file), "--epochs", "2"], Registry()).epochs == 2
    file.write_text(to_toml(parse([*flags, "--epochs", "3"], Registry())))
    again = parse(["--config", str(file), "--steps", "7"], Registry())
    assert (again.steps, again.epochs) == (7, 0)


def test_what_cannot_be_counted_is_one_line_before_a_model_is_loaded(rows: str, tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    stream = {"use": "hf", "path": rows, "streaming": True}
    cases: list[tuple[dict[str, Any], str]] = [
        ({"data": stream, "algorithm": "sft"}, "epochs=… needs data of known length, which a stream is not"),
        ({"algorithm": "grpo", "reward": "length", "filter": "varied"}, "a filter draws extra rows"),
        (
            {"algorithm": "sft", "data": {"use": "json", "path": rows, "encoding": {"max_tokens": 2}}},
            "none of the 10 rows",
        ),
    ]
    for options, message in cases:
        data = options.pop("data", {"use": "json", "path": rows})
        config = make_config(
            options.pop("algorithm"), data=data, epochs=1, output=str(tmp_path / "no"), **options, **TINY
        )
        with pytest.raises(UsageError, match=message):
            Run(config).train()
        assert not (tmp_path / "no").exists()


def test_updates_of_a_batch_are_not_epochs_of_the_data(rows: str, tmp_path: Path) -> None:
    once, twice = (sft(rows, tmp_path / str(n), steps=2, update_epochs=n) for n in (1, 2))
    assert drawn(once) == drawn(twice)


def test_a_forgotten_model_is_one_line(rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["sft", "--data", "json", "--data.path", rows], ["generate"], ["grpo", "--reward", "length"]):
        assert main([*words, "--output", str(tmp_path / "no")]) == 2
        line = "no model is given: pass --model NAME (a hub name, folder or GGUF file), or --model tiny to try"
        assert capsys.readouterr().err == f"rlhf-run: {line}\n"
