"""Accidents of the commands that train nothing: one line, the stated exit code, and no file of the user is touched."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from one_line import RUN

from rlhf_core.cli import main

TINY = "tiny:hidden=8,layers=1"
GENERATE = "generate --prompts 2 --sampling.n 1 --sampling.max-new-tokens 2 --model"
EVAL = "eval {} --evaluator heldout --evaluator.prompts 2 --reward length --sampling.max-new-tokens 2"
SCORE = "score rows.jsonl --reward length"
EXPORT = "export run/checkpoints/step-1"
ROWS = "".join(json.dumps({"prompt": word, "completion": word}) + "\n" for word in "abc")
LONG = "x" * 300
NAMED = {"a link to itself": "loop", "a NUL": "a\0b", "a long name": LONG, "a file below a file": "file/x"}
DEVICES = {"an endless device": "/dev/zero", "a full device": "/dev/full"}

OUTPUTS: list[tuple[str, str, list[str]]] = [
    *((f"{GENERATE} {TINY} --output", "", [*NAMED.values(), *DEVICES.values(), "folder", "loop/x"]),),
    *((f"{SCORE} --output", "", [*NAMED.values(), *DEVICES.values(), "folder", "loop/x", "rows.jsonl"]),),
    *((f"{EVAL.format(TINY)} --output", "", [*NAMED.values(), "file", "loop/x"]),),
    *((f"{EXPORT} --output", "", [*NAMED.values(), "file", "folder", "loop/x", "~nobody-at-all/x"]),),
    *((f"{command} sweep.toml --output", "", [LONG]) for command in ("curves", "frontier")),
    *(("sweep sweep.toml --slurm", "", ["file", "folder", "loop", "file/x"]),),
]
INPUTS: list[tuple[str, str, list[str]]] = [
    ("score", "--reward length", [*NAMED.values(), *DEVICES.values(), "folder", "nowhere", "binary", "deep"]),
    ("export", "", [*NAMED.values(), *DEVICES.values(), "folder", "nowhere", "run"]),
    ("merge-lora", "--output new", [*NAMED.values(), *DEVICES.values(), "folder", "nowhere", "run/model"]),
    *(
        (command, "", [*NAMED.values(), *DEVICES.values(), "folder", "nowhere", "binary"])
        for command in ("sweep", "curves", "frontier")
    ),
    *(
        (command, "", [*NAMED.values(), *DEVICES.values(), "folder", "nowhere/x", "run", "run/checkpoints"])
        for command in (GENERATE, "chat --prompt hi", "eval --evaluator heldout --reward length")
    ),
]
NUMBERS = [
    *((f"{GENERATE} {TINY} {each}", each.split()[0]) for each in ("--seed -1", "--batch-size 0", "--prompts -1")),
    *((f"{GENERATE} {TINY} {each}", each.split()[0]) for each in ("--shard 3/2", "--max-prompt-tokens 0")),
    *((f"{SCORE} {each}", each.split()[0]) for each in ("--seed -1", "--batch-size 0")),
    *((f"{EVAL.format(TINY)} {each}", each.split()[0]) for each in ("--seed -1", "--micro-tokens 0")),
    *((f"chat {TINY} --prompt x {each}", each.split()[0]) for each in ("--seed -1", "--temperature nan")),
]
SWEEPS = {
    "config = 3": "config must be a path, not 3",
    "output = []": "output must be a path",
    'output = "a\\u0000b"': "contains a NUL",
    'discard = "model"': "discard must be a list of names",
    "grid = 3": "grid must be a table",
    "[variants.a]\ngrid = 3": "variants.a.grid must be a table",
    "slurm = 3": "slurm must be a table",
    'seeds = "0"': "seeds must be a list",
    'config = "/dev/zero"': "/dev/zero: is a device",
}


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step, with a checkpoint and a model."""
    folder = tmp_path_factory.mktemp("run")
    words = RUN.replace("--output run", f"--output {folder / 'run'}")
    assert main(words.split()) == 0
    return folder / "run"


@pytest.fixture(autouse=True)
def world(tmp_path: Path, run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working folder with files of all kinds, a run and a sweep of one finished run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RLHF_DISABLE_PLUGIN_AUTOLOAD", "1")
    shutil.copytree(run_folder, "run")
    Path("folder").mkdir()
    Path("file").write_text("mine")
    Path("loop").symlink_to("loop")
    Path("rows.jsonl").write_text(ROWS)
    Path("binary").write_bytes(b"\xff\xfe\0")
    Path("deep").write_text("[" * 100_000)
    Path("sweep.toml").write_text('output = "swept"\n')
    shutil.copytree(run_folder, "swept/run-seed0")
    Path("swept/run-seed0/sweep-status.json").write_text('{"exit": 0}')
    Path("swept/run-seed0/heldout.jsonl").write_text('{"reward": 1.0, "return": 1.0}\n')


def left() -> dict[str, bytes]:
    """Every file, but for what `generate` notes of options before it writes the first line."""
    found = [path for path in Path().rglob("*") if path.is_file() and not path.is_symlink()]
    return {str(path): path.read_bytes() for path in found if not path.name.endswith(".options.json")}


def refused(words: list[str], capsys: pytest.CaptureFixture[str], code: int = 2, user: int = 0) -> str:
    """The one line that is said, when nothing that was there has changed; also to a user who is not root."""
    before = left()
    capsys.readouterr()
    with contextlib.ExitStack() as stack:
        if user:
            os.seteuid(user)
            stack.callback(os.seteuid, 0)
        ended = main(words)
    said = capsys.readouterr()
    lines = [line for line in said.err.splitlines() if "to a temporary folder" not in line]
    assert (ended, len(lines)) == (code, 1), (words, said.err[-2000:])
    assert lines[0].startswith("rlhf-run: ") and "Traceback" not in said.err, words
    after = left()
    assert {name: after.get(name) for name in before} == before, words
    return lines[0]


@pytest.mark.parametrize("row", range(len(OUTPUTS)))
def test_a_place_that_cannot_be_written_is_one_line(row: int, capsys: pytest.CaptureFixture[str]) -> None:
    words, more, places = OUTPUTS[row]
    for place in places:
        refused([*words.split(), place, *more.split()], capsys)
    assert not list(Path("/dev").glob("*.options.json"))


@pytest.mark.parametrize("row", range(len(INPUTS)))
def test_a_file_that_cannot_be_read_is_one_line(row: int, capsys: pytest.CaptureFixture[str]) -> None:
    words, more, places = INPUTS[row]
    for place in places:
        refused([*words.split(), place, *more.split()], capsys)


def test_a_number_that_cannot_be_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for words, option in NUMBERS:
        assert option in refused(words.split(), capsys)


def test_a_sweep_that_says_what_cannot_be_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for content, said in SWEEPS.items():
        Path("s.toml").write_text(content)
        assert said in refused(["sweep", "s.toml", "--status"], capsys), content


# ----------------------------------------------------------------------------------------------------------------------
# damaged files of runs and sweeps
# ----------------------------------------------------------------------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def folder_instead(path: Path) -> None:
    path.unlink()
    path.mkdir()


def link_instead(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def emptied(path: Path) -> None:
    path.write_bytes(b"")


DAMAGES: list[Callable[[Path], None]] = [cut, folder_instead, link_instead, emptied, Path.unlink]
CHECKPOINT = ("state.json", "manifest.json", "run.json", "roles/actor/module.safetensors")


@pytest.mark.parametrize("name", [*(f"checkpoints/step-1/{each}" for each in CHECKPOINT), "config.toml"])
def test_a_damaged_checkpoint_is_one_line_of_every_command_that_takes_it(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in ("export", "chat --prompt hi", f"{GENERATE}", "eval --evaluator heldout --reward length"):
        for damage in DAMAGES:
            if (name, damage) == ("config.toml", cut):
                continue  # whole lines are left
            shutil.rmtree("copy", ignore_errors=True)
            shutil.copytree("run", "copy")
            damage(Path("copy", name))
            said = refused([*command.split(), "copy/checkpoints/step-1"], capsys)
            assert "copy" in said, (command, damage)


METRICS = ("metrics.jsonl", "evaluation-metrics.jsonl", "sweep-status.json")


@pytest.mark.parametrize("name", METRICS)
def test_damaged_lines_of_a_swept_run_are_named_and_the_others_are_drawn(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path("swept/run-seed0", name)
    whole = b'{"step": 1, "reward/mean": 1.0}\n'
    for damaged in (b"3\n", b"nonsense\n", b'{"step": "1"}\n', b"\xff\n", b"[" * 99_999 + b"\n"):
        path.write_bytes(damaged + whole)
        for words in ("sweep sweep.toml --status", "curves sweep.toml --formats"):
            assert main(words.split()) == 0, (words, damaged)
        said = capsys.readouterr().err
        assert name == METRICS[2] or f"{path}:1 is damaged and skipped" in said
        assert "Traceback" not in said


def test_a_damaged_table_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    path = Path("swept/run-seed0/heldout.jsonl")
    for content in ("nonsense\n", "3\n", '{"reward": 1}\n', '{"reward": "x", "return": 1}\n', '{"reward": 1}\n3\n', ""):
        path.write_text(content)
        said = refused(["frontier", "sweep.toml", "--table", "heldout.jsonl", "--formats"], capsys)
        assert str(path) in said
    Path("swept/run-seed0/heldout.parquet").write_bytes(b"PAR1")
    pytest.importorskip("pyarrow")
    assert "heldout.parquet cannot be read" in refused(["frontier", "sweep.toml", "--formats"], capsys)


# ----------------------------------------------------------------------------------------------------------------------
# a disk that is full, a folder that is read-only, a console that is gone
# ----------------------------------------------------------------------------------------------------------------------


@contextmanager
def full_disk(at: int) -> Iterator[None]:
    """While the block runs, no file grows beyond some bytes, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (at, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


WRITERS = {
    "generate": f"{GENERATE} {TINY} --output new",
    "score": f"{SCORE} --output new",
    "export": f"{EXPORT} --output new",
    "eval": f"{EVAL.format(TINY)} --output new",
    "new-plugin": "new-plugin mine",
    "curves": "curves sweep.toml --output new --formats",
}


@pytest.mark.parametrize("command", WRITERS)
def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("swept/run-seed0/metrics.jsonl").write_text('{"step": 1, "reward/mean": 1.0}\n')
    before = set(left())
    with full_disk(16):
        ended = main(WRITERS[command].split())
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("rlhf-run: ")]
    assert ended in (1, 2) and len(said) == 1, (ended, said)
    assert os.strerror(errno.EFBIG) in said[0] or "no space is left" in said[0]
    assert all(not Path(name).stat().st_size for name in set(left()) - before), "half a file"
    assert main(WRITERS[command].split()) == 0, "started again it comes to its end"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
@pytest.mark.parametrize("command", WRITERS)
def test_a_folder_that_may_not_be_written_is_one_line(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("swept/run-seed0/metrics.jsonl").write_text('{"step": 1, "reward/mean": 1.0}\n')
    for folder in (Path.cwd(), *Path.cwd().parents):
        folder.chmod(folder.stat().st_mode | 0o055)
    for path in Path().rglob("*"):
        if not path.is_symlink():
            path.chmod(path.stat().st_mode | 0o044)
    said = refused(WRITERS[command].split(), capsys, user=65534)
    assert "ermission denied" in said or "is not writable" in said


def test_a_command_without_a_console_comes_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Standard output is closed: the stream that Python then has is None."""
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "__stdout__", None)
    for words in (WRITERS["score"], "sweep sweep.toml --status", f"chat {TINY} --prompt hi --max-new-tokens 2"):
        assert main(words.split()) == 0
    assert Path("new").read_text().count("\n") == 3


@pytest.mark.parametrize("name", ["nowhere", "folder", "/dev/full"])
def test_a_file_that_cannot_be_scored_leaves_nothing_beside_it(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    refused(["score", name, "--reward", "length"], capsys)
    assert not list(Path(name).absolute().parent.glob("*.options.json"))
