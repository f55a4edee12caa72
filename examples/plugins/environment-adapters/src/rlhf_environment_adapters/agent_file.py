"""`--environment agent_file --environment.path agent_func.py`: an agent file of OpenRLHF, unchanged.

A file defines `AgentInstance` (`reset`, `step`), or an `AgentExecutor` whose `execute` asks the engine itself
(openrlhf/utils/agent.py, 0.11.2). Of what it returns, rewards, scores and extra_logs are read: ids and log-probabilities are
those that core recorded. Rewards of steps are added up; scores and extra_logs are the last step's. An agent may change
max_tokens, stop and seed of its `sampling_params`. Any other change is refused: a policy is trained as it is sampled.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

from rlhf_core import Environment, EpisodeOver, Example, Feedback, Outcome, Policy, Session, UsageError
from rlhf_environment_adapters.dialogue import Dialogue, load_file

__all__ = ["AgentFile"]

BASES = ("AgentExecutorBase", "AgentInstanceBase", "MultiTurnAgentExecutor", "SingleTurnAgentExecutor")
"""Classes that agent files import from OpenRLHF; stand-ins where it is not installed."""

OWN = ("temperature", "top_p", "top_k", "min_p")
"""Sampling options that the run has, too."""

TURN = ("max_tokens", "stop", "seed")
"""Sampling options that an agent may choose for a turn."""


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
                sampling_params=_sampling_params(policy),
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
        result: Mapping[str, Any] = {}
        policy, params = dialogue.policy, _sampling_params(dialogue.policy)
        while True:
            before = dialogue.text
            try:
                reply = await dialogue.turn(**_turn_options(params, policy))
            except EpisodeOver:  # the steps before the limit count, as in OpenRLHF
                return self._outcome(0.0, result, rewards)
            result = await _awaited(
                agent.step(
                    {
                        "observation_text": before,
                        "action_text": reply.text,
                        "label": self.example.label,
                        "sampling_params": params,
                    }
                )
            )
            params = result.get("sampling_params") or params
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
        """Return one output in the form of vLLM's `RequestOutput`. Raises `UsageError` if it was asked for something else."""
        if given := [name for name, value in more.items() if value is not None]:
            raise UsageError(
                f"the agent passes {given[0]} to llm_engine.generate, which is not supported; leave it out"
            )
        reply = await self.policy.ask(token_ids, **_turn_options(sampling_params, self.policy))
        logprobs = [
            {number: SimpleNamespace(logprob=value)}
            for number, value in zip(reply.token_ids, reply.logprobs, strict=True)
        ]
        output = SimpleNamespace(
            token_ids=list(reply.token_ids), text=reply.text, finish_reason=reply.finish, logprobs=logprobs
        )
        return SimpleNamespace(outputs=[output], prompt_token_ids=list(token_ids))


def _sampling_params(policy: Policy) -> SimpleNamespace:
    """Return the object that an agent receives as `sampling_params`: with the run's values, and no limit of its own."""
    own = {name: getattr(policy.sampling, name) for name in OWN}
    return SimpleNamespace(**own, max_tokens=None, stop=None, seed=None)


def _turn_options(params: Any, policy: Policy) -> dict[str, Any]:
    """Return the options of a turn that an agent chose; none if it passes no `sampling_params`.

    Raises:
        UsageError: it asks for a distribution that the policy is not trained with.
    """
    if params is None:
        return {}
    if not isinstance(params, SimpleNamespace):
        raise UsageError(
            f"the agent passes a {type(params).__name__} as sampling_params; let it change the object that it receives"
        )
    chosen = {name: value for name, value in vars(params).items() if value is not None and name not in TURN}
    for name, value in chosen.items():
        if name not in OWN:
            raise UsageError(f"the agent sets {name} in its sampling_params, which is not supported; leave it out")
        own = getattr(policy.sampling, name)
        if value != own and (name, value, own) != ("top_k", -1, 0):  # vLLM's own word for no limit
            raise UsageError(
                f"the agent sets {name} {value!r} in its sampling_params, and the policy is trained with {own:g}; leave it "
                f"out, or pass --sampling.{name.replace('_', '-')} {value}"
            )
    stop = params.stop or ()
    return {
        "max_tokens": params.max_tokens or 0,
        "stop": (stop,) if isinstance(stop, str) else tuple(stop),
        "seed": params.seed,
    }


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
