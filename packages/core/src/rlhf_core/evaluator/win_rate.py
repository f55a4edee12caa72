"""Measure how often the policy's answer to a held-out prompt beats another model's, by the reward."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from rlhf_core.contract.providers import Evaluator
from rlhf_core.evaluator.heldout_samples import by_datasource, mean_and_error, policy
from rlhf_core.lazy import torch
from rlhf_core.training.rounding import prefer_chosen

if TYPE_CHECKING:
    from rlhf_core.contract.batch import Example, Rollouts
    from rlhf_core.contract.run_view import RunView

__all__ = ["WinRate"]

OPPONENT = "reference"


@dataclass(frozen=True)
class WinRate(Evaluator):
    """Measure how often the policy's answers get a higher reward than the reference model's, on held-out prompts.

    Both answer with their own template and tokenizer, so the two may be of different families. A pair counts if the reward
    abstains from neither.
    """

    prompts: int = 64
    """maximum number of held-out prompts, taken from the first"""
    n: int = 1
    """pairs of completions per prompt"""

    opponents: ClassVar[frozenset[str]] = frozenset({OPPONENT})
    """placed and sampled because of it"""

    def __call__(self, run: RunView) -> dict[str, float]:
        """`win_rate`, its standard error over prompts `…_se`, `…/<datasource>`, and both mean rewards.

        A tie, within the precision of the rewards, counts half.
        """
        rows = run.heldout(self.prompts)
        mine = list(range(run.world.rank, len(rows), run.world.size))
        sides = [self._sample(run, name, [rows[i] for i in mine], mine) for name in (policy(run, "win_rate"), OPPONENT)]
        common = set.intersection(
            *({*side["uids_N"].tolist()} for side in sides)
        )  # some prompt may be too long for one
        own, other = (
            side.rows([i for i, uid in enumerate(side["uids_N"].tolist()) if uid in common]) for side in sides
        )
        rewards = [run.reward_of(side) for side in (own, other)]
        answered_Pn = torch.stack([each.answered_N.view(-1, self.n) for each in rewards]).all(0)
        some_P = answered_Pn.any(1)
        own_Pn, other_Pn = (each.total_N.view(-1, self.n) for each in rewards)
        wins_Pn = prefer_chosen(own_Pn, other_Pn, max(each.precision for each in rewards)).double()
        means = [
            ((each_Pn * answered_Pn).sum(1) / answered_Pn.sum(1))[some_P].tolist()
            for each_Pn in (wins_Pn, own_Pn, other_Pn)
        ]
        told = (*means, [own.meta[i * self.n] for i in some_P.nonzero().flatten().tolist()])
        wins, ours, theirs, meta = (
            [each for part in column for each in part] for column in zip(*run.world.gather(told), strict=True)
        )
        if not wins:
            return {}
        return {
            **by_datasource("win_rate", wins, meta),
            "win_rate/reward": mean_and_error(ours)[0],
            "win_rate/reward_reference": mean_and_error(theirs)[0],
        }

    def _sample(self, run: RunView, name: str, rows: list[Example], uids: list[int]) -> Rollouts:
        """Completions of a role to these rows, asked in its own words."""
        from rlhf_core.data.encoder import Encoder
        from rlhf_core.models.loading.end_tokens import listed_ends
        from rlhf_core.models.loading.image_reader import load_reader
        from rlhf_core.models.loading.tokenizer import load_tokenizer

        spec = run.plan.roles[name]
        tokenizer = load_tokenizer(spec.options.model, spec.options)
        reader = load_reader(spec.options.model, spec.options, tokenizer)
        listed = listed_ends(spec.options.model, spec.options)
        data, longest = run.config.providers["data"], run.config.max_prompt_tokens
        encoder = Encoder.for_data(data, tokenizer, longest, reader, listed)
        sampling = replace(run.config.sampling, n=self.n, seed=run.config.seed)
        return run.rollouts(name, encoder.prompts(rows, uids), sampling)
