"""The example with a game of TextArena: what the policy reads, what moves earn, and a policy that learns from nothing."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from endpoint_agents import PLAIN, Echo, encoder, run_agent

from rlhf_core.cli import main
from rlhf_core.contract.options import Sampling

textarena = pytest.importorskip("textarena")

AGENT = f"{Path(__file__).parents[4] / 'examples' / 'agents' / 'lake.py'}:play"
STEPS = {"w": (-1, 0), "a": (0, -1), "d": (0, 1), "s": (1, 0)}


def board() -> dict[tuple[int, int], str]:
    """Return the fields of the lake that the prompt's seed makes, read from the board that the game prints."""
    game = textarena.make("FrozenLake-v0")
    game.reset(num_players=1, seed=Sampling(seed=5).seed_for(10, -1) % 2**32)
    lines = re.findall(r"^\|(.*)\|$", game.get_observation()[1], re.MULTILINE)
    assert len(lines) == 4
    return {(r, c): field.strip() or "." for r, line in enumerate(lines) for c, field in enumerate(line.split("|"))}


def shortest_way(fields: dict[tuple[int, int], str]) -> str:
    """Return the moves of a shortest way from P to G that avoids the holes."""
    start = next(place for place, field in fields.items() if field == "P")
    ways = {start: ""}
    queue = [start]
    for row, column in queue:
        for move, (down, right) in STEPS.items():
            place = row + down, column + right
            if fields.get(place, "H") != "H" and place not in ways:
                ways[place] = ways[row, column] + move
                queue.append(place)
    return next(ways[place] for place, field in fields.items() if field == "G")


def fields_around(fields: dict[tuple[int, int], str], place: tuple[int, int]) -> str:
    """Return the fields above, left, right and below, with the edge as #."""
    shown = [fields.get((place[0] + down, place[1] + right), "#") for down, right in STEPS.values()]
    return "".join("." if field == "P" else field for field in shown)


def test_the_lake_of_the_examples_is_crossed(tmp_path: Path) -> None:
    """Each turn reads the four fields of the printed board around the place that the moves lead to."""
    fields = board()
    way = shortest_way(fields)
    policy = Echo(list(way))
    rollouts = run_agent(policy, AGENT, encoder(PLAIN, tmp_path), log=("won", "moves"))
    text, place, expected = "", (0, 0), []
    for move in way:
        text += "\n" + fields_around(fields, place)
        expected.append(text)
        text, place = text + move, (place[0] + STEPS[move][0], place[1] + STEPS[move][1])
    assert [bytes(each for each in ids if each < 256).decode() for ids in policy.read] == expected
    assert rollouts["environment_rewards_NT"].sum().item() == 1.0
    assert rollouts["environment/won_N"].tolist() == [1.0]
    assert rollouts["environment/moves_N"].tolist() == [float(len(way))]


def test_a_lake_is_lost_by_two_invalid_moves_and_by_too_many(tmp_path: Path) -> None:
    """The first invalid move is forgiven; a player that walks to and fro reaches the limit, and neither earns anything."""
    fields = board()
    invalid = run_agent(Echo(["w", "?"]), AGENT, encoder(PLAIN, tmp_path), log=("won", "moves"))
    assert invalid["environment_rewards_NT"].sum().item() == 0.0
    assert invalid["environment/moves_N"].tolist() == [2.0]
    to_and_fro = "da" if fields[0, 1] != "H" else "sw"
    idle = run_agent(Echo(list(to_and_fro * 4)), AGENT, encoder(PLAIN, tmp_path), log=("won", "moves"))
    assert idle["environment_rewards_NT"].sum().item() == 0.0
    assert [idle[f"environment/{name}_N"].tolist() for name in ("won", "moves")] == [[0.0], [8.0]]


def test_a_run_trains_on_lakes(tmp_path: Path) -> None:
    """The command of the example, for two steps."""
    pytest.importorskip("rlhf_algos")
    words = ["grpo", "--model", "tiny:hidden=32,layers=1", "--environment", "harness", "--environment.agent", AGENT]
    words += ["--environment.log", "won", "moves", "--sampling.n", "4", "--sampling.max-new-tokens", "60"]
    words += ["--batch-size", "2", "--steps", "2", "--output", str(tmp_path / "lakes")]
    assert main(words) == 0
    steps: list[Any] = [json.loads(line) for line in (tmp_path / "lakes" / "metrics.jsonl").read_text().splitlines()]
    moves = [step["reward/moves"] for step in steps if "reward/moves" in step]
    assert len(moves) == 2
    assert all(2.0 <= each <= 8.0 for each in moves)


def cross(holes: set[tuple[int, int]], moves: Callable[[set[tuple[int, int]], tuple[int, int], int], str]) -> bool:
    """Return True if the player reaches the corner (3, 3) in six moves, without a hole or the edge."""
    place = 0, 0
    for number in range(6):
        step = STEPS[moves(holes, place, number)]
        place = place[0] + step[0], place[1] + step[1]
        if place in holes or max(place) > 3:
            return False
    return place == (3, 3)


def test_the_page_names_the_shares_that_simple_players_win() -> None:
    """All lakes with a way are equally likely, because the game draws again where there is none."""
    inner = [(r, c) for r in range(4) for c in range(4) if (r, c) not in ((0, 0), (3, 3))]
    lakes = [set(holes) for holes in itertools.combinations(inner, 3) if has_a_way(set(holes))]

    def look_right_first(holes: set[tuple[int, int]], place: tuple[int, int], number: int) -> str:
        right = place[0], place[1] + 1
        return "s" if right in holes or right[1] > 3 else "d"

    blind = max(
        sum(cross(holes, lambda holes, place, number, way=way: way[number]) for holes in lakes)
        for way in set(itertools.permutations("sssddd"))
    )
    seeing = sum(cross(holes, look_right_first) for holes in lakes)
    page = (Path(__file__).parents[4] / "docs" / "agents.md").read_text()
    assert len(lakes) == 334
    assert f"wins {blind / len(lakes):.0%} of the lakes" in page
    assert f"wins {seeing / len(lakes):.0%}." in page


def has_a_way(holes: set[tuple[int, int]]) -> bool:
    """Return True if a way leads around the holes."""
    fields = {(r, c): "H" if (r, c) in holes else "." for r in range(4) for c in range(4)}
    try:
        return bool(shortest_way(fields | {(0, 0): "P", (3, 3): "G"}))
    except KeyError:
        return False
