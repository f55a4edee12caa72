"""`--environment python_tool`: a Python interpreter between the turns of a policy, in the sandbox of `--reward code`.

A turn that ends with a fenced block of Python is run, and the policy reads what it printed:

    How many primes are below 100? │ ```python … ``` │ Output: 25 │ The answer is 25.
    prompt                           policy            interpreter  policy, compared with the label

Every block is a separate program: it sees no variable of the one before.
"""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlhf_core.contract.episode import Action, Feedback, Session
from rlhf_core.contract.providers import Environment
from rlhf_core.contract.ranges import at_least
from rlhf_core.errors import UsageError, option
from rlhf_core.reward.sandbox import confinement
from rlhf_core.reward.sandbox.server import SandboxServer

if TYPE_CHECKING:
    from rlhf_core.contract.batch import Example
    from rlhf_core.contract.engines import OpenContext

__all__ = ["PythonTool"]

BLOCK = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)```\s*\Z", re.DOTALL)
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


@dataclass(frozen=True)
class PythonTool(Environment):
    """Runs the Python that a turn ends with; any other turn is the answer, which is right if it ends with the label."""

    seconds: float = 5.0
    """time limit of a program, in seconds"""
    memory: int = 512
    """memory limit of a program, in MiB"""
    shown: int = 500
    """number of characters of the output that the policy reads"""
    call_reward: float = 0.0
    """reward of a turn whose program ends without an error, so that a policy learns to use the tool"""
    confine: bool = True
    """refuse to run if nothing isolates programs from files, network and other processes; set it to False only inside a
    container"""

    metrics = ("calls", "errors")
    stop = ("```\n",)

    def __post_init__(self) -> None:
        at_least(0.01, self, "seconds")
        at_least(1, self, "memory", "shown")

    def check(self) -> None:
        """Refuse a machine that cannot confine programs, before a model is loaded."""
        if sys.platform != "linux":
            raise UsageError("environment python_tool confines programs with the Linux kernel; run it on Linux")
        with SandboxServer() as server:
            self.run(server, "")

    def open(self, context: OpenContext) -> PythonToolEngine:
        """Start what starts the programs."""
        return PythonToolEngine(self)

    def __call__(self, example: Example, seed: int) -> Session:
        def run(program: str) -> tuple[str, bool] | None:
            with SandboxServer() as server:
                return self.run(server, program)

        return PythonSession(self, run, str(example.label))

    def run(self, server: SandboxServer, program: str) -> tuple[str, bool] | None:
        """Return what a program prints and True if it ends well; None if it does not end in time."""
        job = {
            "kind": "scripts",
            "program": program,
            "seconds": self.seconds,
            "memory": self.memory << 20,
            "layers": confinement.LAYERS,
        }
        answer: Any = server.ask(job, {"inputs": [""]})
        missing = set(answer["open"]) - {confinement.OPTIONAL}
        if self.confine and missing:
            raise UsageError(
                "environment python_tool: this machine cannot confine programs (not blocked: "
                f"{', '.join(sorted(missing))}); run it in a container, with {option('confine', False)}"
            )
        (result,) = answer["results"]
        return None if result is None else (str(result[0]), bool(result[1]))


class PythonToolEngine(Environment):
    """Runner of a run's programs.

    Args:
        options: of the environment.
    """

    metrics = PythonTool.metrics
    stop = PythonTool.stop

    def __init__(self, options: PythonTool) -> None:
        self.options = options
        self._server = SandboxServer().__enter__()

    def __call__(self, example: Example, seed: int) -> Session:
        return PythonSession(self.options, lambda program: self.options.run(self._server, program), str(example.label))

    def close(self) -> None:
        """End everything that was started."""
        self._server.__exit__()


@dataclass
class PythonSession(Session):
    """One exercise. It remembers nothing: a turn is a program or the answer."""

    options: PythonTool
    run: Callable[[str], tuple[str, bool] | None]
    label: str

    def respond(self, action: Action) -> Feedback | Awaitable[Feedback]:
        """Run a program, or end with the answer."""
        found = BLOCK.search(action.text)
        if found:
            return self._run(found[1])
        right = _is_right(action.text, self.label)
        return Feedback(reward=float(right), score=float(right), done=True)

    async def _run(self, program: str) -> Feedback:
        """Run a program concurrently with those of other episodes."""
        result = await asyncio.to_thread(self.run, program)
        if result is None:
            return Feedback("Output: no end in time\n", metrics={"calls": 1.0, "errors": 1.0})
        output, fine = result
        text = output.strip()[: self.options.shown] or ("nothing" if fine else "an error")
        metrics = {"calls": 1.0, "errors": float(not fine)}
        return Feedback(f"Output: {text}\n", reward=self.options.call_reward if fine else 0.0, metrics=metrics)


def _is_right(text: str, label: str) -> bool:
    """Return True if a text is the label, or its last number is."""
    numbers = NUMBER.findall(text.replace(",", ""))
    if NUMBER.fullmatch(label.strip()):
        return bool(numbers) and float(numbers[-1]) == float(label)
    return text.strip() == label.strip()
