"""Runs of the tests, in this process or as one of several ranks (`main`).

Each leaves FOLDER/CASE-STAGE with what a run writes and, beside it, `result.pt`: metrics of every step, every completion
that was sampled, and the final weights of every trained role. The rest of a run is checked here, where the ranks are, and
what was seen goes into the same file.
"""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

import torch

from rlhf_core import Run, make_config
from rlhf_core.contract.batch import Batch, Rollouts
from rlhf_core.contract.optimizers import AdamW
from rlhf_core.contract.options import TrainedOptions
from rlhf_core.contract.plan import RoleSpec
from rlhf_core.contract.providers import Advantage, Algorithm, Loss, Strategy
from rlhf_core.contract.results import LossTerms, Outputs, Reduction, RewardOutput
from rlhf_core.contract.roles import Trainable
from rlhf_core.contract.terms import ProviderChoices, Term
from rlhf_core.errors import UsageError
from rlhf_core.launcher.local import join_world
from rlhf_core.models.build import build_module
from rlhf_core.run.iteration import Iteration
from rlhf_core.strategy.torch import TorchStrategy
from rlhf_core.testing import check_strategy
from rlhf_core.testing.tiny import tiny_rollouts

STEPS = 20
ACTOR = {"optim": {"lr": 1e-3, "schedule": "cosine", "warmup": 0.2, "weight_decay": 0.1, "max_grad_norm": 0.5}}
ONLINE = {"batch_size": 4, "sampling": {"n": 2, "max_new_tokens": 6}, "reward": {"use": "func", "path": __file__}}


def reward_func(completions: list[str]) -> list[float]:
    """The share of characters before `m`: something to learn, different for every completion."""
    return [sum(character < "m" for character in text) / max(1, len(text)) for text in completions]


@dataclass(frozen=True)
class Fixed(Advantage):
    """The reward less a half: coupled to nothing, so that ranks cannot change it."""

    needs: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, rewards: RewardOutput, rollouts: Rollouts, extras: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return torch.where(rollouts.mask_NT, rewards.rewards_N[:, None] - 0.5, 0.0)


@dataclass(frozen=True)
class Both(Loss):
    """Policy gradient and a value of every token: two heads, one of them fresh."""

    outputs: ClassVar[frozenset[str]] = frozenset({"logprobs_NT", "values_NT"})
    needs: ClassVar[frozenset[str]] = frozenset({"advantages_NT"})
    rows_per_unit: ClassVar[int] = 1

    def __call__(self, outputs: Outputs, batch: Batch) -> LossTerms:
        error_NT = outputs["values_NT"] - batch["advantages_NT"]
        return LossTerms(error_NT.square() - batch["advantages_NT"] * outputs["logprobs_NT"], Reduction("token"))


@dataclass(frozen=True)
class Plain(Algorithm):
    """An online algorithm that needs no package but core."""

    defaults: ClassVar[Mapping[str, str]] = {"data": "prompts", "rollout": "hf", "reward": "length"}
    roles: ClassVar[Mapping[str, Any]] = {"actor": TrainedOptions(optim=AdamW(lr=1e-3))}

    def __call__(self, choices: ProviderChoices) -> tuple[Term, ...]:
        return (Term("actor", "actor", Both(), Fixed()),)


def write_data(folder: Path) -> None:
    """Ragged rows, demonstrations and pairs. For the process that starts the ranks."""
    dice = random.Random(0)
    words = "the cat sat on a mat and saw one big red dog run far away from home".split()

    def some(most: int) -> str:
        return " ".join(dice.choices(words, k=dice.randint(1, most)))

    rows = [{"prompt": some(8), "completion": some(9)} for _ in range(64)]
    pairs = [{"prompt": some(8), "chosen": some(9), "rejected": some(9)} for _ in range(64)]
    for name, content in (("rows", rows), ("pairs", pairs)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, content)), encoding="utf-8")


def offline(folder: Path, name: str) -> dict[str, Any]:
    """Options of a case on data."""
    return {"data": {"use": "json", "path": str(folder / f"{name}.jsonl")}, "batch_size": 8}


CASES: dict[str, Callable[[Path], tuple[Any, dict[str, Any]]]] = {
    "plain": lambda folder: (Plain(), ONLINE),
    "sft": lambda folder: ("sft", offline(folder, "rows")),
    "dpo": lambda folder: ("dpo", offline(folder, "pairs")),
    # with seed 0 a draw of the third step is so close to two tokens that ring attention's rounding decides
    "ppo": lambda folder: ("ppo", {**ONLINE, "critic": ACTOR, "seed": 1}),
    "grpo": lambda folder: ("grpo", {**ONLINE}),
    "grpo3": lambda folder: ("grpo", {**ONLINE, "batch_size": 3}),
    "ppo5": lambda folder: ("ppo", {**ONLINE, "critic": ACTOR, "batch_size": 5}),
    "dpo3": lambda folder: ("dpo", {**offline(folder, "pairs"), "batch_size": 3}),
    "sft1": lambda folder: ("sft", {**offline(folder, "rows"), "batch_size": 1}),
    "sft3": lambda folder: ("sft", {**offline(folder, "rows"), "batch_size": 3}),
    "wide": lambda folder: (
        "grpo",
        {**ONLINE, "model": "tiny:heads=4,kv_heads=2", "actor": {**ACTOR, "gradient_checkpointing": True}},
    ),
    "odd": lambda folder: (
        "grpo",
        {**ONLINE, "model": "tiny:hidden=48,heads=3", "actor": {**ACTOR, "gradient_checkpointing": True}},
    ),
    "repulse": lambda folder: (
        {"use": "repulse", "alpha": 0.1, "target": {"beta": -2.0}},
        {**ONLINE, "sampling": {"n": 4, "max_new_tokens": 6}, "proposal": ACTOR},
    ),
    "distill": lambda folder: ("distill", {**offline(folder, "rows"), "teacher": {"model": "tiny:layers=1"}}),
    "lora": lambda folder: ("sft", {**offline(folder, "rows"), "actor": {**ACTOR, "lora": {"rank": 4}}}),
    "bf16": lambda folder: ("sft", {**offline(folder, "rows"), "actor": {**ACTOR, "dtype": "bfloat16"}}),
}
"""Algorithm and options of each case; a number is the rows of a batch, which two ranks do not divide."""

VARIANTS: dict[str, dict[str, Any]] = {
    "": {},
    "o": {"offload": "optimizer"},
    "a": {"offload": "all"},
    "c": {"offload": "optimizer", "cpu_adam": True},
    "h": {"hpz": 2},
    "s": {"sequence": 2},
    "q": {"sequence": 4},
    "r": {"sequence": 2, "sequence_kind": "ring"},
    "w": {"sequence": 4, "sequence_kind": "ring"},
    "t": {"tensor": 2},
    "f": {"tensor": 4},
    "ot": {"offload": "optimizer", "tensor": 2},
    "l": {"leaf_modules": ("LlamaDecoderLayer",)},
}
"""Options beside the stage, by the letter that follows it in a word."""

STATES = ("0", "1", "1o", "2", "2o", "3", "3o", "3a")
"""Stages with their letters that keep states in different places, on any number of ranks and without a compiler."""

EVERY = (*STATES, "3l")
"""With those that gather weights in another way, where states are as in stage 3."""


def sharded(stage: str) -> Any:
    """The strategy of a stage and its letter, such as `2o`."""
    from rlhf_strategy_deepspeed.strategy import DeepSpeed

    number: Any = int(stage[0])
    return DeepSpeed(stage=number, **VARIANTS[stage[1:]])


class Recording(Run):
    """A run that remembers its metrics and what was sampled, in the order of the prompts."""

    def rollouts(self, *args: Any, **options: Any) -> Rollouts:
        rollouts = super().rollouts(*args, **options)
        rows = [row[:length].tolist() for row, length in zip(rollouts.tokens_NT, rollouts.lengths_N, strict=True)]
        self.sampled.append([row for rank in self.world.gather(rows) for row in rank])
        return rollouts

    def finish(self, iteration: Iteration, credited: Mapping[str, Batch]) -> None:
        super().finish(iteration, credited)
        self.history.append(dict(self.last_metrics))


def run(folder: Path, case: str, strategy: Any, name: str, **options: Any) -> dict[str, Any]:
    """Run `case` to the end; on every rank what it gave."""
    algorithm, own = CASES[case](folder)
    # small micro-batches, so that ranks have several, and not equally many
    shared = {"model": "tiny", "steps": STEPS, "micro_tokens": 256, "save_every": STEPS // 2, "actor": ACTOR}
    config = make_config(algorithm, **{**shared, **own, "strategy": strategy, "output": str(folder / name), **options})
    this = Recording(config)
    this.sampled, this.history = [], []
    this.train()
    weights = {
        role: {key: tensor.float().clone() for key, tensor in this.roles[role].weights()}
        for role in this.plan.trained_roles
    }
    return {"metrics": this.history, "sampled": this.sampled, "weights": weights}


def resumed(folder: Path, case: str, strategy: Any, name: str, copy: str = "", **options: Any) -> dict[str, Any]:
    """Run `case` again from its checkpoint in the middle, in a copy of its folder."""
    steps = options.get("steps", STEPS)
    world, copy = join_world(), copy or f"{name}-resumed"
    if world.rank == 0:
        shutil.copytree(folder / name, folder / copy)
        shutil.rmtree(folder / copy / "checkpoints" / f"step-{steps}")
    world.barrier()
    return run(folder, case, strategy, copy, resume=True, **options)


def every_stage(folder: str, case: str, options: Mapping[str, Any]) -> None:
    """Run `case` under each stage on every rank, and leave FOLDER/found.pt; without a start of torchrun."""
    torch.set_num_threads(1)
    world = join_world()
    found = {stage: run(Path(folder), case, sharded(str(stage)), f"stage{stage}", **options) for stage in range(4)}
    if world.rank == 0:
        torch.save(found, Path(folder, "found.pt"))


def mistake(action: Callable[[], object]) -> str:
    """Return the user's message."""
    try:
        action()
    except UsageError as error:
        return str(error)
    return ""


def main(folder: Path, *words: str) -> None:
    """Each word is CASE:STAGE; or CASE:FOLDER:STAGE, which resumes what is in a folder; or `wrong`, for mistakes; or `steps`,
    for what no whole run shows."""
    torch.set_num_threads(1)
    world = join_world()
    for word in words:
        name = word.replace(":", "-")
        result: Any
        if word == "wrong":
            result = wrong(folder)
        elif word == "steps":
            strategies = {"torch": TorchStrategy("cpu"), **{stage: sharded(stage) for stage in EVERY}}
            result = {key: {"norms": norms(each)} for key, each in strategies.items()}
            for key in ("torch", *STATES):
                result[key] |= states(strategies[key], scaled=key != "0")
            if world.size == 1:
                for stage in "0123":
                    check_strategy(strategies[stage])
        elif word.count(":") == 2:
            case, old, stage = word.split(":")
            result = resumed(folder, case, sharded(stage), old, name)
        else:
            case, stage = word.split(":")
            result = run(folder, case, sharded(stage), name)
            result["resumed"] = resumed(folder, case, sharded(stage), name)
        if world.rank == 0:
            torch.save(result, folder / f"{name}.pt")


def states(strategy: Strategy, scaled: bool) -> dict[str, Any]:
    """Results of steps in which the states of a role under `strategy` move; with `scaled`, in float16 too."""
    return {
        "moved": moved(strategy),
        "broken": {dtype: broken(strategy, dtype) for dtype in ("float32", "bfloat16")},
        "slept": slept(strategy),
        "overflow": overflow(strategy) if scaled else None,
    }


def trainable(strategy: Strategy, dtype: str, optim: AdamW, freeze: tuple[str, ...] = ()) -> Trainable:
    """A tiny model with two heads under `strategy`, outside any run."""
    outputs = frozenset({"logprobs_NT", "values_NT"})
    options = TrainedOptions(model="tiny:heads=4,kv_heads=4", dtype=dtype, optim=optim, freeze=freeze)
    spec = RoleSpec("actor", options, outputs, terms=(("data", Term("actor", "data", Both())),))
    return strategy(lambda: build_module(spec), optim, 10)


def norms(strategy: Strategy) -> list[float]:
    """Gradient norms of steps whose micro-batches use different heads, with inference between forward and backward, and
    states that leave the device between steps and come back."""
    role = trainable(strategy, "float32", AdamW(lr=1e-2, max_grad_norm=0.1))
    rank, size = role.world.rank, role.world.size
    batch = tiny_rollouts(prompts=2, completions=4)
    found = []
    for heads in (("logprobs_NT", "values_NT"), ("logprobs_NT",), ("logprobs_NT", "values_NT"), ("values_NT",)):
        for head in heads:
            micro = batch.rows(list(range(rank, 8, size)))
            values_NT = role.forward(micro, frozenset({head}))[head]
            with torch.inference_mode():
                role.forward(micro.rows([0]), frozenset({"values_NT"}))
            role.backward(values_NT.square().sum() / 8)
        found.append(role.step()["grad_norm"])
        role.offload()
        role.reload()
    return found


def moved(strategy: Strategy) -> float:
    """Five updates in bfloat16, each a fifth of the distance to the next number: the share of large weights that changed."""
    role = trainable(strategy, "bfloat16", AdamW(lr=2.4e-5, eps=1e-12))
    batch = tiny_rollouts()
    before = {name: tensor.bfloat16().clone() for name, tensor in role.weights()}
    for _ in range(5):
        role.backward(role.forward(batch, frozenset({"logprobs_NT"}))["logprobs_NT"].sum())
        role.step()
        role.offload()
        role.reload()
    after = {name: tensor.bfloat16() for name, tensor in role.weights()}
    large = {
        name: before[name].abs().clamp(2**-6, 2**-5) == before[name].abs() for name in before
    }  # one spacing: 1.2e-4
    changed = sum(int((before[name] != after[name])[large[name]].sum()) for name in before if "layers" in name)
    return changed / sum(int(large[name].sum()) for name in before if "layers" in name)


def broken(strategy: Strategy, dtype: str) -> dict[str, Any]:
    """A step whose gradient is not a number on the last rank, and one after it: whether the first changed weights, whether
    all are finite in the end, what was told, and how many steps the schedule counts."""
    role: Any = trainable(strategy, dtype, AdamW(lr=1e-2))
    batch = tiny_rollouts()
    before = {name: tensor.clone() for name, tensor in role.weights()}
    bad = float("nan") if role.world.rank == role.world.size - 1 else 1.0
    role.backward(role.forward(batch, frozenset({"logprobs_NT"}))["logprobs_NT"].sum() * bad)
    told = role.step()["grad_norm"]
    same = all(torch.equal(before[name], tensor) for name, tensor in role.weights())
    role.backward(role.forward(batch, frozenset({"logprobs_NT"}))["logprobs_NT"].sum())
    after = role.step()["grad_norm"]
    finite = all(bool(tensor.isfinite().all()) for _, tensor in role.weights())
    return {
        "same": same,
        "finite": finite,
        "told": [math.isfinite(told), math.isfinite(after)],
        "steps": role.steps_done,
    }


def slept(strategy: Strategy) -> tuple[bool, float]:
    """Return True if frozen embeddings leave outputs unchanged after a stay off the device, and the norm of the gradient."""
    role = trainable(strategy, "float32", AdamW(lr=1e-2), freeze=("embed",))
    batch, names = tiny_rollouts(), frozenset({"logprobs_NT"})
    before = role.forward(batch, names)["logprobs_NT"].detach().clone()
    role.offload()
    role.reload()
    after = role.forward(batch, names)["logprobs_NT"]
    role.backward(after.sum() / role.world.size)
    return torch.equal(before, after.detach()), role.step()["grad_norm"]


def overflow(strategy: Strategy) -> dict[str, Any]:
    """A step in float16 whose scaled gradient overflows, and an ordinary one after it.

    DeepSpeed refuses float16 on CPUs without instructions for it, where torch computes all the same.
    """
    from deepspeed.accelerator import get_accelerator

    with patch.object(get_accelerator(), "is_fp16_supported", lambda: True):
        role: Any = trainable(strategy, "float16", AdamW(lr=1e-2))
    batch = tiny_rollouts()
    before = {name: tensor.clone() for name, tensor in role.weights()}
    told = []
    for factor in (1e4, 1e-3):
        logprobs_NT = role.forward(batch, frozenset({"logprobs_NT"}))["logprobs_NT"]
        role.backward(logprobs_NT.sum() * factor / role.world.size)
        told.append(dict(role.step()))
        if factor > 1:
            same = all(torch.equal(before[name], tensor) for name, tensor in role.weights())
    changed = any(not torch.equal(before[name], tensor) for name, tensor in role.weights())
    return {"same": same, "changed": changed, "told": told, "steps": role.steps_done}


def wrong(folder: Path) -> dict[str, Any]:
    """Mistakes that only ranks can make."""
    from rlhf_strategy_deepspeed.strategy import DeepSpeed

    return {
        "dtype": mistake(lambda: run(folder, "plain", sharded("0"), "half", actor={"dtype": "float16"})),
        "hpz": mistake(lambda: run(folder, "plain", DeepSpeed(stage=3, hpz=3), "hpz")),
        "groups": mistake(lambda: run(folder, "plain", DeepSpeed(stage=1, sequence=3), "groups")),
        "heads": mistake(lambda: run(folder, "plain", sharded("1s"), "heads", model="tiny:heads=1")),
        "padded": mistake(lambda: run(folder, "plain", sharded("1s"), "padded", actor={"packing": False})),
        "leaves": mistake(lambda: run(folder, "plain", DeepSpeed(stage=3, leaf_modules=("Experts",)), "leaves")),
    }
