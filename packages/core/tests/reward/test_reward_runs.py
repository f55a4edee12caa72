"""Runs on reward code that raises, hangs, dies, forks or answers wrongly: the sample is named and the run stops, or goes on as
was asked, and no process is left."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import pytest

from rlhf_core.cli import main

RUN = (
    "rlhf_core.testing.tiny_algorithm:TinyAlgorithm --model tiny:hidden=16,layers=1 --rollout hf --steps 2 --batch-size 2 "
    "--data json --data.path rows.jsonl --sampling.n 1 --sampling.max-new-tokens 4 --output run "
    "--reward func --reward.path {file}"
)
WORKER = "--reward.workers 1"
BAD = {
    "raises": ("1 / 0", "", "line 7: ZeroDivisionError: division by zero, on sample #, prompt "),
    "raises in a worker": (
        "1 / 0",
        WORKER,
        "line 7: ZeroDivisionError: division by zero, on sample #, prompt ",
    ),
    "hangs": (
        "time.sleep(600)",
        f"{WORKER} --reward.timeout 0.5",
        "no answer within 0.5 s, on sample #, prompt ",
    ),
    "hangs in C": (
        "re.match('(a+)+$', 'a' * 60 + 'b')",
        f"{WORKER} --reward.timeout 0.5",
        "no answer within 0.5 s, on sample #, prompt ",
    ),
    "dies": (
        "os._exit(3)",
        WORKER,
        "the worker process died (exit code 3), on sample #, prompt ",
    ),
    "gives nan": ("answers[at] = math.nan", "", "rewards_N = nan for sample #, prompt "),
    "gives too few": ("answers.pop()", "", "rewards for 1 samples, on sample #, prompt "),
    "gives a list": (
        "answers[at] = [1.0]",
        "",
        "returned rewards with [1.0] in place of one number per sample, on sample #, prompt ",
    ),
    "gives a column": (
        "answers = __import__('numpy').ones((len(completions), 1))",
        "",
        "returned rewards of the shape (1, 1) with [1.0] in place of one number per sample, on sample #, prompt ",
    ),
    "gives a word": (
        "answers[at] = 'good'",
        "",
        "could not convert string to float: 'good', on sample #, prompt ",
    ),
}
"""What happens to the sample whose label is 1, how it is run, and what is said; # stands for its number."""

FILE = """import math, os, re, subprocess, time
def reward_func(labels, completions):
    answers = [1.0 for text in completions]
    for at, label in enumerate(labels):
        if label == 1:
            subprocess.Popen(["sleep", "600"]) if os.getpid() != {pid} else None
            {bad}
    return answers
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with two rows, and no plugin but core's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("RLHF_DISABLE_PLUGIN_AUTOLOAD", "1")
    rows = ({"prompt": f"{name}?", "label": label} for label, name in enumerate(("good", "bad")))
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(case: str, more: str = "") -> int:
    """The exit code of a run on this reward code."""
    bad, how, _ = BAD[case]
    file = Path(f"{case.replace(' ', '_')}{len(more)}.py")
    file.write_text(FILE.format(bad=bad, pid=os.getpid()))
    return main([*RUN.format(file=file).split(), *how.split(), *more.split()])


def descendants() -> set[int]:
    """Processes that descend from this one and still run."""
    parents = {}
    for path in Path("/proc").iterdir():
        try:
            state, parent = (path / "stat").read_text().rpartition(")")[2].split()[:2] if path.name.isdigit() else "Z0"
        except OSError:
            continue
        if state != "Z":
            parents[int(path.name)] = int(parent)
    found = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {os.getpid()}


def left(before: set[int]) -> set[int]:
    """Return the processes that did not run `before` and still run a moment after the kill."""
    deadline = time.monotonic() + 120
    while (more := descendants() - before) and time.monotonic() < deadline:
        time.sleep(0.05)
    return more


@pytest.mark.parametrize("case", BAD)
def test_a_run_stops_and_names_the_sample_and_leaves_no_process(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = descendants()
    assert run(case) == (1 if case == "gives nan" else 2)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("rlhf-run: ")]
    assert len(said) == 1
    assert any(BAD[case][2].replace("#", number) in said[0] for number in "01") and "bad?" in said[0], said
    assert not left(before)


@pytest.mark.parametrize("case", BAD)
def test_with_a_fallback_it_goes_on_counts_them_and_leaves_no_process(case: str) -> None:
    before = descendants()
    assert run(case, "--reward.fallback -3") == 0
    steps = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert [(step["reward/failed"], step["reward/mean"]) for step in steps] == [(0.5, -1.0)] * 2
    assert not left(before)


@pytest.mark.parametrize("workers", ["", WORKER])
def test_a_function_that_forks_rewards_once_and_its_child_is_no_second_run(workers: str) -> None:
    Path("forks.py").write_text(
        "import os\ndef reward_func(completions):\n    os.fork()\n    return [1.0] * len(completions)\n"
    )
    before = descendants()
    assert main([*RUN.format(file="forks.py").split(), *workers.split()]) == 0
    steps = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [1, 2]
    assert [step["reward/mean"] for step in steps] == [1, 1]
    assert not left(before)
