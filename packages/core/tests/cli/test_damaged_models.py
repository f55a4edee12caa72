"""A folder of a model that is damaged or contradicts itself: one line that names it, and the folder is not touched."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf_core.cli import main

RUN = (
    "rlhf_core.testing.tiny_algorithm:TinyAlgorithm --data json --data.path rows --rollout hf --reward length --batch-size 2 "
    "--sampling.max-new-tokens 2 --steps 1"
).split()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-50])


def zeroed(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def folder_instead(path: Path) -> None:
    path.unlink()
    path.mkdir()


def link_to_itself(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def holding(content: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(content) and None


def unknown_dtype(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'"F32"', b'"Q99"'))


def setting(**values: Any) -> Callable[[Path], None]:
    return lambda path: path.write_text(json.dumps({**json.loads(path.read_text()), **values})) and None


JSON = [cut, zeroed, holding(b""), holding(b"[]"), holding(b"3"), holding(b"null"), holding(b"[" * 100_000)]
TABLE: list[tuple[str, Callable[[Path], None], str]] = [
    *(("model.safetensors", act, "model.safetensors is damaged") for act in (cut, zeroed, unknown_dtype)),
    *(("model.safetensors", holding(content), "is damaged") for content in (b"", b"nonsense", b"\xff" * 100)),
    ("model.safetensors", holding(b"\x08" + bytes(7) + b"{}      "), "weights are missing"),
    *(("model.safetensors", act, "cannot load") for act in (folder_instead, link_to_itself)),
    *((name, act, name) for name in ("config.json", "generation_config.json", "tokenizer.json") for act in JSON),
    *(("tokenizer_config.json", act, "tokenizer") for act in JSON),
    ("config.json", folder_instead, "has no config.json"),
    ("tokenizer.json", holding(b"{}"), "check its JSON files"),
    *(
        ("config.json", setting(**{name: value}), "cannot load './m'")
        for name, value in (
            ("hidden_size", -1),
            ("hidden_size", 16),
            ("hidden_size", "x"),
            ("num_attention_heads", 0),
            ("vocab_size", 0),
            ("hidden_act", "none such"),
            ("dtype", "floof"),
            ("rope_parameters", 3),
            ("model_type", "none such"),
            ("quantization_config", 3),
        )
    ),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model that a run has written."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "rows").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    words = [*RUN, "--data.path", str(folder / "rows"), "--model", "tiny:hidden=8,layers=1"]
    assert main([*words, "--output", str(folder / "run")]) == 0
    return folder / "run" / "model"


@pytest.mark.parametrize("name", sorted({name for name, *_ in TABLE}))
def test_a_damaged_model_is_one_line(
    name: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    for number, (_, act, said) in enumerate(row for row in TABLE if row[0] == name):
        shutil.rmtree("m", ignore_errors=True)
        shutil.copytree(model, "m")
        act(Path("m", name))
        before = {path: path.read_bytes() for path in Path("m").rglob("*") if path.is_file()}
        capsys.readouterr()
        assert main([*RUN, "--model", "./m", "--output", "run"]) == 2, number
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("rlhf-run: ")]
        assert len(lines) == 1 and said in lines[0], (number, lines)
        assert {path: path.read_bytes() for path in Path("m").rglob("*") if path.is_file()} == before
        assert not any(Path("run", made).exists() for made in ("metrics.jsonl", "checkpoints", "model"))
