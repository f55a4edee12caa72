"""RePULSe (Zhao et al. 2025): flags that its fork of OpenRLHF adds to `train_ppo`, and its attack evaluation."""

from __future__ import annotations

from rlhf_core.translation import openrlhf
from rlhf_core.translation.draft import Dialect, Draft

__all__ = ["ATTACK", "TRAINING", "USUAL"]

TESTS = "it belongs to tests of the released code; --evaluator measures a policy"
ABSENT = {
    "save_info_path": "OUTPUT/metrics.jsonl has every number",
    "test_info_every": TESTS,
    "n_seeds_f_q": TESTS,
    "no_test_info": TESTS,
    "rm_type": "the reward is --reward",
    "save_negdata": "--reward keep_bad --reward.of 'model model=NAME' keeps rewards below --reward.threshold",
    "save_negdata_threshold": "--reward.threshold of --reward keep_bad",
    "analytic_bad_word_calc": "--evaluator bad_probability enumerates outputs; recipes/repulse/toy.toml has the tokens",
    "parameterization": "the proposal is a separate model, or the policy",
    "actor_loss_type": "--algorithm.contrast prefix is CTL",
    "reinforce_baseline_type": "the baseline of rloo is the mean of a prompt's other completions",
}

CONTRASTS = {"ctl": "prefix", "sixo": "sixo", "dpg": "none"}

USUAL = (
    "rollout_batch_size 128, train_batch_size 128, n_samples_per_prompt 1, generate_max_len 1024, max_epochs 1, "
    "num_episodes 1, lr_scheduler cosine_with_min_lr, lr_warmup_ratio 0.03, init_kl_coef 0.01, lambd 1, eps_clip 0.2, seed 42"
)


def method(draft: Draft) -> None:
    """Translate which method trains, and with which rates."""
    own = draft.take("parameterization")
    if not own:
        draft.command = "ppo"
        return
    contrast = draft.take("actor_loss_type")
    passes = draft.take_number("num_episodes", 1)
    if not draft.take_switch("do_harmlessness_training"):
        draft.command = "ppo"
        draft.set("algorithm.value.aggregate", "sequence")
        draft.set("loss.aggregate", "sequence")
    else:
        passes *= draft.take_number("harmlessness_training_num_episodes", 1)
        _policy(draft, contrast)
    steps = draft.take_number("fit_steps", 0)
    if draft.take_switch("new_custom_single_prompt") and steps:
        draft.set("steps", passes * steps)
    else:
        draft.set("epochs", passes)
    draft.flags.pop("num_episodes", None)


def _policy(draft: Draft, contrast: str) -> None:
    """Translate the policy's own terms and those of the proposal."""
    alpha, beta = draft.take_number("alpha", 0), draft.take_number("target_dist_beta", 0)
    proposal_rate, critic_rate = draft.take("actor_learning_rate"), draft.take("critic_learning_rate")
    draft.set("actor.optim.lr", draft.take("base_actor_learning_rate"))
    draft.unused_roles = frozenset({"critic"})
    draft.set("loss", "reinforce")
    draft.set("loss.aggregate", "sequence")
    kind = draft.take("harmlessness_training_loss_type")
    base = draft.take_switch("use_base_as_proposal")
    baseline = draft.take("reinforce_baseline_type")
    if baseline not in ("", "expectation"):
        draft.note(
            "reinforce_baseline_type", f"there is no baseline {baseline}; rloo's is the mean of the other completions"
        )
    transform = draft.take("reward_transform")
    if kind == "neg_training":
        draft.command = "repulse"
        draft.set("algorithm.compat", "original")
        draft.set("algorithm.alpha", alpha)
        draft.set("algorithm.target.beta", beta)
        if base:
            draft.set("algorithm.proposal", "base")
            draft.unused_roles |= {"proposal"}
        else:
            draft.set("proposal.optim.lr", proposal_rate)
        if contrast in CONTRASTS:
            draft.set("algorithm.contrast", CONTRASTS[contrast])
        else:
            draft.note("actor_loss_type", f"the proposal learns by CTL, not by {contrast}")
    else:
        draft.command = "rloo"
        if transform:
            draft.set("advantage", "transformed")
            draft.set("advantage.alpha", alpha)
            draft.set("advantage.beta", beta)
        else:
            for name, value in (("alpha", alpha), ("target_dist_beta", beta)):
                if value:
                    draft.note(name, "a policy without a proposal has no term for it")
    for name, rate in (("actor_learning_rate", proposal_rate), ("critic_learning_rate", critic_rate)):
        if float(rate or 0) and (name != "actor_learning_rate" or "proposal.optim.lr" not in draft.settings):
            draft.note(
                name, "nothing trains with it: the policy's rate is --base-actor-learning-rate, and there is no critic"
            )
    for name in ("lambd", "value_clip", "eps_clip"):
        draft.flags.pop(name, None)


def heldout(draft: Draft) -> None:
    """Translate what is sampled of held-out prompts at the end."""
    key = draft.take("heldout_input_key")
    if key and key != " ".join(draft.flags.get("input_key", [])):
        draft.note("heldout_input_key", "held-out rows have the column names of the others")
    passes = draft.take("sampling_iters", "1")
    if draft.take_switch("evaluate_heldout_sampling"):
        draft.set("evaluator", "heldout_table")
        copies = [
            float(draft.flags.get(name, ["1"])[0]) for name in ("n_samples_per_prompt", "duplicate_rollout_batch_by")
        ]
        draft.set("evaluator.n", copies[0] * copies[1])
        draft.set("evaluator.passes", passes)
        draft.set("evaluator.kl_coef", draft.flags["init_kl_coef"][0])
    if length := draft.take("rm_max_len"):
        draft.set("reward.encoding.max_tokens", length)
    if draft.has("bf16"):
        draft.set("reward.dtype", "bfloat16")


def attack(draft: Draft) -> None:
    """Translate the evaluation of a policy under attack."""
    draft.words.append(draft.take("ckpt_path") or draft.take("pretrain"))
    if base := draft.take("pretrain"):
        draft.note("pretrain", f"the checkpoint has a tokenizer and a configuration; it began as {base}")
    draft.set("evaluator", "gcg")
    draft.set("evaluator.schedule", "gcg")
    if draft.take("atk_success_criteria") == "reward":
        draft.set("reward", "model")
        draft.set("reward.model", draft.take("reward_pretrain"))
    if draft.take_switch("rm_exclude_adv_suffix"):
        draft.set("evaluator.judge_suffix", "False")
    if number := draft.take("max_targets"):
        draft.set("evaluator.rows", f":{number}")


TRAINING = Dialect(
    "RePULSe",
    (method, heldout, *openrlhf.SAMPLED),
    openrlhf.NAMES,
    {**openrlhf.ONLINE.answers, "heldout_prompt_data": "--data hf --data.heldout-path"},
    {**openrlhf.ABSENT, **ABSENT},
    groups=True,
)

ATTACK = Dialect(
    "RePULSe, attacks",
    (attack,),
    {},
    {
        "file_path": "--evaluator.goals",
        "reward_threshold": "--evaluator.threshold",
        "gcg_steps": "--evaluator.steps",
        "gcg_search_width": "--evaluator.search-width",
        "gcg_topk": "--evaluator.topk",
        "gcg_n_replace": "--evaluator.n-replace",
        "gcg_buffer_size": "--evaluator.buffer",
        "gcg_use_prefix_cache": "--evaluator.prefix-cache",
        "gcg_filter_ids": "--evaluator.filter-ids",
    },
    {
        **openrlhf.ABSENT,
        **ABSENT,
        "gcg_batch_size": "candidates are cut by tokens; --evaluator.batch-tokens bounds their memory",
        "scenario": "--evaluator.goal-key and --evaluator.target-key name the columns",
        "zero_stage": "nothing is trained, so nothing is sharded",
        "gradient_checkpointing": "nothing is trained",
    },
)
