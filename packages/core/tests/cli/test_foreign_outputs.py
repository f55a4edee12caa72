"""Commands write over nothing that is not their own."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from rlhf_core.analysis.figures import MAKER, check_own
from rlhf_core.checkpoint.lock import RunLock
from rlhf_core.checkpoint.own_files import OwnFiles, claim_folder, new_files, read_own_files
from rlhf_core.cli import main
from rlhf_core.cli.resumable import append_lines, whole_lines
from rlhf_core.cli.sweep import SCRIPT_MARK, _write_script
from rlhf_core.errors import RunStopped, UsageError

GENERATE = "generate --model tiny:hidden=8,layers=1 --prompts 1 --sampling.n 1 --sampling.max-new-tokens 2"
WITHOUT_END = '{"prompt": "a", "completion": "b"}\n{"prompt": "c", "completion": "d"}'

CASES: dict[str, tuple[str, dict[str, str], str]] = {
    "generate over rows": (
        f"{GENERATE} --output mine",
        {"mine": WITHOUT_END},
        "mine exists and is not a file of this command",
    ),
    "generate over rows that look like its own": (
        f"{GENERATE} --output mine",
        {"mine": '{"uid": 0, "k": 0}'},
        "mine exists and is not a file of this command",
    ),
    "a note of something else": (
        f"{GENERATE} --output out",
        {"out.options.json": '{"mine": 1}'},
        "out.options.json is not a file of this command",
    ),
    "score over rows": (
        "score rows --reward length --output mine",
        {"rows": WITHOUT_END, "mine": WITHOUT_END},
        "mine exists and is not a file of this command",
    ),
    "merge-lora over a model": (
        "merge-lora adapter --output model",
        {"adapter/adapter_config.json": "{}", "adapter/adapter_model.safetensors": "", "model/w": "mine"},
        "already exists",
    ),
    "new-plugin over a folder": ("new-plugin mine", {"rlhf-mine/x": "mine"}, "already exists"),
    "new-plugin over a link to nothing": ("new-plugin other", {}, "already exists"),
    "eval over evaluations of a run": (
        "eval tiny:hidden=8,layers=1 --evaluator heldout --reward length --output run",
        {"run/run.json": "", "run/evaluations.jsonl": "the run's"},
        "evaluations.jsonl belongs to the run",
    ),
    "eval over evaluations": (
        "eval tiny:hidden=8,layers=1 --evaluator heldout --reward length --output mine",
        {"mine/evaluations.jsonl": "mine"},
        "evaluations.jsonl exists and is not a file of this run",
    ),
    "a script over notes": ("sweep s.toml --slurm notes", {"s.toml": "seeds = [0]", "notes": "mine"}, "notes exists"),
    "a script for Ray over notes": (
        "sweep s.toml --ray notes",
        {"s.toml": "seeds = [0]", "notes": "mine"},
        "notes exists",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_file_of_somebody_else_is_refused_and_stays(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words, files, message = CASES[case]
    monkeypatch.chdir(tmp_path)
    Path("rlhf-other").symlink_to("nowhere")
    for name, content in files.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(content)
    if "run/run.json" in files:
        own = new_files()
        type(own)(own.run, "steps = 1\n", ("config.toml", "evaluations.jsonl")).write(Path("run"))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert main(words.split()) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and message in lines[0], lines
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_figures_tables_and_scripts_are_written_over_if_they_are_the_commands_own(tmp_path: Path) -> None:
    path = tmp_path / "file"
    table = ["method", "seeds", "reward", "pareto"]
    for columns, own in (([], f"x {MAKER} y"), (table, "method,seeds,cvar,pareto\r\na,3,1,True\r\n")):
        path.write_text(own)
        check_own(path, columns)
        for foreign in ("mine", "method,mine\n", ""):
            path.write_text(foreign)
            with pytest.raises(UsageError, match="exists and is not a figure or table of this command"):
                check_own(path, columns)
    path.unlink()
    for text in ("one", "two"):
        _write_script(path, f"#!/bin/bash\n{SCRIPT_MARK}\n{text}\n")
    assert path.read_text().endswith("two\n")


def test_an_evaluation_may_write_beside_a_finished_run_and_again(tmp_path: Path) -> None:
    own = OwnFiles("1f", "steps = 1\n", ("config.toml",))
    own.write(tmp_path)
    for names in (["table.parquet"], ["table.parquet", "gcg/"]):
        claim_folder(tmp_path, names, beside_run=True)
        (tmp_path / "table.parquet").write_text("a table")
    assert read_own_files(tmp_path) == OwnFiles("1f", "steps = 1\n", ("config.toml",), ("gcg/", "table.parquet"))
    with pytest.raises(UsageError, match=r"config.toml belongs to the run"):
        (tmp_path / "config.toml").touch()
        claim_folder(tmp_path, ["config.toml"], beside_run=True)


def test_an_evaluation_keeps_out_of_the_folder_of_a_run_that_is_going(tmp_path: Path) -> None:
    OwnFiles("1f", "steps = 1\n", ("config.toml",)).write(tmp_path)
    held = RunLock(tmp_path)
    held.acquire()
    try:
        with pytest.raises(UsageError, match="in use by"):
            claim_folder(tmp_path, ["table.parquet"], beside_run=True)
    finally:
        held.release()
    assert read_own_files(tmp_path) == OwnFiles("1f", "steps = 1\n", ("config.toml",))


def test_the_folder_of_a_run_is_no_place_for_a_recipe(tmp_path: Path) -> None:
    OwnFiles("1f", "steps = 1\n").write(tmp_path)
    with pytest.raises(UsageError, match="is the folder of a run"):
        claim_folder(tmp_path, ["steps/"])


def test_a_folder_of_an_evaluation_is_used_again_by_evaluations(tmp_path: Path) -> None:
    claim_folder(tmp_path / "out", ["table.parquet"])
    (tmp_path / "out" / "table.parquet").write_text("a table")
    claim_folder(tmp_path / "out", ["table.parquet", "another"])


def test_a_disk_that_fills_up_leaves_whole_lines_and_the_command_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out.jsonl"
    append_lines(path, [{"a": 1}])
    path.write_bytes(path.read_bytes() + b'{"half')
    write = os.pwrite

    def full(descriptor: int, content: memoryview, offset: int) -> int:
        if offset > 12:
            raise OSError(28, "No space left on device")
        return write(descriptor, content[:5], offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(
            RunStopped, match="No space left on device; all of its lines are complete, so run the command again"
        ) as caught:
            append_lines(path, [{"b": "x" * 40}])
    assert caught.value.exit_code == 1
    assert path.read_bytes() == b'{"a": 1}\n'
    append_lines(path, [{"b": 2}])
    assert [json.loads(line) for line in whole_lines(path)] == [{"a": 1}, {"b": 2}]
    assert json.loads(path.read_bytes().splitlines()[1]) == {"b": 2}
