"""OpenRLHF: the flat flags up to 0.10, and the grouped ones from then on."""

from __future__ import annotations

from dataclasses import replace

from rlhf_core.translation import rules
from rlhf_core.translation.draft import Dialect, Draft, Note

__all__ = ["LORA_COMBINER", "OFFLINE", "OFFLINE_USUAL", "ONLINE", "ONLINE_USUAL", "PAIRS", "SAMPLED"]

PLACED = ("actor", "critic", "ref", "reward")

NAMES = {
    "actor.model_name_or_path": "pretrain",
    "model.model_name_or_path": "pretrain",
    "reward.model_name_or_path": "reward_pretrain",
    "critic.model_name_or_path": "critic_pretrain",
    "ref.model_name_or_path": "ref_pretrain",
    "reward.remote_url": "remote_rm_url",
    "data.prompt_dataset": "prompt_data",
    "data.prompt_probs": "prompt_data_probs",
    "data.tokenizer_chat_template": "chat_template_path",
    "tokenizer_chat_template": "chat_template_path",
    "ckpt.output_dir": "save_path",
    "ckpt.path": "ckpt_path",
    "ckpt.load_enable": "load_checkpoint",
    "ckpt.save_hf": "save_hf_ckpt",
    "ckpt.max_num": "max_ckpt_num",
    "ckpt.max_mem": "max_ckpt_mem",
    "ds.attn_implementation": "attn_implementation",
    "ds.lora.rank": "lora_rank",
    "ds.lora.alpha": "lora_alpha",
    "ds.lora.dropout": "lora_dropout",
    "ds.lora.target_modules": "target_modules",
    "ds.tensor_parallel_size": "ds_tensor_parallel_size",
    "ds.enable_sleep": "deepspeed_enable_sleep",
    "vllm.num_engines": "vllm_num_engines",
    "vllm.tensor_parallel_size": "vllm_tensor_parallel_size",
    "vllm.gpu_memory_utilization": "vllm_gpu_memory_utilization",
    "vllm.enable_sleep": "vllm_enable_sleep",
    "vllm.sync_backend": "vllm_sync_backend",
    "vllm.sync_with_ray": "vllm_sync_with_ray",
    "actor.adam.lr": "actor_learning_rate",
    "critic.adam.lr": "critic_learning_rate",
    "adam.lr": "learning_rate",
    "model.adam.lr": "learning_rate",
    "actor.adam.betas": "adam_betas",
    "actor.adam.weight_decay": "l2",
    "actor.lr_scheduler": "lr_scheduler",
    "actor.lr_warmup_ratio": "lr_warmup_ratio",
    "actor.min_lr_ratio": "min_lr_ratio",
    "actor.max_norm": "max_norm",
    "actor.gradient_checkpointing_enable": "gradient_checkpointing",
    "actor.policy_loss_type": "policy_loss_type",
    "actor.eps_clip": "eps_clip",
    "actor.eps_clip_low_high": "eps_clip_low_high",
    "actor.dual_clip": "dual_clip",
    "actor.entropy_coef": "entropy_loss_coef",
    "actor.aux_loss_coef": "aux_loss_coef",
    "actor.loss_agg_mode": "loss_agg_mode",
    "critic.value_clip": "value_clip",
    "critic.freezing_steps": "freezing_actor_steps",
    "algo.advantage.estimator": "advantage_estimator",
    "algo.advantage.gamma": "gamma",
    "algo.advantage.lambd": "lambd",
    "algo.advantage.no_std_norm": "no_advantage_std_norm",
    "algo.advantage.is_correction_enable": "enable_vllm_is_correction",
    "algo.kl.init_coef": "init_kl_coef",
    "algo.kl.estimator": "kl_estimator",
    "algo.kl.use_loss": "use_kl_loss",
    "algo.kl.target": "kl_target",
    "algo.kl.horizon": "kl_horizon",
    "algo.kl.unbiased_gradient": "use_unbiased_kl_gradient",
    "algo.dynamic_filtering_enable": "dynamic_filtering",
    "algo.dynamic_filtering_range": "dynamic_filtering_reward_range",
    "reward.normalize_enable": "normalize_reward",
    "reward.clip_range": "reward_clip_range",
    "reward.overlong_buffer_len": "overlong_buffer_len",
    "reward.overlong_penalty_factor": "overlong_penalty_factor",
    "reward.stop_properly_penalty_coef": "stop_properly_penalty_coef",
    "rollout.batch_size": "rollout_batch_size",
    "rollout.max_new_tokens": "generate_max_len",
    "rollout.micro_batch_size": "micro_rollout_batch_size",
    "rollout.max_tokens_per_gpu": "rollout_max_tokens_per_gpu",
    "train.batch_size": "train_batch_size",
    "train.micro_batch_size": "micro_train_batch_size",
    "train.max_tokens_per_gpu": "train_max_tokens_per_gpu",
    "train.colocate_all": "colocate_all_models",
    "train.async_enable": "async_train",
    "train.dynamic_batch_enable": "use_dynamic_batch",
    "train.full_determinism_enable": "full_determinism",
    "model.loss_type": "loss_type",
    "model.margin_loss_enable": "margin_loss",
    "model.beta": "beta",
    "model.label_smoothing": "label_smoothing",
    "model.ipo_enable": "ipo",
    "model.nll_loss_coef": "nll_loss_coef",
    "model.aux_loss_coef": "aux_loss_coef",
    "model.gradient_checkpointing_enable": "gradient_checkpointing",
    "logger.wandb.key": "use_wandb",
    "logger.wandb.project": "wandb_project",
    "logger.wandb.run_name": "wandb_run_name",
    "logger.wandb.org": "wandb_org",
    "logger.tensorboard_dir": "use_tensorboard",
    "eval.dataset": "eval_dataset",
    "eval.split": "eval_split",
    "eval.steps": "eval_steps",
}
NAMES |= {f"{role}.{size}": f"{role}_{size}" for role in PLACED for size in ("num_nodes", "num_gpus_per_node")}
"""Usual names of grouped flags; of one that is not here, the group is left out."""

BY_ENGINE = "the launcher decides which models and engines share devices"
MICRO = "micro-batches are cut by tokens and change no result; --micro-tokens bounds their memory"
ABSENT = {
    "micro_train_batch_size": MICRO,
    "micro_rollout_batch_size": MICRO,
    "use_dynamic_batch": MICRO,
    "train_max_tokens_per_gpu": MICRO,
    "rollout_max_tokens_per_gpu": MICRO,
    "logging_steps": "every step is logged",
    "save_hf_ckpt": "OUTPUT/model is in the format of Hugging Face, and `rlhf-run export` writes a checkpoint in it",
    "save_value_network": "checkpoints hold the critic, and OUTPUT has its weights",
    "max_ckpt_mem": "--keep-gb bounds the size of checkpoints",
    "use_ds_universal_ckpt": "checkpoints fit any stage and any number of processes",
    "disable_ds_ckpt": "--save-every 0 saves at the end alone",
    "vllm_enable_sleep": BY_ENGINE,
    "deepspeed_enable_sleep": BY_ENGINE,
    "colocate_actor_ref": BY_ENGINE,
    "colocate_critic_reward": BY_ENGINE,
    "vllm_sync_backend": "weights take the fastest path that trainer and engine share",
    "vllm_sync_with_ray": "weights take the fastest path that trainer and engine share",
    "adam_offload": "--strategy.offload optimizer keeps its states in main memory; --strategy.cpu-adam True is its update",
    "ref_reward_offload": "--reward.offload True keeps a reward model in CPU memory between calls",
    "normalize_reward": "--reward.mean and --reward.std are what is subtracted and divided by; the model's card has them",
    "loss_type": "the difference of scores goes through the logarithm of a sigmoid, which log-exp is too",
    "agent_func_path": "an environment is a class, --environment MODULE:CLASS; docs/environments.md writes one",
    "partial_rollout": "--ahead 1 --partial.midway True continues completions under new weights, where the engine supports it",
    "ring_attn_size": "pass --strategy deepspeed --strategy.sequence N --strategy.sequence-kind ring, and start as many ranks",
    "ds_tensor_parallel_size": "--strategy.tensor lets ranks share layers, under --strategy.stage 0, 1 or 2",
    "ring_head_stride": "a ring sends all key heads at once",
    "grad_accum_dtype": "gradients are summed in float32",
    "disable_fast_tokenizer": "the tokenizer is the model's own",
    "actor_init_on_gpu": "models are made where they train",
    "value_head_prefix": "the head is called score",
    "wandb_group": "the folder of a run names its group",
    "prompt_key": "--data.prompt-key names the column of the prompt",
    "dynamic_filtering_reward_range": "--filter.low and --filter.high bound the mean score",
    "enable_vllm_is_correction": "--loss.correction.level token corrects the engine's probabilities",
    "zpg": "there is no hierarchical partition",
    "ema_beta": "--actor.ema has the decay; --enable-ema switches it on",
    "max_steps": "the environment ends an episode",
    "is_rm": "the kind of model is found",
    "local_rank": "the launcher sets it",
    "packing_samples": "rows are packed where the attention can keep them apart",
    "compute_fp32_loss": "losses are computed in float32",
}

ONLINE_USUAL = (
    "rollout_batch_size 1024, train_batch_size 128, n_samples_per_prompt 1, generate_max_len 1024, max_epochs 1, "
    "num_episodes 1, actor_learning_rate 1e-6, critic_learning_rate 9e-6, lr_scheduler cosine_with_min_lr, "
    "lr_warmup_ratio 0.03, init_kl_coef 0.01, lambd 1, eps_clip 0.2, seed 42"
)
"""Defaults of `train_ppo` and `train_ppo_ray` that are not ours."""

OFFLINE_USUAL = "train_batch_size 128, max_epochs 1, lr_scheduler cosine_with_min_lr, lr_warmup_ratio 0.03, seed 42"
"""Defaults of `train_sft`, `train_rm`, `train_dpo` and `train_kto` that are not ours."""

CLIPPED = {"rloo": {"loss": "clip", "advantage.per_token": "after"}}
"""Apply OpenRLHF's additions to an algorithm: RLOO clips ratios there, and leaves the penalty out of its baseline."""

POLICY_LOSSES = {"gspo": {"loss": "gspo"}}

GROUPS = ("grpo", "dr_grpo", "rloo", "reinforce_pp_baseline")
"""Algorithms that need several completions of a prompt."""


def estimator(draft: Draft) -> None:
    """Translate the advantage estimator, which is the choice of an algorithm here, and the kind of policy loss."""
    theirs = draft.take("advantage_estimator", "gae")
    if theirs in rules.ESTIMATORS:
        draft.command = rules.ESTIMATORS[theirs]
    else:
        draft.note("advantage_estimator", f"there is no estimator {theirs}")
    for path, value in {
        **CLIPPED.get(draft.command, {}),
        **POLICY_LOSSES.get(draft.take("policy_loss_type"), {}),
    }.items():
        draft.set(path, value)
    aggregate = {"token-mean": "token", "seq-mean-token-mean": "sequence"}.get(draft.take("loss_agg_mode"))
    if aggregate:
        draft.set("loss.aggregate", aggregate)
    if draft.flags.get("critic_pretrain") == ["None"]:
        draft.take("critic_pretrain")


def online_batch(draft: Draft) -> None:
    """Translate batches: theirs count completions in an optimizer step, ours prompts in a step and optimizer steps in it."""
    prompts = draft.take_number("rollout_batch_size", 1024)
    n = draft.take_number("n_samples_per_prompt", 1) * draft.take_number("duplicate_rollout_batch_by", 1)
    draft.set("batch_size", prompts)
    if n == 1 and draft.command in GROUPS:
        draft.notes.append(
            Note("n_samples_per_prompt", f"{draft.command} compares completions of a prompt: 4 in the place of 1")
        )
        n = 4
    draft.set("sampling.n", n)
    draft.set("minibatches", max(1.0, prompts * n // draft.take_number("train_batch_size", prompts * n)))
    draft.set("update_epochs", draft.take_number("max_epochs", 1))
    if "num_episodes" in draft.flags:
        draft.set("epochs", draft.take_number("num_episodes", 1))
    length = draft.take("max_len")
    if length and "prompt_max_len" not in draft.flags:
        draft.set("max_prompt_tokens", length)


def placement(draft: Draft) -> None:
    """Translate who has which devices under Ray."""
    sizes = {}
    for role in PLACED:
        nodes, devices = draft.take_number(f"{role}_num_nodes", 0), draft.take_number(f"{role}_num_gpus_per_node", 0)
        if nodes * devices:
            sizes[role] = f"{int(nodes)}x{int(devices)}"
    if "reward" in sizes:
        for name in ("reward_num_nodes", "reward_num_gpus_per_node"):
            draft.note(
                name,
                "--reward model_role makes the reward model a role with workers of its own (--reward-model.model)",
            )
    queue = draft.take("async_queue_size", "1")
    if draft.take_switch("async_train"):
        draft.set("ahead", queue)
    together = draft.take_switch("colocate_all_models")
    if engines := draft.flags.get("vllm_num_engines"):
        draft.set("launcher.engines", *engines)
    draft.set("launcher.place", "together" if together else "separate")
    if "actor" in sizes:
        draft.set("launcher.workers", sizes["actor"])
    others = {role: size for role, size in sizes.items() if role in ("critic", "ref") and size != sizes.get("actor")}
    if others and not together:
        names = {"ref": "reference"}
        draft.set("launcher.role_workers", *(f"{names.get(role, role)}={size}" for role, size in others.items()))


def devices(draft: Draft) -> None:
    """Translate whether DeepSpeed trains; without its stage the program's is 2."""
    draft.set("strategy", "deepspeed")
    draft.set("strategy.stage", draft.take("zero_stage", "2"))
    if draft.take_switch("enable_ema"):
        draft.set("{role}.ema", draft.take("ema_beta", "0.992"))


def kl(draft: Draft) -> None:
    """Translate the KL penalty: without an estimator it is k1, and in the loss if a switch is on."""
    if not draft.take_switch("use_kl_loss"):
        draft.set("algorithm.kl.where", "reward")
    else:
        draft.set("algorithm.kl.where", "loss")
    draft.set("algorithm.kl.estimator", draft.take("kl_estimator", "k1"))
    if draft.take_switch("dynamic_filtering"):
        draft.set("filter", "inside")
        low, high = [*draft.take("dynamic_filtering_reward_range").split(), "0", "1"][:2]
        draft.set("filter.low", low)
        draft.set("filter.high", high)


def offline_batch(draft: Draft) -> None:
    """Translate batches and passes over rows."""
    if "train_batch_size" in draft.flags:
        draft.set("batch_size", draft.take_number("train_batch_size", 128))
    draft.set("epochs", draft.take_number("max_epochs", 1))


def one_pass(draft: Draft) -> None:
    """Translate reward models of which the head alone learns, by gradients or by Hessian-vector products."""
    if draft.take_switch("head_only"):
        draft.set("reward.freeze", "body")
    if not draft.take_switch("use_hvp"):
        return
    draft.set("reward.optim.use", "omd_memoryless")
    for name in ("damping", "damping_strategy", "damping_growth_rate", "num_cg_steps"):
        if value := draft.take(name):
            draft.set(f"reward.optim.{name}", value)
    for name in ("adam_betas", "l2", "max_norm"):
        if draft.take(name):
            draft.note(name, "the estimator has no moments and no decay")


def preferences(draft: Draft) -> None:
    """Translate which loss pairs have."""
    if draft.take_switch("ipo"):
        draft.set("loss", "ipo")
    elif draft.has("label_smoothing"):
        draft.set("loss", "cdpo")


SHARED = (rules.schedule, rules.checkpoints, rules.evaluation, rules.tracking, rules.template, devices)

SAMPLED = (online_batch, rules.rewards, rules.engines, rules.clip_bounds, kl, *SHARED)
"""Rules of every online algorithm."""

ONLINE = Dialect(
    "OpenRLHF, online",
    (estimator, placement, *SAMPLED),
    NAMES,
    {
        "ref_pretrain": "--reference.model",
        "lambd": "--advantage.lam",
        "no_advantage_std_norm": "--advantage.whiten mean",
    },
    ABSENT,
    groups=True,
)

OFFLINE = Dialect(
    "OpenRLHF, from data", (offline_batch, one_pass, *SHARED), NAMES, {"beta": "--loss.beta"}, ABSENT, groups=True
)

PAIRS = replace(OFFLINE, title="OpenRLHF, from pairs", rules=(preferences, *OFFLINE.rules))

LORA_COMBINER = Dialect(
    "OpenRLHF, adapters",
    (),
    {},
    {"lora_path": "--adapter", "model_path": "--base", "output_path": "--output", "bf16": "--dtype bfloat16"},
    ABSENT,
)
