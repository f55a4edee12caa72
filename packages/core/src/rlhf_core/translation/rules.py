"""Rules that several dialects share."""

from __future__ import annotations

from rlhf_core.translation.draft import Draft

__all__ = [
    "ESTIMATORS",
    "PREFERENCES",
    "SCHEDULES",
    "checkpoints",
    "clip_bounds",
    "engines",
    "evaluation",
    "rewards",
    "schedule",
    "template",
    "tracking",
]

ESTIMATORS = {
    "gae": "ppo",
    "reinforce": "reinforce_pp",
    "reinforce_plus_plus": "reinforce_pp",
    "reinforce_baseline": "reinforce_pp_baseline",
    "reinforce_plus_plus_baseline": "reinforce_pp_baseline",
    "group_norm": "grpo",
    "grpo": "grpo",
    "dr_grpo": "dr_grpo",
    "rloo": "rloo",
}
"""The algorithm for an advantage estimator of OpenRLHF or verl."""

PREFERENCES = {
    "sigmoid": "dpo",
    "ipo": "ipo",
    "hinge": "hinge",
    "robust": "robust",
    "exo_pair": "exo_pair",
    "nca_pair": "nca_pair",
    "bco_pair": "bco_pair",
    "sppo_hard": "sppo_hard",
    "aot": "aot",
    "apo_zero": "apo_zero",
    "apo_down": "apo_down",
    "discopop": "discopop",
    "sigmoid_norm": "sigmoid_norm",
}
"""The loss for a `loss_type` of TRL's DPO."""

SCHEDULES = {
    "constant": "constant",
    "constant_with_warmup": "constant",
    "linear": "linear",
    "cosine": "cosine",
    "cosine_with_min_lr": "cosine",
    "cosine_with_min_lr_and_warmup": "cosine",
}
"""The schedule for a name of transformers."""


TRACKERS = frozenset({"wandb", "tensorboard", "mlflow"})


def schedule(draft: Draft) -> None:
    """Translate the name of the learning-rate schedule, and its floor of a tenth where the name implies it."""
    for name in ("lr_scheduler", "lr_scheduler_type"):
        theirs = draft.take(name)
        if theirs in SCHEDULES:
            draft.set("{role}.optim.schedule", SCHEDULES[theirs])
            if theirs == "constant":  # of transformers, which ignores a warm-up then
                _drop_warmup(draft)
            if theirs == "cosine_with_min_lr" and "min_lr_ratio" not in draft.flags:
                draft.set("{role}.optim.min_lr_ratio", 0.1)
        elif theirs:
            draft.note(name, f"there is no schedule {theirs}; constant, linear and cosine are there")
    for name in ("warmup_steps", "lr_warmup_steps"):
        if not draft.has(name) or draft.flags[name][0].startswith("-"):
            draft.flags.pop(name, None)
        else:
            for ratio in ("warmup_ratio", "lr_warmup_ratio"):  # steps win over a share
                draft.flags.pop(ratio, None)


def _drop_warmup(draft: Draft) -> None:
    """Drop a warm-up that the schedule does not have."""
    for name in ("warmup_ratio", "lr_warmup_ratio", "warmup_steps", "lr_warmup_steps"):
        if draft.take_number(name, 0):
            draft.note(name, "the schedule constant has no warm-up; constant_with_warmup has")


def rewards(draft: Draft) -> None:
    """Translate where rewards come from: models, servers, and files with functions."""
    models = [name for name in draft.take("reward_pretrain", draft.take("reward_model_path")).split(",") if name]
    places = [name for name in draft.take("remote_rm_url").replace(",", " ").split() if name]
    files = [name for name in places if name.endswith(".py")]
    if files:
        draft.set("reward", "func")
        draft.set("reward.path", files[0])
    elif places:
        draft.set("reward", "remote")
        draft.set("reward.url", *places)
    elif len(models) > 1:
        draft.set("reward", "sum")
        draft.set("reward.parts", *(f"model model={name}" for name in models))
    elif models:
        draft.set("reward", "model")
        draft.set("reward.model", models[0])


def engines(draft: Draft) -> None:
    """Translate which engine samples, and what each of its processes gets."""
    number = draft.take_number("vllm_num_engines", 0)
    if number or draft.take_switch("use_vllm"):
        draft.set("rollout", "vllm")
    parallel = draft.take("vllm_tensor_parallel_size", "1")
    if parallel != "1":
        draft.note("vllm_tensor_parallel_size", "pass --rollout.process own --rollout.tensor-parallel-size")


def template(draft: Draft) -> None:
    """Translate how prompts become text; without a chat template and an input template they stay as they are."""
    if draft.take_switch("apply_chat_template"):
        draft.set("data.encoding.template", "chat")
    elif "input_template" not in draft.flags:
        draft.set("data.encoding.template", "raw")


def checkpoints(draft: Draft) -> None:
    """Translate when checkpoints are written; -1 means only at the end."""
    steps = {name: draft.take_number(name, -1) for name in ("save_steps", "save_steps_harmless") if name in draft.flags}
    strategy = draft.take("save_strategy", "steps")
    if strategy == "steps" and any(each > 0 for each in steps.values()):
        draft.set("save_every", max(steps.values()))
    elif strategy == "epoch":
        draft.note("save_strategy", "give --save-every the steps of an epoch")
    folder = draft.take("ckpt_path")
    if folder and "save_path" in draft.flags:
        if folder != " ".join(draft.flags["save_path"]):
            draft.note("ckpt_path", "checkpoints are in OUTPUT/checkpoints, and the model is in OUTPUT/model")
    elif folder:
        draft.set("output", folder)
    if draft.take_switch("load_checkpoint"):
        draft.set("resume", "auto")


def evaluation(draft: Draft) -> None:
    """Translate when held-out rows are evaluated; -1 means never in between."""
    strategy = draft.take("eval_strategy", draft.take("evaluation_strategy", "steps"))
    steps = draft.take_number("eval_steps", -1)
    if strategy == "steps" and steps > 0:
        draft.set("eval_every", steps)
    elif strategy == "epoch":
        draft.note("eval_strategy", "give --eval-every the steps of an epoch")


def tracking(draft: Draft) -> None:
    """Translate trackers; a key is not repeated, since it belongs to the environment."""
    names = [name for name in draft.take("report_to").replace(",", " ").split() if name not in ("none", "all")]
    if draft.has("use_wandb"):
        names.append("wandb")
        draft.note("use_wandb", "the key is not passed on; `wandb login` or WANDB_API_KEY has it")
    if draft.has("use_tensorboard"):
        names.append("tensorboard")
    draft.flags.pop("use_wandb", None)
    draft.flags.pop("use_tensorboard", None)
    known = sorted(set(names) & TRACKERS)
    if known:
        draft.set("observer", ",".join(known))
    if unknown := sorted(set(names) - TRACKERS):
        draft.note("report_to", f"there is no tracker {', '.join(unknown)}")
    if name := draft.take("run_name"):
        if known:
            draft.flags["wandb_run_name"] = [name]
        else:
            draft.note("run_name", "a run is called as its folder, --output")
    for each in ("wandb_project", "wandb_run_name", "wandb_org", "wandb_group"):
        if not known and draft.take(each):
            draft.note(each, "it belongs to a tracker, which the command does not choose")


def clip_bounds(draft: Draft) -> None:
    """Translate the clip of the importance ratio: one bound for both sides, or two."""
    both = draft.take("eps_clip_low_high").split()
    if len(both) == 2:
        draft.set("loss.clip_low", both[0])
        draft.set("loss.clip_high", both[1])
        draft.flags.pop("eps_clip", None)
    for name in ("eps_clip", "cliprange"):
        if name in draft.flags:
            value = draft.take(name)
            draft.set("loss.clip_low", value)
            draft.set("loss.clip_high", value)
