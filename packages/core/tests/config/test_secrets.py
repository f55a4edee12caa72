"""Secrets are planted everywhere a user may put one; none is found in what a run leaves or says."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from rlhf_core.config.builder import parse
from rlhf_core.config.parsing import read
from rlhf_core.config.value_types import reveal
from rlhf_core.plugins.registry import Registry
from rlhf_core.run.run import Run
from rlhf_core.testing import tiny_run
from rlhf_core.util.jsonl import append_line
from rlhf_core.util.secrets import hide, redact

PLANTED = {
    "environment": "planted-in-env-1",
    "literal": "planted-literal-2",
    "hub": "hf_planted3plantedplanted",
    "userinfo": "planted-user:planted-pw-4",
    "query": "planted-query-5",
}
PLUGIN = '''
import os
from dataclasses import dataclass
from typing import Annotated

from rlhf_core import Reward, Secret, hookimpl
from rlhf_core.config.value_types import reveal


@dataclass(frozen=True)
class Leaky(Reward):
    """A reward that gives its secrets away."""

    token: Annotated[str, Secret()] = ""
    """from the environment"""
    key: Annotated[str, Secret()] = ""
    """given as it is"""
    url: str = ""
    """an address"""
    fails: bool = False
    """with a traceback that holds them"""

    def __call__(self, rollouts):
        known = f"{reveal(self.token)} {reveal(self.key)} {self.url} {os.environ['HF_TOKEN']}"
        for texts in (rollouts.texts, rollouts.raw_texts):
            texts[:] = [f"{known} {text}" for text in texts]
        if self.fails:
            raise RuntimeError(f"cannot ask with {known}")
        return [1.0] * len(rollouts)


@hookimpl
def rlhf_reward():
    return {"leaky": Leaky}
'''
WORDS = [
    *("--model", "tiny:hidden=16,layers=1", "--steps", "2", "--batch-size", "2", "--sampling.max-new-tokens", "4"),
    *("--data", "prompts", "--reward", "leaky", "--rollout", "hf", "--save-every", "1"),
    *("--reward.token", "env:RLHF_TEST_PLANTED", "--reward.key", PLANTED["literal"]),
    *("--reward.url", f"http://{PLANTED['userinfo']}@127.0.0.1:9/score?model=x&api_key={PLANTED['query']}"),
]


@pytest.mark.parametrize("fails", [False, True])
def test_no_secret_is_in_any_file_or_line(fails: bool, tmp_path: Path) -> None:
    (tmp_path / "leaky.py").write_text(PLUGIN)
    algorithm = "rlhf_core.testing.tiny_algorithm:TinyAlgorithm"
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "rlhf_core",
            "-p",
            "leaky",
            algorithm,
            *WORDS,
            "--output",
            "run",
            "--reward.fails",
            str(fails),
        ],
        cwd=tmp_path,
        env={
            "PATH": "",
            "PYTHONPATH": ":".join(filter(None, sys.path)),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "HOME": str(tmp_path),
            "HF_TOKEN": PLANTED["hub"],
            "RLHF_TEST_PLANTED": PLANTED["environment"],
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == int(fails), done.stderr
    said = done.stdout + done.stderr
    assert (
        "RuntimeError: cannot ask with *** *** http://***@127.0.0.1:9/score?model=x&api_key=*** ***" in said
    ) is fails
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(files) >= (1 if fails else 10)
    parts = [part for secret in PLANTED.values() for part in secret.split(":")]
    for place, content in [("the terminal", said.encode()), *((str(path), path.read_bytes()) for path in files)]:
        assert not [part for part in parts if part.encode() in content], place
    if not fails:
        sample = json.loads((tmp_path / "run" / "samples.jsonl").read_text().splitlines()[0])
        assert sample["completion"].startswith("*** *** http://***@127.0.0.1:9/score?model=x&api_key=*** *** ")


def test_a_masked_address_cannot_be_used_and_the_line_says_so(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(
        'algorithm = "rlhf_core.testing.tiny_algorithm:TinyAlgorithm"\n[reward]\nuse = "remote"\nurl = ["http://***@host/"]\n'
    )
    with pytest.raises(
        ValueError, match="reward.url has a hidden part in this file; give the whole address as --reward.url ADDRESS"
    ):
        read(["--config", str(tmp_path / "run.toml")], Registry(autoload=False))


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("https://me:pw@host/a", "https://***@host/a"),
        ("postgres://host/db?password=x&sslmode=y", "postgres://host/db?password=***&sslmode=y"),
        ("http://host/?hf_token=abc#top", "http://host/?hf_token=***#top"),
        ("see http://host/?page=2 and a@b.c", "see http://host/?page=2 and a@b.c"),
        ("key=value in words, no address", "key=value in words, no address"),
    ],
)
def test_what_addresses_carry_is_masked(text: str, masked: str) -> None:
    assert redact(text) == masked


def test_what_was_revealed_is_masked_also_where_json_writes_it_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLANTED_HERE", 'quo"te-\\-ü-secret')
    secret = reveal("env:PLANTED_HERE")
    for line in (secret, json.dumps({"said": secret}), json.dumps({"said": secret}, ensure_ascii=False)):
        assert "secret" not in redact(line)
    assert hide("short") == redact("short"), "a word of few letters is no token"


def test_an_address_without_secrets_is_written_as_it_is(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, steps=0)
    run.train()
    assert "***" not in (tmp_path / "config.toml").read_text()
    assert tomllib.loads((tmp_path / "config.toml").read_text())["steps"] == 0


@pytest.mark.parametrize(
    "word", ["TinyAlgorithm", "completion", "tiny:hidden=16,layers=1", "12345678", "prompts1.jsonl"]
)
def test_a_secret_that_is_a_common_word_changes_neither_configuration_nor_names(
    word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file repeats the run: what is read from it is what was run."""
    (tmp_path / "prompts1.jsonl").write_text('{"prompt": "one"}\n{"prompt": "two"}\n')
    monkeypatch.setenv("DATABASE_PASSWORD", word)
    hide(word)
    registry = Registry()
    words = [
        "rlhf_core.testing.tiny_algorithm:TinyAlgorithm",
        "--model",
        "tiny:hidden=16,layers=1",
        "--seed",
        "12345678",
    ]
    words += [
        "--data",
        "json",
        "--data.path",
        str(tmp_path / "prompts1.jsonl"),
        "--steps",
        "0",
        "--output",
        str(tmp_path / "run"),
    ]
    config = parse([*words, "--batch-size", "2"], registry)
    Run(config, registry).train()
    assert parse(["--config", str(tmp_path / "run" / "config.toml")], registry) == config
    append_line(tmp_path / "lines.jsonl", {"completion": [f"a {word} b", (word,)], "x": 0.12345678, "y": 12345678})
    assert json.loads((tmp_path / "lines.jsonl").read_text()) == {
        "completion": ["a *** b", ["***"]],
        "x": 0.12345678,
        "y": 12345678,
    }


def test_a_word_is_masked_where_it_stands_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_PASSWORD", "training")
    assert redact("training, pretraining; trainings (training)") == "***, pretraining; trainings (***)"
    monkeypatch.setenv("DATABASE_PASSWORD", "training-7")
    assert redact("xtraining-7y") == "x***y", "a secret that no text has by chance is found anywhere"
