"""Every metric that core and its own providers log: name, unit and meaning. docs/metrics.md is made from this.

A name may hold `<word>`, which stands for a role, a source (a role that is sampled), a datasource and the like, and
`[...]`, which may be left out: what the first source logs as `reward/mean`, a second one logs as `<source>/reward/mean`.
A plugin documents its own metrics in the same way, through the hook `rlhf_metrics`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

__all__ = ["MEASURED", "METRICS", "matches_documented"]

MEASURED = ("time/", "speed/", "memory/")
"""Prefixes of metrics that are measured, not computed: two equal runs differ in them."""

_RUN = {
    "step": "steps: finished steps, from 1",
    "tokens": "tokens: prompt and completion tokens of the rows that the step trained on, over all ranks; rows that "
    "several roles share count once",
    "samples": "completions: drawn in the step, of all roles and over all ranks",
    "padding": "share 0..1: padding among the token positions of the training batches",
    "loss/<role>": "loss: what the role's optimizer step minimized, the weighted sum of its terms",
    "loss/<role>/<datasource>": "loss: the same over the rows of data of this data source",
    "grad_norm/<role>": "norm: norm of the role's gradient over all parameters, before clipping",
    "lr/<role>": "rate: the learning rate of the step",
    "skipped/<role>": "optimizer steps: updates of the role that the step left out: a number was not finite (under "
    "on_nonfinite skip), float16 overflowed, the advantage chose no row to train on, or the reward abstained from all "
    "samples; a step without any update has no loss/<role>",
    "staleness/<role>": "optimizer steps: for a role that follows another one, steps that the other role has taken since "
    "its weights were last copied to this one",
    "loss_scale/<role>": "factor: multiplies float16 losses in the backward pass; halved when gradients overflow",
    "micro_tokens/<role>": "tokens: the budget of a micro-batch after this step; only under on_oom halve",
    "kl/mean": "nats per token: KL to the reference by algorithm.kl.estimator, over sampled tokens",
    "kl/completion": "nats per completion: the same, summed over each completion; what an adaptive coefficient follows",
    "kl/coef": "factor: the KL coefficient in force",
    "[<source>/]completion/length": "tokens: mean length of the sampled completions",
    "[<source>/]completion/truncated": "share 0..1: completions cut at sampling.max_new_tokens (with an "
    "environment: or at a limit of the episode)",
    "[<source>/]completion/turns": "turns: mean number in an episode; only with an environment",
    "[<source>/]completion/failed": "share 0..1: episodes whose environment or agent failed; only with an environment",
    "[<source>/]completion/segments": "segments: mean number in an episode, if an agent drives it; a new segment "
    "begins where the agent or the chat template changes earlier messages",
    "[<source>/]completion/feedback": "tokens: mean number per completion that the environment wrote; only with an environment",
    "[<source>/]completion/entropy": "nats per token: entropy of the distribution that was sampled (temperature and truncation "
    "included), estimated without bias as the mean of -log p over sampled tokens",
    "rollout/kept_mass": "share 0..1: probability that top-p, top-k and min-p keep, mean over tokens; logged if they "
    "truncate; importance ratios are then biased if the option sampling.replay is off",
    "rollout/staleness": "optimizer steps: age of the sampled tokens when they are trained on, mean over tokens and sources",
    "rollout/staleness_max": "optimizer steps: age of the oldest sampled token that the step trains on",
    "rollout/staleness_oldest": "optimizer steps: age of a completion's oldest token when it is trained on, mean over "
    "completions; only when sampling ahead",
    "rollout/staleness_newest": "optimizer steps: age of a completion's newest token, mean over completions; only when "
    "sampling ahead",
    "rollout/span": "optimizer steps: steps between the weights that sampled a completion's oldest and newest token, mean over "
    "completions; only when sampling ahead",
    "rollout/slices": "calls: calls of the rollout engines for the step; only with partial rollouts",
    "rollout/carried": "prompts: prompts in progress that continue in a later step; only with partial rollouts",
    "rollout/masked": "share 0..1: sampled tokens that were too old and are masked; only under stale.policy mask",
    "rollout/dropped": "0 or 1: 1 if completions were too old, so that all of the step were sampled again; only under "
    "stale.policy drop",
    "<role>/mismatch": "nats: absolute difference between the log-probabilities of rollout engine and trainer, mean over "
    "those tokens of the step's first update that were sampled by the role's current weights; the run warns or stops above "
    "max_mismatch (on_mismatch)",
    "<role>/mismatch_max": "nats: the largest such difference",
    "<role>/mismatch_kl": "nats per token: KL(sampler || trainer) estimated from these tokens (k3)",
    "[<source>/]reward/mean": "reward: mean over completions, after shaping, per-token rewards included; what is maximized",
    "[<source>/]reward/mean/<datasource>": "reward: the same over the rows of this data source",
    "[<source>/]reward/variance": "reward squared: variance over the batch",
    "[<source>/]reward/unshaped": "reward: mean as the provider gave it, logged where shaping is on",
    "dynamic/reward": "reward: mean over everything sampled, including what dynamic sampling then leaves out",
    "dynamic/rounds": "rounds: of sampling until enough prompts were kept",
    "dynamic/prompts": "prompts: sampled in these rounds",
    "dynamic/kept": "share 0..1: of them that were kept",
    "data/epoch": "epochs: passes over the data since the run began, where it has a length: 1.25 is one and a quarter",
    "data/dropped": "rows: left out since the run began, because they are too long or empty",
    "data/truncated": "rows: cut to the limit since the run began",
    "data/duplicates": "rows: left out since the run began, because they were there already",
}

_TIME = {
    "time/step": "seconds: the whole step",
    "time/data": "seconds: the loop waited for rows of data and turned them into tensors",
    "time/rollout": "seconds: sampling",
    "time/reward": "seconds: scoring",
    "time/needs": "seconds: forward passes for what credit and losses need: reference, critic, old log-probabilities",
    "time/credit": "seconds: advantages",
    "time/train": "seconds: forward, backward and optimizer",
    "time/sync": "seconds: new weights to the rollout engine",
    "time/wait": "seconds: the loop waited for the step's completions and, as part of time/sync, for a call of the sampler to "
    "end before new weights; only when sampling ahead",
    "time/sampler_wait": "seconds: the sampler waited for training before it began the step; with ahead",
    "time/checkpoint": "seconds: the loop stood still for the checkpoint of the step before",
    "time/checkpoint_background": "seconds: to write a checkpoint in the background",
    "speed/tokens": "tokens per second: `tokens` by `time/step`",
    "memory/process": "GiB: most memory that the first process has held so far",
    "memory/device": "GiB: most memory that tensors of the first process held on its device in this step; with a GPU only",
}

_PROVIDERS = {
    "<role>/router_loss": "loss: load balancing of a mixture of experts, before its weight",
    "<role>/kl": "nats per token: the KL loss's own estimate, with the weights of the step",
    "<role>/<name>/<datasource>": "as <role>/<name>: over the rows of data of this data source",
    "sleep/<resident>/seconds": "seconds: of the step in which a role, or the rollout engine, was put to sleep or woken; with "
    "launcher.share_memory; measured, as times are",
    "sleep/<resident>/gib": "GiB: that it gave back and took again in these switches",
    "sync/bytes": "bytes: of weights sent to the engine",
    "sync/seconds": "seconds: the engine took for them; measured, as times are",
    "sync/calls": "calls: to the engine for one update",
    "sync/restarts": "times: so far that processes of an engine's own died and were started again",
    "sync/buckets": "buckets: in which weights were sent to the engine's process",
    "recovered/roles": "deaths: of a role's processes since the last step, after which the run continued; in such steps only",
    "recovered/seconds": "seconds: from the deaths until the run was restored; measured, as times are",
    "recovered/engine": "rollout engines: that died since the last step, and were replaced; under launcher ray",
    "recovered/engine_seconds": "seconds: that it took to replace them; measured, as times are",
    "sync/controller_calls": "calls: of the controller to workers and engines for one update; under launcher ray",
    "sync/logprob_diff_mean": "nats per token: between the engine's log-probabilities and the trainer's, mean, where compared",
    "sync/logprob_diff_max": "nats per token: the same at most",
    "[<source>/]reward/abstained": "share 0..1: of completions from which the reward abstained; only in steps with one",
    "reward/answered": "share 0..1: of completions in which an answer was found",
    "reward/gave_up": "share 0..1: of answers whose comparison took too long",
    "reward/tests_passed": "share 0..1: of a program's tests that passed, mean",
    "reward/ungraded": "share 0..1: of completions for which the judge gave no grade, and `reward.fallback` is used",
    "reward/score": "score: of the reward model, before its mean and standard deviation are taken out",
    "reward/<role>": "score: of that role's model, mean, before weighing; under reward model_roles",
    "reward/cut": "share 0..1: of completions that were cut to the reward model's window",
    "reward/<part>": "reward: of one part of reward sum, before weighing, where it does not abstain; its own metrics "
    "follow as reward/<part>/<name>",
    "eval/heldout/reward": "reward: mean over held-out prompts",
    "eval/heldout/reward_se": "reward: its standard error",
    "eval/heldout/abstained": "share 0..1: of completions from which the reward abstained; only where there is one",
    "eval/heldout/reward/<datasource>": "reward: the same over the prompts of this data source",
    "eval/heldout/length": "tokens: mean length of the completions",
    "eval/heldout/truncated": "share 0..1: of completions that were cut",
    "eval/heldout/[<role>/]loss": "loss: of the algorithm on held-out rows of data, as one batch; without a role the policy's",
    "eval/heldout/[<role>/]perplexity": "perplexity: exp of the negative log-likelihood a token of held-out completions",
    "eval/heldout/[<role>/]<name>": (
        "as <role>/<name> or reward/<name>: the loss's own metrics on held-out rows (accuracy and margin of pairs), or the "
        "reward's on held-out completions with their standard errors `…_se`"
    ),
    "eval/pass@<k>": "probability: that one of k completions is right, unbiased",
    "eval/pass@<k>_se": "probability: its standard error over prompts",
    "eval/pass@<k>/<datasource>": "probability: the same over the prompts of this data source",
    "eval/policy/kl": "nats per completion: KL to the reference on held-out prompts",
    "eval/policy/kl_se": "nats per completion: its standard error",
    "eval/policy/kl_token": "nats per token: the same by the estimator k3",
    "eval/policy/length": "tokens: mean length",
    "eval/policy/length_median": "tokens: median length",
    "eval/policy/length_max": "tokens: greatest length",
    "eval/policy/truncated": "share 0..1: of completions that were cut",
    "eval/preference/accuracy": "share 0..1: of held-out pairs in which the chosen completion has the higher reward",
    "eval/preference/accuracy_se": "share 0..1: its standard error",
    "eval/preference/accuracy/<datasource>": "share 0..1: the same over the pairs of this data source",
    "eval/win_rate": "share 0..1: of held-out prompts that the policy answers better than its opponent; a tie counts half",
    "eval/win_rate_se": "share 0..1: its standard error over prompts",
    "eval/win_rate/reward": "reward: mean of the policy's answers",
    "eval/win_rate/reward_reference": "reward: mean of the opponent's answers",
    "eval/preference/margin": "reward: chosen minus rejected, mean over pairs",
}

METRICS: Mapping[str, str] = {**_RUN, **_TIME, **_PROVIDERS}
"""`{name: "unit: meaning"}`"""


def matches_documented(documented: str, name: str, words: Mapping[str, Collection[str]]) -> bool:
    """Return True if `name` is a metric documented as `documented`.

    `words` are what placeholders may stand for (roles, sources, datasources); one that is not there stands for any word, and
    `<datasource>` for any text.
    """
    pattern = re.escape(documented).replace(r"\[", "(?:").replace(r"\]", ")?")

    def choices(placeholder: re.Match[str]) -> str:
        known, any_text = words.get(placeholder[1]), ".+" if placeholder[1] == "datasource" else r"[\w.:-]+"
        return any_text if known is None else f"(?:{'|'.join(map(re.escape, known)) or '(?!)'})"

    return re.fullmatch(re.sub(r"<(\w+)>", choices, pattern), name) is not None
