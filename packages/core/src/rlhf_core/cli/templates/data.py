"""Template of `new-plugin --kind data`: a data provider and its test."""

from __future__ import annotations

__all__ = ["MODULE", "RUN", "TEST"]

RUN = "rlhf-run sft --model tiny --data $name --steps 3"

MODULE = '''\
from collections.abc import Sequence
from dataclasses import dataclass

from rlhf_core import Data, Example, hookimpl


@dataclass(frozen=True)
class $cls(Data):
    """Sums of small numbers, with their answers."""

    rows: int = 100
    """number of rows"""

    def __call__(self, split: str) -> Sequence[Example]:
        offset = 0 if split == "train" else self.rows
        numbers = range(offset, offset + self.rows)
        return [Example(f"{i} + {i} =", (f" {i + i}",), label=i + i, origin=f"$name:{i}") for i in numbers]


@hookimpl
def rlhf_data() -> dict[str, type]:
    return {"$name": $cls}
'''

TEST = """\
from rlhf_core.testing import check_data

from $module import $cls


def test_it_keeps_the_contract() -> None:
    check_data($cls())
"""
