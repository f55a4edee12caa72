"""RLHFlow's online iterative RLHF (Dong et al. 2024) and the deployment pipeline of one-pass reward models (Li et al. 2025)."""

from __future__ import annotations

from rlhf_core.translation import rules
from rlhf_core.translation.draft import Dialect, Draft

__all__ = ["ANNOTATION", "DPO", "DPO_USUAL", "GENERATION", "MERGING", "PIPELINE", "SFT", "SFT_USUAL"]

DPO_USUAL = "loss_type sigmoid, learning_rate 5e-7, lr_scheduler_type cosine, beta 0.1, max_steps 1200"
"""Defaults of the script `dpo_iteration/run_dpo.py` that are not ours."""

SFT_USUAL = "learning_rate 2e-5, lr_scheduler_type cosine"

RECIPES = {("ppo", "hvp"): "online-ppo-one-pass.toml", ("ppo", "regular"): "online-ppo-regular.toml"}
"""The recipe of a pipeline, by its method and its kind of reward model."""

SELECTORS = {"max_min": "max_min", "max_max": "max_max", "max_random": "max_random", "random": "random_pair"}


def shard(draft: Draft) -> None:
    """Translate the part of the prompts that one process answers, and where it writes."""
    index, count = draft.take("local_index"), draft.take("my_world_size")
    folder = draft.take("output_dir", "gen_data")
    if index:
        draft.set("shard", f"{index}/{count or 1}")
        draft.set("output", f"{folder}{index}.jsonl")
    else:
        draft.set("output", _as_lines(folder))
    draft.set("rollout", "vllm")
    draft.set("data", "hf")
    draft.set("data.path", draft.take("dataset_name_or_path", "DATA"))


def _as_lines(path: str) -> str:
    """Return a file's name with the ending of JSON lines."""
    return f"{path}l" if path.endswith(".json") else path if path.endswith(".jsonl") else f"{path}.jsonl"


def annotate(draft: Draft) -> None:
    """Translate the scoring of completions by a reward model."""
    draft.words.append(_as_lines(draft.take("dataset_name_or_path", "COMPLETIONS.jsonl")))
    draft.set("output", _as_lines(draft.take("output_dir", "scored.jsonl")))
    draft.set("reward", "model")
    draft.set("reward.model", draft.take("reward_name_or_path", "sfairXC/FsfairX-LLaMA3-RM-v0.1"))


def merge(draft: Draft) -> None:
    """Translate the merging of shards: lines of files, one after the other."""
    base, number = draft.take("base_path"), int(draft.take_number("num_datasets", 1))
    output = _as_lines(draft.take("output_dir", "merged.jsonl"))
    draft.words += [*(f"{base}{index}.jsonl" for index in range(number)), ">", output]


def pairs(draft: Draft) -> None:
    """Translate the choice of pairs among scored completions, and the loss that they train."""
    draft.set("data", "selected")
    draft.set("data.path", _as_lines(draft.take("train_dir", "DATA")))
    if path := draft.take("eval_dir"):
        draft.set("data.heldout_path", _as_lines(path))
    draft.set("data.select", "pairs")
    choice = draft.take("choose_type", "max_random")
    if choice in SELECTORS:
        draft.set("data.selector", SELECTORS[choice])
    else:
        draft.note("choose_type", f"there is no choice {choice}; --data.selector names one")
    loss = draft.take("loss_type", "sigmoid")
    if loss in rules.PREFERENCES:
        draft.set("loss", rules.PREFERENCES[loss])
    else:
        draft.note("loss_type", f"there is no loss {loss}")


def pipeline(draft: Draft) -> None:
    """Translate the choice of a pipeline, which is a recipe file here."""
    method, reward = draft.take("method", "ppo"), draft.take("rm_type", "hvp")
    draft.words.append(f"recipes/pipelines/{RECIPES.get((method, reward), f'online-{method}.toml')}")
    draft.note("method", "the recipe's steps train with it")
    draft.note("rm_type", "`optim.use` of the recipe's step that trains the reward model")
    draft.note("rm_strategy", f'`selector = "{draft.take("rm_strategy", "best_worst")}"` of the recipe\'s step `pairs`')
    draft.note("total_T", f"`total_T = {draft.take('total_T', '50')}` of the recipe")


GENERATION = Dialect(
    "RLHFlow, generation",
    (shard,),
    {},
    {
        "model_name_or_path": "--model",
        "tokenizer": "--model",
        "K": "--sampling.n",
        "temperature": "--sampling.temperature",
        "max_new_tokens": "--sampling.max-new-tokens",
        "dataset_key": "--data.prompt-key",
    },
    {
        "eos_ids": "a completion ends at the end tokens of tokenizer and generation config; --sampling.stop takes texts",
        "ports": "the command starts the engine itself, and no server is needed; --shard divides prompts over several",
    },
)

ANNOTATION = Dialect(
    "RLHFlow, scoring", (annotate,), {}, {}, {"K": "every line of the file is scored, however many a prompt has"}
)

MERGING = Dialect("RLHFlow, merging", (merge,))

DPO = Dialect(
    "RLHFlow, DPO",
    (pairs, rules.schedule, rules.checkpoints, rules.evaluation, rules.tracking),
    {"ref_model": "ref_pretrain"},
    {"ref_pretrain": "--reference.model", "beta": "--loss.beta"},
)

SFT = Dialect("RLHFlow, SFT", (rules.schedule, rules.tracking), {"train_set_path": "dataset", "model_name": "pretrain"})

PIPELINE = Dialect(
    "one-pass reward models, deployment",
    (pipeline,),
    {},
    {"start_t": "--start-t", "stop_t": "--stop-t", "stop_T": "--stop-t"},
)
