"""Template of `new-plugin --kind sampler`: a sampler and its test."""

from __future__ import annotations

__all__ = ["MODULE", "RUN", "TEST"]

RUN = "rlhf-run grpo --model tiny --data prompts --reward length --sampler $name --steps 3"

MODULE = '''\
from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlhf_core import Sampler, hookimpl

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class $cls(Sampler):
    """The rows in turn, without those whose completions all score at least a bound."""

    bound: float = 1.0
    """score from which a row is learned"""

    def open(self, context: object) -> _Rows:
        return _Rows(self.bound)


class _Rows:
    """Memory from step to step; every checkpoint holds its state."""

    def __init__(self, bound: float) -> None:
        self.bound = bound
        self.place = 0
        self.learned: set[int] = set()

    def __call__(self, rows: int, seed: int) -> Iterator[int]:
        while True:
            number, self.place = self.place % rows, self.place + 1
            if number not in self.learned or len(self.learned) == rows:
                yield number

    def update(self, row_N: Tensor, scores_N: Tensor) -> None:
        for number in set(row_N.tolist()):
            learned = bool((scores_N[row_N == number] >= self.bound).all())
            (self.learned.add if learned else self.learned.discard)(number)

    def state_dict(self) -> dict[str, Any]:
        return {"place": self.place, "learned": sorted(self.learned)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.place, self.learned = state["place"], set(state["learned"])

    def close(self) -> None:
        """Nothing is open."""


@hookimpl
def rlhf_sampler() -> dict[str, type]:
    return {"$name": $cls}
'''

TEST = """\
from rlhf_core.testing import check_sampler

from $module import $cls


def test_it_keeps_the_contract() -> None:
    assert check_sampler($cls(bound=0.5), rows=4) == [0, 1, 2, 3, *(0, 1) * 18]
"""
