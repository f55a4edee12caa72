"""The live display: a line that moves on a terminal, a view that is replaced in a notebook, and nothing of it in a pipe."""

from __future__ import annotations

import logging
import os
import pty
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from rlhf_core.observer.live import LiveView, NotebookView, TerminalView, clock, make_view
from rlhf_core.util.activity import activity, report
from rlhf_core.util.messages import console, console_messages, log, progress

TINY = "rlhf_core.testing.tiny_algorithm:TinyAlgorithm"
RUN = f"{TINY} --model tiny:hidden=16,layers=1 --batch-size 2 --sampling.n 2 --sampling.max-new-tokens 4 --steps 2"


class Written(LiveView):
    """Keeps what it would draw."""

    interval = 0.0

    def __init__(self, steps: int, done: int = 0) -> None:
        super().__init__(steps, done)
        self.texts: list[str] = []

    def show(self, text: str) -> None:
        self.texts.append(text)


def run_on_a_terminal(folder: Path, words: list[str]) -> str:
    """Return the output of a command on its own terminal."""
    leader, follower = pty.openpty()
    env = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    with subprocess.Popen(words, cwd=folder, env=env, stdout=follower, stderr=follower, stdin=follower) as process:
        os.close(follower)
        pieces = []
        while True:
            try:
                piece = os.read(leader, 65536)
            except OSError:  # the other end is closed, on Linux
                break
            if not piece:
                break
            pieces.append(piece)
        assert process.wait(timeout=120) == 0, b"".join(pieces).decode()
    os.close(leader)
    return b"".join(pieces).decode()


def test_a_terminal_has_a_line_that_moves_and_ends_with_the_lines_of_a_pipe(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "rlhf_core", *RUN.split(), "--output", "run"]
    written = run_on_a_terminal(tmp_path, words)
    drawn = re.findall(r"\r([^\r\n]*)\x1b\[K", written)
    assert any(re.match(r"step 1/2 ░{10}  \S.*  0:0\d so far", text) for text in drawn)
    assert any(re.match(r"step 2/2 █{5}░{5}  .*reward [+-]\d", text) for text in drawn)
    assert all(len(text) < 120 for text in drawn)
    left = [line.rpartition("\x1b[K")[2].rpartition("\r")[2] for line in written.replace("\r\n", "\n").splitlines()]
    shown = [line.split()[0] for line in left if line.startswith((TINY, "step", "model"))]
    assert shown == [TINY, "step", "step", "model"], "a tidy screen is left"


def test_a_pipe_has_no_display(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "rlhf_core", *RUN.split(), "--output", "run"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "\x1b" not in done.stderr and "\r" not in done.stderr and "░" not in done.stderr
    shown = [line.split()[0] for line in done.stderr.splitlines() if line.startswith((TINY, "step", "model"))]
    assert shown == [TINY, "step", "step", "model"]


def test_reports_are_shown_with_progress_and_time_left() -> None:
    view = Written(20, 3)
    view.open()
    try:
        report("sampling", 12, 32)
        report("scoring")
        view.finish_step(4, "step 4/20 …", "reward +0.42 ± 0.31", 60.0)
        report("training actor", 3, 8)
    finally:
        view.close()
    report("sampling", 1, 2)
    assert view.texts[0].startswith("step 4/20 █░░░░░░░░░  starting")
    assert "  sampling 12/32  0:00 so far" in view.texts[1] and "  scoring  " in view.texts[2]
    assert view.texts[-1] == "step 5/20 ██░░░░░░░░  training actor 3/8  reward +0.42 ± 0.31  15:59 left"
    assert not activity.isEnabledFor(logging.DEBUG), "nobody listens any more"


def test_a_view_draws_at_most_some_times_a_second() -> None:
    view = Written(2)
    view.interval = 60.0
    view.open()
    for number in range(1000):
        report("sampling", number, 1000)
    view.close()
    assert len(view.texts) == 1, "the first one"


def test_reports_are_never_lines_on_the_console(capsys: pytest.CaptureFixture[str]) -> None:
    activity.setLevel(logging.DEBUG)
    try:
        with console_messages():
            report("sampling", 1, 2)
    finally:
        activity.setLevel(logging.INFO)
    assert capsys.readouterr().err == ""


def test_a_message_takes_the_place_of_the_line(capsys: pytest.CaptureFixture[str]) -> None:
    with console_messages():
        view = TerminalView(2, 0)
        view.open()
        log.warning("careful")
        view.close()
    assert re.search(r"\r\x1b\[Krlhf-run: careful\n\rstep 1/2 [^\n]*\x1b\[K\r\x1b\[K$", capsys.readouterr().err)
    assert console.view is None


def test_a_terminal_is_chosen_by_what_surrounds_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(log, "handlers", [])
    monkeypatch.delitem(sys.modules, "IPython", raising=False)
    with console_messages():
        monkeypatch.setenv("TERM", "xterm")
        assert isinstance(make_view(2, 0), TerminalView)
        monkeypatch.setenv("TERM", "dumb")
        assert make_view(2, 0) is None
        monkeypatch.setenv("TERM", "xterm")
        progress.setLevel(logging.ERROR)
        try:
            assert make_view(2, 0) is None, "a silenced run is silent"
        finally:
            progress.setLevel(logging.NOTSET)
    assert make_view(2, 0) is None, "messages go to another handler"


class Page:
    """An HTML object of IPython."""

    def __init__(self, data: str) -> None:
        self.data = data


class Handle:
    """A display handle of IPython."""

    def __init__(self) -> None:
        self.pages: list[str] = []

    def update(self, page: Page) -> None:
        self.pages.append(page.data)


@pytest.fixture
def cell(monkeypatch: pytest.MonkeyPatch) -> Handle:
    """A cell of a notebook, as IPython's modules describe it."""
    handle = Handle()

    def display(page: Page, display_id: bool) -> Handle:
        assert display_id
        handle.update(page)
        return handle

    ipython: Any = types.ModuleType("IPython")
    shown: Any = types.ModuleType("IPython.display")
    ipython.get_ipython = lambda: types.SimpleNamespace(kernel=object())
    shown.HTML, shown.display = Page, display
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", shown)
    return handle


def test_a_notebook_has_one_output_that_is_replaced(cell: Handle, capsys: pytest.CaptureFixture[str]) -> None:
    with console_messages():
        view = make_view(20, 0)
        assert isinstance(view, NotebookView)
        view.open()
        for step in range(1, 13):
            view.finish_step(step, f"step {step}/20  <reward>", "", 1.0)
        view.close()
    assert len(cell.pages) == 14
    assert cell.pages[0].startswith('<progress value="0" max="20"></progress> step 1/20')
    assert "step 12/20  &lt;reward&gt;</pre>" in cell.pages[-1] and "stopped" in cell.pages[-1]
    assert "step 3/20  &lt;" in cell.pages[-1] and "step 2/20  &lt;" not in cell.pages[-1], "the last ten"
    assert not any("\x1b" in page or "\r" in page for page in cell.pages) and capsys.readouterr().err == ""


def test_a_terminals_ipython_is_no_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    ipython: Any = types.ModuleType("IPython")
    ipython.get_ipython = lambda: types.SimpleNamespace()
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    with console_messages():
        assert make_view(2, 0) is None


@pytest.mark.parametrize(("seconds", "text"), [(-3, "0:00"), (65.9, "1:05"), (3600, "1:00:00"), (90061, "25:01:01")])
def test_a_clock_shows_hours_from_an_hour_on(seconds: float, text: str) -> None:
    assert clock(seconds) == text
