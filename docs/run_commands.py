"""Runs what the documentation shows, as a reader would: `nox -s docs`, or `python docs/run_commands.py [FILE …]`.

Each file gets a folder of its own under a temporary one, and its blocks are executed from top to bottom:

* `console`: every line that starts with `$ ` is a command of bash and must exit with 0 (a trailing `\\` continues it).
  What is shown after it must appear in what it prints, in that order, where `…` stands for anything and any number for any
  other. A block that is preceded by `<!-- exit 2 -->` shows a mistake, and its commands must exit with 2.
* `python`: a script that must succeed.
* any block preceded by `<!-- file: NAME -->` is written to NAME, one preceded by `<!-- append: NAME -->` added to it.

`<!-- not run: REASON -->` before a block leaves it out; the reason is printed, so that it is seen. Needs no package.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*)\n(?P<body>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL)
MARK = re.compile(r"<!-- (?P<what>not run|file|append|exit):? (?P<value>.*?) -->\s*\Z")


@dataclass(frozen=True)
class Block:
    """A fenced block and the mark before it."""

    file: Path
    line: int
    language: str
    body: str
    mark: str = ""
    """`not run`, `file`, `append`, `exit`, or nothing"""
    value: str = ""
    """what the mark says"""


@dataclass(frozen=True)
class Command:
    """A command and the lines that are shown after it."""

    text: str
    shown: tuple[str, ...]


def documents() -> list[Path]:
    """Every document that is checked."""
    return [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *sorted(ROOT.glob("docs/*.md")),
        *sorted(ROOT.glob("docs/tutorials/*.md")),
        *sorted(ROOT.glob("docs/reports/*.md")),
        *sorted(ROOT.glob("*/*/README.md")),
        *sorted(ROOT.glob("examples/plugins/*/README.md")),
    ]


def blocks(file: Path) -> Iterator[Block]:
    """The blocks of a document."""
    text = file.read_text(encoding="utf-8")
    for match in FENCE.finditer(text):
        mark = MARK.search(text[: match.start()].rstrip())
        body = re.sub(rf"^{match['indent']}", "", match["body"], flags=re.MULTILINE)
        line = text.count("\n", 0, match.start()) + 1
        what, value = (mark["what"], mark["value"]) if mark else ("", "")
        yield Block(file, line, match["language"], body, what, value)


def commands(body: str) -> Iterator[Command]:
    """The commands of a console block."""
    joined = body.replace("\\\n", "\x00")
    for part in re.split(r"^\$ ", joined, flags=re.MULTILINE)[1:]:
        first, *shown = part.splitlines()
        yield Command(first.replace("\x00", "\\\n"), tuple(line.strip() for line in shown if line.strip()))


def plain(text: str) -> str:
    """`text` with one kind of blank and one kind of number."""
    return " ".join(re.sub(r"[-+]?\d+([.:]\d+)*(e-?\d+)?", "0", text).split())


def missing(printed: str, shown: tuple[str, ...]) -> str:
    """The first line of `shown` that is not in `printed` after the ones before it; empty if all are."""
    squeezed, at = plain(printed), 0
    for line in shown:
        for piece in filter(None, (plain(piece) for piece in line.split("…"))):
            found = squeezed.find(piece, at)
            if found < 0:
                return line
            at = found + len(piece)
    return ""


def run(block: Block, folder: Path) -> str:
    """Do what a block says in `folder`; the reason why it failed, or nothing."""
    if block.mark in ("file", "append"):
        path = folder / block.value
        path.parent.mkdir(parents=True, exist_ok=True)
        before = path.read_text(encoding="utf-8") + "\n\n" if block.mark == "append" else ""
        path.write_text(before + block.body, encoding="utf-8")
        return ""
    if block.language == "python":
        return _run(Command(block.body, ()), [sys.executable, "-c", block.body], folder, 0)
    expected = int(block.value) if block.mark == "exit" else 0
    for command in commands(block.body):
        if wrong := _run(command, ["bash", "-c", command.text], folder, expected):
            return wrong
    return ""


def _run(command: Command, argv: list[str], folder: Path, expected: int) -> str:
    started = time.monotonic()
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "COLUMNS": "120"}
    done = subprocess.run(argv, cwd=folder, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    print(f"  {time.monotonic() - started:6.1f} s  {command.text.splitlines()[0]}", flush=True)
    if done.returncode != expected:
        return f"exit code {done.returncode}, not {expected}:\n{command.text}\n{done.stdout}"
    if line := missing(done.stdout, command.shown):
        return f"{command.text}\nshould print\n{line}\nbut prints\n{done.stdout}"
    return ""


def main(names: list[str]) -> int:
    """Run the documents; 1 if a block failed."""
    failed, ran = 0, 0
    with tempfile.TemporaryDirectory() as temporary:
        for file in [Path(name).resolve() for name in names] or documents():
            print(file.relative_to(ROOT), flush=True)
            folder = Path(temporary) / str(file.relative_to(ROOT)).replace("/", "_")
            folder.mkdir()
            for name in ("examples", "packages", "recipes"):  # a reader stands in a checkout
                shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
            for block in blocks(file):
                if block.mark == "not run":
                    print(f"       not run  line {block.line}: {block.value}")
                elif block.language in ("console", "python") or block.mark in ("file", "append"):
                    ran += 1
                    if wrong := run(block, folder):
                        failed += 1
                        print(f"FAILED {file.relative_to(ROOT)}:{block.line}: {wrong}", flush=True)
    print(f"{ran - failed} blocks ran, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
