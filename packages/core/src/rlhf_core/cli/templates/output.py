"""Template of `new-plugin --kind output`: an output of a role's forward pass and its test."""

from __future__ import annotations

__all__ = ["MODULE", "RUN", "TEST"]

RUN = "rlhf-run plugins --kind output"

MODULE = '''\
from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlhf_core import Output, States, hookimpl
from rlhf_core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class $cls(Output):
    """A linear function of the state at each completion's last token, (N,).

    Losses ask for it by name: `outputs = frozenset({"${name}_N"})`. The ending states the shape.
    """

    def head(self, hidden: int) -> nn.Module:
        return torch.nn.Linear(hidden, 1)

    def __call__(self, states: States, head: nn.Module | None) -> Tensor:
        assert head is not None, "it is what `head` made"
        scores_N: Tensor = head(states.last_NH)[:, 0].float()
        return scores_N


@hookimpl
def rlhf_output() -> dict[str, type]:
    return {"${name}_N": $cls}
'''

TEST = """\
from rlhf_core.testing import check_output

from $module import $cls


def test_it_keeps_the_contract() -> None:
    check_output($cls(), "${name}_N")
"""
