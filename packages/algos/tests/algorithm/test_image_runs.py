"""Whole runs of models that read images: what they learn depends on the picture, and an interruption changes nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("PIL")

from vision_models import asked, llava, picture, qwen

from rlhf_core import Run, loop, make_config
from rlhf_core.contract.options import Sampling
from rlhf_core.errors import UsageError

REWARD = "def reward_func(completions):\n    return [sum(map(ord, text)) % 7 / 7 for text in completions]\n"
OPTIM = {"lr": 1e-2, "schedule": "constant", "warmup": 0.0}


def options_of(algorithm: Any, folder: Path, made: Callable[[Path], str], **more: Any) -> dict[str, Any]:
    """A run of an instant on rows with one image, none and two."""
    for name, colour in (("red.png", "red"), ("blue.png", "blue")):
        picture(folder / name, colour)
    rows = [
        asked("Colour?", "red.png"),
        asked("Colour?", "blue.png"),
        asked("Hm?"),
        asked("Both?", "red.png", "blue.png"),
    ]
    name = algorithm if isinstance(algorithm, str) else algorithm["use"]
    for row, said in zip(rows, ("red", "blue", "no", "both"), strict=True):
        if name == "sft":
            row["messages"].append({"role": "assistant", "content": said})
        if name == "dpo":
            row |= {"prompt": row.pop("messages"), "chosen": said, "rejected": said[::-1]}
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options: dict[str, Any] = {
        "algorithm": algorithm,
        "model": str(folder / "model") if (folder / "model").exists() else made(folder / "model"),
        "data": {"use": "json", "path": str(path)},
        "actor": {"optim": OPTIM},
        "steps": 4,
        "batch_size": 4,
        "save_every": 2,
        "micro_tokens": 120,
    }
    if name in ("grpo", "ppo"):
        (folder / "reward.py").write_text(REWARD)
        options |= {
            "reward": {"use": "func", "path": str(folder / "reward.py")},
            "sampling": {"n": 2, "max_new_tokens": 6},
            "minibatches": 2,
        }
    return options | more


def metrics(output: Path) -> list[dict[str, float]]:
    """Return the metrics of each step, except those that depend on the clock."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(("time/", "speed/", "memory/"))} for line in lines]


@pytest.mark.parametrize("made", [llava, qwen], ids=["llava", "qwen2-vl"])
def test_sft_learns_to_tell_red_from_blue(tmp_path: Path, made: Callable[[Path], str]) -> None:
    """The questions are the same, so that the picture alone tells the answers apart."""
    run = Run(make_config(**options_of("sft", tmp_path, made, output=str(tmp_path / "run"), steps=60, save_every=0)))
    with run.open():
        loop.train(run)
        examples = list(run.data.rows)[:2]
        greedy = Sampling(n=1, max_new_tokens=8, temperature=0.0)
        prompts = run.encoder.prompts(examples, [0, 1])
        from rlhf_core.rollout.hf import HuggingFaceRollout

        said = HuggingFaceRollout()(run.roles["actor"], prompts, greedy).texts
    losses = [line["loss/actor"] for line in metrics(tmp_path / "run")]
    assert losses[-1] < 0.1 < 2 < losses[0]
    assert said == ["red", "blue"]


@pytest.mark.parametrize(
    ("algorithm", "made"),
    [
        ("sft", qwen),
        ("dpo", llava),
        ({"use": "grpo", "kl": {"coef": 0.01, "where": "loss"}}, qwen),
        ({"use": "grpo", "kl": {"coef": 0.01, "where": "reward"}}, llava),
    ],
    ids=["sft", "dpo", "grpo", "grpo with the kl in the reward"],
)
def test_a_run_with_images_goes_on_where_it_stopped(
    tmp_path: Path, algorithm: Any, made: Callable[[Path], str]
) -> None:
    options = options_of(algorithm, tmp_path, made)
    Run(make_config(**options, output=str(tmp_path / "whole"))).train()
    Run(make_config(**options | {"steps": 2}, output=str(tmp_path / "parts"))).train()
    Run(make_config(**options, output=str(tmp_path / "parts"), resume=True)).train()
    numbers = metrics(tmp_path / "whole")
    assert numbers == metrics(tmp_path / "parts")
    assert numbers[0]["grad_norm/actor"] > 0
    files = [tmp_path / run / "model" / "model.safetensors" for run in ("whole", "parts")]
    assert files[0].read_bytes() == files[1].read_bytes()
    samples = [json.loads(line) for line in (tmp_path / "whole" / "samples.jsonl").read_text().splitlines()]
    assert any("image" in row["prompt"] for row in samples), "where the images stood"


def test_micro_batches_change_no_number(tmp_path: Path) -> None:
    """One row at a time, or all rows with their one, two and no images together."""
    found = []
    for tokens in (1, 10_000):
        output = tmp_path / f"{tokens}"
        options = options_of("grpo", tmp_path, qwen, output=str(output), steps=1, micro_tokens=tokens, minibatches=1)
        Run(make_config(**options)).train()
        found.append(metrics(output)[0])
    assert found[0]["grad_norm/actor"] > 0
    for name in ("loss/actor", "grad_norm/actor", "reward/mean"):
        assert found[0][name] == pytest.approx(found[1][name], rel=1e-4, abs=1e-6)


def test_adapters_learn_from_images_too(tmp_path: Path) -> None:
    """The reference is the same model without them; what is saved is read again, processor included."""
    pytest.importorskip("peft")
    actor = {"lora": {"rank": 2, "targets": ["q_proj", "down_proj"]}, "optim": OPTIM}
    output = tmp_path / "run"
    Run(make_config(**options_of("dpo", tmp_path, llava, output=str(output), actor=actor))).train()
    losses = [line["loss/actor"] for line in metrics(output)]
    assert losses[-1] < losses[0]
    again = options_of("sft", tmp_path, llava, output=str(tmp_path / "again"), model=str(output / "model"), steps=1)
    Run(make_config(**again)).train()
    assert metrics(tmp_path / "again")[0]["grad_norm/actor"] > 0


def test_a_critic_is_refused_before_anything_is_sampled(tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match="the critic needs a value head, but the vision-language model .* cannot have one"
    ):
        Run(make_config(**options_of("ppo", tmp_path, llava, output=str(tmp_path / "run")))).train()
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
