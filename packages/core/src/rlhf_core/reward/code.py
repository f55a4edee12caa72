"""`--reward code`: unit tests of the program in a completion, each program in a confined process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlhf_core.contract.providers import Reward
from rlhf_core.contract.results import RewardOutput
from rlhf_core.errors import DataError, UsageError, advice, option, run_option
from rlhf_core.lazy import torch
from rlhf_core.reward import sandbox

if TYPE_CHECKING:
    from rlhf_core.contract.batch import Rollouts

__all__ = ["Code"]

FENCE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)```", re.DOTALL)


@dataclass(frozen=True)
class Code(Reward):
    """Unit tests of the Python program in the completion; the label holds the tests: 1 if all pass, else 0."""

    partial: bool = False
    """the share of the tests that pass instead"""
    timeout: float = 5.0
    """seconds for a program and its tests together"""
    memory: int = 1024
    """MiB a program may allocate"""
    workers: int = 0
    """programs run at a time; 0 is one per CPU"""
    confine: bool = True
    """no network, no files but an empty folder, no process left; off only inside a container of its own"""

    def __call__(self, rollouts: Rollouts) -> RewardOutput:
        jobs = [(program(text), tests_of(label)) for text, label in zip(rollouts.texts, rollouts.labels)]
        with ThreadPoolExecutor(self.workers or os.cpu_count()) as threads:
            results = list(threads.map(lambda job: self._run(*job), jobs))
        shares = [sum(passed) / len(passed) for passed in results]
        whole = [float(share == 1) for share in shares]
        return RewardOutput(
            rewards_N=torch.tensor(shares if self.partial else whole),
            scores_N=torch.tensor(whole),
            metrics={"tests_passed": torch.tensor(shares)},
        )

    def _run(self, solution: str, tests: Sequence[str]) -> list[bool]:
        """Which tests pass; none if the program hangs, dies or never returns from its own code."""
        nonce = secrets.token_hex(16)  # an answer without it was written by the program
        job = {"solution": solution, "tests": tests, "nonce": nonce, "confine": self.confine}
        limits = {"seconds": self.timeout, "memory": self.memory}
        with tempfile.TemporaryDirectory(prefix="rlhf-code-") as folder:
            process = subprocess.Popen(
                [sys.executable, "-I", str(sandbox.__file__)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                cwd=folder,
                env={"PATH": os.defpath, "HOME": folder},
                start_new_session=True,
            )
            try:
                answer, _ = process.communicate(json.dumps(job | limits).encode(), timeout=self.timeout)
            except subprocess.TimeoutExpired:
                answer = b""
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
        if process.returncode == sandbox.CANNOT:
            raise UsageError(
                "reward code: this kernel lets no process confine itself (Landlock is missing); "
                f"run it inside a container with {option('confine', False)}"
            )
        return _read(answer, nonce) or [False] * len(tests)


def _read(answer: bytes, nonce: str) -> list[bool] | None:
    """The results, if they are the sandbox's."""
    try:
        given, results = json.loads(answer)
    except ValueError:
        return None
    return [bool(result) for result in results] if given == nonce else None


def program(text: str) -> str:
    """The last fenced block of a completion, or all of it."""
    blocks = FENCE.findall(text)
    return str(blocks[-1]) if blocks else text


def tests_of(label: Any) -> list[str]:
    """The tests in a label: code, or a list of pieces of code that are counted one by one."""
    tests = [label] if isinstance(label, str) else label
    if not isinstance(tests, list) or not tests or not all(isinstance(test, str) for test in tests):
        column = advice(f" ({run_option('data.label_key')})")
        raise DataError(f"reward code: a label should be test code or a list of it{column}, not {label!r}")
    return tests
