"""Messages go through the logger `rlhf`: on the console without a handler, and wherever a Python user wants them."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlhf_core.util.messages import console, console_messages, install_console, log, progress

SCRIPT = """
import logging, sys
{before}
from rlhf_core import Run, make_config
from rlhf_core.util.messages import log, progress
tiny = "rlhf_core.testing.tiny_algorithm:TinyAlgorithm"
options = {{"model": "tiny:hidden=16,layers=1", "sampling": {{"n": 2, "max_new_tokens": 4}}, "batch_size": 2}}
run = Run(make_config(tiny, **options, steps=1, output="out"))
log.warning("a warning")
progress.info("step 1")
"""


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The loggers as a new process has them."""
    level = log.level
    monkeypatch.setattr(log, "handlers", [])
    log.setLevel(logging.NOTSET)
    yield
    log.setLevel(level)


def run_script(folder: Path, before: str, after: str = "") -> str:
    """Return the stderr output of a script."""
    words = [sys.executable, "-c", f"{SCRIPT.format(before=before)}\n{after}"]
    return subprocess.run(words, cwd=folder, stderr=subprocess.PIPE, text=True, check=True).stderr


def test_a_script_that_configures_nothing_has_todays_console(tmp_path: Path) -> None:
    lines = run_script(tmp_path, "", "run.train()").splitlines()
    assert lines[:2] == ["rlhf-run: a warning", "step 1"]
    assert lines[2].startswith("rlhf_core.testing.tiny_algorithm:TinyAlgorithm · model tiny")
    assert [line.split()[0] for line in lines[3:]] == ["step", "model", "report"]


def test_a_level_silences_a_run(tmp_path: Path) -> None:
    assert run_script(tmp_path, 'logging.getLogger("rlhf").setLevel(logging.ERROR)') == ""
    shown = run_script(tmp_path, 'logging.getLogger("rlhf.progress").setLevel(logging.ERROR)')
    assert shown == "rlhf-run: a warning\n"


def test_a_handler_takes_the_messages_from_the_console(tmp_path: Path) -> None:
    before = 'logging.getLogger("rlhf").addHandler(logging.FileHandler("rlhf.log", delay=True))'
    assert run_script(tmp_path, before) == ""
    assert (tmp_path / "rlhf.log").read_text() == "a warning\nstep 1\n"


def test_a_configured_root_logger_gets_each_message_once(tmp_path: Path) -> None:
    lines = run_script(tmp_path, 'logging.basicConfig(level="INFO", format="%(name)s|%(message)s")').splitlines()
    assert lines.count("rlhf|a warning") == 1 and not any(line.startswith("rlhf-run:") for line in lines)
    assert lines.count("rlhf.progress|step 1") == 1


@pytest.mark.usefixtures("bare")
def test_the_console_of_a_command_writes_once_whatever_a_library_adds(capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    extra = logging.StreamHandler(sys.stderr)
    root.addHandler(extra)
    try:
        with console_messages():
            install_console()
            log.warning("one %s", "event")
            progress.info("step 1")
    finally:
        root.removeHandler(extra)
    assert capsys.readouterr().err == "rlhf-run: one event\nstep 1\n"
    assert log.handlers == [] and log.propagate


@pytest.mark.usefixtures("bare")
def test_a_handler_of_the_root_logger_is_enough(caplog: pytest.LogCaptureFixture) -> None:
    install_console()  # pytest's handlers are on the root logger
    assert console not in log.handlers
    progress.info("step 1")
    assert [record.getMessage() for record in caplog.records] == ["step 1"]
