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
from types import ModuleType
from typing import Any

import pytest
from scripted import Script, play

from rlhf_core import Example, Outcome, Reply, UsageError
from rlhf_core.testing import check_environment, check_light
from rlhf_environment_adapters.openenv import OpenEnv
from rlhf_environment_adapters.reasoning_gym import ReasoningGym
from rlhf_environment_adapters.textarena import TextArena
from rlhf_environment_adapters.tools import Tools


def test_the_package_is_light() -> None:
    check_light("rlhf_environment_adapters.plugin", "rlhf_environment_adapters.agent_file")


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


def test_the_reward_of_tools_counts_at_a_limit(tmp_path: Path) -> None:
    (tmp_path / "shop.py").write_text(SHOP)
    call = '<tool_call>{"name": "price", "arguments": {"item": "tea"}}</tool_call>'
    outcome = play(Tools(f"{tmp_path / 'shop.py'}:Shop"), Script(call))
    assert outcome == Outcome(1.0, metrics={"calls": 1.0, "errors": 0.0})


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

    async def ask(
        self, token_ids: Any, max_tokens: int = 0, stop: Sequence[str] = (), seed: int | None = None
    ) -> Reply:
        await asyncio.sleep(0)
        return await super().ask(token_ids, max_tokens, stop, seed)


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
