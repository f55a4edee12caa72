"""`--reward code`: unit tests of the program in a completion, which cannot reach what judges it."""

from __future__ import annotations

import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from rlhf_core.contract.providers import Reward
from rlhf_core.contract.results import RewardOutput
from rlhf_core.errors import UsageError, option
from rlhf_core.lazy import torch
from rlhf_core.reward.code_labels import Assertions, Scripts, parse_label
from rlhf_core.reward.sandbox import confinement
from rlhf_core.reward.sandbox.server import SandboxServer
from rlhf_core.util.messages import log

if TYPE_CHECKING:
    from rlhf_core.contract.batch import Rollouts

__all__ = ["Code"]

FENCE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)```", re.DOTALL)


@dataclass(frozen=True)
class Code(Reward):
    """Unit tests of the Python program in the completion; the label holds the tests: 1 if all pass, else 0."""

    partial: bool = False
    """reward the share of tests that pass, in place of 1 for all and 0 otherwise"""
    timeout: float = 5.0
    """time limit of a program and its tests together, in seconds"""
    memory: int = 1024
    """memory limit of a program, in MiB"""
    workers: int = 0
    """number of programs that run at the same time; 0 runs one per CPU"""
    confine: bool = True
    """refuse to run if nothing isolates programs from files, network and other processes; set it to False only inside a
    container"""

    def check(self) -> None:
        """Refuse a machine that cannot confine programs, before a model is loaded."""
        if sys.platform != "linux":
            raise UsageError("reward code confines programs with the Linux kernel; run it on Linux")
        with SandboxServer() as server:
            self.judge(server, "", Assertions(["pass"]))

    def __call__(self, rollouts: Rollouts) -> RewardOutput:
        jobs = [(program(text), parse_label(label)) for text, label in zip(rollouts.texts, rollouts.labels)]
        with SandboxServer() as server, ThreadPoolExecutor(self.workers or os.cpu_count()) as threads:
            results = list(threads.map(lambda job: self.judge(server, *job), jobs))
        shares = [sum(passed) / len(passed) for passed in results]
        whole = [float(share == 1) for share in shares]
        return RewardOutput(
            rewards_N=torch.tensor(shares if self.partial else whole),
            scores_N=torch.tensor(whole),
            metrics={"tests_passed": torch.tensor(shares)},
        )

    def judge(
        self,
        server: SandboxServer,
        solution: str,
        tests: Assertions | Scripts,
        layers: tuple[str, ...] = confinement.LAYERS,
    ) -> list[bool]:
        """Return which tests pass: none after the one in which the program hangs or dies.

        Args:
            server: starts its processes.
            solution: the program.
            tests: its tests.
            layers: what confines it; all but where less is tried.
        """
        job = {"program": solution, "seconds": self.timeout, "memory": self.memory << 20, "layers": layers}
        answer = server.ask(job | {"kind": tests.kind}, tests.part())
        self._report(frozenset(answer["open"]))
        return tests.read_results(answer["results"])

    def _report(self, missing: frozenset[str]) -> None:
        """Log once what this machine cannot keep programs from.

        Raises:
            UsageError: `confine` asks for it.
        """
        if self.confine and missing - {confinement.OPTIONAL}:
            raise UsageError(
                f"reward code: this machine cannot confine programs (not blocked: {', '.join(sorted(missing))}); "
                "use a kernel with Landlock (5.13) and libseccomp or user namespaces, or run it in a container "
                f"with {option('confine', False)}"
            )
        if missing:
            _log_once(missing)


@cache
def _log_once(missing: frozenset[str]) -> None:
    log.warning("reward code: this machine does not confine programs (not blocked: %s)", ", ".join(sorted(missing)))


def program(text: str) -> str:
    """Return the last fenced block of a completion, or all of it."""
    blocks = FENCE.findall(text)
    return str(blocks[-1]) if blocks else text
