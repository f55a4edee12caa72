"""Code of a user that ends the program: no exit code passes for that of finished work, and one line says what happened."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from one_line import one_line

from rlhf_core.cli import main

ENDS = {"exits": "import sys; sys.exit(3)", "exits with 0": "raise SystemExit", "interrupts": "raise KeyboardInterrupt"}
FILES = {
    "reward": "def reward_func(prompts):\n    {end}\n",
    "plugin": "{end}\n",
    "hook": "from rlhf_core import hookimpl\n@hookimpl\ndef rlhf_reward():\n    {end}\n",
    "observer": "from rlhf_core import hookimpl\n@hookimpl\ndef rlhf_step_end(step):\n    {end}\n",
    "reader": (
        "from dataclasses import dataclass\nfrom rlhf_core import Data, Example\n"
        "class Rows:\n    def __iter__(self):\n        yield from [Example('a'), Example('b')]\n        {end}\n"
        "@dataclass(frozen=True)\nclass Reader(Data):\n    runs_ahead = {ahead}\n"
        "    def __call__(self, split):\n        return Rows()\n"
    ),
}
FUNCTION = "--reward func --reward.path {name}.py"
CALLED, INTERRUPTED = (1, "{call} was called ({name}.py, line {line}) before the work was done"), (130, "interrupted")
NAMED, IMPORTED = (2, "{name}.py: line {line}: {error}"), (2, "{name}.py cannot be imported: line {line}: {error}")
LOADED = (2, "plugin '{name}' of (local) failed to load: {error}")
PLACES: dict[str, tuple[str, str, tuple[int, str], tuple[int, str]]] = {
    "a reward function": ("reward", FUNCTION, NAMED, INTERRUPTED),
    "a reward function in a worker": ("reward", f"{FUNCTION} --reward.workers 1", NAMED, NAMED),
    "a reward file": ("plugin", FUNCTION, IMPORTED, INTERRUPTED),
    "a plugin": ("plugin", "-p {name}", LOADED, INTERRUPTED),
    "a hook of names": ("hook", "-p {name}", LOADED, INTERRUPTED),
    "a hook of observers": ("observer", "-p {name}", CALLED, INTERRUPTED),
    "a class": ("plugin", "--reward {name}:Mine", CALLED, INTERRUPTED),
    "a reader": ("reader", "--data {name}:Reader --steps 3", CALLED, INTERRUPTED),
    "a reader in the background": ("reader", "--data {name}:Reader --steps 3", CALLED, INTERRUPTED),
}
"""The file, the words, and what is left and said if it exits and if it interrupts."""


@pytest.mark.parametrize("place", PLACES)
def test_code_that_ends_the_program_ends_it_in_one_line_and_not_as_if_it_were_done(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setenv("RLHF_DISABLE_PLUGIN_AUTOLOAD", "1")
    file, words, exits, interrupts = PLACES[place]
    for number, (kind, end) in enumerate(ENDS.items()):
        name = f"ends_{list(PLACES).index(place)}_{number}"  # a module is imported once
        text = FILES[file].format(end=end, ahead=place.endswith("background"))
        Path(f"{name}.py").write_text(text)
        code, said = interrupts if kind == "interrupts" else exits
        call = "sys.exit(3)" if kind == "exits" else "sys.exit()"
        error = {"exits": "SystemExit: 3", "exits with 0": "SystemExit:", "interrupts": "KeyboardInterrupt:"}[kind]
        line = text[: text.index(end)].count("\n") + 1
        expected = said.format(name=name, call=call, line=line, error=error)
        assert expected in one_line(words.format(name=name).split(), capsys, code), (kind, expected)
        assert not Path("run/model").exists()
        shutil.rmtree("run", ignore_errors=True)


NO_PLUGINS = {
    "folder": "plugin 'folder' of (local) failed to load: it is a folder without __init__.py, and has no hook",
    "./folder": "-p ./folder: give a plugin's module or entry point, not a path: use -p folder, with",
    "file.py": "not a path: use -p file, with its folder as working folder or in PYTHONPATH",
    "./file.py": "not a path: use -p file, with its folder as working folder or in PYTHONPATH",
    "..": "not a path",
    "a b": "-p a b: give a plugin's module or entry point, not a path",
    "not_there": "-p not_there: no plugin or module is called 'not_there'",
    "not_there.x": "-p not_there.x: no plugin or module is called 'not_there.x'",
}


@pytest.mark.parametrize("name", NO_PLUGINS)
def test_what_is_no_plugin_is_refused_and_says_how_to_name_one(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    for module in ("folder", "file"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    Path("folder").mkdir()
    Path("file.py").write_text("")
    assert NO_PLUGINS[name] in one_line(["-p", name], capsys)


def test_a_module_without_hooks_is_imported_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    Path("bare_module.py").write_text("from pathlib import Path\nPath('imported').touch()\n")
    assert main(["-p", "bare_module", "plugins", "--kind", "reward"]) == 0
    assert Path("imported").exists()
    assert "-p bare_module: the module has no hook (a function rlhf_…() with @hookimpl);" in capsys.readouterr().err
