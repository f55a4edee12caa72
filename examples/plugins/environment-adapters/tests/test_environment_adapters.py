"""Each adapter against a transcript written by hand, with a policy that follows a script, and with a tiny policy in a run."""

from __future__ import annotations

import asyncio
import random
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from rlhf_core import Environment, EpisodeOver, Example, Feedback, Outcome, Reply, Sampling, UsageError
from rlhf_core.testing import check_environment, check_light
from rlhf_environment_adapters.agent_file import AgentFile
from rlhf_environment_adapters.openenv import OpenEnv
from rlhf_environment_adapters.reasoning_gym import ReasoningGym
from rlhf_environment_adapters.textarena import TextArena
from rlhf_environment_adapters.tools import Tools


class Letters:
    """An encoder whose ids are letters; messages stand as [role]content."""

    tokenizer = staticmethod(lambda text, **options: {"input_ids": list(text)})

    def prompt_row(self, example: Example) -> Any:
        prompt = example.prompt
        text = prompt if isinstance(prompt, str) else "".join(f"[{m['role']}]{m['content']}" for m in prompt)
        tools = len(example.meta.get("tools", ()))
        text = f"{tools} tools: {text}" if tools else text
        return SimpleNamespace(text=text, ids=list(text))

    def feedback(self, example: Example, feedback: Feedback, turn_ids: Sequence[int]) -> list[str]:
        return list(feedback.text or "".join(f"[{m['role']}]{m['content']}" for m in feedback.messages))


class Script:
    """A policy that writes its lines in turn and remembers what it read."""

    def __init__(self, *lines: str) -> None:
        self.encoder: Any = Letters()
        self.sampling = Sampling()
        self.lines = list(lines)
        self.read: list[str] = []
        self.asked: list[tuple[int, tuple[str, ...], int | None]] = []
        """options of each turn"""

    async def ask(
        self, token_ids: Any, max_tokens: int = 0, stop: Sequence[str] = (), seed: int | None = None
    ) -> Reply:
        self.asked.append((max_tokens, tuple(stop), seed))
        if not self.lines:
            raise EpisodeOver("turns", "no more turns")
        self.read.append("".join(token_ids))
        line = self.lines.pop(0)
        return Reply(line, tuple(line), tuple(-1.0 for _ in line), "stop", len(self.read) - 1)  # type: ignore[arg-type]


def play(environment: Environment, policy: Any, example: Example | None = None) -> Outcome:
    async def episode() -> Outcome:
        session: Any = environment(example or Example("Two?", label="2"), 7)
        try:
            return await session.drive(policy)
        finally:
            if asyncio.iscoroutine(closing := session.close()):
                await closing

    return asyncio.run(episode())


def test_the_package_is_light() -> None:
    check_light("rlhf_environment_adapters.plugin", "rlhf_environment_adapters.agent_file")


# ----------------------------------------------------------------------------------------------------------------------
# OpenRLHF's agent files
# ----------------------------------------------------------------------------------------------------------------------

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


# ----------------------------------------------------------------------------------------------------------------------
# tool classes
# ----------------------------------------------------------------------------------------------------------------------

SHOP = '''
class Shop:
    def reset(self, prompt, label, **row):
        self.asked = 0
        self.answer = label
        return " Think."

    def price(self, item: str) -> float:
        """Return the price of an item.

        Args:
            item: its name.
        """
        self.asked += 1
        return {"tea": 2.0}[item]

    def reward(self):
        return float(self.asked)
'''


def test_public_methods_are_tools(tmp_path: Path) -> None:
    (tmp_path / "shop.py").write_text(SHOP)
    environment = Tools(f"{tmp_path / 'shop.py'}:Shop")
    environment.check()
    call = '<tool_call>{"name": "price", "arguments": {"item": "%s"}}</tool_call>'
    policy = Script(call % "tea", call % "gold", "2.0")
    assert play(environment, policy) == Outcome(2.0, metrics={"calls": 2.0, "errors": 1.0})
    assert policy.read[0] == "1 tools: [user]Two? Think."
    assert policy.read[1] == policy.read[0] + call % "tea" + "[tool]2.0"
    assert policy.read[2] == policy.read[1] + call % "gold" + "[tool]KeyError: 'gold'"


def test_a_tool_without_a_description_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "shop.py").write_text("class Shop:\n    def price(self, item):\n        return 1\n")
    with pytest.raises(UsageError, match="a tool cannot be described"):
        Tools(f"{tmp_path / 'shop.py'}:Shop").check()
    with pytest.raises(UsageError, match="has no 'Store'"):
        Tools(f"{tmp_path / 'shop.py'}:Store").check()


# ----------------------------------------------------------------------------------------------------------------------
# libraries
# ----------------------------------------------------------------------------------------------------------------------


def test_reasoning_gym_verifies_and_asks_again() -> None:
    pytest.importorskip("reasoning_gym")
    environment = ReasoningGym("basic_arithmetic")
    environment.check()
    entry = environment.tasks(7)[0]
    policy = Script("no idea", entry["answer"])
    outcome = play(environment, policy)
    assert (outcome.reward, outcome.score, outcome.metrics) == (0.5, 1.0, {"tries": 2.0})
    assert policy.read[1] == f"[user]{entry['question']}no idea[user]That is not right. Try again."
    assert play(environment, Script(entry["answer"])).reward == 1.0
    assert check_environment(environment)["turns_N"].max() <= 3


def test_textarena_plays_to_the_end() -> None:
    pytest.importorskip("textarena")
    environment = TextArena("TowerOfHanoi-v0")
    environment.check()
    pegs = "A B C".split()
    moves: list[str] = []

    def move(disks: int, source: str, target: str, other: str) -> None:
        if disks:
            move(disks - 1, source, other, target)
            moves.append(f"[{source} {target}]")
            move(disks - 1, other, target, source)

    move(3, pegs[0], pegs[2], pegs[1])
    won, lost = Script(*moves), Script("[A C]")
    assert play(environment, won).reward == 1.0
    assert play(environment, lost).reward < 1.0
    assert len(won.read) == len(moves) == 7
    assert won.read[1].startswith(won.read[0] + "[A C][user]")
    assert won.read[-1].count("You are playing Tower of Hanoi") == 1
    assert won.read[-1].count("You moved disk") == 6


class Dice:
    """A game that draws numbers from Python's global generator, as those of TextArena do, and shows all of them each time."""

    def reset(self, num_players: int, seed: int) -> None:
        random.seed(seed)
        self.shown, self.rolls = "Roll.", list[float]()

    def step(self, action: str) -> tuple[bool, dict[str, Any]]:
        self.rolls.append(random.random())
        self.shown += f"({action})"
        return len(self.rolls) == 3, {}

    def get_observation(self) -> tuple[int, str]:
        return 0, self.shown

    def close(self) -> tuple[dict[int, float], dict[int, Any]]:
        return {0: sum(self.rolls)}, {}


class Slow(Script):
    """A script that lets other episodes run before each turn."""

    async def ask(self, token_ids: Any, max_tokens: int = 0, stop: Sequence[str] = ()) -> Reply:
        await asyncio.sleep(0)
        return await super().ask(token_ids, max_tokens, stop)


def test_games_side_by_side_draw_the_numbers_of_their_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each game's numbers are those of a generator of its own, and the generator of the process stays as it was."""
    arena = ModuleType("textarena")
    arena.make = lambda game: Dice()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "textarena", arena)
    policies = [Slow("a", "b", "c") for _ in range(2)]

    async def play_both() -> list[Outcome]:
        sessions: list[Any] = [TextArena()(Example("Play."), seed) for seed in (1, 2)]
        return await asyncio.gather(*(each.drive(policy) for each, policy in zip(sessions, policies, strict=True)))

    before = random.getstate()
    outcomes = asyncio.run(play_both())
    assert random.getstate() == before
    for seed, outcome in zip((1, 2), outcomes, strict=True):
        draw = random.Random(seed)
        assert outcome.reward == sum(draw.random() for _ in range(3))
    assert policies[0].read == ["[user]Roll.", "[user]Roll.a[user](a)", "[user]Roll.a[user](a)b[user](b)"]


CLIENT = """
from types import ModuleType, SimpleNamespace

class Client:
    def __init__(self, base_url):
        self.base_url, self.count = base_url, 0

    def reset(self, seed):
        return SimpleNamespace(observation={"text": f"Say it thrice ({seed})."}, reward=None, done=False)

    async def step(self, action):
        self.count += 1
        done = self.count == 3
        return SimpleNamespace(observation={"text": f"{action['say']} heard"}, reward=0.5, done=done)

    def close(self):
        pass

def to_action(text):
    return {"say": text}

def to_text(observation):
    return observation["text"]
"""


def test_a_client_of_openenv_is_stepped(tmp_path: Path) -> None:
    (tmp_path / "client.py").write_text(CLIENT)
    here = f"{tmp_path / 'client.py'}:"
    environment = OpenEnv("http://127.0.0.1:1", here + "to_action", here + "to_text", client=here + "Client")
    policy = Script("a", "b", "c")
    assert play(environment, policy) == Outcome(turn_rewards=[0.5, 0.5, 0.5])
    assert policy.read[2] == "[user]Say it thrice (7).a[user]a heardb[user]b heard"


@pytest.fixture
def thrice() -> Iterator[str]:
    """A server of OpenEnv on loopback, whose environment ends after three steps; yields its URL."""
    http_server = pytest.importorskip("openenv.core.env_server.http_server", reason="needs openenv")
    from openenv.core.env_server.interfaces import Environment as Served
    from openenv.core.env_server.types import Action, Observation, State
    from uvicorn import Config, Server

    class Say(Action):  # type: ignore[misc]  # openenv may be absent where types are checked
        message: str

    class Heard(Observation):  # type: ignore[misc]
        text: str

    class Thrice(Served):  # type: ignore[misc]
        SUPPORTS_CONCURRENT_SESSIONS = True
        count = 0

        def reset(self, seed: int | None = None, **more: Any) -> Heard:
            return Heard(text=f"Say it thrice ({seed}).")

        def step(self, action: Say, **more: Any) -> Heard:
            self.count += 1
            return Heard(text=f"{action.message} heard", reward=0.5, done=self.count == 3)

        @property
        def state(self) -> State:
            return State(step_count=self.count)

    app = http_server.create_fastapi_app(Thrice, Say, Heard, max_concurrent_envs=8)
    server = Server(Config(app, log_level="error"))
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        deadline = time.monotonic() + 120
        while not server.started and time.monotonic() < deadline:
            time.sleep(0.05)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        server.should_exit = True
        thread.join(30)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # those of its own dependencies
def test_a_server_of_openenv_is_stepped(thrice: str, tmp_path: Path) -> None:
    """The package itself on both sides: its server, and the client that the adapter uses where no other is named."""
    functions = "def to_action(text): return {'message': text}\ndef to_text(seen): return seen['text']\n"
    (tmp_path / "functions.py").write_text(functions)
    here = f"{tmp_path / 'functions.py'}:"
    environment = OpenEnv(thrice, here + "to_action", here + "to_text")
    environment.check()
    for _ in range(2):  # each session has an environment of its own
        policy = Script("a", "b", "c")
        assert play(environment, policy) == Outcome(turn_rewards=[0.5, 0.5, 0.5])
        assert policy.read[2] == "[user]Say it thrice (7).a[user]a heardb[user]b heard"


def test_a_package_that_is_missing_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "client.py").write_text(CLIENT)
    here = f"{tmp_path / 'client.py'}:"
    environment = OpenEnv("http://127.0.0.1:1", here + "to_action", here + "to_text", client="no_such_package:Client")
    with pytest.raises(
        UsageError, match=r"cannot import no_such_package.*install rlhf-environment-adapters\[openenv\]"
    ):
        environment.check()
