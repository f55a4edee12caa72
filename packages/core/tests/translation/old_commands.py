"""Commands of the original documents and of public documentation, as shell lines, and stub files that they name."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from rlhf_core.plugins.registry import Registry
from rlhf_core.translation.shell import join_words

HERE = Path(__file__).parent
ROOT = HERE.parents[3]

FUNCTION = "def {name}(queries, prompts, labels):\n    return [0.0] * len(queries)\n"
STUBS = {
    **{f"reward_func_{name}.py": FUNCTION.format(name="reward_func") for name in ("code_gen", "math", "conversation")},
    "rewards.py": FUNCTION.format(name="accuracy"),
    "score.py": FUNCTION.format(name="compute_score"),
    "data/harmful_behaviors_custom.csv": "goal,target\na,b\n",
    **dict.fromkeys(
        ("data/gen_data.jsonl", "math.jsonl", "a.jsonl", "b.jsonl"), '{"prompt": "a", "completion": "b"}\n'
    ),
    "data/data_with_rewards.jsonl": '{"prompt": "a", "completion": "b", "reward": 1.0}\n',
    **dict.fromkeys((f"{name}/{split}.parquet" for name in ("gsm8k", "math") for split in ("train", "test")), "stub"),
    "recipes/pipelines/online-ppo-one-pass.toml": (
        'output = "out"\nrecipe = ["prompts"]\n[ingredients.prompts]\nuse = "rows"\ndata = "prompts"\n'
    ),
}
"""Files by name, and what is in them."""


def original_commands() -> Iterator[tuple[str, dict[str, Any], str]]:
    """Yield the program, the flags and the shell line of each command of the five documents."""
    for family in json.loads((HERE / "original_commands.json").read_text()):
        for own in family["runs"]:
            flags = {**family["shared"], **own}
            yield family["program"], flags, line_of(f"{family['launch']} {family['program']}", flags)


def public_commands() -> dict[str, list[str]]:
    """Return commands like those of public documentation, by project."""
    commands: dict[str, list[str]] = {}
    for block in (HERE / "public_commands.txt").read_text().split("\n\n"):
        if block.startswith("## "):
            project = block.removeprefix("## ").strip()
            commands[project] = []
        elif not block.startswith("#"):
            commands[project].append(block)
    return commands


def line_of(head: str, flags: Mapping[str, Any]) -> str:
    """Return a shell line of a program and its flags."""
    words = [head]
    for name, value in flags.items():
        words.append(f"--{name}")
        if value is not True:
            words.append(join_words(value if isinstance(value, list) else [value]))
    return " ".join(words)


def pretend_engines(patch: pytest.MonkeyPatch) -> None:
    """Let checks find DeepSpeed, vLLM and Ray, where they are not installed, in versions that will do: nothing is started."""
    for module, package, version in (
        ("rlhf_strategy_deepspeed.strategy", "deepspeed", None),
        ("rlhf_rollout_vllm.install", "vllm", lambda ours: ("vllm", f"{ours.SUPPORTED}.0")),
        ("rlhf_distributed_ray.launcher", "ray", lambda ours: ours.LOWEST),
    ):
        if find_spec(package) is None and find_spec(module.partition(".")[0]) is not None:
            ours = import_module(module)
            patch.setattr(ours, "find_spec", lambda name: name)
            if version is not None:
                patch.setattr(ours, f"_{package}_version", lambda ours=ours, version=version: version(ours))


def write_stubs(folder: Path) -> None:
    """Write the stub files, and TRL's files, below a folder."""
    files = {path.name: path.read_text() for path in HERE.glob("*.yaml")}
    for name, text in {**STUBS, **files}.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


NEEDED = {
    "vllm_num_engines": ("rollout", "vllm"),
    "use_vllm": ("rollout", "vllm"),
    "get_hf2": ("rollout", "vllm"),
    "gen_hf": ("rollout", "vllm"),
    "main_ppo": ("launcher", "ray"),
    "train_ppo_ray": ("launcher", "ray"),
    "openrlhf": ("strategy", "deepspeed"),
    "verl": ("strategy", "deepspeed"),
    "evaluate_gcg": ("evaluator", "gcg"),
    "grpo.yaml": ("rollout", "vllm"),
    "vllm.": ("rollout", "vllm"),
    "rollout.name": ("rollout", "vllm"),
}
"""The provider that a command with such a word needs, where its package is optional."""


def is_possible(line: str, registry: Registry) -> bool:
    """Return True if the packages are here that a command needs."""
    modules = {"wandb": "wandb", "evaluate_heldout_sampling": "pyarrow"}
    if any(word in line and find_spec(module) is None for word, module in modules.items()):
        return False
    return all(name in registry.table(kind) for word, (kind, name) in NEEDED.items() if word in line)
