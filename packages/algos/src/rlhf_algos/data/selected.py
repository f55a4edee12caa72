"""The best completion of each prompt, or a best and a worst one as a pair, out of a file of scored ones.

The same choice as the advantages `best_of_n` and `pairs` make among samples, for completions that `rlhf-run generate` and
`rlhf-run score` left: what rejection sampling and iterative DPO train on where sampling is a command of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import Literal

from rlhf_core.contract.batch import Example
from rlhf_core.data.json import Json
from rlhf_core.errors import DataError, run_option

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
    min_gap: float = 0.0
    """pairs: those whose rewards differ by no more than this are left out"""

    def _read(self, path: str) -> Sequence[Example]:
        rows = Json._read(replace(self, number_keys=(*self.number_keys, self.reward_key)), path)
        groups: dict[str, list[Example]] = {}
        for row in rows:
            if len(row.completions) != 1:
                raise DataError(f"{row.origin}: expected one completion, as `rlhf-run generate` and `score` write it")
            groups.setdefault(repr(row.prompt), []).append(row)
        best_first = [sorted(group, key=self._reward, reverse=True) for group in groups.values()]
        chosen = [ranked[0] for ranked in best_first] if self.select == "best" else list(self._pairs(best_first))
        if not chosen:
            raise DataError(
                f"{path}: no prompt has two completions whose rewards differ by more than {self.min_gap:g}; generate more of "
                f"each with {run_option('sampling.n')}"
            )
        return chosen

    def _pairs(self, best_first: list[list[Example]]) -> Iterator[Example]:
        """A pair of each prompt, where there is one."""
        for best, *_, worst in (ranked * 2 for ranked in best_first):  # a completion alone is its own worst
            if self._reward(best) - self._reward(worst) > self.min_gap:
                yield replace(best, completions=(*best.completions, *worst.completions))

    def _reward(self, row: Example) -> float:
        return row.fields[self.reward_key]
