"""Accidents with numbers, paths, data, templates and code: one line, exit code 2, and the folder can be used at once.

A run's folder that is lost in the middle is among them. Damaged models are in `test_damaged_models.py`, everyday mistakes in
`test_cli_bad_inputs.py`.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from one_line import RUN, one_line

from rlhf_core.cli import main
from rlhf_core.contract.hooks import hookimpl
from rlhf_core.contract.providers import Observer
from rlhf_core.contract.run_view import RunView

LONG = "x" * 5000
HUGE = "9" * 20

NUMBERS = [
    ("--seed -1", "--seed must be at least 0, not -1"),
    *((f"--{name} {HUGE}", f"--{name} expects INT") for name in ("seed", "steps", "batch-size", "keep")),
    ("--seed 1.5", "--seed expects INT, not '1.5'"),
    ("--steps 1e3", "--steps expects INT, not '1e3'"),
    ("--steps -1", "--steps must be at least 0"),
    ("--batch-size 0", "--batch-size must be at least 1"),
    *((f"--actor.optim.lr {value}", "--actor.optim.lr must be") for value in ("nan", "inf", "-1", "1e400")),
    *((f"--sampling.temperature {value}", "--sampling.temperature must be") for value in ("nan", "inf", "-1")),
    *((f"--max-mismatch {value}", "--max-mismatch must be at least 0") for value in ("nan", "-1")),
    ("--dtype floof", "--dtype expects {float32,bfloat16,float16}"),
    ("--actor.dtype int8", "--actor.dtype expects"),
    ("--model tiny:hidden=0", "hidden must be a positive whole number"),
    ("--resume garbage", "--resume expects"),
]
PATHS = {
    "--output": "--output",
    "--config": "--config",
    "--model": "",
    "-p": "-p",
    "--data json --data.path": "",
    "--reward func --reward.path": "",
    "--data.encoding.template-file": "--data.encoding.template-file",
}
"""Options that are paths, and what the line says of each."""
PLACES: dict[str, str] = {
    "a folder": "folder",
    "a file below a file": "file/x",
    "a link to itself": "loop",
    "text that is no UTF-8": "a\udcffb",
    "a NUL": "a\0b",
    "a line break": "./a\nb",
    "an endless device": "/dev/zero",
    "a long name": LONG,
    "a long path": "/".join(["y" * 200] * 30),
}
"""What no option takes for its path, a folder as --output apart."""
NO_ACCIDENT = {("--output", "a folder"), ("--output", "a line break")}
DATA = "--data json --data.path rows"
ROWS: list[tuple[bytes, str]] = [
    ("{}".encode("utf-16"), "rows: expected UTF-8 text"),
    (b"\n\n", "rows: the file has no rows"),
    (b'{"prompt": "a\0b"}', "rows:1: expected one JSON object per line"),
    (b'{"prompt": null}', "rows:1: 'prompt' should be text or a chat, not null"),
    (b'{"prompt": NaN}', "rows:1: 'prompt' should be text or a chat"),
    (b'{"prompt": [{"role": 1, "content": 2}]}', "rows:1: 'prompt': message 0"),
]
CONFIGS: list[tuple[bytes, str]] = [
    ("seed = 1".encode("utf-16"), "c.toml: not valid TOML"),
    (b"seed = -1", "seed in c.toml must be at least 0, not -1"),
    (b"seed = 1e3", "c.toml: seed must be INT, not 1000.0"),
    (f"steps = {HUGE}".encode(), "c.toml: steps must be INT"),
    (b'output = "a\\u0000b"', "contains a NUL"),
    (b"sampling = [1]", "c.toml: sampling must be a table"),
]
TEMPLATES: list[tuple[bytes, str]] = [
    (b"{% if", "rows:1: the chat cannot be rendered: unexpected"),
    (b"{{ a.b.c }}", "rows:1: the chat cannot be rendered: 'a' is undefined"),
    (b"{{ raise_exception('no\\nway') }}", "rows:1: the chat cannot be rendered: no way"),
    (b"{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "cannot be rendered: "),
    (b"{% for i in range(10**9) %}x{% endfor %}", "rendered: Range too big"),
    (b"{{ 1 / 0 }}", "rendered: division by zero"),
    (b"{% include 'x' %}", "rows:1: the chat cannot be rendered"),
    (b"\xff", "--data.encoding.template-file t: it is not UTF-8 text"),
]
REWARDS: list[tuple[bytes, str]] = [
    (b"def reward(", "cannot be imported: SyntaxError: '(' was never closed"),
    (b"\n\nraise ValueError('a\\nb')", "cannot be imported: line 3: ValueError: a b"),
    (b"import not_there_at_all", "cannot be imported: line 1: ModuleNotFoundError"),
    (b"def f(n): return f(n)\nf(1)", "cannot be imported: line 1: RecursionError"),
    (b"\xff", "cannot be imported: SyntaxError"),
    (b"def reward(prompts):\n    return None", "returned NoneType instead of rewards"),
    (
        b"def reward(prompts):\n    return [10**400 for _ in prompts]",
        "returned rewards with a number that is too large",
    ),
]


@pytest.fixture(autouse=True)
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working folder with a folder, a file and a link to itself, and no plugin but core's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("RLHF_DISABLE_PLUGIN_AUTOLOAD", "1")
    Path("folder").mkdir()
    Path("file").write_text("mine")
    Path("loop").symlink_to("loop")
    Path("rows").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')


def left() -> dict[str, bytes]:
    """The files in the working folder but those of a run."""
    return {str(path): path.read_bytes() for path in Path().rglob("*") if path.is_file() and path.parts[0] != "run"}


def refused(words: str | list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The answer to these words is one line that says so, and the folder holds nothing that would stand in the way."""
    before = left()
    line = one_line(words.split() if isinstance(words, str) else words, capsys)
    assert said in line, (words, line[:2000])
    assert left() == before, words
    assert not any(Path("run", name).exists() for name in ("metrics.jsonl", "checkpoints", "model")), words


def test_a_number_that_cannot_be_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for words, said in NUMBERS:
        refused(words, said, capsys)


@pytest.mark.parametrize("option", PATHS)
def test_a_path_that_cannot_be_is_one_line(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    for kind, place in PLACES.items():
        if (option, kind) in NO_ACCIDENT:
            continue
        said = "is not UTF-8 text" if kind == "text that is no UTF-8" else PATHS[option]
        refused([*option.split(), place], said, capsys)


@pytest.mark.parametrize(
    ("name", "words", "table"),
    [
        ("rows", DATA, ROWS),
        ("c.toml", "--config c.toml", CONFIGS),
        ("t", f"{DATA} --data.encoding.template-file t", TEMPLATES),
        ("r.py", "--reward func --reward.path r{}.py --reward.name reward", REWARDS),
    ],
)
def test_a_file_that_cannot_be_used_is_one_line(
    name: str, words: str, table: list[tuple[bytes, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    for number, (content, said) in enumerate(table):
        path = Path(name.replace("r.py", f"r{number}.py"))  # a module is imported once
        path.write_bytes(content)
        if "output" not in content.decode(errors="replace"):
            refused(words.format(number), said, capsys)
            continue
        assert main([*RUN.removesuffix("--output run").split(), *words.split()]) == 2
        assert said in capsys.readouterr().err


def test_a_mark_at_the_beginning_of_a_file_is_no_text(capsys: pytest.CaptureFixture[str]) -> None:
    mark = b"\xef\xbb\xbf"
    Path("c.toml").write_bytes(mark + b"seed = 1.5")
    refused("--config c.toml", "c.toml: seed must be INT, not 1.5", capsys)
    Path("rows").write_bytes(mark + b'{"prompt": "a"}\n')
    assert main([*RUN.split(), *DATA.split()]) == 0


# ----------------------------------------------------------------------------------------------------------------------
# the folder is lost while the run is going
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Accident(Observer):
    """Something that happens to the folder after the second step, when there is a checkpoint of the first."""

    kind: str = "removed"
    """what"""

    def __call__(self, run: RunView) -> object:
        return Happening({"removed": shutil.rmtree, "read-only": read_only}[self.kind], run.output)


class Happening:
    def __init__(self, act: Callable[[Path], None], output: Path) -> None:
        self.act, self.output = act, output

    @hookimpl
    def rlhf_step_end(self, step: int) -> None:
        if step == 2:
            self.act(self.output)


def read_only(folder: Path) -> None:
    for path in (*folder.rglob("*"), folder):
        path.chmod(0o555 if path.is_dir() else 0o444)


@contextmanager
def somebody(folder: Path) -> Iterator[None]:
    """Work in a folder with the rights of a user who is not root."""
    root = os.geteuid() == 0
    if root:
        os.chown(folder, 65534, 65534)
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


LOST = ["--steps", "3", "--save-every", "1", "--observer", f"{__name__}:Accident", "--observer.kind"]


def test_a_folder_that_is_removed_during_the_run_ends_it_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert "run" in one_line([*LOST, "removed"], capsys, code=1)
    shutil.rmtree("run", ignore_errors=True)
    assert main(RUN.split()) == 0


def test_a_folder_that_becomes_read_only_during_the_run_ends_it_and_the_run_continues(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*RUN.split(), "--output", "first"]) == 0  # everything is imported: the interpreter may be root's alone
    capsys.readouterr()
    monkeypatch.setattr(
        sys, "executable", shutil.which("true")
    )  # nor can the watch over stops be started by somebody else
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        folder.chmod(0o755)
        monkeypatch.chdir(folder)
        with somebody(folder):
            line = one_line([*LOST, "read-only"], capsys, code=1)
            assert "Permission denied" in line and "--resume" in line
            for path in (Path("run"), *Path("run").rglob("*")):
                path.chmod(0o755)
            assert main([*RUN.split(), *LOST[:4], "--resume"]) == 0
        said = capsys.readouterr().err
        assert "step 2/3" in said and "step 1/3" not in said
        monkeypatch.undo()
