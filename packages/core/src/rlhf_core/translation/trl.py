"""TRL: `trl sft`, `trl dpo` and so on, its scripts, and the YAML files that they read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from rlhf_core.errors import UsageError
from rlhf_core.translation import rules
from rlhf_core.translation.draft import Dialect, Draft
from rlhf_core.util.text_files import read_text

__all__ = ["GRPO", "OFFLINE", "PPO", "TRAINERS", "USUAL", "read_yaml"]

MICRO = "micro-batches are cut by tokens and change no result; --micro-tokens bounds their memory"
ABSENT = {
    "per_device_eval_batch_size": MICRO,
    "logging_steps": "every step is logged",
    "logging_strategy": "every step is logged",
    "logging_first_step": "every step is logged",
    "log_level": "warnings are printed once",
    "logging_dir": "the tracker tensorboard writes into the folder of the run",
    "log_completions": "OUTPUT/samples.jsonl has completions of every step",
    "overwrite_output_dir": "a folder that has a run is refused, or continued with --resume",
    "ddp_timeout": "every wait has a deadline",
    "dataloader_num_workers": "--data.workers is a number of processes that tokenize",
    "preprocessing_num_workers": "--data.workers is a number of processes that tokenize",
    "dataset_num_proc": "--data.workers is a number of processes that tokenize",
    "remove_unused_columns": "columns go to rewards by name, and none is removed",
    "gradient_checkpointing_kwargs": "the form without re-entrance is used",
    "use_reentrant": "the form without re-entrance is used",
    "torch_dtype": "--dtype is float32, bfloat16 or float16",
    "model_revision": "give a folder that holds the revision",
    "lora_task_type": "the kind of model is found",
    "use_liger_kernel": "the language-model head runs in chunks, --chunk",
    "generate_during_eval": "--evaluator heldout shows completions",
    "push_to_hub": "--push-to-hub takes the name of the repository",
    "hub_strategy": "the model is uploaded at the end",
    "do_train": "rlhf-run ALGORITHM trains",
    "vllm_mode": "the launcher decides where the engine is",
    "use_vllm": "--rollout vllm",
    "vllm_server_host": "the run starts its engine itself",
    "vllm_server_port": "the run starts its engine itself",
    "missing_eos_penalty": "--algorithm.shaping.stop-properly counts completions that were cut",
    "num_sample_generations": "OUTPUT/samples.jsonl has completions of every step",
    "max_prompt_length": "--data.encoding.max-tokens bounds prompt and completion together",
    "dataset_config": "--data.path takes NAME:CONFIG",
    "shuffle_dataset": "rows are shuffled by --seed",
    "tf32": "the library's default is used",
}
ONLINE_ABSENT = {name: reason for name, reason in ABSENT.items() if name != "max_prompt_length"}

COMMON = (
    "per_device_train_batch_size 8, num_train_epochs 3, lr_scheduler_type linear, max_grad_norm 1.0, seed 42, adam_beta1 0.9, "
    "adam_beta2 0.999"
)
SAMPLED = "max_prompt_length 512, max_completion_length 256, num_iterations 1, temperature 1.0"
USUAL = {
    "sft": f"{COMMON}, learning_rate 2e-5, max_length 1024",
    "dpo": f"{COMMON}, learning_rate 1e-6, max_length 1024, beta 0.1, loss_type sigmoid",
    "orpo": f"{COMMON}, learning_rate 1e-6, max_length 1024, beta 0.1",
    "kto": f"{COMMON}, learning_rate 1e-6, max_length 1024, beta 0.1",
    "reward": f"{COMMON}, learning_rate 1e-4, max_length 1024",
    "grpo": f"{COMMON}, learning_rate 1e-6, {SAMPLED}, num_generations 8, beta 0.0, epsilon 0.2, loss_type dapo",
    "rloo": f"{COMMON}, learning_rate 1e-6, {SAMPLED}, num_generations 2, beta 0.05",
    "online_dpo": f"{COMMON}, learning_rate 5e-7, max_new_tokens 64, temperature 0.9, beta 0.1",
    "ppo": (
        "per_device_train_batch_size 64, num_train_epochs 1, lr_scheduler_type linear, learning_rate 3e-6, seed 42, "
        "kl_coef 0.05, cliprange 0.2, gamma 1.0, lam 0.95, num_ppo_epochs 4, num_mini_batches 1, "
        "response_length 53, temperature 0.7"
    ),
}
"""Defaults of each trainer that are not ours, by its name."""


ALGORITHMS = {"cispo": "cispo", "sapo": "sapo"}
"""Losses of GRPO's trainer that are algorithms here."""

AGGREGATES = {"grpo": "sequence", "dapo": "token", "bnpo": "token", "dr_grpo": "constant"}
"""Aggregation of a loss of GRPO's trainer, by its name."""


def read_yaml(draft: Draft) -> None:
    """Read the file of `--config`; flags of the command override it.

    Raises:
        UsageError: the file cannot be read, or is no table of options.
    """
    path = draft.take("config")
    if not path:
        return
    import yaml  # type: ignore[import-untyped]  # stubs are a separate package, for one call

    try:
        table = yaml.safe_load(read_text(Path(path)))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, yaml.YAMLError) as error:
        raise UsageError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(table, dict):
        raise UsageError(f"{path}: expected a table of options")
    for name, value in table.items():
        if name not in draft.flags or name in draft.usual:
            draft.flags[str(name)] = _words(value)
            draft.usual -= {str(name)}


def _words(value: Any) -> list[str]:
    """Return a value of YAML as the words of a flag."""
    if isinstance(value, list):
        return [str(each) for each in value]
    return [str(value)]


def _rows(draft: Draft) -> float:
    """Return the rows of an optimizer step: of a device, times steps that are accumulated, times processes."""
    each = draft.take_number("per_device_train_batch_size", draft.take_number("batch_size", 8))
    if draft.processes == "gpu":
        draft.note("per_device_train_batch_size", "--batch-size is for one process; multiply it by their number")
    processes = int(draft.processes) if draft.processes.isdigit() else 1
    return each * draft.take_number("gradient_accumulation_steps", 1) * processes


def length(draft: Draft) -> None:
    """Translate how long a run is: steps where they are given, or passes over the data."""
    steps, epochs = draft.take_number("max_steps", -1), draft.take_number("num_train_epochs", 3)
    if steps > 0:
        draft.set("steps", steps)
    elif "steps" not in draft.settings:
        draft.set("epochs", epochs)


def row_batch(draft: Draft) -> None:
    """Translate batches of rows: those of a device, times steps that are accumulated, times processes."""
    draft.set("batch_size", _rows(draft))


def group_batch(draft: Draft) -> None:
    """Translate batches of completions, which are prompts times completions of a prompt."""
    n = draft.take_number("num_generations", 8)
    accumulate = float(draft.flags.get("gradient_accumulation_steps", ["1"])[0])
    draft.set("sampling.n", n)
    draft.set("minibatches", max(1.0, draft.take_number("steps_per_generation", accumulate) // accumulate))
    draft.set("batch_size", max(1.0, _rows(draft) // n))


def pair_batch(draft: Draft) -> None:
    """Translate batches of prompts with two completions each."""
    draft.set("sampling.n", draft.take_number("num_generations", 2))
    row_batch(draft)


def episode_batch(draft: Draft) -> None:
    """Translate batches of prompts with one completion each, and episodes as steps."""
    rows = _rows(draft)
    draft.set("batch_size", rows)
    draft.set("sampling.n", 1)
    draft.set("minibatches", draft.take_number("num_mini_batches", 1))
    if "total_episodes" in draft.flags:
        draft.set("steps", max(1.0, draft.take_number("total_episodes", 0) // rows))


def group_loss(draft: Draft) -> None:
    """Translate which loss GRPO has, and how rewards of a group are scaled."""
    kind = draft.take("loss_type", "dapo")
    draft.command = ALGORITHMS.get(kind, draft.command)
    if kind in AGGREGATES:
        draft.set("loss.aggregate", AGGREGATES[kind])
    elif kind not in ALGORITHMS:
        draft.note("loss_type", f"there is no loss {kind}")
    scale = draft.take("scale_rewards", "group").lower()
    if scale in ("false", "none"):
        draft.set("advantage.std", "False")
    elif scale == "batch":
        draft.note("scale_rewards", "rewards are scaled by the deviation of their prompt's group")
    if draft.take("importance_sampling_level", "token") == "sequence":
        draft.set("loss", "gspo")


def pair_loss(draft: Draft) -> None:
    """Translate which loss pairs have."""
    kind = draft.take("loss_type", "sigmoid")
    if draft.has("label_smoothing") and kind == "sigmoid":
        draft.set("loss", "cdpo")
    elif kind in rules.PREFERENCES:
        draft.set("loss", rules.PREFERENCES[kind])
    else:
        draft.note("loss_type", f"there is no loss {kind}")


def penalty(draft: Draft) -> None:
    """Translate `beta`: of a group's algorithm the weight of the KL penalty, of ORPO that of the odds ratio."""
    if "beta" not in draft.flags:
        return
    path = {"orpo": "loss.lam", "dpo": "loss.beta", "online_dpo": "loss.beta", "kto": "loss.beta"}.get(draft.command)
    draft.set(path or "algorithm.kl.coef", draft.take("beta"))


def functions(draft: Draft) -> None:
    """Translate reward functions: files with functions, and models."""
    names = draft.flags.pop("reward_funcs", [])
    models = [name for name in names if "/" in name and not name.endswith(".py")]
    dotted = [name for name in names if name not in models]
    if models and not dotted:
        draft.flags.setdefault("reward_model_path", [",".join(models)])
    elif dotted:
        first = dotted[0]
        draft.set("reward", "func")
        if "." in first and not first.endswith(".py"):
            module, _, function = first.rpartition(".")
            draft.set("reward.path", f"{module}:{function}")
        else:
            draft.set("reward.path", first if first.endswith(".py") else f"{first}.py")
        for name in [*dotted[1:], *models]:
            draft.note("reward_funcs", f"{name} is one more: --reward sum --reward.parts takes several")
    rules.rewards(draft)


def moments(draft: Draft) -> None:
    """Translate the decay rates of the optimizer's moments, and which optimizer it is."""
    first, second = draft.take("adam_beta1"), draft.take("adam_beta2")
    draft.set("{role}.optim.betas", first or "0.9", second or "0.999")
    optimizer = draft.take("optim", "adamw_torch")
    if not optimizer.startswith("adamw"):
        draft.note("optim", f"there is no optimizer {optimizer}; `rlhf-run plugins --kind optimizer` lists them")


def precision(draft: Draft) -> None:
    """Translate the dtype, adapters and quantization."""
    for name in ("torch_dtype", "dtype"):
        if draft.take(name) in ("bfloat16", "float16"):
            draft.flags.setdefault("bf16", [])
    if not draft.take_switch("use_peft"):
        return
    draft.flags.setdefault("lora_r", ["16"])
    draft.flags.setdefault("lora_alpha", ["32"])
    draft.flags.setdefault("lora_dropout", ["0.05"])


def sampled_by(draft: Draft) -> None:
    """Translate whether vLLM samples."""
    if draft.take_switch("use_vllm"):
        draft.set("rollout", "vllm")
    parallel = draft.take("vllm_tensor_parallel_size", "1")
    if parallel != "1":
        draft.note("vllm_tensor_parallel_size", "pass --rollout.process own --rollout.tensor-parallel-size")


SHARED = (precision, rules.schedule, rules.checkpoints, rules.evaluation, rules.tracking, moments)
ANSWERS = {"max_completion_length": "--sampling.max-new-tokens", "num_iterations": "--update-epochs"}
NAMES = {"model_name": "model_name_or_path", "dataset_text_field": "text_field", "ref_model_path": "ref_model"}

ONLINE_RULES = (penalty, functions, sampled_by, rules.clip_bounds, length, *SHARED)
ONLINE_NAMES = {**NAMES, "sft_model_path": "model_name_or_path"}

OFFLINE = Dialect(
    "TRL, from data",
    (read_yaml, penalty, row_batch, length, *SHARED),
    NAMES,
    {**ANSWERS, "text_field": "--data.text-key", "desirable_weight": "--advantage.desirable"},
    ABSENT,
)
PAIRS = replace(OFFLINE, title="TRL, from pairs", rules=(read_yaml, pair_loss, *OFFLINE.rules[1:]))

GROUPS = Dialect(
    "TRL, groups of completions", (read_yaml, group_batch, *ONLINE_RULES), ONLINE_NAMES, ANSWERS, ONLINE_ABSENT
)
GRPO = replace(GROUPS, title="TRL, GRPO", rules=(read_yaml, group_loss, *GROUPS.rules[1:]))
ONLINE_PAIRS = replace(GROUPS, title="TRL, online DPO", rules=(read_yaml, pair_loss, pair_batch, *ONLINE_RULES))
PPO = replace(GROUPS, title="TRL, PPO", rules=(read_yaml, episode_batch, *ONLINE_RULES))

TRAINERS = {
    "sft": OFFLINE,
    "dpo": PAIRS,
    "orpo": OFFLINE,
    "kto": OFFLINE,
    "reward": OFFLINE,
    "grpo": GRPO,
    "rloo": GROUPS,
    "online_dpo": ONLINE_PAIRS,
    "ppo": PPO,
}
"""The dialect of each trainer, by its name."""
