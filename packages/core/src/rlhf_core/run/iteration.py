"""One pass of the loop: an iteration owns its step, rows, batches, rewards and metrics, and the state of the data after it.

It reads only what stays the same while a run is open, so that several iterations can be under way. The run takes over the
iteration's metrics and state when it has been trained on (`Run.finish`); what was collected for an iteration that is never
trained on leaves no trace.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from rlhf_core.contract.batch import StepInfo
from rlhf_core.contract.options import Sampling
from rlhf_core.contract.plan import DATA
from rlhf_core.contract.results import RewardOutput, ScoredRollouts
from rlhf_core.data.stream import DrawnRows
from rlhf_core.errors import NotFiniteReward, options_under
from rlhf_core.lazy import torch
from rlhf_core.reward.output import to_reward_output, without_nan
from rlhf_core.rollout.kept_sets import with_kept_sets
from rlhf_core.run.reward_inputs import reward_precision
from rlhf_core.run.rollout_metrics import log_completions, log_rewards
from rlhf_core.training.abstentions import Answers, answered_rows, mark_abstained
from rlhf_core.training.credit import prepare_rows
from rlhf_core.training.dynamic_sampling import DynamicSampling, keep_sampling
from rlhf_core.training.empty_shares import like_others
from rlhf_core.training.nonfinite import keep_samples
from rlhf_core.training.old_logprobs import keep_exact
from rlhf_core.training.reward_shaping import RewardShaping
from rlhf_core.training.running_moments import Moments
from rlhf_core.training.step_metrics import Meter
from rlhf_core.training.token_balance import balance_rows, balance_tokens
from rlhf_core.util.clock import current_time
from rlhf_core.util.messages import log

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from rlhf_core.contract.batch import Batch, Prompts, Rollouts
    from rlhf_core.contract.distributed import World
    from rlhf_core.contract.options import RunConfig
    from rlhf_core.contract.plan import Plan
    from rlhf_core.contract.roles import Role
    from rlhf_core.data.encoder import Encoder
    from rlhf_core.data.prefetch import Prefetcher
    from rlhf_core.run.partial_sampling import PartialSampling

__all__ = ["Iteration", "Services"]


class Services(Protocol):
    """The parts of an open run that no step changes; an iteration sees no other."""

    @property
    def config(self) -> RunConfig:
        """The resolved options."""
        ...

    @property
    def plan(self) -> Plan:
        """The whole plan."""
        ...

    @property
    def output(self) -> Path:
        """The folder of the run."""
        ...

    @property
    def world(self) -> World:
        """The ranks of the run."""
        ...

    @property
    def roles(self) -> Mapping[str, Role]:
        """The placed roles."""
        ...

    @property
    def encoder(self) -> Encoder:
        """The encoder of the role that reads the data."""
        ...

    @property
    def stream(self) -> Prefetcher:
        """This rank's rows; the one thing that iterations take from in turn."""
        ...

    @property
    def group_filter(self) -> Any:
        """The filter of sampled groups; None if all are trained on."""
        ...

    @property
    def reward(self) -> Any:
        """The engine of the reward. Raises `UsageError` if none was chosen."""
        ...

    def reward_inputs(self, rollouts: Batch) -> Batch:
        """Return completions with the outputs of roles that the reward reads."""
        ...

    def rollouts(self, source: str, prompts: Prompts, sampling: Sampling, trained: bool = False) -> Rollouts:
        """Return completions of a role; with kept sets if they are to be trained on."""
        ...


class Iteration:
    """A step on its way from data to credit.

    Args:
        run: the services of the open run.
        step: the step that it becomes, from 1.
        kl_coef: the KL coefficient in force when it begins.
        moments: running moments of rewards by source, before it.
    """

    def __init__(self, run: Services, step: int, kl_coef: float, moments: Mapping[str, Moments]) -> None:
        self.run = run
        self.config = run.config
        self.world = run.world
        self.step = step
        self.plan = run.plan.for_step(step)
        """the part of the plan that takes part in this step"""
        self.info = StepInfo(step, (step - 1) / max(1, run.config.steps), kl_coef)
        """the step, as every batch of this iteration knows it"""
        self.meter = Meter(run.world)
        self.started = current_time()
        self.batches: dict[str, Batch] = {}
        """a batch per source, read or sampled"""
        self.rewards: dict[str, RewardOutput] = {}
        """rewards of sampled batches, by source"""
        self.left_out: dict[str, Rollouts] = {}
        """completions from which the reward abstained, by source: those of the last time that it scored"""
        self._abstained: dict[str, Tensor] = {}
        """numbers of this rank's abstentions and of its scored completions, by source"""
        self.moments = {source: Moments(*each.state()) for source, each in moments.items()}
        """running moments of rewards after this iteration"""
        self.position: Mapping[str, Any] = {}
        """position of the data after this iteration"""
        self.engine_states: dict[str, Any] = {}
        """states of engines after this iteration, by place, where later ones may be under way"""
        self.sampled_after: list[int] = []
        """for each call of the rollout engines, how many steps had been trained before it"""
        self.sampled_again = False
        """True if its completions take the place of some that were too old"""
        self.trained_versions: dict[str, int] = {}
        """version of each role when its updates began"""
        self.partial: PartialSampling | None = None
        """groups in progress, where completions can continue in a later iteration"""
        self._moments_before = moments
        self.rows: DrawnRows
        """this rank's rows of data; dynamic sampling may draw more"""

    def begin(self) -> None:
        """Draw the rows of the step; where groups continue over steps, rows are drawn on demand."""
        self.rows = self.draw() if self.partial is None else DrawnRows([], [])

    def draw(self) -> DrawnRows:
        """Return the next rows of data, made ready while earlier steps were at work."""
        with self.meter.phase("data"), options_under("/data"):
            drawn = next(self.run.stream)
        self.position = self.run.stream.state_dict()
        return drawn

    def again(self) -> Iteration:
        """Return a new iteration on the same rows, to be filled again; its data position and engine states are these."""
        other = Iteration(self.run, self.step, self.info.kl_coef, self._moments_before)
        other.rows, other.position, other.engine_states = self.rows, self.position, self.engine_states
        other.sampled_after, other.sampled_again = self.sampled_after, True
        return other

    def read(self) -> None:
        """Turn the rows into the batch of the source `data`."""
        with self.meter.phase("data"):
            batch = self.run.encoder.batch(*self.rows)
            batch = replace(batch, world=self.world, step=self.info)
            if self._lacks_rows:
                batch = like_others(batch, self.world)
            batch = prepare_rows(self.run.plan, batch)  # it may pair rows in the order of ranks
            self.batches[DATA] = balance_rows(batch, self.world) if self._may_move else batch

    def sample(self, source: str) -> Rollouts | ScoredRollouts:
        """Return completions of `source` on the rows' prompts; scored ones where a filter has had prompts replaced."""
        group_filter = self.run.group_filter
        if group_filter is None:
            return self.sample_once(source, self.rows)
        dynamic = self.config.algorithm.dynamic or DynamicSampling()
        return keep_sampling(self, source, self.rows, group_filter, dynamic)

    def sample_once(self, source: str, rows: DrawnRows) -> Rollouts:
        """Return completions of `source` on the prompts of `rows`."""
        config = self.config
        with self.meter.phase("rollout"):
            seed = Sampling(seed=config.seed).seed_for(self.step - 1, self.run.plan.sources.index(source))
            sampling = replace(config.sampling, seed=seed)
            if self.partial is not None:
                rollouts = self.partial.sample(self, source, sampling)
            else:
                prompts = self.run.encoder.prompts(*rows)
                rollouts = self.run.rollouts(source, prompts, sampling, trained=True)
            engine, tokenizer = config.providers["rollout"], self.run.roles[source].tokenizer
            rollouts = with_kept_sets(rollouts, config.sampling, engine, tokenizer)
        rollouts = self.world.share(rollouts)
        dtype = self.plan.roles[source].options.compute_dtype
        if not self.plan.proximal:
            rollouts = keep_exact(rollouts, engine, config.sampling.temperature, dtype)
        self.meter.log_total("samples", len(rollouts))
        log_completions(self.meter, self.prefix(source, "completion"), rollouts, config.sampling)
        return replace(rollouts, world=self.world, step=self.info)

    def score(self, source: str, sampled: Rollouts | ScoredRollouts) -> None:
        """Score and shape completions unless they are scored, and keep them as the batch of `source`."""
        scored = sampled if isinstance(sampled, ScoredRollouts) else self.judge(source, sampled)
        prefix = self.prefix(source, "reward")
        mine = (Answers.measure(scored), scored.failed, self._abstained[source].tolist())
        ranks, failures, abstained = zip(*self.world.gather(mine), strict=True)
        missing, asked = map(sum, zip(*abstained, strict=True))
        if missing:
            self.meter.log({f"{prefix}/abstained": missing / asked})
        failed = self.config.on_nonfinite == "skip" and any(failures)
        answered = None if failed else answered_rows(scored, self.world, ranks)
        if answered is None:
            skipped = mark_abstained(scored)
            self.batches[source] = replace(skipped, step=replace(self.info, skip=True))  # by every rank
            self.rewards[source] = scored.rewards
            self.left_out.pop(source, None)  # they are in the batch
            return
        if self._may_move:
            in_place = all(rank.tokens for rank in ranks) or not any(rank.lacking for rank in ranks)
            tokens = [rank.tokens for rank in ranks] if in_place else None
            answered = balance_tokens(answered, self.world, tokens)
        uids = tuple(sorted(set().union(*(rank.uids for rank in ranks))))
        rollouts, rewards = replace(answered.rollouts, step=replace(self.info, uids=uids)), answered.rewards
        shaping = self.config.algorithm.shaping
        if shaping not in (None, RewardShaping()):
            self.meter.log_batch(f"{prefix}/unshaped", rewards.total_N)
            seen = self.moments.setdefault(source, Moments())
            rewards = shaping(rewards, rollouts, self.config.sampling.max_new_tokens, seen)
        if "reward" in self.config.providers:
            log_rewards(self.meter, prefix, rewards, rollouts)
        self.batches[source] = rollouts.with_extras(rewards_N=rewards.rewards_N)
        self.rewards[source] = rewards

    @property
    def _may_move(self) -> bool:
        """True if groups may move between ranks: no credit reads a prompt's rows of two sources together."""
        return not any(spec.parts for spec in self.run.plan.credits.values())

    @property
    def _lacks_rows(self) -> bool:
        """True if some ranks have no row of a batch."""
        return self.config.batch_size < self.world.size

    def judge(self, source: str, rollouts: Rollouts) -> ScoredRollouts:
        """Return completions of `source` with their rewards, and let the sampler of rows know what the policy earned."""
        scored = self._score_once(rollouts)
        if self._lacks_rows:
            scored = like_others(scored, self.world)
        missing = (~scored.rewards.answered_N).nonzero().flatten()
        if len(missing):
            self.left_out[source] = mark_abstained(scored.rows(missing))
        count = torch.tensor([float(len(missing)), float(len(scored))])
        self._abstained[source] = self._abstained.get(source, torch.zeros(2)) + count
        sampled = [name for name in self.run.plan.sources if name != DATA]
        if self.run.stream.reacts and source == (
            self.run.plan.policy if self.run.plan.policy in sampled else sampled[0]
        ):
            self._update_sampler(scored)
        return scored

    def _update_sampler(self, scored: ScoredRollouts) -> None:
        """Give the sampler the scores of all ranks, in the order of drawing; none if a reward of them is not finite."""
        scored = scored.keep_answered()
        mine = [scored.rollouts[name].cpu() for name in ("uids_N", "row_N")]
        everyone = self.world.gather((*mine, scored.rewards.outcome_N.cpu(), scored.failed))
        if not any(failed for *_, failed in everyone):
            uids_N, row_N, scores_N = (torch.cat([each[k] for each in everyone]) for k in range(3))
            order_N = uids_N.argsort(stable=True)
            if not len(uids_N):  # the reward abstained from all
                return
            with options_under("/sampler"):
                self.run.stream.update(row_N[order_N], scores_N[order_N])

    def _score_once(self, rollouts: Rollouts) -> ScoredRollouts:
        """Return completions with their rewards. With `--on-nonfinite skip`, a reward that is not finite is reported and 0.

        Raises:
            NotFiniteReward: a reward is not finite, and the run stops at that.
        """
        if "reward" not in self.config.providers:  # an algorithm of comparisons, which scores nothing
            return ScoredRollouts(rollouts, RewardOutput(torch.zeros(len(rollouts))))
        engine, reward, precision = self.run.reward, self.config.providers["reward"], reward_precision(self.run.plan)
        with self.meter.phase("reward"):
            with options_under("/reward"):
                read = self.run.reward_inputs(rollouts)
                if not len(read):
                    return ScoredRollouts(rollouts, RewardOutput(torch.zeros(0)))
                raw = self.world.share(engine(read))
            try:
                return ScoredRollouts(rollouts, to_reward_output(raw, rollouts, reward, precision))
            except NotFiniteReward as error:
                if self.config.on_nonfinite == "stop":
                    raise
                path = keep_samples(self.run.output, self.step, error)
                log.warning(f"step {self.step} is skipped: {error}; the samples are in {path}")
                return ScoredRollouts(rollouts, to_reward_output(without_nan(raw), rollouts, reward), failed=True)

    def prefix(self, source: str, what: str) -> str:
        """Return the prefix of metrics about `what`: without the source's name if the policy is sampled."""
        return what if source == self.run.plan.policy else f"{source}/{what}"
