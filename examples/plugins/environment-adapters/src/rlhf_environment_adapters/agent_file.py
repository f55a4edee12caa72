"""`--environment agent_file --environment.path agent_func.py`: an agent file of OpenRLHF, unchanged.

A file defines `AgentInstance` (`reset`, `step`), or an `AgentExecutor` whose `execute` asks the engine itself
(openrlhf/utils/agent.py, 0.11.2). Of what it returns, rewards, scores and extra_logs are read: ids and log-probabilities are
those that core recorded. Rewards of steps are added up; scores and extra_logs are the last step's. `sampling_params` are not
changed, because a policy is trained as it is sampled.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

from rlhf_core import Environment, Example, Feedback, Outcome, Policy, Session, UsageError
from rlhf_environment_adapters.dialogue import Dialogue, load_file

__all__ = ["AgentFile"]

BASES = ("AgentExecutorBase", "AgentInstanceBase", "MultiTurnAgentExecutor", "SingleTurnAgentExecutor")
"""Classes that agent files import from OpenRLHF; stand-ins where it is not installed."""


@dataclass(frozen=True)
class AgentFile(Environment):
    """An agent file of OpenRLHF (--agent-func-path)."""

    path: str
    """the file; it defines AgentInstance, or an AgentExecutor with its own execute"""
    log: tuple[str, ...] = ()
    """names among extra_logs that are logged as reward/<name>"""
    max_length: int = 0
    """value that an executor gets as max_length; 0 means a number that never limits"""

    drives = True

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of extra_logs."""
        return self.log

    def check(self) -> None:
        """Import the file. Raises `UsageError` if it defines no agent."""
        _agent_of(self.path)

    def __call__(self, example: Example, seed: int) -> Session:
        return AgentFileSession(self, example)


@dataclass
class AgentFileSession(Session):
    """One episode."""

    environment: AgentFile
    example: Example

    async def drive(self, policy: Policy) -> Outcome:
        """Run the file's agent."""
        agent = _agent_of(self.environment.path)
        dialogue = Dialogue(policy, self.example)
        if "execute" in vars(agent):
            result = await agent().execute(
                prompt=dialogue.text,
                label=self.example.label,
                sampling_params=SimpleNamespace(max_tokens=None),
                max_length=self.environment.max_length or sys.maxsize,
                hf_tokenizer=policy.encoder.tokenizer,
                llm_engine=_Engine(policy),
            )
            return self._outcome(_number(result["reward"]), result)
        return await self._play(await _made(agent), dialogue)

    async def _play(self, agent: Any, dialogue: Dialogue) -> Outcome:
        """Take turns with `reset` and `step`."""
        states = {"observation": dialogue.text, "label": self.example.label}
        observation = (await _awaited(agent.reset(states)))["observation"]
        if observation != dialogue.text:
            ids = dialogue.policy.encoder.tokenizer(observation, add_special_tokens=False)["input_ids"]
            dialogue.ids, dialogue.text = list(ids), observation
        rewards: list[float] = []
        while True:
            before = dialogue.text
            reply = await dialogue.turn()
            result = await _awaited(
                agent.step(
                    {
                        "observation_text": before,
                        "action_text": reply.text,
                        "label": self.example.label,
                        "sampling_params": None,
                    }
                )
            )
            rewards.append(_number(result["rewards"]))
            if result["done"]:
                return self._outcome(0.0, result, rewards)
            dialogue.tell(Feedback(text=str(result["environment_feedback"])))

    def _outcome(self, reward: float, result: Mapping[str, Any], rewards: Sequence[float] = ()) -> Outcome:
        """Return what the file's last answer says."""
        logs, score = result.get("extra_logs") or {}, result.get("scores")
        metrics = {name: _number(logs[name]) for name in self.environment.log if name in logs}
        return Outcome(reward, rewards, None if score is None else _number(score), metrics)


class _Engine:
    """Object that executors receive as `llm_engine`."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy

    async def generate(self, token_ids: Sequence[int], sampling_params: Any = None, **more: Any) -> Any:
        """Return one output in the form of vLLM's `RequestOutput`."""
        reply = await self.policy.ask(token_ids, max_tokens=getattr(sampling_params, "max_tokens", None) or 0)
        logprobs = [
            {number: SimpleNamespace(logprob=value)}
            for number, value in zip(reply.token_ids, reply.logprobs, strict=True)
        ]
        output = SimpleNamespace(
            token_ids=list(reply.token_ids), text=reply.text, finish_reason=reply.finish, logprobs=logprobs
        )
        return SimpleNamespace(outputs=[output], prompt_token_ids=list(token_ids))


def _agent_of(path: str) -> Any:
    """Return the file's executor, if it executes itself, or else its instance."""
    if importlib.util.find_spec("openrlhf") is None:
        _stand_in()
    names = vars(load_file(path, "agent_func"))
    executor = names.get("AgentExecutor")
    if executor is not None and "execute" in vars(executor):
        return executor
    if "AgentInstance" not in names:
        raise UsageError(f"{path} defines neither AgentInstance nor an AgentExecutor with execute")
    return names["AgentInstance"]


class _Base:
    """A base class of OpenRLHF, which takes whatever a file gives it."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass


def _stand_in() -> None:
    """Let agent files import their base classes without OpenRLHF."""
    bases = {name: type(name, (_Base,), {}) for name in BASES}
    for name in ("openrlhf", "openrlhf.utils", "openrlhf.utils.agent"):
        module = ModuleType(name)
        module.__spec__ = importlib.util.spec_from_loader(name, loader=None)
        sys.modules[name] = module
    vars(sys.modules["openrlhf.utils.agent"]).update(bases)


async def _made(agent: Any) -> Any:
    """Return an instance; OpenRLHF's template writes `async def __init__`, which Python itself cannot call."""
    if inspect.iscoroutinefunction(agent.__init__):
        instance = agent.__new__(agent)
        await agent.__init__(instance)
        return instance
    return agent()


async def _awaited(value: Any) -> Any:
    return await value if inspect.isawaitable(value) else value


def _number(value: Any) -> float:
    """Return a number, or the one in a tensor."""
    return float(value.float().mean()) if "torch" in type(value).__module__ else float(value)
