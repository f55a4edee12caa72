"""Whole runs with adapters: they learn, leave their base alone, and go on after an interruption as if nothing had been."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_core import Run, make_config
from rlhf_core.contract.options import ModelOptions
from rlhf_core.models.loading.load import load_model

pytest.importorskip("peft")

ROWS = [
    {"prompt": word, "completion": word.upper(), "chosen": word.upper(), "rejected": word[::-1]}
    for word in ("alpha", "be", "gamma ray", "d")
]
READ = {
    "sft": ("prompt", "completion"),
    "reward": ("prompt", "chosen", "rejected"),
    "dpo": ("prompt", "chosen", "rejected"),
}
LORA = {"rank": 2, "targets": ["q_proj", "down_proj"]}


def options_of(algorithm: str, folder: Path, **more: Any) -> dict[str, Any]:
    """A run of an instant whose roles are adapted."""
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps({k: row[k] for k in READ.get(algorithm, ("prompt",))}) + "\n" for row in ROWS))
    trained = {"lora": LORA, "optim": {"lr": 1e-2, "schedule": "constant", "warmup": 0.0}}
    options: dict[str, Any] = {
        "algorithm": algorithm,
        "model": "tiny:hidden=16,layers=1",
        "data": {"use": "json", "path": str(path), "encoding": {"template": "raw"}},
        "reward" if algorithm == "reward" else "actor": trained,
        "steps": 4,
        "batch_size": 4,
        "minibatches": 1,
        "save_every": 2,
    }
    if algorithm in ("ppo", "grpo"):
        options |= {"reward": "length", "sampling": {"n": 2, "max_new_tokens": 6}, "minibatches": 2, "update_epochs": 1}
    if algorithm == "ppo":
        options["critic"] = trained
    return options | more


def metrics(output: Path) -> list[dict[str, float]]:
    """Return the metrics of each step, except those that depend on the clock."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in line.items() if not name.startswith(("time/", "speed/", "memory/"))}
        for line in lines
    ]


@pytest.mark.parametrize("algorithm", ["sft", "reward", "dpo", "ppo", "grpo"])
def test_a_run_with_adapters_goes_on_where_it_stopped(algorithm: str, tmp_path: Path) -> None:
    options = options_of(algorithm, tmp_path)
    Run(make_config(**options, output=str(tmp_path / "whole"))).train()
    Run(make_config(**options | {"steps": 2}, output=str(tmp_path / "parts"))).train()
    Run(make_config(**options, output=str(tmp_path / "parts"), resume=True)).train()
    numbers = metrics(tmp_path / "whole")
    assert numbers == metrics(tmp_path / "parts")
    assert numbers[0][f"grad_norm/{'reward' if algorithm == 'reward' else 'actor'}"] > 0
    files = [tmp_path / run / "model" / "adapter_model.safetensors" for run in ("whole", "parts")]
    assert files[0].read_bytes() == files[1].read_bytes()
    full = sum(tensor.numel() for tensor in load_model(options["model"], ModelOptions()).state_dict().values()) * 4
    for checkpoint in (tmp_path / "whole" / "checkpoints").iterdir():
        for role in (checkpoint / "roles").iterdir():
            assert sum(file.stat().st_size for file in role.glob("module*")) < full / 2


def test_the_kl_begins_at_zero_and_grows_as_the_adapters_do(tmp_path: Path) -> None:
    """The reference shares the actor's weights: were it to see the adapters, the KL would stay at zero."""
    options = options_of("grpo", tmp_path, output=str(tmp_path / "run"))
    options["algorithm"] = {"use": "grpo", "kl": {"coef": 0.01}}
    run = Run(make_config(**options))
    run.train()
    kls = [line["kl/mean"] for line in metrics(tmp_path / "run")]
    assert kls[0] == pytest.approx(0.0, abs=1e-6)
    assert abs(kls[-1]) > 1e-6


def test_a_run_with_adapters_learns(tmp_path: Path) -> None:
    options = options_of("sft", tmp_path, output=str(tmp_path / "run"), steps=25)
    options["actor"]["lora"] = {"rank": 8}
    Run(make_config(**options)).train()
    losses = [line["loss/actor"] for line in metrics(tmp_path / "run")]
    assert losses[-1] < losses[0] - 0.2


def test_a_merged_adapter_is_the_policy_that_was_trained(tmp_path: Path) -> None:
    options = options_of("sft", tmp_path, output=str(tmp_path / "run"))
    run = Run(make_config(**options))
    ids = torch.tensor([[5, 6, 7, 8]])
    with run.open():
        from rlhf_core import loop

        loop.train(run)
        run.export()
        with torch.no_grad():
            expected = run.roles["actor"].causal_lm(ids).logits  # type: ignore[attr-defined]
    again = load_model(str(tmp_path / "run" / "model"), ModelOptions())
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, expected, rtol=0, atol=1e-5)
