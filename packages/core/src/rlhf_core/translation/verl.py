"""verl: overrides of `verl.trainer.main_ppo`, and of its trainer of demonstrations."""

from __future__ import annotations

import re

from rlhf_core.translation import rules
from rlhf_core.translation.draft import Dialect, Draft

__all__ = ["ONLINE", "SFT", "SFT_USUAL", "USUAL"]

ACTOR, ROLLOUT, CRITIC = "actor_rollout_ref.actor", "actor_rollout_ref.rollout", "critic"

USUAL = (
    "data.train_batch_size 1024, data.max_prompt_length 512, data.max_response_length 512, algorithm.adv_estimator gae, "
    f"{ACTOR}.ppo_mini_batch_size 256, {ACTOR}.ppo_epochs 1, {ACTOR}.optim.lr 1e-6, {ACTOR}.clip_ratio 0.2, "
    f"{ACTOR}.entropy_coeff 0, {ACTOR}.grad_clip 1.0, {ROLLOUT}.n 1, {ROLLOUT}.temperature 1.0, "
    f"{ACTOR}.optim.betas 0.9 0.999, {ACTOR}.optim.weight_decay 0.01, critic.optim.betas 0.9 0.999, "
    "critic.optim.weight_decay 0.01, critic.cliprange_value 0.5, trainer.total_epochs 30, "
    "algorithm.gamma 1.0, algorithm.lam 1.0"
)
"""Defaults of `main_ppo` that are not ours."""

SFT_USUAL = "data.train_batch_size 256, data.max_length 1024, optim.lr 1e-5, trainer.total_epochs 4"

ANSWERS = {
    "data.train_files": "--data hf --data.path",
    "data.val_files": "--data hf --data.heldout-path",
    "data.prompt_key": "--data hf --data.prompt-key",
    "data.response_key": "--data hf --data.completion-key",
    "data.max_prompt_length": "--max-prompt-tokens",
    "data.max_response_length": "--sampling.max-new-tokens",
    "data.max_length": "--data.encoding.max-tokens",
    "data.train_max_samples": "--data hf --data.limit",
    "data.image_key": "--data hf --data.images-key",
    "data.seed": "--seed",
    "actor_rollout_ref.model.path": "--model",
    "actor_rollout_ref.model.enable_gradient_checkpointing": "--actor.gradient-checkpointing",
    "actor_rollout_ref.model.trust_remote_code": "--actor.trust-remote-code",
    "actor_rollout_ref.model.lora_rank": "--actor.lora.rank",
    "actor_rollout_ref.model.lora_alpha": "--actor.lora.alpha",
    "actor_rollout_ref.model.target_modules": "--actor.lora.targets",
    "actor_rollout_ref.model.use_remove_padding": "--actor.packing",
    f"{ACTOR}.optim.lr": "--actor.optim.lr",
    f"{ACTOR}.optim.lr_warmup_steps_ratio": "--actor.optim.warmup",
    f"{ACTOR}.optim.lr_warmup_steps": "--actor.optim.warmup",
    f"{ACTOR}.optim.weight_decay": "--actor.optim.weight-decay",
    f"{ACTOR}.optim.betas": "--actor.optim.betas",
    f"{ACTOR}.optim.min_lr_ratio": "--actor.optim.min-lr-ratio",
    f"{ACTOR}.optim.warmup_style": "--actor.optim.schedule",
    f"{ACTOR}.optim.lr_scheduler_type": "--actor.optim.schedule",
    f"{ACTOR}.grad_clip": "--actor.optim.max-grad-norm",
    f"{ACTOR}.ppo_epochs": "--update-epochs",
    f"{ACTOR}.clip_ratio_low": "--loss.clip-low",
    f"{ACTOR}.clip_ratio_high": "--loss.clip-high",
    f"{ACTOR}.clip_ratio_c": "--loss.dual-clip",
    f"{ACTOR}.entropy_coeff": "--algorithm.entropy",
    f"{ROLLOUT}.n": "--sampling.n",
    f"{ROLLOUT}.temperature": "--sampling.temperature",
    f"{ROLLOUT}.top_p": "--sampling.top-p",
    f"{ROLLOUT}.gpu_memory_utilization": "--rollout.gpu-memory-utilization",
    f"{ROLLOUT}.enforce_eager": "--rollout.enforce-eager",
    f"{ROLLOUT}.max_num_seqs": "--rollout.max-num-seqs",
    f"{ROLLOUT}.max_model_len": "--rollout.max-model-len",
    f"{ROLLOUT}.enable_prefix_caching": "--rollout.enable-prefix-caching",
    "critic.model.path": "--critic.model",
    "critic.optim.lr": "--critic.optim.lr",
    "critic.optim.lr_warmup_steps_ratio": "--critic.optim.warmup",
    "critic.optim.weight_decay": "--critic.optim.weight-decay",
    "critic.optim.betas": "--critic.optim.betas",
    "critic.grad_clip": "--critic.optim.max-grad-norm",
    "critic.model.enable_gradient_checkpointing": "--critic.gradient-checkpointing",
    "critic.model.use_remove_padding": "--critic.packing",
    "critic.cliprange_value": "--algorithm.value.clip",
    "algorithm.gamma": "--advantage.gamma",
    "algorithm.norm_adv_by_std_in_grpo": "--advantage.std",
    "algorithm.lam": "--advantage.lam",
    "reward_model.overlong_buffer.len": "--algorithm.shaping.overlong-buffer",
    "reward_model.overlong_buffer.penalty_factor": "--algorithm.shaping.overlong-factor",
    "algorithm.kl_ctrl.horizon": "--algorithm.kl.horizon",
    "trainer.total_epochs": "--epochs",
    "trainer.total_training_steps": "--steps",
    "trainer.default_local_dir": "--output",
    "trainer.max_actor_ckpt_to_keep": "--keep",
    "model.partial_pretrain": "--model",
    "model.lora_rank": "--actor.lora.rank",
    "model.lora_alpha": "--actor.lora.alpha",
    "model.target_modules": "--actor.lora.targets",
    "model.enable_gradient_checkpointing": "--actor.gradient-checkpointing",
    "optim.lr": "--actor.optim.lr",
    "optim.weight_decay": "--actor.optim.weight-decay",
    "optim.warmup_steps_ratio": "--actor.optim.warmup",
    "optim.clip_grad": "--actor.optim.max-grad-norm",
    "data.multiturn.messages_key": "--data hf --data.prompt-key",
}

MICRO = "micro-batches are cut by tokens and change no result; --micro-tokens bounds their memory"
SHARDED = "--strategy deepspeed shards; docs/fsdp.md has FSDP2"
ENGINE = "pass --rollout.process own --rollout.tensor-parallel-size"
ABSENT_ENDS = {
    "ppo_micro_batch_size": MICRO,
    "ppo_micro_batch_size_per_gpu": MICRO,
    "log_prob_micro_batch_size": MICRO,
    "log_prob_micro_batch_size_per_gpu": MICRO,
    "forward_micro_batch_size_per_gpu": MICRO,
    "micro_batch_size_per_gpu": MICRO,
    "micro_batch_size": MICRO,
    "ppo_max_token_len_per_gpu": MICRO,
    "log_prob_max_token_len_per_gpu": MICRO,
    "use_dynamic_bsz": MICRO,
    "log_prob_use_dynamic_bsz": MICRO,
    "param_offload": SHARDED,
    "optimizer_offload": SHARDED,
    "grad_offload": SHARDED,
    "fsdp_size": SHARDED,
    "tensor_model_parallel_size": ENGINE,
    "ulysses_sequence_parallel_size": "pass --strategy deepspeed --strategy.sequence, and start as many ranks",
    "val_batch_size": "held-out rows are batched by --evaluator",
    "filter_overlong_prompts": "longer prompts are dropped and counted",
    "truncation": "longer prompts are dropped and counted",
    "filter_overlong_prompts_workers": "--data.workers is a number of processes that tokenize",
    "shuffle": "rows are shuffled by --seed",
    "return_raw_chat": "rewards get prompts as text and rows with all columns",
    "critic_warmup": "--algorithm.critic-warmup is a share of the steps",
    "val_before_train": "an evaluator measures before the first step, too",
    "val_only": "rlhf-run eval measures without training",
    "log_val_generations": "--evaluator heldout shows completions",
    "balance_batch": "micro-batches of about equal tokens are balanced",
    "resume_mode": "--resume continues a run",
    "free_cache_engine": "the launcher decides which models and engines share devices",
    "enable_chunked_prefill": "the engine decides",
    "disable_log_stats": "the engine's log is not printed",
    "load_format": "weights take the fastest path that trainer and engine share",
    "use_shm": "weights take the fastest path that trainer and engine share",
    "layered_summon": "weights take the fastest path that trainer and engine share",
    "max_num_batched_tokens": "the engine decides",
    "ignore_eos": "a completion ends at an end token",
    "calculate_log_probs": "log-probabilities of the engine and the trainer are compared in every step",
    "mode": "the engine decides",
    "val_kwargs.n": "--evaluator heldout has --evaluator.n",
    "val_kwargs.do_sample": "--evaluator heldout has its own temperature",
    "val_kwargs.temperature": "--evaluator heldout has its own temperature",
    "val_kwargs.top_p": "--evaluator heldout has its own sampling",
    "use_fused_kernels": "the language-model head runs in chunks, --chunk",
    "use_torch_compile": "models are not compiled",
    "device": "--strategy.device names the device",
    "reward_manager": "a reward is a provider, --reward",
    "launch_reward_fn_async": "rewards are computed while the next prompts are sampled, with --ahead",
    "log": "every metric is logged",
    "enable": "the option that it switches on has a value that switches it off",
    "num_gen_batches": "--algorithm.dynamic.rounds bounds rounds",
    "max_num_gen_batches": "--algorithm.dynamic.rounds bounds rounds",
    "gen_batch_size": "--algorithm.dynamic.oversample is how many batches a round samples",
}
"""Reasons why an option has no place here, by the end of its name."""

LOSSES = {"gspo": "gspo", "gpg": "reinforce"}
CLIPPED = {"rloo": "clip"}
"""The loss of an algorithm that clips ratios there and not here."""

ENGINES = {"hf": "hf", "vllm": "vllm"}

PENALTIES = {"low_var_kl": "k3", "kl": "k1", "mse": "k2", "k1": "k1", "k2": "k2", "k3": "k3"}
AGGREGATES = {
    "token-mean": "token",
    "seq-mean-token-mean": "sequence",
    "seq-mean-token-sum": "constant",
    "seq-mean-token-sum-norm": "constant",
}


def estimator(draft: Draft) -> None:
    """Translate the advantage estimator, which is the choice of an algorithm here, and how losses are added up."""
    theirs = draft.take("algorithm.adv_estimator", "gae")
    if theirs in rules.ESTIMATORS:
        draft.command = rules.ESTIMATORS[theirs]
    else:
        draft.note("algorithm.adv_estimator", f"there is no estimator {theirs}")
    mode = draft.take(f"{ACTOR}.loss_agg_mode")
    if mode in AGGREGATES:
        draft.set("loss.aggregate", AGGREGATES[mode])
    if loss := LOSSES.get(draft.take(f"{ACTOR}.policy_loss.loss_mode"), CLIPPED.get(draft.command)):
        draft.set("loss", loss)
    bound = draft.take(f"{ACTOR}.clip_ratio")
    for side in ("low", "high"):
        if bound and f"{ACTOR}.clip_ratio_{side}" not in draft.flags:
            draft.set(f"loss.clip_{side}", bound)


def batch(draft: Draft) -> None:
    """Translate batches: prompts of a step, and prompts of an optimizer step."""
    prompts = draft.take_number("data.train_batch_size", 1024)
    small = draft.take_number(f"{ACTOR}.ppo_mini_batch_size", prompts)
    draft.set("batch_size", prompts)
    draft.set("minibatches", max(1.0, prompts // small))


def rows(draft: Draft) -> None:
    """Translate batches of demonstrations."""
    draft.set("batch_size", draft.take_number("data.train_batch_size", 256))


def length(draft: Draft) -> None:
    """Translate how long a run is: steps where they are given, or passes over the data."""
    steps = draft.flags.get("trainer.total_training_steps", ["null"])[0]
    draft.flags.pop("trainer.total_training_steps" if not steps.isdigit() else "trainer.total_epochs", None)
    for name in (f"{ACTOR}.optim.lr_warmup_steps", "optim.lr_warmup_steps"):
        if draft.flags.get(name, [""])[0].startswith("-"):
            draft.flags.pop(name)


def kl(draft: Draft) -> None:
    """Translate the KL penalty: in the loss, in the reward, or nowhere."""
    in_loss = draft.take_switch(f"{ACTOR}.use_kl_loss")
    in_reward = draft.take_switch("algorithm.use_kl_in_reward")
    weight = draft.take(f"{ACTOR}.kl_loss_coef", "0.001")
    kind = draft.take(f"{ACTOR}.kl_loss_type", "low_var_kl")
    controlled = draft.take("algorithm.kl_ctrl.kl_coef", "0.001")
    penalty = draft.take("algorithm.kl_penalty", "kl")
    adaptive = draft.take("algorithm.kl_ctrl.type", "fixed") == "adaptive"
    target = draft.take("algorithm.kl_ctrl.target_kl", "0.1")
    if in_loss:
        draft.set("algorithm.kl.coef", weight)
        draft.set("algorithm.kl.where", "loss")
        draft.set("algorithm.kl.estimator", PENALTIES.get(kind, "k3"))
    elif in_reward:
        draft.set("algorithm.kl.coef", controlled)
        draft.set("algorithm.kl.where", "reward")
        draft.set("algorithm.kl.estimator", PENALTIES.get(penalty, "k1"))
        if adaptive:
            draft.set("algorithm.kl.target", target)
    else:
        draft.set("algorithm.kl.coef", "0")


def placement(draft: Draft) -> None:
    """Translate machines and devices: all roles share them, as in verl's hybrid engine."""
    nodes, devices = draft.take_number("trainer.nnodes", 1), draft.take_number("trainer.n_gpus_per_node", 8)
    draft.set("launcher", "ray")
    draft.set("launcher.workers", f"{int(nodes)}x{int(devices)}")
    engine = draft.take(f"{ROLLOUT}.name", "vllm")
    draft.set("rollout", ENGINES.get(engine, "vllm"))
    if engine not in ENGINES:
        draft.note(f"{ROLLOUT}.name", f"there is no engine {engine}; vllm takes its place")
    kind = draft.take(f"{ACTOR}.strategy", "fsdp")
    sharding(draft)
    if draft.flags.get(f"{ROLLOUT}.tensor_model_parallel_size") == ["1"]:
        draft.take(f"{ROLLOUT}.tensor_model_parallel_size")
    if kind not in ("fsdp", "fsdp2"):
        draft.note(f"{ACTOR}.strategy", f"there is no {kind}; DeepSpeed's stage 3 shards weights in its place")


def sharding(draft: Draft) -> None:
    """Shard weights as FSDP does."""
    draft.set("strategy", "deepspeed")
    draft.set("strategy.stage", "3")


def rewards(draft: Draft) -> None:
    """Translate where rewards come from: a model, a file with a function, or rules for mathematics."""
    path, name = draft.take("custom_reward_function.path"), draft.take("custom_reward_function.name", "compute_score")
    model = draft.take("reward_model.model.path")
    if draft.take_switch("reward_model.enable") and model:
        draft.set("reward", "model")
        draft.set("reward.model", model)
    elif path:
        draft.set("reward", "func")
        draft.set("reward.path", path)
        draft.set("reward.name", name)
        draft.note(
            "custom_reward_function.path", "its arguments differ: a function gets lists, as docs/rewards.md says"
        )
    else:
        draft.set("reward", "math")
        draft.note(
            "data.train_files", "rewards follow from the column data_source there; --reward math compares answers"
        )
    for each in [each for each in draft.flags if each.startswith("reward_model.") and "overlong" not in each]:
        draft.note(each, f"--reward has options of its own; {draft.take(each)} is not carried over")


def tracking(draft: Draft) -> None:
    """Translate trackers and when held-out rows are measured and checkpoints written."""
    names = re.findall(r"[a-z_]+", draft.take("trainer.logger").lower())
    project, run = draft.take("trainer.project_name"), draft.take("trainer.experiment_name")
    known = sorted(set(names) & rules.TRACKERS)
    if known:
        draft.set("observer", ",".join(known))
        for name, value in (("wandb_project", project), ("wandb_run_name", run)):
            if value:
                draft.flags[name] = [value]
    elif run:
        draft.set("output", run)
        draft.note("trainer.project_name", "the folder of a run names it")
    for name in set(names) - {"console", *known}:
        draft.note("trainer.logger", f"there is no tracker {name}")
    for name, path in (("trainer.save_freq", "save_every"), ("trainer.test_freq", "eval_every")):
        steps = draft.take_number(name, -1)
        if steps > 0:
            draft.set(path, steps)


def chats(draft: Draft) -> None:
    """Translate what verl's files have: chats as prompts."""
    if "data.prompt_key" not in draft.flags:
        draft.set("data.prompt_key", "prompt")


RULES = (estimator, batch, length, kl, placement, rewards, tracking, chats)

ONLINE = Dialect("verl, online", RULES, {}, ANSWERS, ABSENT_ENDS)
SFT = Dialect("verl, SFT", (rows, length, tracking, sharding), {}, ANSWERS, ABSENT_ENDS)
