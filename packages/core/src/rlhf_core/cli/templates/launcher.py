"""Template of `new-plugin --kind launcher`: a launcher and its test."""

from __future__ import annotations

__all__ = ["MODULE", "RUN", "TEST"]

RUN = "rlhf-run grpo --model tiny --data prompts --reward length --launcher $name --steps 3"

MODULE = '''\
from __future__ import annotations

import os
from dataclasses import dataclass
from typing import ClassVar

from rlhf_core import Launcher, Placement, Plan, Registry, UsageError, hookimpl


@dataclass(frozen=True)
class $cls(Launcher):
    """Core's launcher `local`, where enough memory is free.

    A launcher of your own returns a `Placement`: the roles of the plan, wherever they are, and the rollout engine.
    """

    min_free_gib: float = 0.0
    """memory that must be free on this machine before a model is loaded; 0 skips the check"""

    one_process: ClassVar[bool] = True

    def check(self) -> None:
        free_gib = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
        if free_gib < self.min_free_gib:
            raise UsageError(f"{free_gib:.1f} GiB are free, and --launcher.min-free-gib asks for {self.min_free_gib}")

    def __call__(self, plan: Plan) -> Placement:
        launcher: Launcher = Registry(autoload=False).resolve("launcher", "local")()
        return launcher(plan)


@hookimpl
def rlhf_launcher() -> dict[str, type]:
    return {"$name": $cls}
'''

TEST = """\
from rlhf_core.testing import check_launcher

from $module import $cls


def test_it_keeps_the_contract() -> None:
    check_launcher($cls())
"""
