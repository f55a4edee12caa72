"""The best completion of each prompt, or a best and a worst one as a pair, out of a file of scored ones.

The same choice as the advantages `best_of_n`, `pairs` and the pair selectors make among samples, for completions that
`rlhf-run generate` and `rlhf-run score` left: what rejection sampling and iterative DPO train on where sampling is a command
of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from functools import cached_property
from typing import Any, Literal

from rlhf_algos.selection.selector import PairSelector
from rlhf_core.config.provider_spec import make_from_spec
from rlhf_core.contract.batch import Example
from rlhf_core.data.json import Json
from rlhf_core.errors import DataError, OptionError, run_option
from rlhf_core.lazy import torch

__all__ = ["SelectedData"]


@dataclass(frozen=True)
class SelectedData(Json):
    """Each prompt's best completion of a scored JSON file, as a demonstration; or its best and worst one, as a preference.

    Of equal rewards the earlier row counts as the better one; a prompt whose completions are all equally good gives no pair.
    """

    _: KW_ONLY
    reward_key: str = "reward"
    """column of the reward"""
    select: Literal["best", "pairs"] = "best"
    """best for sft, pairs for dpo and its family"""
    selector: str = ""
    """pair selector of `pairs`, by name with its options, such as "best_quartile rank=3"; empty takes the best and the
    worst"""
    min_gap: float = 0.0
    """largest difference of rewards at which `pairs` leaves a pair out"""
    uncertainty_key: str = ""
    """column of the reward's standard deviation, for pair selectors that read it; empty means no column"""

    def check(self) -> None:
        """Make the pair selector, so that a mistake in it is raised before anything is read."""
        super().check()
        if self.selector:
            _ = self._selector

    def _read(self, path: str) -> Sequence[Example]:
        numbers = (self.reward_key, *([self.uncertainty_key] if self.uncertainty_key else []))
        rows = Json._read(replace(self, number_keys=(*self.number_keys, *numbers)), path)
        groups: dict[str, list[Example]] = {}
        for row in rows:
            if len(row.completions) != 1:
                raise DataError(
                    f"{row.origin}: expected one completion per row, in the format that `rlhf-run generate` and "
                    "`rlhf-run score` write"
                )
            groups.setdefault(repr(row.prompt), []).append(row)
        chosen = list(self._choose(list(groups.values())))
        if not chosen:
            raise DataError(
                f"{path}: no prompt has two completions that {self.selector or self.select} selects as a pair with "
                f"rewards more than {self.min_gap:g} apart; generate more completions per prompt with "
                f"{run_option('sampling.n')}"
            )
        return chosen

    def _choose(self, groups: list[list[Example]]) -> Iterator[Example]:
        """Yield the completions of each prompt to train on."""
        best_first = [sorted(group, key=self._reward, reverse=True) for group in groups]
        if self.select == "best":
            return (ranked[0] for ranked in best_first)
        return self._selected(groups) if self.selector else self._pairs(best_first)

    @cached_property
    def _selector(self) -> PairSelector:
        """The pair selector.

        Raises:
            OptionError: the advantage of that name selects no pairs of completions.
        """
        selector = make_from_spec("advantage", self.selector, "selector")
        if not isinstance(selector, PairSelector):
            raise OptionError(
                "selector", f"{self.selector!r} does not choose pairs; name a pair selector, such as best_second"
            )
        return selector

    def _selected(self, groups: list[list[Example]]) -> Iterator[Example]:
        """The selector's pair of each prompt, where there is one."""
        for number, group in enumerate(groups):
            covariance_GG = self._covariance(group)
            pair = self._selector.pair(torch.tensor([*map(self._reward, group)]), number, covariance_GG=covariance_GG)
            if pair is not None:
                chosen, rejected = (group[place] for place in pair)
                yield replace(chosen, completions=(*chosen.completions, *rejected.completions))

    def _covariance(self, group: list[Example]) -> Any:
        """The covariance of a prompt's rewards, where the file has their standard deviations."""
        if not self.uncertainty_key:
            return None
        return torch.tensor([row.fields[self.uncertainty_key] for row in group], dtype=torch.float64).square().diag()

    def _pairs(self, best_first: list[list[Example]]) -> Iterator[Example]:
        """A pair of each prompt, where there is one."""
        for best, *_, worst in (ranked * 2 for ranked in best_first):  # a completion alone is its own worst
            if self._reward(best) - self._reward(worst) > self.min_gap:
                yield replace(best, completions=(*best.completions, *worst.completions))

    def _reward(self, row: Example) -> float:
        return row.fields[self.reward_key]
