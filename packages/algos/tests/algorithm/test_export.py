"""A model folder from any checkpoint: plain ones, adapters, averages, reward models; and commands that take a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf_core import Run, make_config
from rlhf_core.cli import main

ROWS = [{"prompt": f"{n}?", "chosen": f"{n} yes", "rejected": f"no {n}"} for n in range(8)]
LR = {"lr": 1e-2, "schedule": "constant", "warmup": 0.0}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(path)


def run_of(algorithm: str, rows: str, output: Path, role: dict[str, Any] | None = None, **options: Any) -> Run:
    """A run of three steps with a checkpoint of each."""
    name = "reward" if algorithm == "reward" else "actor"
    data = {"use": "json", "path": rows, "heldout": 2, "completion_key": "chosen" if algorithm == "sft" else ""}
    small = {"model": "tiny", "steps": 3, "batch_size": 2, "save_every": 1, "keep": 9, "output": str(output)}
    return Run(make_config(algorithm, data=data, **{name: {"optim": LR, **(role or {})}}, **{**small, **options}))


def same(one: Path, other: Path) -> None:
    """The folders hold the same files and weights."""
    names = {path.relative_to(one) for path in one.rglob("*") if path.is_file()}
    assert names == {path.relative_to(other) for path in other.rglob("*") if path.is_file()}
    for name in names:
        if name.suffix == ".safetensors":
            first, second = load_file(one / name), load_file(other / name)
            assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(
    ("algorithm", "role", "folders"),
    [
        ("sft", {}, ["model"]),
        ("sft", {"lora": {"rank": 2}}, ["model"]),
        ("sft", {"ema": 0.5}, ["model", "model-ema"]),
        ("dpo", {"dtype": "bfloat16"}, ["model"]),
        ("reward", {}, ["model"]),
        ("reward", {"lora": {"rank": 2}}, ["model"]),
    ],
    ids=["sft", "lora", "average", "dpo", "reward", "reward with adapters"],
)
def test_the_last_checkpoint_becomes_the_folder_that_the_run_wrote(
    algorithm: str, role: dict[str, Any], folders: list[str], rows: str, tmp_path: Path, capsys: Any
) -> None:
    if role.get("lora"):
        pytest.importorskip("peft")
    output = tmp_path / "run"
    run_of(algorithm, rows, output, role, evaluator="none").train()
    assert main(["export", str(output / "checkpoints/step-3")]) == 0
    assert f"model saved in {output}/model-step-3" in capsys.readouterr().out
    for folder in folders:
        same(output / folder, output / folder.replace("model", "model-step-3", 1))
    assert "step 3" in (output / "model-step-3/README.md").read_text()
    assert main(["export", str(output / "checkpoints/step-1"), "--output", str(tmp_path / "first")]) == 0
    files = ("adapter_model.safetensors", "model.safetensors")
    name = next(each for each in files if (tmp_path / "first" / each).exists())
    first, last = load_file(tmp_path / "first" / name), load_file(output / "model" / name)
    assert any(not torch.equal(first[key], last[key]) for key in first), "the weights of step 1, not the last ones"
    if not role.get("lora"):
        kind = AutoModelForSequenceClassification if algorithm == "reward" else AutoModelForCausalLM
        kind.from_pretrained(tmp_path / "first")


def test_the_best_model_is_exported_at_the_end(rows: str, tmp_path: Path) -> None:
    """Learning rate 10 makes every step worse: the best is the first one."""
    run = run_of(
        "sft", rows, tmp_path, {"optim": {**LR, "lr": 10.0}}, eval_every=1, keep=1, keep_best="eval/heldout/loss"
    )
    run.train()
    best = json.loads((tmp_path / "checkpoints/best.json").read_text())
    losses = {f"step-{step}": metrics["eval/heldout/loss"] for step, metrics in run.evaluations if step}
    assert best["mode"] == "min" and best["checkpoint"] == min(losses, key=losses.__getitem__) != "step-3"
    assert (
        main(["export", str(tmp_path / "checkpoints" / best["checkpoint"]), "--output", str(tmp_path / "again")]) == 0
    )
    same(tmp_path / "model-best", tmp_path / "again")
    assert "The best checkpoint by eval/heldout/loss" in (tmp_path / "model-best/README.md").read_text()
    ours, last = (load_file(tmp_path / name / "model.safetensors") for name in ("model-best", "model"))
    assert any(not torch.equal(ours[key], last[key]) for key in ours)


def test_commands_take_a_checkpoint_for_a_model(rows: str, tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("peft")
    run_of("sft", rows, tmp_path / "run", {"lora": {"rank": 2}}, evaluator="none").train()
    checkpoint, model = str(tmp_path / "run/checkpoints/step-3"), str(tmp_path / "run/model")
    words = {
        "chat": ["--prompt", "2?", "--temperature", "0", "--max-new-tokens", "4"],
        "eval": ["--evaluator", "heldout", "--reward", "length", "--evaluator.prompts", "2"],
        "generate": ["--prompts", "2"],
    }
    for command, flags in words.items():
        found = []
        for name, folder in ((model, "from-model"), (checkpoint, "from-checkpoint")):
            out = tmp_path / f"{command}-{folder}"
            flags_here = (
                flags if command == "chat" else [*flags, "--sampling.max-new-tokens", "4", "--output", str(out)]
            )
            capsys.readouterr()
            assert main([command, *([name] if command != "generate" else ["--model", name]), *flags_here]) == 0
            found.append(out.read_text() if command == "generate" else capsys.readouterr().out)
        assert found[0] == found[1]


def test_mistakes_are_one_line(rows: str, tmp_path: Path, capsys: Any) -> None:
    output = tmp_path / "run"
    run_of("sft", rows, output, evaluator="none").train()
    checkpoint = output / "checkpoints/step-3"

    def said(*words: str) -> str:
        capsys.readouterr()
        assert main(list(words)) == 2
        line: str = capsys.readouterr().err
        assert line.count("\n") == 1
        return line

    assert "is not a checkpoint; name a folder OUTPUT/checkpoints/step-N" in said("export", str(output))
    assert "has no role 'critic'; it has actor" in said("export", str(checkpoint), "--role", "critic")
    assert "it already exists; name a new folder" in said("export", str(checkpoint), "--output", str(output))
    hint = f"convert it to a model folder with rlhf-run export {checkpoint}"
    assert hint in said(
        "dpo", "--model", str(checkpoint), "--data", "json", "--data.path", rows, "--output", str(tmp_path / "no")
    )
    assert hint in said("score", rows, "--reward", "model", "--reward.model", str(checkpoint))
    (checkpoint / "roles/actor/module.safetensors").write_bytes(b"")
    assert "is damaged (roles/actor/module.safetensors" in said("export", str(checkpoint))
    (output / "config.toml").unlink()
    assert "config.toml, the configuration of the checkpoint, is missing" in said(
        "export", str(output / "checkpoints/step-2")
    )
