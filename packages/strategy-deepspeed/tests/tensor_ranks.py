"""Ranks of the tests of tensor parallelism: runs of models whose heads ranks divide, and steps outside of runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import deepspeed_ranks as ranks
import torch
import transformers

from rlhf_core.contract.optimizers import AdamW
from rlhf_core.contract.options import TrainedOptions
from rlhf_core.contract.plan import RoleSpec
from rlhf_core.launcher.local import join_world
from rlhf_core.models.build import build_module
from rlhf_core.models.freezing import parameter_size
from rlhf_core.models.loading.tokenizer import load_tokenizer
from rlhf_core.strategy.torch import TorchStrategy
from rlhf_core.testing.tiny import tiny_rollouts

SHORT: dict[str, Any] = {"model": "tiny:heads=4,kv_heads=2", "steps": 6, "save_every": 3}

MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "averaged": ("sft", {"actor": {**ranks.ACTOR, "ema": 0.5}}),
    "tracked": ("grpo", {"reference": {"track": {"of": "actor", "every": 1, "decay": 0.5}}}),
    "whole": ("sft", {"model": "tiny:heads=4,kv_heads=4"}),
    "taught": ("distill", {"teacher": {"model": "tiny:layers=1,heads=4,kv_heads=2"}}),
}
"""Cases with options of their own, by name: the case of `deepspeed_ranks`, and the options."""

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("Qwen3Config", {**SIZES, "head_dim": 16, "tie_word_embeddings": False}),
    "qwen2": ("Qwen2Config", SIZES),
    "llama": ("LlamaConfig", {**SIZES, "attention_bias": True, "mlp_bias": True}),
    "gemma3": ("Gemma3TextConfig", {**SIZES, "head_dim": 8, "sliding_window": 8}),
    "phi": ("PhiConfig", SIZES),
}
"""Norms of single heads, and heads wider than the hidden state; biases of both kinds of matrices; tied embeddings; digits in
the names of matrices."""

STATES = ("0t", "1t", "2t", "2ot")


def write_models(folder: Path) -> None:
    """Write `MODELS` to folders of their names, each with large random weights. For the process that starts the ranks."""
    tokenizer = load_tokenizer("tiny", TrainedOptions())
    for name, (kind, sizes) in MODELS.items():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            config = getattr(transformers, kind)(
                **sizes,
                vocab_size=len(tokenizer),
                bos_token_id=None,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
            model = transformers.AutoModelForCausalLM.from_config(config)
            for parameter in model.parameters():
                torch.nn.init.normal_(parameter, 0.0, 0.2)
            model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def _options(folder: Path, case: str) -> tuple[str, dict[str, Any]]:
    """Return the case of `deepspeed_ranks` and all options."""
    if case in MODELS:
        return "sft", {**SHORT, "model": str(folder / case), "steps": 2, "save_every": 1}
    case, options = MORE.get(case, (case, {}))
    return case, {**SHORT, **options}


def run(folder: Path, case: str, strategy: Any, name: str) -> dict[str, Any]:
    """Run a case to its end."""
    case, options = _options(folder, case)
    return ranks.run(folder, case, strategy, name, **options)


def resumed(folder: Path, case: str, strategy: Any, name: str, copy: str = "") -> dict[str, Any]:
    """Run a case again from its checkpoint in the middle, in a copy of its folder."""
    case, options = _options(folder, case)
    return ranks.resumed(folder, case, strategy, name, copy, **options)


def steps() -> dict[str, Any]:
    """Results of single steps under plain torch on these ranks and under each stage, which no whole run shows."""
    strategies: dict[str, Any] = {"torch": TorchStrategy("cpu"), **{stage: ranks.sharded(stage) for stage in STATES}}
    return {
        key: {"norms": ranks.norms(each), "answers": answers(each), **ranks.states(each, scaled=key != "0t")}
        for key, each in strategies.items()
    }


def answers(strategy: Any) -> list[torch.Tensor]:
    """Log-probabilities of a frozen role, as its model is, after a stay off the device, with whole weights, and after those.

    Ranks make different numbers of passes with whole weights.
    """
    outputs = frozenset({"logprobs_NT"})
    spec = RoleSpec("reference", TrainedOptions(model="tiny:heads=4,kv_heads=4"), outputs)
    role = strategy(lambda: build_module(spec), None, 1)
    batch = tiny_rollouts()
    found = [role.forward(batch, outputs)["logprobs_NT"]]
    role.offload()
    role.reload()
    found.append(role.forward(batch, outputs)["logprobs_NT"])
    with role.gathered():
        found += [role.forward(batch, outputs)["logprobs_NT"] for _ in range(join_world().rank + 1)][:1]
    return [each.detach().clone() for each in (*found, role.forward(batch, outputs)["logprobs_NT"])]


def alternating(*stages: str) -> dict[str, list[float]]:
    """Roles that live in this process at once and step in turn, by their stages: the norms of two steps, and the parameters."""
    strategies: dict[str, Any] = {"torch": TorchStrategy("cpu"), **{stage: ranks.sharded(stage) for stage in stages}}
    roles = {key: ranks.trainable(each, "float32", AdamW(lr=1e-2)) for key, each in strategies.items()}
    batch, names = tiny_rollouts(), frozenset({"logprobs_NT"})
    norms: dict[str, list[float]] = {key: [] for key in roles}
    for _ in range(2):
        losses = {}
        for key, role in roles.items():
            own = batch.rows(list(range(role.world.rank, 8, role.world.size)))
            losses[key] = role.forward(own, names)["logprobs_NT"].sum() / 8
        for key, role in roles.items():
            role.backward(losses[key])
        for key, role in roles.items():
            norms[key].append(role.step()["grad_norm"])
    return {key: [*norms[key], sum(map(parameter_size, role.module.parameters()))] for key, role in roles.items()}


def wrong(folder: Path) -> dict[str, str]:
    """Mistakes that only ranks can make."""
    four = {"model": "tiny:heads=4,kv_heads=4"}
    return {
        "groups": ranks.mistake(lambda: ranks.run(folder, "plain", ranks.sharded("1f"), "groups", **four)),
        "heads": ranks.mistake(lambda: ranks.run(folder, "plain", ranks.sharded("1t"), "heads")),
        "lora": ranks.mistake(
            lambda: ranks.run(folder, "plain", ranks.sharded("1t"), "lora", **four, actor={"lora": {"rank": 2}})
        ),
    }


def main(folder: Path, *words: str) -> None:
    """Each word is CASE:STAGE, which runs and is resumed in its middle; or CASE:FOLDER:STAGE, which resumes what is there; or
    `steps`, `alternating-STAGE-STAGE…` or `wrong`."""
    torch.set_num_threads(1)
    world = join_world()
    for word in words:
        case, *old, stage = word.split(":") if ":" in word else (word, "")
        result: Any
        if word == "steps":
            result = steps()
        elif word == "wrong":
            result = wrong(folder)
        elif word.startswith("alternating"):
            result = alternating(*word.split("-")[1:])
        elif old:
            result = resumed(folder, case, ranks.sharded(stage), old[0], word.replace(":", "-"))
        else:
            result = run(folder, case, ranks.sharded(stage), word.replace(":", "-"))
            result["resumed"] = resumed(folder, case, ranks.sharded(stage), word.replace(":", "-"))
        if world.rank == 0:
            torch.save(result, folder / f"{word.replace(':', '-')}.pt")
