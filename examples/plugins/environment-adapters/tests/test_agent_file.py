"""Agent files of OpenRLHF against a policy that follows a script, and with a tiny policy in a run."""

from __future__ import annotations

from pathlib import Path

import pytest
from scripted import Script, play

from rlhf_core import Example, Outcome, UsageError
from rlhf_core.testing import check_environment
from rlhf_environment_adapters.agent_file import AgentFile

INSTANCE = """
from openrlhf.utils.agent import AgentExecutorBase, AgentInstanceBase, MultiTurnAgentExecutor
import torch

class AgentInstance(AgentInstanceBase):
    async def __init__(self, *args, **kwargs):
        self.step_idx = 0

    async def reset(self, states, **kwargs):
        return {"observation": states["observation"] + " Go."}

    async def step(self, states, **kwargs):
        done = states["label"] in states["action_text"] or self.step_idx == 2
        self.step_idx += 1
        return {
            "rewards": torch.tensor([1.0 if states["label"] in states["action_text"] else -0.5]),
            "scores": torch.tensor([float(done)]),
            "environment_feedback": "" if done else " No. ",
            "done": done,
            "sampling_params": states.get("sampling_params", None),
            "extra_logs": {"step": self.step_idx},
        }

class AgentExecutor(MultiTurnAgentExecutor):
    def __init__(self):
        super().__init__(AgentInstance)
"""

EXECUTOR = """
from openrlhf.utils.agent import AgentExecutorBase

class AgentExecutor(AgentExecutorBase):
    async def execute(self, prompt, label, sampling_params, max_length, hf_tokenizer, llm_engine):
        ids = hf_tokenizer(prompt)["input_ids"]
        first = (await llm_engine.generate(ids, sampling_params)).outputs[0]
        second = (await llm_engine.generate([*ids, *first.token_ids, "!"], sampling_params)).outputs[0]
        logprob = first.logprobs[0][first.token_ids[0]].logprob
        return {"reward": float(label in second.text), "scores": 1.0, "extra_logs": {"first": logprob}}
"""


def test_an_agent_instance_of_openrlhf_runs_unchanged(tmp_path: Path) -> None:
    (tmp_path / "agent_func.py").write_text(INSTANCE)
    environment = AgentFile(str(tmp_path / "agent_func.py"), log=("step",))
    environment.check()
    policy = Script("3", "2")
    assert play(environment, policy) == Outcome(0.0, [-0.5, 1.0], 1.0, {"step": 2.0})
    assert policy.read == ["Two? Go.", "Two? Go.3 No. "]


def test_the_steps_before_a_limit_are_rewarded(tmp_path: Path) -> None:
    """OpenRLHF adds up the rewards so far where no token is left, and keeps the last scores."""
    (tmp_path / "agent_func.py").write_text(INSTANCE)
    environment = AgentFile(str(tmp_path / "agent_func.py"), log=("step",))
    assert play(environment, Script("3", "4")) == Outcome(0.0, [-0.5, -0.5], 0.0, {"step": 2.0})


def test_an_executor_of_openrlhf_asks_the_engine_itself(tmp_path: Path) -> None:
    (tmp_path / "agent_func.py").write_text(EXECUTOR)
    policy = Script("3", "2")
    outcome = play(AgentFile(str(tmp_path / "agent_func.py"), log=("first",)), policy)
    assert outcome == Outcome(1.0, (), 1.0, {"first": -1.0})
    assert policy.read == ["Two?", "Two?3!"]


def test_an_agent_file_chooses_the_end_and_the_seed_of_a_turn(tmp_path: Path) -> None:
    lines = "sampling_params.max_tokens, sampling_params.stop, sampling_params.seed = 5, '!', 3"
    (tmp_path / "agent_func.py").write_text(EXECUTOR.replace("        first =", f"        {lines}\n        first ="))
    policy = Script("3", "2")
    play(AgentFile(str(tmp_path / "agent_func.py")), policy)
    assert policy.asked == [(5, ("!",), 3)] * 2
    change = "states['sampling_params'].max_tokens = 4 + self.step_idx\n        done ="
    (tmp_path / "agent_func.py").write_text(INSTANCE.replace("done =", change, 1))
    policy = Script("3", "3", "2")
    play(AgentFile(str(tmp_path / "agent_func.py")), policy)
    assert policy.asked == [(0, (), None), (4, (), None), (5, (), None)]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("sampling_params.temperature = 0.7", "sets temperature 0.7 .* trained with 1; .* --sampling.temperature 0.7$"),
        ("sampling_params.top_k = 5", "sets top_k 5 .* trained with 0; .* --sampling.top-k 5$"),
        (
            "sampling_params.min_tokens = 2",
            "sets min_tokens in its sampling_params, which is not supported; leave it out$",
        ),
        ("sampling_params = {'temperature': 1}", "passes a dict as sampling_params; let it change the object"),
        ("await llm_engine.generate(ids, sampling_params, priority=2)", "passes priority to llm_engine.generate"),
    ],
)
def test_an_agent_file_for_another_distribution_is_refused(tmp_path: Path, line: str, told: str) -> None:
    (tmp_path / "agent_func.py").write_text(EXECUTOR.replace("        first =", f"        {line}\n        first ="))
    policy = Script("3", "2")
    with pytest.raises(UsageError, match=told):
        play(AgentFile(str(tmp_path / "agent_func.py")), policy)
    assert not policy.read, "no turn is sampled"


def test_values_that_change_nothing_are_accepted_from_an_agent_file(tmp_path: Path) -> None:
    same = "sampling_params.top_k, sampling_params.temperature, sampling_params.min_p = -1, 1, None"
    (tmp_path / "agent_func.py").write_text(EXECUTOR.replace("        first =", f"        {same}\n        first ="))
    assert play(AgentFile(str(tmp_path / "agent_func.py")), Script("3", "2")).reward == 1.0


def test_a_file_without_an_agent_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "agent_func.py").write_text("x = 1")
    with pytest.raises(UsageError, match="defines neither AgentInstance nor an AgentExecutor"):
        AgentFile(str(tmp_path / "agent_func.py")).check()
    with pytest.raises(UsageError, match="is no Python file"):
        AgentFile(str(tmp_path / "missing.py")).check()


def test_a_tiny_policy_plays_an_agent_file(tmp_path: Path) -> None:
    (tmp_path / "agent_func.py").write_text(INSTANCE)
    played = check_environment(AgentFile(str(tmp_path / "agent_func.py"), log=("step",)), [Example("Two?", label="no")])
    assert played["turns_N"].tolist() == [3, 3, 3]
    assert played["environment_rewards_NT"].sum(1).tolist() == [-1.5] * 3
    assert played["segments_N"].tolist() == [1, 1, 1]
    assert not played["sampler_logprobs_NT"][~played.mask_NT].any()
