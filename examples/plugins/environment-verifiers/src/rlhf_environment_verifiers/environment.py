"""`--environment verifiers --environment.taskset NAME`: tasks of a taskset of verifiers (v1), with its harness and rewards.

The harness of verifiers is an agent that speaks OpenAI's protocol. It gets the URL of the endpoint over the policy that is
trained, so that every token it asks for is recorded as it was sampled. Rewards and metrics are those of the task.
"""

from __future__ import annotations

import json
import os
import secrets
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

from rlhf_core import Environment, Example, Harness, OpenContext, Session, UsageError

__all__ = ["Verifiers"]


@dataclass(frozen=True)
class Verifiers(Environment):
    """A taskset of verifiers (v1)."""

    taskset: str
    """name of the module that exports the taskset (its id in verifiers)"""
    options: str = "{}"
    """options of the taskset as a JSON object, in verifiers' names"""
    harness: str = "rlhf_verifiers_direct"
    """name of the module that exports the harness (its id in verifiers): rlhf_verifiers_direct asks for one answer in this
    process; null and bash are verifiers' own, which start a process for each episode with uv"""
    tasks: int = 10000
    """maximum number of tasks that are taken from the taskset"""
    seconds: float = 600.0
    """time limit of an episode, in seconds"""
    request_sampling: Literal["refuse", "ignore"] = "refuse"
    """answer to a request of the harness with a sampling option that is not the run's, or with a field that the endpoint does
    not support: refuse returns an error, ignore samples with `--sampling` all the same"""
    log: tuple[str, ...] = ()
    """names of the task's rewards and metrics that are logged as reward/<name>"""

    drives = True

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the numbers that are logged."""
        return self.log

    def check(self) -> None:
        """Load the taskset and the harness.

        Raises:
            UsageError: one of them is missing, or an option is unknown.
        """
        Player(self)

    def open(self, context: OpenContext) -> Any:
        """Return an engine that plays the tasks."""
        return self.served().open(context)

    def __call__(self, example: Example, seed: int) -> Session:
        return self.served()(example, seed)

    def served(self) -> Harness:
        """Return the environment that serves the policy to the player of the tasks."""
        return Harness(
            agent=Player(self).play, seconds=self.seconds, request_sampling=self.request_sampling, log=self.log
        )


class Player:
    """The tasks, and the agent that plays them.

    Args:
        options: the environment's.
    """

    def __init__(self, options: Verifiers) -> None:
        self.options = options
        try:
            from verifiers.v1.utils import loaders
        except ImportError as error:
            raise UsageError(
                f"cannot import verifiers: {error}; install rlhf-environment-verifiers[verifiers]"
            ) from None
        try:
            found = json.loads(options.options)
            kind = loaders.taskset_class(options.taskset)
            config = loaders.taskset_config_type(options.taskset)(id=options.taskset, **found)
            self.harness = loaders.harness_config_type(options.harness)(id=options.harness)
        except (ImportError, ValueError, TypeError, AttributeError) as error:
            reason = " ".join(str(error).split())
            raise UsageError(f"taskset {options.taskset} with harness {options.harness}: {reason}") from None
        self.tasks = list(islice(kind(config), options.tasks))
        if not self.tasks:
            raise UsageError(f"taskset {options.taskset} has no tasks; choose another one, or other options")

    async def play(self, base_url: str, api_key: str, seed: int) -> dict[str, Any]:
        """Play the task that the seed chooses, which the completions of a prompt share."""
        import verifiers.v1 as vf

        variable = f"RLHF_VERIFIERS_{secrets.token_hex(8)}"  # verifiers reads a key from a variable alone
        os.environ[variable] = api_key
        try:
            client = vf.EvalClientConfig(base_url=base_url, api_key_var=variable)
            place = vf.SubprocessConfig()
            config = vf.AgentConfig(harness=self.harness, model="policy", client=client, runtime=place)
            trace = await vf.Agent(config).run(self.tasks[seed % len(self.tasks)])
        finally:
            del os.environ[variable]
        if trace.has_error:
            error = trace.last_error
            raise RuntimeError(
                f"verifiers: {error.type}: {error.message}" if error else "verifiers: the rollout failed"
            )
        rewards = {name: each.score for name, each in trace.rewards.items() if each is not None}
        numbers = {**trace.metrics, **rewards}
        return {
            "reward": trace.reward,
            "metrics": {name: numbers[name] for name in self.options.log if name in numbers},
        }
