"""Bad folders, files and environments: one line, exit code 2, no traceback. Flags and TOML are in test_cli_errors.py."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf_core.checkpoint.own_files import new_files
from rlhf_core.cli import main

ALGORITHM = "rlhf_core.testing.tiny_algorithm:TinyAlgorithm"
RUN = f"{ALGORITHM} --model tiny:hidden=16,layers=1 --data prompts --rollout hf --reward length --steps 1 --output run"
CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}


def file(name: str, content: str | bytes = "") -> Callable[[], None]:
    """Return a function that writes this file in the working folder."""

    def make() -> None:
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    return make


def both(*makers: Callable[[], None]) -> Callable[[], None]:
    def make() -> None:
        for maker in makers:
            maker()

    return make


def folder(name: str, mode: int = 0o755) -> Callable[[], None]:
    def make() -> None:
        Path(name).mkdir(parents=True, mode=mode)

    return make


def begun() -> None:
    """A run that was killed after its first step."""
    Path("run").mkdir()
    new_files().with_names(["metrics.jsonl"]).write(Path("run"))
    Path("run/metrics.jsonl").write_text('{"step": 1}\n')


FOLDERS: dict[str, tuple[Callable[[], None], str, str]] = {
    "the output is a file": (file("run"), "", "--output run is a file; name a folder"),
    "the output's parent is a file": (file("there"), "--output there/run", "cannot write to --output there/run"),
    "the output holds a run": (begun, "", "run already holds a run; add --resume"),
    "a folder of checkpoints": (folder("run/checkpoints"), "", "run/checkpoints exists and is not a file of this run"),
    "a file of metrics": (file("run/metrics.jsonl"), "", "run/metrics.jsonl exists and is not a file of this run"),
    "nothing to resume": (folder("empty"), "--output empty --resume", "there is no run in empty to resume"),
    "a run that cannot be told from other files": (
        file("run/config.toml"),
        "--resume",
        "run/run.json, the list of the run's files, is missing or damaged, and no checkpoint has a copy",
    ),
    "a link that leads out": (
        lambda: (Path("run").mkdir(), Path("run/model").symlink_to("/"))[1],
        "",
        "run/model is a link that points outside run",
    ),
    "a model folder that is not there": (folder("x"), "--model ./missing", "no folder './missing'"),
    "a model folder without anything": (folder("empty"), "--model ./empty", "empty is not a Hugging Face model folder"),
    "a model folder without weights": (
        file("bare/config.json", json.dumps(CONFIG)),
        "--model ./bare",
        "bare has no weights in safetensors format",
    ),
    "a model folder with a pickle": (
        both(file("old/config.json", json.dumps(CONFIG)), file("old/pytorch_model.bin", b"\x80\x04.")),
        "--model ./old",
        "pickled weights can run code and are not loaded",
    ),
    "a run's folder as a model": (
        file("done/model/config.json", "{}"),
        "--model ./done",
        "done is a run's output; its model is",
    ),
    "an adapter without a base": (
        both(file("a/adapter_config.json", "{}"), file("a/adapter_model.safetensors", b"")),
        "--model ./a",
        "has no base_model_name_or_path",
    ),
    "an adapter with a pickle": (file("a/adapter_config.json", "{}"), "--model ./a", "pickled weights can run code"),
    "several GGUF files": (
        both(file("g/a.gguf"), file("g/b.gguf")),
        "--model ./g",
        "has 2 GGUF files; pass one of them: a.gguf, b.gguf",
    ),
    "a data file that is not there": (folder("x"), "--data json --data.path no.jsonl", "no.jsonl: No such file"),
    "a folder as a data file": (folder("d"), "--data json --data.path d", "d: Is a directory"),
    "a data file of zero bytes": (file("d.jsonl"), "--data json --data.path d.jsonl", "d.jsonl: the file has no rows"),
    "a data file that is no text": (
        file("d.jsonl", b"\xff\xfe\x00"),
        "--data json --data.path d.jsonl",
        "d.jsonl: expected UTF-8 text",
    ),
    "a row that is no JSON": (
        file("d.jsonl", '{"prompt": "a"}\n{oops'),
        "--data json --data.path d.jsonl",
        "d.jsonl:2: expected one JSON object per line",
    ),
    "a row that is no object": (
        file("d.jsonl", '{"prompt": "a"}\n7'),
        "--data json --data.path d.jsonl",
        "d.jsonl:2: a row should be an object",
    ),
    "a row without a prompt": (
        file("d.jsonl", '{"colour": "a"}'),
        "--data json --data.path d.jsonl",
        "d.jsonl:1: no prompt among the columns colour",
    ),
    "half a character": (
        file("d.jsonl", '{"prompt": "\\ud800"}'),
        "--data json --data.path d.jsonl",
        "d.jsonl:1: 'prompt': '\\ud800' is half of a surrogate pair",
    ),
    "rows that nest without end": (
        file("d.jsonl", '{"prompt": ' + "[" * 100_000),
        "--data json --data.path d.jsonl",
        "d.jsonl:1: nested too deeply",
    ),
    "a reward file that is not there": (folder("x"), "--reward func --reward.path no.py", "no.py"),
    "a configuration that is no text": (file("c.toml", b"\xff"), "--config c.toml", "c.toml: not valid TOML"),
    "a configuration that nests without end": (
        file("c.toml", "a = " + "[" * 5000),
        "--config c.toml",
        "c.toml: nested too deeply",
    ),
    "a configuration of a thousand digits": (
        file("c.toml", "seed = " + "1" * 5000),
        "--config c.toml",
        "c.toml: not valid",
    ),
}

ENVIRONMENT: dict[str, tuple[dict[str, str], str, str]] = {
    "a token's variable that is not set": (
        {},
        "--reward remote --reward.url http://127.0.0.1:9/ --reward.token env:RLHF_NOT_SET",
        "an option is given as env:RLHF_NOT_SET, but the environment variable RLHF_NOT_SET is not set",
    ),
    "an address that is none": (
        {},
        "--reward remote --reward.url 127.0.0.1:9",
        "--reward.url 127.0.0.1:9: expected an address",
    ),
    "a server that is not there": (
        {},
        "--reward remote --reward.url http://127.0.0.1:9/ --reward.tries 1",
        "--reward.url: no server answered in 1 tries: http://127.0.0.1:9/",
    ),
    "no tensorboard": ({"HIDE": "tensorboard"}, "--observer tensorboard", "observer tensorboard needs tensorboard"),
    "no wandb": ({"HIDE": "wandb"}, "--observer wandb", "observer wandb needs wandb: python3 -m pip install"),
    "no key for wandb": (
        {"HOME": ".", "WANDB_MODE": "online", "NETRC": "./none"},
        "--observer wandb",
        "observer wandb: No API key configured",
    ),
    "a plugin to load that is not there": ({}, "-p nobody_has_it", "-p nobody_has_it: no plugin or module is called"),
    "an offline hub": ({"HF_HUB_OFFLINE": "1"}, "--model nobody/nothing", "cannot load 'nobody/nothing'"),
}


@pytest.fixture(autouse=True)
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty working folder, and no plugin but core's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("RLHF_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)


def refused(words: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    """`words` after the usual ones win over them; the answer is one line that says so, after what a run says of itself."""
    assert main([*RUN.split(), *words.split()]) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("rlhf-run: ")]
    assert len(lines) == 1 and said in lines[0], captured.err
    assert "Traceback" not in captured.err and captured.out == ""


@pytest.mark.parametrize("case", FOLDERS)
def test_a_bad_folder_or_file_is_one_line(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    make, words, said = FOLDERS[case]
    make()
    refused(words, said, capsys)


@pytest.mark.parametrize("case", ENVIRONMENT)
def test_a_bad_environment_is_one_line(
    case: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    variables, words, said = ENVIRONMENT[case]
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if "HIDE" in os.environ:
        monkeypatch.setattr("rlhf_core.observer.tracker.find_spec", lambda module: None)
    elif "wandb" in case:
        pytest.importorskip("wandb").teardown()  # it keeps the key of a test before
    refused(words, said, capsys)


def test_there_are_enough_of_them() -> None:
    assert len(FOLDERS) + len(ENVIRONMENT) >= 36
