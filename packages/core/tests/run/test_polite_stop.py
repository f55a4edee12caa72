"""A signal ends a run within a stated time though its reward, loss or template never returns; saved where it can be."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from stuck import run, run_under_nohup, run_with_pid

from rlhf_core.checkpoint import valid_checkpoints
from rlhf_core.run.stop_watch import GRACE, LAST
from rlhf_core.testing import RankResult, run_ranks
from rlhf_core.testing.tiny import tiny_run

WITHIN = 1.0
WORDS = ["rlhf_core.testing.tiny_algorithm:TinyAlgorithm", "--model", "tiny:hidden=16,layers=1", "--steps", "3"]
WORDS += ["--batch-size", "2", "--sampling.max-new-tokens", "4", "--stop-within", f"{WITHIN:g}"]
FUNCTION = """
import pathlib, os, signal, time
def reward_func(queries, prompts, labels):
    if pathlib.Path({file!r}).exists():
        os.kill(int(pathlib.Path({file!r}).read_text()), signal.SIGTERM)
        time.sleep(600)
    return [0.0] * len(queries)
"""


def stuck(way: str, signals: str) -> list[str]:
    return ["--reward", "stuck:Stuck", "--reward.way", way, "--reward.signals", signals]


UNWOUND, FORCED = "step 2 (reward) did not end within 1 s of ", "the run did not end in time and is stopped"
CASES = {  # how it is stuck: (options, exit code, what is said, saved)
    "sleep": (stuck("sleep", "SIGTERM"), 143, f"{UNWOUND}SIGTERM, and the newest checkpoint is step-1", True),
    "spin": (stuck("spin", "SIGHUP"), 129, f"{UNWOUND}SIGHUP, and the newest checkpoint is step-1", True),
    "lock": (stuck("lock", "SIGINT"), 130, f"{UNWOUND}SIGINT, and the newest checkpoint is step-1", True),
    "search": (stuck("search", "SIGUSR1"), 75, f"{UNWOUND}SIGUSR1, and the newest checkpoint is step-1", True),
    "thread": (stuck("thread", "SIGTERM"), 143, f"{UNWOUND}SIGTERM, and the newest checkpoint is step-1", True),
    "several hangups": (stuck("sleep", "SIGHUP+SIGHUP"), 129, UNWOUND, True),
    "swallow": (stuck("swallow", "SIGTERM"), 143, FORCED, False),
    "sum": (stuck("sum", "SIGTERM"), -signal.SIGKILL, "", False),
    "a second signal": (stuck("sleep", "SIGTERM+SIGTERM"), -signal.SIGTERM, "", False),
    "loss": (
        ["--reward", "length", "--loss", "stuck:StuckLoss"],
        143,
        "step 2 (train) did not end within 1 s of SIGTERM, and there is no checkpoint yet",
        False,
    ),
}


QUICK = ("sleep", "swallow", "loss")
"""The cases of every day: unwound and saved, ended by force, unwound and not saved."""


def end(folder: Path, names: Iterable[str]) -> dict[str, RankResult]:
    """Have the cases end as they do, all at once, each in a process."""

    def end_one(name: str) -> RankResult:
        return run_ranks(1, run, *WORDS, *CASES[name][0], "--output", str(folder / name), seconds=240)[0]

    with ThreadPoolExecutor() as threads:
        return dict(zip(names, threads.map(end_one, names), strict=True))


def check(folder: Path, results: Mapping[str, RankResult]) -> None:
    for name, result in results.items():
        _, code, said, saved = CASES[name]
        assert result.code == code, (name, result.stderr)
        assert said in result.stderr and "Traceback" not in result.stderr, (name, result.stderr)
        assert [each.name for each in valid_checkpoints(folder / name)] == (["step-1"] if saved else []), name


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, RankResult]]:
    folder = tmp_path_factory.mktemp("stuck")
    return folder, end(folder, QUICK)


def test_a_run_that_is_stuck_ends_in_time_and_is_saved_where_it_can_be(
    ended: tuple[Path, dict[str, RankResult]],
) -> None:
    check(*ended)


@pytest.mark.slow
def test_whatever_holds_a_run_and_whatever_the_signal_it_ends_in_time(tmp_path: Path) -> None:
    check(tmp_path, end(tmp_path, [name for name in CASES if name not in QUICK]))


def test_what_was_given_up_and_saved_resumes_to_the_same_numbers(
    ended: tuple[Path, dict[str, RankResult]], tmp_path: Path
) -> None:
    """The stuck step had drawn from `random` and sampled; nothing of that is left."""
    again = [*WORDS, "--reward", "stuck:Stuck", "--output"]
    whole, resumed = tmp_path, ended[0] / "sleep"
    assert run_ranks(1, run, *again, str(whole))[0].code == 0
    last = run_ranks(1, run, *again, str(resumed), "--resume", "--resume-changed")[0]
    assert last.code == 0, last.stderr
    for file in ("model/model.safetensors", "samples.jsonl"):
        assert (resumed / file).read_bytes() == (whole / file).read_bytes(), file


def test_a_reward_in_a_worker_process_that_never_returns_is_given_up(tmp_path: Path) -> None:
    (tmp_path / "reward.py").write_text(FUNCTION.format(file=str(tmp_path / "pid")))
    words = [*WORDS, "--reward", "func", "--reward.path", str(tmp_path / "reward.py"), "--reward.workers", "1"]
    result = run_ranks(1, run_with_pid, str(tmp_path / "pid"), *words, "--output", str(tmp_path / "run"))[0]
    assert result.code == 143, result.stderr
    assert (
        f"step 1 (reward) did not end within {WITHIN:g} s of SIGTERM, and there is no checkpoint yet" in result.stderr
    )


def test_two_ranks_end_though_one_is_stuck_and_the_other_waits_for_it(tmp_path: Path) -> None:
    words = [*WORDS, *stuck("sleep", "SIGTERM"), "--reward.rank", "1", "--output", str(tmp_path / "run")]
    waiting, hung = run_ranks(2, run, *words, seconds=120)
    assert hung.code == 143, hung.stderr
    assert "step 2 (reward) did not end within 1 s of SIGTERM" in hung.stderr
    assert waiting.code in (143, -signal.SIGKILL), waiting.stderr
    assert "Traceback" not in waiting.stderr + hung.stderr


def test_a_hangup_that_is_ignored_stays_ignored(tmp_path: Path) -> None:
    """As `nohup` starts a program."""
    words = [*WORDS, *stuck("hangup", "SIGHUP"), "--output", str(tmp_path / "run")]
    assert run_ranks(1, run_under_nohup, *words)[0].code == 0


def test_the_watching_process_ends_with_the_run_that_it_watches() -> None:
    """Also where the run is killed and says nothing."""
    program = "import time; from rlhf_core.run.stop_watch import StopWatch\nwith StopWatch(60) as watch:\n"
    program += "    print(watch._process.pid, flush=True)\n    time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        watcher = int(process.stdout.readline())
        os.kill(watcher, 0)
        process.kill()
    for _ in range(600):
        if not Path(f"/proc/{watcher}").exists() or "\nState:\tZ" in Path(f"/proc/{watcher}/status").read_text():
            return
        time.sleep(0.1)
    pytest.fail("the watching process lives on")


def test_the_stated_time_is_that_of_the_documentation() -> None:
    page = (Path(__file__).parents[4] / "docs" / "reliability.md").read_text()
    assert f"{GRACE:g} s" in page and f"{LAST:g} s" in page


@pytest.mark.parametrize("program", ["", None, "no-program", "."])
def test_a_run_whose_interpreter_cannot_be_started_goes_on_and_says_so_once(
    program: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Python does not know its place, it may not be executed, or it is gone."""
    if program == "no-program":
        program = str(tmp_path / "file")
        Path(program).touch(mode=0o644)
    monkeypatch.setattr(sys, "executable", program)
    handles = len(list(Path("/proc/self/fd").iterdir()))
    tiny_run(tmp_path / "run", reward="length", steps=2).train()
    assert len(list(Path("/proc/self/fd").iterdir())) <= handles + 1, "neither end of the pipe is left open"
    said = [line for line in capsys.readouterr().err.splitlines() if "stopping the run has no time limit" in line]
    assert len(said) == 1 and "cannot be started (" in said[0]
    assert signal.getsignal(signal.SIGVTALRM) == signal.SIG_DFL
