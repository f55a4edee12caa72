"""Flags of TRL and OpenRLHF, each with what to write here.

The table provides the error for users who type one of them, `docs/flags.md` prints it, and `rlhf-run translate`
translates with it. An answer holds flags, with a value where one is part of it; `{role}` stands for the role that the
algorithm trains. Of several answers, the first one counts that a run has.
"""

from __future__ import annotations

import re
from collections.abc import Collection

__all__ = ["FLAGS", "find_answer", "read_answer", "table"]

LR = "--{role}.optim.lr"
WHOLE_BATCH = "--batch-size; it is the whole batch of a step, over all ranks; memory is bounded by --micro-tokens"
MICRO = "--micro-tokens; micro-batches are cut by tokens and change no result, and --batch-size is the whole batch"
EVERY_STEP = "--observer; every step is logged, and a tracker is named"
DATA = "--data hf --data.path"
TOKENS = "--data.encoding.max-tokens"
NEW_TOKENS = "--sampling.max-new-tokens"
BEST = "--keep-best METRIC"
EVAL = "--eval-every; steps, and --evaluator names what is measured"

FLAGS: dict[str, tuple[str, ...]] = {
    # models
    "model_name_or_path": ("--model",),
    "pretrain": ("--model",),
    "ref_model": ("--reference.model",),
    "ref_pretrain": ("--reference.model",),
    "critic_pretrain": ("--critic.model",),
    "reward_model_path": ("--reward model --reward.model",),
    "reward_pretrain": ("--reward model --reward.model",),
    "trust_remote_code": ("--{role}.trust-remote-code",),
    "attn_implementation": ("--{role}.attention",),
    "flash_attn": ("--{role}.attention flash_attention_2",),
    "bf16": ("--dtype bfloat16",),
    "fp16": ("--dtype float16",),
    "torch_dtype": ("--dtype",),
    "gradient_checkpointing": ("--{role}.gradient-checkpointing",),
    "use_peft": ("--{role}.lora.rank 16",),
    "lora_r": ("--{role}.lora.rank",),
    "lora_rank": ("--{role}.lora.rank",),
    "lora_alpha": ("--{role}.lora.alpha",),
    "lora_dropout": ("--{role}.lora.dropout",),
    "lora_target_modules": ("--{role}.lora.targets",),
    "target_modules": ("--{role}.lora.targets",),
    "load_in_4bit": ("--{role}.quantize nf4",),
    "actor_model_name_or_path": ("--model",),
    "teacher_model": ("--teacher.model",),
    "freeze_visual_encoder": ("--{role}.freeze vision",),
    "aux_loss_coef": ("--{role}.router-aux-coef",),
    "ema_beta": ("--{role}.ema",),
    "sync_ref_model": ("--reference.track.of actor",),
    "ref_model_sync_steps": ("--reference.track.every",),
    "ref_model_mixup_alpha": ("--reference.track.decay; the share of the old weights, 1 - alpha",),
    # the optimizer and the length of a run
    "learning_rate": (LR,),
    "actor_learning_rate": ("--actor.optim.lr",),
    "critic_learning_rate": ("--critic.optim.lr",),
    "lr_scheduler_type": ("--{role}.optim.schedule",),
    "lr_scheduler": ("--{role}.optim.schedule",),
    "warmup_ratio": ("--{role}.optim.warmup",),
    "warmup_steps": ("--{role}.optim.warmup",),
    "lr_warmup_ratio": ("--{role}.optim.warmup",),
    "lr_warmup_steps": ("--{role}.optim.warmup",),
    "min_lr_ratio": ("--{role}.optim.min-lr-ratio",),
    "weight_decay": ("--{role}.optim.weight-decay",),
    "l2": ("--{role}.optim.weight-decay",),
    "max_grad_norm": ("--{role}.optim.max-grad-norm",),
    "max_norm": ("--{role}.optim.max-grad-norm",),
    "adam_beta1": ("--{role}.optim.betas; both, 0.9 0.95",),
    "adam_beta2": ("--{role}.optim.betas; both, 0.9 0.95",),
    "adam_betas": ("--{role}.optim.betas",),
    "adam_epsilon": ("--{role}.optim.eps",),
    "optim": ("--{role}.optim.use",),
    "num_train_epochs": ("--epochs",),
    "num_episodes": ("--epochs", "--steps"),
    "max_steps": ("--steps",),
    "per_device_train_batch_size": (WHOLE_BATCH,),
    "train_batch_size": (WHOLE_BATCH,),
    "rollout_batch_size": (WHOLE_BATCH,),
    "per_device_eval_batch_size": (MICRO,),
    "micro_train_batch_size": (MICRO,),
    "micro_rollout_batch_size": (MICRO,),
    "gradient_accumulation_steps": (MICRO,),
    "num_iterations": ("--update-epochs",),
    "num_ppo_epochs": ("--update-epochs",),
    "max_epochs": ("--update-epochs; passes over the data are --epochs",),
    "num_mini_batches": ("--minibatches",),
    # data
    "dataset_name": (DATA,),
    "dataset": (DATA,),
    "prompt_data": (DATA,),
    "dataset_train_split": ("--data hf --data.split",),
    "dataset_split": ("--data hf --data.split",),
    "train_split": ("--data hf --data.split",),
    "prompt_split": ("--data hf --data.split",),
    "prompt_data_probs": ("--data hf --data.shares",),
    "dataset_probs": ("--data hf --data.shares",),
    "dataset_test_split": ("--data hf --data.heldout-split",),
    "eval_dataset": ("--data hf --data.heldout-path",),
    "eval_split": ("--data hf --data.heldout-split",),
    "heldout_prompt_data": ("--data hf --data.heldout-path",),
    "input_key": ("--data hf --data.prompt-key",),
    "output_key": ("--data hf --data.completion-key",),
    "label_key": ("--data hf --data.label-key",),
    "chosen_key": ("--data hf --data.chosen-key",),
    "rejected_key": ("--data hf --data.rejected-key",),
    "image_key": ("--data hf --data.images-key",),
    "max_images_per_prompt": ("--data hf --data.max-images",),
    "system_prompt": ("--data.system",),
    "apply_chat_template": ("--data.encoding.template chat",),
    "chat_template_path": ("--data.encoding.template-file",),
    "input_template": ("--data.encoding.input-template",),
    "max_length": (TOKENS,),
    "max_seq_length": (TOKENS,),
    "max_len": (TOKENS,),
    "max_prompt_length": ("--max-prompt-tokens",),
    "prompt_max_len": ("--max-prompt-tokens",),
    "packing": ("--{role}.packing",),
    "packing_samples": ("--{role}.packing",),
    "assistant_only_loss": ("--data hf --data.turns all",),
    "multiturn": ("--data hf --data.turns all",),
    "max_samples": ("--data hf --data.limit",),
    # sampling
    "use_vllm": ("--rollout vllm",),
    "vllm_gpu_memory_utilization": ("--rollout vllm --rollout.gpu-memory-utilization",),
    "vllm_num_engines": ("--rollout vllm --launcher ray --launcher.engines",),
    "enforce_eager": ("--rollout vllm --rollout.enforce-eager",),
    "enable_prefix_caching": ("--rollout vllm --rollout.enable-prefix-caching",),
    "max_num_seqs": ("--rollout vllm --rollout.max-num-seqs",),
    "num_generations": ("--sampling.n",),
    "n_samples_per_prompt": ("--sampling.n",),
    "max_completion_length": (NEW_TOKENS,),
    "max_new_tokens": (NEW_TOKENS,),
    "response_length": (NEW_TOKENS,),
    "generate_max_len": (NEW_TOKENS,),
    "temperature": ("--sampling.temperature",),
    "top_p": ("--sampling.top-p",),
    "top_k": ("--sampling.top-k",),
    "min_p": ("--sampling.min-p",),
    # rewards, credit and losses
    "reward_funcs": ("--reward func --reward.path",),
    "reward_weights": ("--reward sum --reward.weights",),
    "remote_rm_url": ("--reward remote --reward.url",),
    "beta": ("--loss.beta", "--algorithm.kl.coef"),
    "kl_coef": ("--algorithm.kl.coef",),
    "init_kl_coef": ("--algorithm.kl.coef",),
    "kl_target": ("--algorithm.kl.target",),
    "kl_horizon": ("--algorithm.kl.horizon",),
    "kl_estimator": ("--algorithm.kl.estimator",),
    "use_kl_loss": ("--algorithm.kl.where loss",),
    "epsilon": ("--loss.clip-low",),
    "epsilon_high": ("--loss.clip-high",),
    "clip_eps_low": ("--loss.clip-low",),
    "clip_eps_high": ("--loss.clip-high",),
    "dual_clip": ("--loss.dual-clip",),
    "delta": ("--loss.dual-clip",),
    "loss_agg_mode": ("--loss.aggregate",),
    "cliprange": ("--loss.clip-low",),
    "eps_clip": ("--loss.clip-low",),
    "cliprange_value": ("--algorithm.value.clip",),
    "value_clip": ("--algorithm.value.clip",),
    "scale_rewards": ("--advantage.std",),
    "advantage_estimator": ("--advantage",),
    "gamma": ("--advantage.gamma",),
    "lam": ("--advantage.lam",),
    "lambd": ("--advantage.lam",),
    "freezing_actor_steps": ("--algorithm.critic-warmup",),
    "entropy_loss_coef": ("--algorithm.entropy",),
    "entropy_coef": ("--algorithm.entropy",),
    "use_unbiased_kl_gradient": ("--algorithm.kl.unbiased",),
    "ptx_coef": ("--algorithm.ptx",),
    "reward_clip_range": ("--algorithm.shaping.clip",),
    "overlong_buffer_len": ("--algorithm.shaping.overlong-buffer",),
    "overlong_penalty_factor": ("--algorithm.shaping.overlong-factor",),
    "stop_properly_penalty_coef": ("--algorithm.shaping.stop-properly",),
    "dynamic_filtering": ("--filter inside",),
    "loss_type": ("--loss",),
    "rpo_alpha": ("--algorithm.nll",),
    "nll_loss_coef": ("--algorithm.nll",),
    "label_smoothing": ("--loss.label-smoothing",),
    "margin_loss": ("--loss.margin True",),
    "desirable_weight": ("--advantage.desirable",),
    "undesirable_weight": ("--advantage.undesirable",),
    "center_rewards_coefficient": ("--loss.center",),
    "precompute_ref_log_probs": ("--algorithm.cache",),
    # where it runs
    "deepspeed": ("--strategy deepspeed",),
    "zero_stage": ("--strategy deepspeed --strategy.stage",),
    "overlap_comm": ("--strategy deepspeed --strategy.overlap",),
    "full_determinism": ("--deterministic True",),
    # what is written and measured
    "output_dir": ("--output",),
    "save_path": ("--output",),
    "ckpt_path": ("--output",),
    "report_to": ("--observer",),
    "use_wandb": ("--observer wandb",),
    "use_tensorboard": ("--observer tensorboard",),
    "wandb_project": ("--observer wandb --observer.project",),
    "wandb_org": ("--observer wandb --observer.entity",),
    "wandb_run_name": ("--observer wandb --observer.name",),
    "logging_steps": (EVERY_STEP,),
    "eval_strategy": (EVAL,),
    "evaluation_strategy": (EVAL,),
    "eval_steps": (EVAL,),
    "do_eval": ("--evaluator",),
    "best_metric_key": ("--keep-best",),
    "save_steps": ("--save-every",),
    "save_strategy": ("--save-every; steps, 0 saves at the end only",),
    "save_total_limit": ("--keep",),
    "max_ckpt_num": ("--keep",),
    "load_best_model_at_end": (BEST,),
    "metric_for_best_model": (BEST,),
    "greater_is_better": ("--keep-best-mode",),
    "resume_from_checkpoint": ("--resume",),
    "load_checkpoint": ("--resume",),
    "hub_model_id": ("--push-to-hub",),
}
"""Answers, by the foreign flag without dashes."""


def read_answer(answer: str) -> tuple[list[tuple[str, str]], str]:
    """Return (path, value) of each flag of an answer, and its remark: `data.path` with `` for `--data.path`."""
    flags, _, remark = answer.partition(";")
    pairs = re.findall(r"--([\w.{}-]+)((?: (?!--)\S+)*)", flags)
    return [(path.replace("-", "_"), value.strip()) for path, value in pairs], remark.strip()


def find_answer(path: str, role: str, known: Collection[str]) -> str:
    """Return the answer to a flag that a run has not, or nothing where there is none.

    Args:
        path: the flag, without dashes in front and with underscores.
        role: the role that the run's algorithm trains.
        known: paths of the run's options, and its kinds of providers.
    """
    for answer in FLAGS.get(path, ()):
        answer = answer.replace("{role}", role)
        paths = [each for each, _ in read_answer(answer)[0]]
        kinds = [each for each in paths if "." not in each and each in known]
        if all(each in known or each.partition(".")[0] in kinds for each in paths):
            return answer
    return ""


def table() -> str:
    """Return the rows of `docs/flags.md`; `ROLE` stands for `actor`, or for the role that an algorithm trains."""
    rows = []
    for theirs, ours in sorted(FLAGS.items()):
        cells = []
        for answer in ours:
            flags, _, remark = answer.replace("{role}", "ROLE").partition(";")
            cells.append(f"`{flags}`{',' * bool(remark)}{remark}")
        rows.append(f"| `--{theirs.replace('_', '-')}` | {', or '.join(cells)} |\n")
    return "".join(rows)


if __name__ == "__main__":
    print(table(), end="")
