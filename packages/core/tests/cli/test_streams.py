"""Work ends with 0 only when it is done: a console that goes away ends nothing, and nothing else passes for the end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_core.cli import app, main

RUN = "rlhf_core.testing.tiny_algorithm:TinyAlgorithm --model tiny:hidden=8,layers=1 --reward length --steps 2 --output run"


def ended(work: str, tmp_path: Path, **streams: object) -> subprocess.CompletedProcess[str]:
    """A process of the command line that does `work` in place of its own."""
    script = tmp_path / "child.py"
    script.write_text(
        f"import os, sys\nfrom rlhf_core.cli import app\ndef work(argv):\n{work}\napp._run = work\nsys.exit(app.main([]))\n"
    )
    options: dict[str, object] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **streams}
    return subprocess.run([sys.executable, str(script)], timeout=300, cwd=tmp_path, **options)  # type: ignore[call-overload,no-any-return]


LINES = "    for i in range(20_000):\n        print('a line of output', i)\n        print('a message', i, file=sys.stderr)\n"


@pytest.mark.parametrize("gone", ["stdout", "stderr"])
def test_work_goes_on_when_the_reader_of_its_output_has_gone(gone: str, tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    work = f"{LINES}    open('done', 'w').close()\n    return 0"
    try:
        end = ended(work, tmp_path, **{gone: writing})
    finally:
        os.close(writing)
    assert end.returncode == 0 and (tmp_path / "done").exists()


def test_work_that_fails_without_a_console_does_not_exit_with_0(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        assert ended(f"{LINES}    return 2", tmp_path, stdout=writing).returncode == 2
        assert ended(f"{LINES}    raise BrokenPipeError('of a plugin')", tmp_path, stdout=writing).returncode == 1
    finally:
        os.close(writing)


def test_a_broken_pipe_of_a_plugin_is_an_error_with_its_traceback(tmp_path: Path) -> None:
    end = ended("    raise BrokenPipeError('of a plugin')", tmp_path)
    assert end.returncode == 1 and "BrokenPipeError: of a plugin" in end.stderr


@pytest.mark.parametrize("code", ["", "0", "3", "75", "'bye'"])
def test_sys_exit_in_a_plugin_is_no_end_of_the_work(code: str, tmp_path: Path) -> None:
    """Whatever its code, which would be read as that of the work: 75 has a batch system start it again."""
    end = ended(f"    sys.exit({code})", tmp_path)
    said = (
        f"rlhf-run: sys.exit({code}) was called (child.py, line 4) before the work was done; nothing else was saved\n"
    )
    assert (end.returncode, end.stderr) == (1, said)


def test_an_end_for_a_signal_before_the_first_step_keeps_its_code(tmp_path: Path) -> None:
    work = "    from rlhf_core.run.signals import PreemptionExit\n    raise PreemptionExit(75)"
    end = ended(work, tmp_path)
    assert (end.returncode, end.stderr) == (75, "")


@pytest.mark.parametrize(
    ("call", "code"),
    [
        ("os._exit(0)", 1),
        ("os._exit(3)", 3),
        ("__import__('threading').Thread(target=os._exit, args=(0,)).start()\n    __import__('time').sleep(60)", 1),
    ],
)
def test_an_end_that_nothing_can_catch_is_said_and_no_success(call: str, code: int, tmp_path: Path) -> None:
    end = ended(f"    {call}\n    return 0", tmp_path)
    exit_call = f"os._exit({3 if code == 3 else 0})"
    said = f"rlhf-run: {exit_call} was called before the work was done; nothing else was saved\n"
    assert (end.returncode, end.stderr) == (code, said)


def test_a_process_that_is_forked_ends_as_it_likes_and_os_exit_is_given_back(tmp_path: Path) -> None:
    work = "    child = os.fork()\n    if not child:\n        os._exit(0)\n    return os.waitpid(child, 0)[1]"
    end = ended(work, tmp_path)
    assert (end.returncode, end.stderr) == (0, "")
    before = os._exit
    assert app.main(["--version"]) == 0
    assert os._exit is before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_output_that_is_lost_on_a_full_disk_is_one_line_and_no_success(tmp_path: Path) -> None:
    with Path("/dev/full").open("w") as full:
        end = ended("    print('a result')\n    return 0", tmp_path, stdout=full)
    assert end.returncode == 1
    assert end.stderr == "rlhf-run: standard output could not be written: No space left on device\n"


def test_streams_that_are_closed_from_the_start_are_no_obstacle_and_no_files_take_their_place(tmp_path: Path) -> None:
    work = "    print('lost')\n    kept = open('kept', 'w')\n    assert kept.fileno() > 2\n    os.write(1, b'x')\n    return 0"
    (tmp_path / "child.py").write_text("")
    ended(work, tmp_path)  # writes the script
    shell = f"exec {sys.executable} child.py <&- >&- 2>&-"
    assert subprocess.run(["bash", "-c", shell], cwd=tmp_path, timeout=300).returncode == 0
    assert (tmp_path / "kept").read_bytes() == b""


def test_a_run_without_a_console_comes_to_its_end(tmp_path: Path) -> None:
    """`rlhf-run … 2>&1 | head -1`."""
    words = f"{sys.executable} -m rlhf_core {RUN} 2>&1 | head -1; echo ${{PIPESTATUS[0]}}"
    said = subprocess.run(["bash", "-c", words], cwd=tmp_path, capture_output=True, text=True, timeout=300).stdout
    assert said.splitlines()[-1] == "0"
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2
    assert (tmp_path / "run" / "model").is_dir()


def test_streams_that_somebody_put_there_are_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.stdout, sys.stderr
    assert main(["--version"]) == 0
    assert (sys.stdout, sys.stderr) == before and capsys.readouterr().out
    assert app.main(["--no-such"]) == 2
