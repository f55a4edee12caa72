"""Registers what this package supplies, and warns when importance weights collapse.

Names and strings: nothing is imported until it is chosen.
"""

from __future__ import annotations

from collections.abc import Mapping

from rlhf_core.contract.hooks import Providers, hookimpl

__all__ = [
    "rlhf_advantage",
    "rlhf_algorithm",
    "rlhf_data",
    "rlhf_evaluator",
    "rlhf_ingredient",
    "rlhf_loss",
    "rlhf_metrics",
    "rlhf_optimizer",
    "rlhf_reward",
    "rlhf_watch",
]


@hookimpl
def rlhf_advantage() -> Providers:
    return {
        "ask": "rlhf_algos.advantage.ask:AskAdvantage",
        "batch_mean": "rlhf_algos.advantage.batch_mean:BatchMeanAdvantage",
        "best_of_n": "rlhf_algos.advantage.best_of_n:BestOfNAdvantage",
        "best_quartile": "rlhf_algos.advantage.best_quartile:BestQuartilePairs",
        "best_second": "rlhf_algos.advantage.best_second:BestSecondPairs",
        "best_worst": "rlhf_algos.advantage.best_worst:BestWorstPairs",
        "ctl": "rlhf_algos.advantage.ctl:CTLAdvantage",
        "delta_ucb": "rlhf_algos.advantage.delta_ucb:DeltaUCBPairs",
        "dr_grpo": "rlhf_algos.advantage.dr_grpo:DrGRPOAdvantage",
        "drts": "rlhf_algos.advantage.drts:DRTSPairs",
        "first_two": "rlhf_algos.advantage.first_two:FirstTwoPairs",
        "gae": "rlhf_algos.advantage.gae:GAEAdvantage",
        "gdpo": "rlhf_algos.advantage.gdpo:GDPOAdvantage",
        "grpo": "rlhf_algos.advantage.grpo:GRPOAdvantage",
        "kto": "rlhf_algos.advantage.kto:KTOAdvantage",
        "max_max": "rlhf_algos.advantage.best_second:BestSecondPairs",
        "max_min": "rlhf_algos.advantage.best_worst:BestWorstPairs",
        "max_random": "rlhf_algos.advantage.max_random:MaxRandomPairs",
        "max_uncertainty": "rlhf_algos.advantage.max_uncertainty:MaxUncertaintyPairs",
        "maxrl": "rlhf_algos.advantage.maxrl:MaxRLAdvantage",
        "negative": "rlhf_algos.advantage.negative:NegativeAdvantage",
        "optimistic": "rlhf_algos.advantage.optimistic:OptimisticPairs",
        "pairs": "rlhf_algos.advantage.pairs:PairsAdvantage",
        "random_pair": "rlhf_algos.advantage.random_pair:RandomPairs",
        "reinforce": "rlhf_algos.advantage.reinforce:ReinforceAdvantage",
        "reinforce_pp": "rlhf_algos.advantage.reinforce_pp:ReinforcePPAdvantage",
        "reinforce_pp_baseline": "rlhf_algos.advantage.reinforce_pp_baseline:ReinforcePPBaselineAdvantage",
        "rloo": "rlhf_algos.advantage.rloo:RLOOAdvantage",
        "sixo_negatives": "rlhf_algos.advantage.sixo_negatives:SixoNegativesAdvantage",
        "teacher": "rlhf_algos.advantage.teacher:TeacherAdvantage",
        "transformed": "rlhf_algos.advantage.transformed:TransformedAdvantage",
    }


@hookimpl
def rlhf_ingredient() -> Providers:
    return {"pairs": "rlhf_algos.ingredient.pairs:Pairs"}


@hookimpl
def rlhf_loss() -> Providers:
    return {
        "aot": "rlhf_algos.loss.aot:AOTLoss",
        "apo_down": "rlhf_algos.loss.apo_down:APODownLoss",
        "apo_zero": "rlhf_algos.loss.apo_zero:APOZeroLoss",
        "bco_pair": "rlhf_algos.loss.bco_pair:BCOPairLoss",
        "bradley_terry": "rlhf_algos.loss.bradley_terry:BradleyTerryLoss",
        "cdpo": "rlhf_algos.loss.cdpo:CDPOLoss",
        "chosen_nll": "rlhf_algos.loss.chosen_nll:ChosenNLLLoss",
        "cispo": "rlhf_algos.loss.cispo:CISPOLoss",
        "clip": "rlhf_algos.loss.clip:ClipLoss",
        "dapo": "rlhf_algos.loss.dapo:DAPOLoss",
        "discopop": "rlhf_algos.loss.discopop:DiscoPOPLoss",
        "distill": "rlhf_algos.loss.distill:DistillLoss",
        "dpo": "rlhf_algos.loss.dpo:DPOLoss",
        "dppo": "rlhf_algos.loss.dppo:DPPOLoss",
        "dr_grpo": "rlhf_algos.loss.dr_grpo:DrGRPOLoss",
        "entropy": "rlhf_algos.loss.entropy:EntropyLoss",
        "exo_pair": "rlhf_algos.loss.exo_pair:EXOPairLoss",
        "grpo": "rlhf_algos.loss.grpo:GRPOLoss",
        "gspo": "rlhf_algos.loss.gspo:GSPOLoss",
        "hinge": "rlhf_algos.loss.hinge:HingeLoss",
        "ipo": "rlhf_algos.loss.ipo:IPOLoss",
        "kto": "rlhf_algos.loss.kto:KTOLoss",
        "nca_pair": "rlhf_algos.loss.nca_pair:NCAPairLoss",
        "orpo": "rlhf_algos.loss.orpo:ORPOLoss",
        "prm": "rlhf_algos.loss.prm:PRMLoss",
        "reinforce": "rlhf_algos.loss.reinforce:ReinforceLoss",
        "robust": "rlhf_algos.loss.robust:RobustLoss",
        "sapo": "rlhf_algos.loss.sapo:SAPOLoss",
        "sft": "rlhf_algos.loss.sft:SFTLoss",
        "sigmoid_norm": "rlhf_algos.loss.sigmoid_norm:SigmoidNormLoss",
        "simpo": "rlhf_algos.loss.simpo:SimPOLoss",
        "sppo_hard": "rlhf_algos.loss.sppo_hard:SPPOHardLoss",
        "value": "rlhf_algos.loss.value:ValueLoss",
        "weighted_nll": "rlhf_algos.loss.weighted_nll:WeightedNLLLoss",
    }


@hookimpl
def rlhf_algorithm() -> Providers:
    return {
        "active_reward": "rlhf_algos.algorithm.active_reward:ActiveRewardModeling",
        "aot": "rlhf_algos.algorithm.aot:AOT",
        "bco_pair": "rlhf_algos.algorithm.bco_pair:BCOPair",
        "cdpo": "rlhf_algos.algorithm.cdpo:CDPO",
        "cispo": "rlhf_algos.algorithm.cispo:CISPO",
        "csft": "rlhf_algos.algorithm.csft:CSFT",
        "dapo": "rlhf_algos.algorithm.dapo:DAPO",
        "distill": "rlhf_algos.algorithm.distill:Distill",
        "dpo": "rlhf_algos.algorithm.dpo:DPO",
        "dppo": "rlhf_algos.algorithm.dppo:DPPO",
        "dr_grpo": "rlhf_algos.algorithm.dr_grpo:DrGRPO",
        "gdpo": "rlhf_algos.algorithm.gdpo:GDPO",
        "grpo": "rlhf_algos.algorithm.grpo:GRPO",
        "gspo": "rlhf_algos.algorithm.gspo:GSPO",
        "ipo": "rlhf_algos.algorithm.ipo:IPO",
        "kto": "rlhf_algos.algorithm.kto:KTO",
        "on_policy_distill": "rlhf_algos.algorithm.on_policy_distill:OnPolicyDistill",
        "online_dpo": "rlhf_algos.algorithm.online_dpo:OnlineDPO",
        "orpo": "rlhf_algos.algorithm.orpo:ORPO",
        "ppo": "rlhf_algos.algorithm.ppo:PPO",
        "prm": "rlhf_algos.algorithm.prm:PRM",
        "reinforce": "rlhf_algos.algorithm.reinforce:Reinforce",
        "reinforce_pp": "rlhf_algos.algorithm.reinforce_pp:ReinforcePP",
        "reinforce_pp_baseline": "rlhf_algos.algorithm.reinforce_pp_baseline:ReinforcePPBaseline",
        "rejection_sampling": "rlhf_algos.algorithm.rejection_sampling:RejectionSampling",
        "repulse": "rlhf_algos.algorithm.repulse:RePULSe",
        "reward": "rlhf_algos.algorithm.reward:RewardModeling",
        "rloo": "rlhf_algos.algorithm.rloo:RLOO",
        "sapo": "rlhf_algos.algorithm.sapo:SAPO",
        "sft": "rlhf_algos.algorithm.sft:SFT",
        "simpo": "rlhf_algos.algorithm.simpo:SimPO",
    }


@hookimpl
def rlhf_data() -> Providers:
    return {
        "conditional": "rlhf_algos.data.conditional:ConditionalData",
        "selected": "rlhf_algos.data.selected:SelectedData",
    }


@hookimpl
def rlhf_evaluator() -> Providers:
    return {
        "bad_probability": "rlhf_algos.evaluator.bad_probability:BadProbability",
        "bad_samples": "rlhf_algos.evaluator.bad_samples:BadSamples",
        "heldout_table": "rlhf_algos.evaluator.heldout_table:HeldoutTable",
    }


@hookimpl
def rlhf_optimizer() -> Providers:
    return {
        "mle": "rlhf_algos.optimizer.mle:MLE",
        "omd": "rlhf_algos.optimizer.omd:OMD",
        "omd_cg": "rlhf_algos.optimizer.omd_cg:OMDCG",
        "omd_memoryless": "rlhf_algos.optimizer.omd_memoryless:OMDMemoryless",
        "sgd": "rlhf_algos.optimizer.sgd:SGD",
    }


@hookimpl
def rlhf_reward() -> Providers:
    return {
        "keep_bad": "rlhf_algos.reward.keep_bad:KeepBad",
        "uncertain": "rlhf_algos.reward.uncertain:UncertainReward",
    }


@hookimpl
def rlhf_metrics() -> Mapping[str, str]:
    from rlhf_algos.metrics import METRICS

    return METRICS


@hookimpl
def rlhf_watch() -> object:
    from rlhf_algos.collapse import CollapseWarning

    return CollapseWarning()
