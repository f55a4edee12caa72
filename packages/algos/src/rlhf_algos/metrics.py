"""Metrics of this package's losses, advantages and evaluators, as in `rlhf_core.plugins.metric_catalogue`."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["METRICS"]

METRICS: Mapping[str, str] = {
    "<role>/nll": "nats per token: -log p of completions; with preference losses, of the chosen ones",
    "<role>/accuracy": "share 0..1: of pairs with the higher reward on the chosen side; of a process reward model, of steps "
    "judged right",
    "<role>/margin": "reward: chosen minus rejected, mean over pairs",
    "<role>/chosen_reward": "reward: of chosen completions, modeled or implicit",
    "<role>/rejected_reward": "reward: of rejected completions, modeled or implicit",
    "<role>/desirable_reward": "reward: implicit, of KTO's desirable completions",
    "<role>/undesirable_reward": "reward: implicit, of KTO's undesirable completions",
    "<role>/clip_fraction": "share 0..1: of tokens whose gradient the clip cut off",
    "<role>/gate": "share 0..1: of a token's gradient that SAPO's gate lets through, mean over tokens",
    "<role>/approx_kl": "nats per token: KL(old || new) by k3 (Schulman 2020)",
    "<role>/ratio": "ratio: pi / pi_old, mean over tokens",
    "<role>/sampler_kl": "nats per token: KL(sampler || old), what engine and trainer differ by",
    "<role>/sampler_weight": "weight: the importance correction's, mean over tokens",
    "<role>/sampler_kept": "share 0..1: of tokens that the correction keeps",
    "<role>/entropy": "nats per token: exact entropy of the trained policy on sampled tokens, where a loss asks for it",
    "<role>/divergence": "nats per token: divergence from the teacher (loss.divergence)",
    "<role>/value_error": "reward squared: of the critic's values against their returns",
    "<role>/value": "reward: mean value",
    "<role>/return": "reward: mean return, what values should be",
    "reward/uncertainty": "reward: standard deviation of a completion's reward under the curvature of its head, mean over them",
    "reward/kept": "reward: mean of the best completions, which are trained on",
    "ask/labels": "pairs: labeled so far, those of all ranks",
    "ask/score": "score: of the pairs that are asked, by what `ask` chooses by; mean over them",
    "pairs/share": "share 0..1: of prompts that give a pair to train on",
    "pairs/regret": "reward: of a prompt's best completion, minus the mean of the pair's two; mean over pairs",
    "bco/z": "nats per completion: mean log(pi / ref) over all batches so far, which BCO compares with",
    "kto/desirable": "share 0..1: of rows labeled desirable",
    "kto/z": "nats per completion: KTO's reference point, mean over rows",
    "repulse/ess": "completions: effective sample size of a prompt's importance weights, 1 / sum w^2, mean over prompts",
    "repulse/largest_weight": "share 0..1: of a prompt's weight that its heaviest sample holds, mean over prompts",
    "repulse/log_z": "nats: log of the mean unnormalized weight, mean over prompts",
    "repulse/kl_proposal_target": "nats per completion: KL(q || sigma), estimated",
    "repulse/kl_target_proposal": "nats per completion: KL(sigma || q), estimated; never above log n",
    "repulse/collapsed": "share 0..1: of prompts in which one sample holds nearly all the weight",
    "repulse/weighted_reward": "reward: mean under the importance weights",
    "eval/bad/logprob": "nats: log of the probability that a prompt is answered badly",
    "eval/bad/logprob_bound": "nats: what it could be at most, were everything that is left out bad",
    "eval/bad/logprob_eos_unaware": "nats: the same, counting tokens after the end of the answer too",
    "eval/bad/probability": "probability: that a prompt is answered badly",
    "eval/bad_samples/logprob": "nats per completion: of bad samples kept earlier, mean over them, at the sampling temperature",
    "eval/bad_samples/log_mass": "nats: log of the probability of any kept bad sample, mean over prompts, at that temperature",
    "eval/heldout_table/reward": "reward: mean over all samples of the table",
    "eval/heldout_table/return": "reward: the same less the KL penalty",
    "eval/heldout_table/worst": "reward: the lowest of them",
    "eval/heldout_table/samples": "completions: rows of the table",
}
"""`{name: "unit: meaning"}`"""
