"""Killed at any moment and resumed, a run leaves what an uninterrupted one leaves: same numbers, each once, same weights.

A run is a child process, forked from a server that has imported everything, so that starting one costs little. Every
other kill comes at a moment drawn from the clock; the rest at a file operation, drawn from all that a run makes in its
folder (opening, renaming, removing …), since what is on the disk changes there and moments inside saving are brief.
"""

from __future__ import annotations

import json
import multiprocessing
import random
import signal
from pathlib import Path
from typing import Any

import pytest
from killed_child import At, train

STEPS = 3
ALGORITHMS = ("sft", "dpo", "ppo", "grpo")
CLASSES: dict[str, dict[str, Any]] = {
    "plain": {},
    "saving beside the training": {"save_async": True},
    "adapters": {"lora": {"rank": 2, "dropout": 0.1}},
    "adapters, saving beside the training": {"lora": {"rank": 2, "dropout": 0.1}, "save_async": True},
}
"""What is added to an algorithm's options; `lora` to its actor's. Dropout draws from a random state that must be restored."""
QUICK = [
    ("sft", "plain"),
    ("dpo", "saving beside the training"),
    ("ppo", "saving beside the training"),
    ("grpo", "plain"),
    ("grpo", "adapters, saving beside the training"),
]
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "rlhf_core.run.run",
        "rlhf_core.models.export.folder",
        "transformers.generation",
        "transformers.models.llama.modeling_llama",
    ]
)


def attempt(
    options: dict[str, Any], when: At | None = None, seconds: float | None = None, count: Path | None = None
) -> int:
    """Run until the end, the file operation, or the time; the exit code."""
    process = FORKS.Process(target=train, args=(options, when, count))
    process.start()
    process.join(seconds)
    process.kill()
    process.join()
    return process.exitcode or 0


def options_of(algorithm: str, kind: str, folder: Path) -> dict[str, Any]:
    """A run of an instant with evaluations and a checkpoint every step, of the kind that `CLASSES` names."""
    added = dict(CLASSES[kind])
    actor: dict[str, Any] = {"optim": {"lr": 1e-2, "schedule": "cosine", "warmup": 0.5}}
    if "lora" in added:
        actor["lora"] = added.pop("lora")
    words = ["alpha", "be", "gamma ray", "d", "epsilon", "zeta zeta"]
    rows: list[dict[str, Any]] = [
        {"prompt": w, "completion": w.upper(), "chosen": w.upper(), "rejected": w[::-1]} for w in words
    ]
    fields = {"sft": ("prompt", "completion"), "dpo": ("prompt", "chosen", "rejected")}.get(algorithm, ("prompt",))
    path = folder / f"{algorithm}.jsonl"
    path.write_text("".join(json.dumps({name: row[name] for name in fields}) + "\n" for row in rows))
    options: dict[str, Any] = {
        "algorithm": algorithm,
        "model": "tiny:hidden=16,layers=1",
        "data": {"use": "json", "path": str(path), "heldout": 0.4, "encoding": {"template": "raw"}},
        "actor": actor,
        "steps": STEPS,
        "batch_size": 4,
        "save_every": 1,
    }
    if algorithm in ("ppo", "grpo"):
        options |= {"reward": "length", "sampling": {"n": 2, "max_new_tokens": 6}, "minibatches": 2}
        options |= {"evaluator": "heldout", "eval_every": 2}
    return options | added


def left_by(output: Path) -> dict[str, Any]:
    """Everything a run leaves that does not tell the time."""
    metrics = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in metrics] == list(range(1, STEPS + 1))
    evaluations = output / "evaluations.jsonl"
    return {
        "metrics": [
            {k: v for k, v in row.items() if not k.startswith(("time/", "speed/", "memory/"))} for row in metrics
        ],
        "samples": (output / "samples.jsonl").read_bytes(),
        "evaluations": evaluations.read_bytes() if evaluations.exists() else b"",
        "weights": {path.name: path.read_bytes() for path in (output / "model").glob("*.safetensors")},
        "checkpoints": sorted(path.name for path in (output / "checkpoints").iterdir()),
        "hidden": [path.name for path in output.rglob(".*")],
    }


def killed_and_resumed(algorithm: str, kind: str, kills: int, folder: Path) -> None:
    """Kill the run `kills` times, in as many attempts as that takes, and compare each that ends with the uninterrupted."""
    if "lora" in CLASSES[kind]:
        pytest.importorskip("peft")
    options = options_of(algorithm, kind, folder)
    count = folder / "count"
    assert attempt(options | {"output": str(folder / "whole")}, count=count) == 0, (folder / "whole.log").read_text()
    operations, seconds = (float(word) for word in count.read_text().split())
    whole = left_by(folder / "whole")
    assert whole["weights"]
    moments = random.Random(algorithm + kind)
    killed = runs = 0
    while killed < kills:
        output, runs = folder / f"run-{runs}", runs + 1
        for _ in range(min(2, kills)):  # where there are many, also twice in a row
            when, limit = At(moments.randint(1, int(operations))), None
            if (killed + runs) % 2 == 0:
                when, limit = None, moments.uniform(0.3, 1.0) * seconds
            killed += attempt(continued(options, output), when, limit) == -signal.SIGKILL
        for _ in range(min(2, kills)):  # and a run that has ended can be resumed: nothing changes
            assert attempt(continued(options, output)) == 0, Path(f"{output}.log").read_text()
            assert left_by(output) == whole


def continued(options: dict[str, Any], output: Path) -> dict[str, Any]:
    """The options that go on with whatever is in `output`; killed before it had written anything, a run just begins."""
    return options | {"output": str(output), "resume": (output / "config.toml").exists()}


@pytest.mark.parametrize(("algorithm", "kind"), QUICK)
def test_a_run_that_is_killed_and_resumed_ends_as_if_it_had_not_been(algorithm: str, kind: str, tmp_path: Path) -> None:
    killed_and_resumed(algorithm, kind, 1, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_thirty_random_kills_change_nothing(algorithm: str, kind: str, tmp_path: Path) -> None:
    killed_and_resumed(algorithm, kind, 30, tmp_path)
